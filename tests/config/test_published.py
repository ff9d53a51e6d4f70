"""The published models to the last parameter: the configuration alone, and the module tree built without memory.

Totals count every tensor of the state dict, the router's selection bias included. Sources: checkpoint metadata of LongCat-Flash,
-Lite and 2.0 (their totals, prediction module included), published activated ranges, the configuration of DeepSeek-V3.2.
"""

import functools
import time

import pytest
import torch

import longcat_lab as lab
from longcat_lab.budget import activated, totals
from longcat_lab.config import load, presets

# A DeepSeek-V3.2 layer by its configuration: hidden 7168, 128 heads, query latent 1536, key-value latent 512.
DEEPSEEK_MLA = 7168 * 1536 + 1536 + 1536 * 128 * 192 + 7168 * (512 + 64) + 512 + 512 * 128 * 256 + 128 * 128 * 7168
DEEPSEEK_EXPERT = 3 * 7168 * 2048
DEEPSEEK_MIXTURE = (256 + 1) * DEEPSEEK_EXPERT + 256 * 7168  # and 256 elements of selection bias
DEEPSEEK_ENDS = 2 * 129280 * 7168 + 7168  # embedding, head, final norm
DEEPSEEK_DENSE = 61 * (DEEPSEEK_MLA + 2 * 7168) + 3 * 3 * 7168 * 18432 + 58 * DEEPSEEK_MIXTURE + DEEPSEEK_ENDS
DEEPSEEK_INDEXER = 1536 * 64 * 128 + 7168 * 128 + 7168 * 64 + 2 * 128  # the last: gain and bias of its LayerNorm
DEEPSEEK_MTP = 2 * 7168**2 + 3 * 7168 + DEEPSEEK_MLA + 2 * 7168 + DEEPSEEK_MIXTURE + 256 + DEEPSEEK_INDEXER
LITE_INDEXER = 1536 * 16 * 128 + 3072 * 128 + 3072 * 16 + 128

# name: (total without prediction module, total)
TOTALS = {
    "longcat-2.0": (1_638_616_807_424, 1_775_560_491_136),
    "longcat-flash": (560_664_980_480, 561_862_880_256),
    "longcat-flash-lite": (68_562_465_024, 69_073_335_552),
    # Its total is published as "69 B" only: Lite's, 14 indexers in the trunk, one in the prediction module.
    "longcat-flash-lite-sparse": (68_562_465_024 + 14 * LITE_INDEXER, 69_073_335_552 + 15 * LITE_INDEXER),
    "deepseek-v3.2": (
        DEEPSEEK_DENSE + 58 * 256 + 61 * DEEPSEEK_INDEXER,
        DEEPSEEK_DENSE + 58 * 256 + 61 * DEEPSEEK_INDEXER + DEEPSEEK_MTP,
    ),
}
# name: smallest, at eight real experts, largest
ACTIVATED = {
    "longcat-2.0": (33_349_834_752, 48_650_655_744, 56_301_066_240),
    "longcat-flash": (18_693_794_816, 27_149_511_680, 31_377_370_112),
    "longcat-flash-lite": (2_920_521_984, 3_977_486_592, 4_505_968_896),
}
# name: indexers in the trunk, elements of one
INDEXERS = {
    "longcat-2.0": (38, 7_602_304),
    "longcat-flash": (0, 0),
    "longcat-flash-lite": (0, 0),
    "longcat-flash-lite-sparse": (14, 3_588_224),
    "deepseek-v3.2": (61, 13_959_424),
}


@functools.cache
def state(name):
    with torch.device("meta"):
        return lab.build(load(name)).state_dict()


def elements(name, part=lambda key: True):
    return sum(tensor.numel() for key, tensor in state(name).items() if part(key))


def test_they_are_presets():
    assert set(TOTALS) <= set(presets())


@pytest.mark.parametrize("name", TOTALS)
def test_the_built_model_has_the_published_number_of_parameters(name):
    trunk, total = TOTALS[name]
    assert (elements(name, lambda key: not key.startswith("mtp.")), elements(name)) == (trunk, total)


@pytest.mark.parametrize("name", TOTALS)
def test_the_configuration_alone_says_the_same(name):
    table = lab.budget(load(name))
    assert (table.loc["total without mtp", "params"], table.loc["total", "params"]) == TOTALS[name]


def test_deepseeks_trunk_is_the_commonly_given_number():
    """671 026 419 200 counts the selection biases of 58 mixtures, and was given for the same layers without indexers (V3)."""
    assert DEEPSEEK_DENSE == 671_026_404_352 and DEEPSEEK_DENSE + 58 * 256 == 671_026_419_200
    dense = load("deepseek-v3.2", "model.attention.kind=mla")
    assert totals(dense)["total_params_without_mtp"] == 671_026_419_200
    assert elements("deepseek-v3.2", lambda key: not key.startswith("mtp.") and ".indexer." not in key) == 671_026_419_200
    assert elements("deepseek-v3.2", lambda key: key.startswith("layers.") and key.endswith("e_score_correction_bias")) == 14_848


