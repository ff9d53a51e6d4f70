"""N-gram embedding: fusion, scale at the start, layers that it enters at, boundaries, decoding, and what it refuses."""

import pytest
import torch
from torch.autograd import gradcheck

from longcat_lab.blocks import Cache, NgramEmbeddingConfig
from longcat_lab.blocks.ngram_embedding.op import fuse, fuse_reference
from longcat_lab.config import ConfigError, load
from longcat_lab.errors import LabError
from longcat_lab.model import build

NODE = "model.embedding.ngram"


def tiny(*overrides, seed=0):
    return build(load("tiny", f"{NODE}.order=3", *overrides), seed=seed)


def embedding(*overrides):
    return tiny(*overrides).embed_tokens.eval()


def test_one_product_is_the_sum_over_branches():
    token, rows, projection = (torch.randn(*s, dtype=torch.float64) for s in ((2, 5, 6), (2, 5, 3, 4), (6, 12)))
    for scales in ((0.25, 0.25), (1.0, 1.0), (0.3, 1.7)):
        torch.testing.assert_close(fuse(token, rows, projection, *scales), fuse_reference(token, rows, projection, *scales))


def test_fusion_gradient():
    leaves = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((1, 3, 4), (1, 3, 2, 2), (4, 4))]
    assert gradcheck(lambda t, r, w: fuse(t, r, w, 0.4, 1.7), leaves)


FUSIONS = {
    "mean": (("fusion=mean",), 1 / 5, 1 / 5, 1.0),
    "concat": (("fusion=concat",), 1.0, 1.0, 1.0),
    "sum": (("fusion=sum", "base_scale=0.5", "ngram_scale=2.0"), 0.5, 2.0, 1.0),
    "a kind of its own": (("kind=ngram_sum", "base_scale=0.5"), 0.5, 1.0, 1.0),
    "amplified": (("kind=ngram_amplified",), 1 / 5, 1 / 5, 32**0.5),
}


@pytest.mark.parametrize("case", FUSIONS)
def test_module_is_the_equation(case):
    """Written out branch by branch: c (a E_0[t] + b sum_i W_i E_i[H_i])."""
    settings, a, b, c = FUSIONS[case]
    module, tokens = embedding(f"{NODE}.normalised_init=none", *(f"{NODE}.{each}" for each in settings)), torch.randint(0, 512, (1, 9))
    rows, width = module.tables.addresses(tokens), module.width
    total = a * module.weight[tokens]
    for i in range(rows.shape[-1]):
        total = total + b * module.tables.weight[rows[..., i]] @ module.projection.weight[:, i * width : (i + 1) * width].T
    torch.testing.assert_close(module(tokens), c * total, rtol=1e-5, atol=1e-6)


def test_layer_norm_amplifier_is_torchs():
    module, tokens = embedding(f"{NODE}.amplifier=layer_norm"), torch.randint(0, 512, (1, 9))
    out = module(tokens)
    assert module.norm.weight.shape == (32,) and module.norm.bias is None
    torch.testing.assert_close(out.mean(-1), torch.zeros(1, 9), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.var(-1, unbiased=False), torch.ones(1, 9), atol=0.02, rtol=0)


@pytest.mark.parametrize("way", ["scale", "rows"])
@pytest.mark.parametrize("fusion", ["mean", "concat", "sum"])
@pytest.mark.parametrize("table", [1.0, 0.0, 0.3])
def test_normalised_init_starts_with_the_plain_embeddings_rms_whatever_the_fusion(way, fusion, table):
    tokens = torch.randint(0, 512, (16, 64))
    wide = ("model.hidden_size=128", f"{NODE}.base_scale=0.7", f"{NODE}.ngram_scale=1.9", f"{NODE}.normalised_init={way}")
    plain = build(load("tiny", "model.hidden_size=128")).embed_tokens(tokens).square().mean().sqrt()
    for amplifier, ratio in (("none", 1.0), ("sqrt_hidden", 1.0 if way == "rows" else 128**0.5)):
        ngram = tiny(*wide, f"{NODE}.fusion={fusion}", f"{NODE}.amplifier={amplifier}", f"{NODE}.table_init_ratio={table}").embed_tokens
        assert float((ngram(tokens).square().mean().sqrt() / plain).detach()) == pytest.approx(ratio, rel=0.05)