@pytest.mark.parametrize("name", ACTIVATED)
def test_activated_parameters_are_the_published_ranges(name):
    table = activated(load(name))["activated params"]
    smallest, eight, largest = ACTIVATED[name]
    assert (table.loc[0], table.loc[8], table.loc[12]) == (smallest, eight, largest)
    assert (table.min(), table.max()) == (smallest, largest)


def test_lite_sparse_activates_its_indexers_too():
    sparse, dense = (activated(load(name))["activated params"] for name in ("longcat-flash-lite-sparse", "longcat-flash-lite"))
    assert set(sparse - dense) == {14 * LITE_INDEXER}


@pytest.mark.parametrize("name", INDEXERS)
def test_indexers_are_where_and_as_large_as_published(name):
    count, size = INDEXERS[name]
    owners = {key.split(".indexer.")[0] for key in state(name) if ".indexer." in key and not key.startswith("mtp.")}
    assert len(owners) == count
    assert elements(name, lambda key: key.startswith("layers.") and ".indexer." in key) == count * size
    if "longcat" in name:
        assert all(owner.endswith("self_attn.0") for owner in owners)  # self_attn.1 reuses
    assert elements(name, lambda key: key.startswith("mtp.") and ".indexer." in key) == size  # the prediction block has its own


def test_longcat_2_has_one_prediction_block_and_an_idle_copy_of_the_tables():
    assert elements("longcat-2.0", lambda key: key.startswith("mtp.")) == 136_943_683_712
    blocks = {key.split(".")[2] for key in state("longcat-2.0") if key.startswith("mtp.layers.")}
    assert blocks == {"0"} and load("longcat-2.0").model.mtp.num_nextn_predict_layers == 3


@pytest.mark.parametrize("name", TOTALS)
def test_a_budget_takes_well_under_a_second(name):
    config = load(name)
    lab.budget(config)  # pandas is imported here
    start = time.perf_counter()
    lab.budget(config, context_length=131_072)
    assert time.perf_counter() - start < 1


def attention_flops(name, length):
    """Core, and index scores, of all trunk attentions at a context of `length` tokens, a token: by the equations."""
    c, layers = load(name).model.attention, load(name).model.num_layers
    attentions = layers * (1 if "deepseek" in name else 2)
    sparse = hasattr(c, "index_topk")
    keys = sum(min(t, c.index_topk) for t in range(1, length + 1)) / length if sparse else (length + 1) / 2
    absorbed = sparse and length > c.index_topk  # one key [512 ; 64] and one value [512] for all heads
    core = attentions * 2 * c.num_attention_heads * (576 + 512 if absorbed else 128 + 64 + 128) * keys
    scores = INDEXERS[name][0] * (2 * c.index_n_heads * 128 + 2 * c.index_n_heads) * (length + 1) / 2 if sparse else 0
    return core, scores


@pytest.mark.parametrize("name", TOTALS)
def test_flops_at_a_long_context_are_weights_core_and_scores(name):
    config = load(name)
    core, scores = attention_flops(name, 131_072)
    table = lab.budget(config, context_length=131_072)
    # Two a weight that is multiplied, which norms, router biases and (in the trunk's rows) prediction steps are not.
    short = lab.budget(config, context_length=1)
    before = attention_flops(name, 1)[0]
    indexers = 2 * INDEXERS[name][0] * (INDEXERS[name][1] - (256 if "deepseek" in name else 128))  # they do not run on one token
    expected = short.loc["layers", "FLOPs/token"] - before + core + scores + indexers
    assert table.loc["layers", "FLOPs/token"] == pytest.approx(expected, rel=1e-9)


def test_sparse_attention_is_cheaper_where_the_context_is_long():
    def flops(name, length):
        return totals(load(name), length)["flops_per_token_without_mtp"]

    assert flops("longcat-flash-lite-sparse", 2048) == flops("longcat-flash-lite", 2048)  # everything is selected
    assert flops("longcat-flash-lite-sparse", 131_072) < flops("longcat-flash-lite", 131_072) / 2.5
    # Twice the keys cost dense attention twice, the sparse core nothing, and its indexer a little.
    assert attention_flops("longcat-2.0", 262_144)[0] / attention_flops("longcat-2.0", 131_072)[0] < 1.01


def test_decoding_state_is_576_values_an_attention_and_128_an_indexer():
    for name, attentions in (("longcat-2.0", 76), ("longcat-flash", 56), ("longcat-flash-lite-sparse", 28), ("deepseek-v3.2", 61)):
        table = lab.budget(load(name))
        assert table.loc["layers", "bytes/token"] == 2 * (576 * attentions + 128 * INDEXERS[name][0])