@pytest.mark.parametrize(
    ("table", "amplifier", "ratio"), [(1.0, "none", 5**-0.5), (0.0, "none", 1 / 5), (1.0, "sqrt_hidden", (128 / 5) ** 0.5)]
)
def test_without_normalised_init_the_mean_shrinks_and_the_amplifier_grows_the_output(table, amplifier, ratio):
    tokens = torch.randint(0, 512, (16, 64))
    plain = build(load("tiny", "model.hidden_size=128")).embed_tokens(tokens).square().mean().sqrt()
    settings = ("normalised_init=none", f"table_init_ratio={table}", f"amplifier={amplifier}")
    ngram = tiny("model.hidden_size=128", *(f"{NODE}.{each}" for each in settings)).embed_tokens
    assert float((ngram(tokens).square().mean().sqrt() / plain).detach()) == pytest.approx(ratio, rel=0.05)


def test_the_tokens_share_of_the_variance_is_reported():
    """E + 1 branches of equal variance: the token has 1 / (E + 1) of it."""
    module = tiny("model.hidden_size=128").embed_tokens.train()
    module(torch.randint(0, 512, (4, 64)))
    assert module.statistics()["base_variance_share"] == pytest.approx(1 / 5, rel=0.1)


def test_token_rows_start_equal_with_and_without_tables():
    plain, ngram, rows = build(load("tiny"), seed=7), tiny(seed=7), tiny(f"{NODE}.normalised_init=rows", seed=7)
    shared = set(plain.state_dict()) & set(ngram.state_dict())
    assert shared == set(plain.state_dict())
    assert all(torch.equal(plain.state_dict()[name], ngram.state_dict()[name]) for name in shared)
    torch.testing.assert_close(rows.embed_tokens.weight, plain.embed_tokens.weight * 5**0.5, rtol=1e-6, atol=0)


def test_entering_at_layers_adds_the_rows_by_a_projection_of_each_layer():
    model = tiny("model.num_layers=3", f"{NODE}.injection_layers=[0, 2]", f"{NODE}.fusion=sum", f"{NODE}.ngram_scale=0.3").eval()
    module, tokens = model.embed_tokens, torch.randint(0, 512, (1, 12))
    added = {}

    def keep(point):
        def hook(layer, arguments):
            added[point] = arguments[0]

        return hook

    def left(layer, arguments, out):
        added["out"] = out

    model.layers[2].register_forward_pre_hook(keep(2)), model.layers[1].register_forward_hook(left)
    model.hidden(tokens)
    read = module.tables.weight[module.tables.addresses(tokens)].flatten(-2)
    torch.testing.assert_close(added[2] - added["out"], 0.3 * read @ module.layer_projections["2"].weight.T, rtol=1e-4, atol=1e-6)
    assert list(module.layer_projections) == ["2"]


def test_rows_that_enter_at_layers_alone_start_as_the_plain_ones_do():
    for way in ("scale", "rows", "none"):
        model = tiny("model.num_layers=2", f"{NODE}.injection_layers=[1]", f"{NODE}.normalised_init={way}")
        assert float(model.embed_tokens.weight.square().mean().sqrt().detach()) == pytest.approx(0.05, rel=0.02)


def test_layer_norm_has_no_floor_that_a_quiet_start_would_feel():
    """16 branches of rows of 0.006: a mean square of 2e-6, below torch's usual eps."""
    module = tiny(f"{NODE}.amplifier=layer_norm", f"{NODE}.normalised_init=none", "model.initializer_range=0.006").embed_tokens
    assert float(module(torch.randint(0, 512, (4, 64))).square().mean().detach()) == pytest.approx(1, rel=1e-3)


def test_layers_alone_leave_the_input_embedding_plain():
    model, tokens = tiny("model.num_layers=2", f"{NODE}.injection_layers=[1]").eval(), torch.randint(0, 512, (1, 12))
    assert model.embed_tokens.projection is None
    assert torch.equal(model.embed_tokens(tokens), model.embed_tokens.weight[tokens])
    out = model.hidden(tokens)
    with torch.no_grad():
        model.embed_tokens.tables.weight.zero_()
    assert not torch.equal(model.hidden(tokens), out)


def test_a_width_of_ones_own_need_not_divide_the_hidden_size():
    """LongCat's rule needs E to divide the width; a floor (12 tables of 42 at 512) is a setting here."""
    config = load("tiny", f"{NODE}.order=4", f"{NODE}.table_width=5")
    module, shape = build(config).embed_tokens, config.model.shape()
    assert module.tables.weight.shape[1] == 5 and module.projection.weight.shape == (32, 30)
    assert config.model.embedding.ngram.budget(shape).params == module.tables.weight.numel() + 32 * 30
    assert config.model.embedding.ngram.budget(shape).flops_per_token == 2 * 32 * 30


WAYS = {
    "v1": (),
    "none": (f"{NODE}.boundary=none",),
    "eos": (f"{NODE}.boundary=eos", f"{NODE}.eos_token_id=7"),
    "eos alone, reserved": (f"{NODE}.boundary=eos", f"{NODE}.eos_token_id=7", f"{NODE}.eos_looks_back=false", f"{NODE}.pad=reserved"),
    "eos pads": (f"{NODE}.pad=eos", f"{NODE}.eos_token_id=7"),
    "xor at layers": (f"{NODE}.hash=multiplicative_xor", f"{NODE}.injection_layers=[0, 1]"),
    "permuted, layer norm": (f"{NODE}.hash=permuted", f"{NODE}.amplifier=layer_norm"),
}


@pytest.mark.parametrize("way", WAYS)
def test_decoding_with_a_cache_of_predecessors_is_the_whole_pass(way):
    model = tiny("model.num_layers=2", "model.initializer_range=0.2", *WAYS[way]).double().eval()
    tokens = torch.randint(0, 12, (1, 30))  # token 7 comes up
    with torch.no_grad():
        whole = model.hidden(tokens)
        for sizes in ([1] * 30, [11, 1, 1, 17], [2] * 15):
            cache = Cache()
            pieces = [model.hidden(piece, cache=cache) for piece in tokens.split(sizes, 1)]
            torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-9, atol=1e-9)


def test_predecessors_older_than_the_order_are_not_read():
    """n - 1 tokens of history are all that decoding must keep."""
    module, tokens = embedding(), torch.randint(0, 512, (2, 20))
    whole = module(tokens)
    for i in range(3, 20):
        assert torch.equal(module(tokens[:, i : i + 1], history=tokens[:, i - 2 : i]), whole[:, i : i + 1])
        assert torch.equal(module(tokens[:, i : i + 1], history=tokens[:, :i]), whole[:, i : i + 1])


def test_packed_documents_equal_separate_documents():
    module, tokens = embedding(), torch.randint(0, 512, (1, 12))
    packed = module(tokens, torch.tensor([[0] * 5 + [1] * 7]))
    apart = torch.cat((module(tokens[:, :5]), module(tokens[:, 5:])), 1)
    torch.testing.assert_close(packed, apart, rtol=0, atol=0)


def test_only_rows_that_were_read_count_as_touched():
    module = embedding().train()
    tokens = torch.randint(0, 512, (2, 16))
    module(tokens)
    read = sorted(set(module.tables.addresses(tokens).flatten().tolist()))
    assert module.tables.touched.nonzero().flatten().tolist() == read
    measured = module.tables.statistics()
    assert measured["rows_in_step"] == len(read) and measured["rows_touched"] == pytest.approx(len(read) / len(module.tables.weight))
    assert measured["table_rms"] == pytest.approx(float(module.tables.weight[read].detach().square().mean().sqrt()))


def test_sparse_gradients_are_the_dense_ones():
    tokens, out = torch.randint(0, 512, (2, 16)), torch.randn(2, 16, 32)
    found = []
    for sparse in (False, True):
        module = tiny("model.num_layers=2", f"{NODE}.injection_layers=[0, 1]").embed_tokens.train()
        module.tables.sparse_gradients = sparse
        for part in (0, 1):  # gradients of two parts of a batch add up
            (module(tokens[part : part + 1]) * out[part]).sum().backward()
        assert module.tables.weight.grad.is_sparse == sparse
        found.append(module.tables.weight.grad.to_dense())
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-7)


BAD = {
    r"6 tables \(\(order - 1\) \* splits\) do not divide hidden_size 32: .* table_width": ("order=4",),
    r"vocab_ratio: 0\.001 of vocab_size 512 gives tables without rows: .* table_rows": ("vocab_ratio=0.001",),
    r"eos_token_id is empty, but boundary or pad is eos": ("boundary=eos",),
    r"eos_token_id: 512 is no token of vocab_size 512": ("pad=eos", "eos_token_id=512"),
    r"multipliers: \[3, 4, 5\] are not 3 \(order\) odd numbers": ("hash=multiplicative_xor", "multipliers=[3, 4, 5]"),
    r"the hash would leave 64 bits: make the tables": ("table_rows=9000000000000000000",),
    r"injection_layers: \[0, 1\] is not a rising list of numbers from 0 to 0": ("injection_layers=[0, 1]",),
    r"amplifier: sqrt_hidden is of the input embedding, which injection_layers \[1\] leaves plain": (
        "amplifier=sqrt_hidden",
        "injection_layers=[1]",
    ),
    r"multipliers are for hash multiplicative_xor, and hash is polynomial": ("multipliers=[3, 5, 7]",),
    r"base_scale 0 and table_init_ratio 0 make an embedding of zeros": ("fusion=sum", "base_scale=0.0", "table_init_ratio=0.0"),
    r"there is no ngram kind 'ngram_embeding', did you mean 'ngram_embedding'": ("kind=ngram_embeding",),
}


@pytest.mark.parametrize("sentence", BAD)
def test_impossible_settings_are_one_sentence(sentence):
    with pytest.raises(ConfigError, match=sentence) as error:
        load("tiny", *(f"{NODE}.{each}" for each in BAD[sentence]), *(("model.num_layers=2",) if "leaves plain" in sentence else ()))
    assert "\n" not in str(error.value) and NODE in str(error.value)


@pytest.mark.parametrize("bad", [512, -1])
@pytest.mark.parametrize("overrides", [(), (f"{NODE}.order=3",), (f"{NODE}.kind=hash_sum", f"{NODE}.hash=permuted")])
def test_a_token_outside_the_vocabulary_is_named(bad, overrides):
    model, tokens = build(load("tiny", *overrides)), torch.zeros(1, 4, dtype=torch.int64)
    tokens[0, 2] = bad
    for call in (model, model.hidden, model.embed_tokens):
        with pytest.raises(LabError, match=rf"Token id {bad} is outside the vocabulary of 512 \(model.vocab_size\)"):
            call(tokens)


def test_published_tables_to_the_last_parameter():
    from dataclasses import replace

    shape = load("tiny").model.shape()
    for settings, hidden, vocab, tables in (
        ({"order": 4, "splits": 4, "vocab_ratio": 78.0}, 3072, 131072, 31_406_985_216),
        ({"order": 5, "splits": 4, "vocab_ratio": 100.567}, 8192, 163840, 134_978_871_296),
        ({"order": 5, "splits": 4, "vocab_ratio": 59.604}, 4096, 163840, 40_000_000_000),
    ):
        place = replace(shape, hidden_size=hidden, vocab_size=vocab)
        found = NgramEmbeddingConfig(**settings).budget(place)
        assert found.params - hidden**2 == pytest.approx(tables, rel=2e-5)
        assert found.active_params == hidden**2 and found.flops_per_token == 2 * hidden**2
