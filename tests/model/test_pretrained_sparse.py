"""Checkpoints of sparse models: DeepSeek-V3.2's, LongCat-2.0's and Flash-Lite-Sparse's keys, names and sizes (no oracle for LongCat's)."""

import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import longcat_lab as lab
from longcat_lab.config.model import ModelConfig
from longcat_lab.model.lm import LongcatLM
from longcat_lab.model.pretrained.config import model_config
from longcat_lab.model.pretrained.describe import config_json
from longcat_lab.model.pretrained.keys import Keys
from longcat_lab.model.pretrained.names import layout

MLA = {"num_attention_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 12}
LSA = MLA | {"kind": "lsa", "index_n_heads": 4, "index_head_dim": 16, "index_topk": 8, "index_init_tokens": 2, "index_local_tokens": 3}
UNSCALED = {"mla_scale_q_lora": False, "mla_scale_kv_lora": False}
DSA = MLA | UNSCALED | {"kind": "dsa", "index_n_heads": 4, "index_head_dim": 16, "index_topk": 8}
MOE = {"n_routed_experts": 6, "zero_expert_num": 2, "moe_topk": 3, "expert_ffn_hidden_size": 32}
SIGMOID = MOE | {"zero_expert_num": 0, "scoring_func": "sigmoid"}
BASE = {"hidden_size": 64, "num_layers": 2, "vocab_size": 300, "max_position_embeddings": 64, "ffn": {"ffn_hidden_size": 96}}
NGRAM = {"kind": "token", "ngram": {"order": 3, "splits": 2, "vocab_ratio": 7.3, "normalised_init": "none"}}
TABLES = {"num_nextn_predict_layers": 3, "own_embedding": True, "own_ngram_tables": True}
LONGCAT_2 = {"attention": LSA, "moe": MOE, "embedding": NGRAM, "mtp": TABLES}
DEEPSEEK = {"attention": DSA, "moe": SIGMOID, "layer": {"kind": "decoder", "first_k_dense_replace": 1}}
STEPS = {"block": "layer", "repeat_block": False, "num_nextn_predict_layers": 2, "hidden": "normed"}


def built(parts):
    model = lab.build(ModelConfig.model_validate(BASE | parts)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0, 0.3) if "norm" in name else parameter.normal_(0.0, 0.12)
    return model


def everything(model, tokens):
    """Logits of the next token and of all prediction steps."""
    with torch.no_grad():
        hidden = model.hidden(tokens)
        steps = model.ahead(hidden, tokens) if model.mtp is not None else []
        return torch.stack([model.lm_head(each) for each in (model.norm(hidden), *steps)])


def tensors(folder):
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def keys_of(folder):
    return json.loads((folder / "config.json").read_text())


ROUND = {
    "LongCat-2.0": LONGCAT_2,
    "Flash-Lite-Sparse": LONGCAT_2 | {"mtp": {"num_nextn_predict_layers": 3, "own_embedding": True, "hidden": "normed"}},
    "a scale for the n-grams": LONGCAT_2 | {"embedding": {"ngram": {**NGRAM["ngram"], "normalised_init": "scale"}}},
    "every attention an owner": LONGCAT_2 | {"attention": LSA | {"cli_factor": 1, "dsa_mtp_cli": False}},
    "other norm, layout and latent": {
        "attention": LSA | {"index_k_norm_type": "layer", "index_rope_layout": "half-split", "index_query_latent": "scaled"},
        "moe": MOE,
    },
    "dsa in shortcut layers": {"attention": DSA | {"kind": "dsa"}, "moe": MOE},
    "DeepSeek-V3.2": DEEPSEEK | {"mtp": STEPS},
    "DeepSeek-V3.2, another scale of scores": DEEPSEEK | {"attention": DSA | {"index_query_latent": "scaled"}},
}


@pytest.mark.parametrize("case", ROUND)
def test_what_was_built_here_comes_back(case, tmp_path):
    model, tokens = built(ROUND[case]), torch.randint(0, 300, (2, 24))
    lab.save_pretrained(model, tmp_path / "a")
    again = lab.from_pretrained(tmp_path / "a")
    torch.testing.assert_close(everything(again, tokens), everything(model, tokens), rtol=0, atol=1e-4)
    before, after = model.config.attention.model_dump(), again.config.attention.model_dump()
    after["latent_norm_eps"] = before["latent_norm_eps"]  # None says the same as the number written
    if case == "dsa in shortcut layers":
        assert (before.pop("kind"), after.pop("kind")) == ("dsa", "lsa")  # the same attention under LongCat's name
    assert after == before
    lab.save_pretrained(again, tmp_path / "b", max_shard_bytes=100_000)
    left, right = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
    assert keys_of(tmp_path / "a") == keys_of(tmp_path / "b")


def test_keys_and_names_of_longcat_2(tmp_path):
    lab.save_pretrained(built(LONGCAT_2), tmp_path / "a")
    keys, stored = keys_of(tmp_path / "a"), tensors(tmp_path / "a")
    said = {"index_n_heads": 4, "index_head_dim": 16, "index_topk": 8, "index_init_tokens": 2, "index_local_tokens": 3}
    said |= {"cli_factor": 2, "dsa_mtp_cli": True, "index_k_norm_type": "rms", "attention_method": "LSA"}
    said |= {"mtp_num_layers": 3, "mtp_replicate_modules": True, "mtp_disable_over_tokenizer": True}
    said |= {"oe_neighbor_num": 3, "oe_split_num": 2, "oe_vocab_size_ratio": 7.3, "architectures": ["LongcatCausalLM"]}
    assert {key: keys.get(key) for key in said} == said and "model_type" not in keys
    indexers = {name.rsplit(".indexer.", 1)[0] for name in stored if ".indexer." in name}
    assert indexers == {"model.layers.0.self_attn.0", "model.layers.1.self_attn.0", "model.mtp.layers.0.self_attn"}
    place = "model.layers.1.self_attn.0.indexer"
    assert {name for name in stored if name.startswith(place)} == {f"{place}.{n}.weight" for n in ("wq_b", "wk", "k_norm", "weights_proj")}
    for prefix in ("model.", "model.mtp."):
        assert [stored[f"{prefix}oe_embed_tokens{i}.weight"].shape for i in (0, 3)] == [(2191, 16), (2197, 16)]
        assert stored[f"{prefix}oe_embed_proj3.weight"].shape == (64, 16) and f"{prefix}oe_embed_proj4.weight" not in stored
    assert not any(".experts.6." in name for name in stored)  # zero-experts have no rows: transformers has no such model


@pytest.mark.parametrize("place", ["model.mtp.layers.0.", "model.mtp.ngram_embeddings.", "model.mtp.embed_tokens."])
def test_idle_tables_are_found_wherever_they_lie(place, tmp_path):
    """Their published names are not confirmed."""
    model = built(LONGCAT_2)
    lab.save_pretrained(model, tmp_path / "a")
    moved = {name.replace("model.mtp.oe_", f"{place}oe_"): tensor for name, tensor in tensors(tmp_path / "a").items()}
    if "ngram" in place:
        renamed = {f"{place}oe_embed_tokens": f"{place}embedders.", f"{place}oe_embed_proj": f"{place}post_projs."}
        for old, new in renamed.items():
            moved = {name.replace(old, new): tensor for name, tensor in moved.items()}
    (tmp_path / "b").mkdir()
    save_file(moved, tmp_path / "b/model.safetensors")
    (tmp_path / "b/config.json").write_text(json.dumps(keys_of(tmp_path / "a")))
    again = lab.from_pretrained(tmp_path / "b")
    assert torch.equal(again.mtp.embed_tokens.tables.weight, model.mtp.embed_tokens.tables.weight)
    assert torch.equal(again.mtp.embed_tokens.projection.weight, model.mtp.embed_tokens.projection.weight)


# Elements, and names: LongCat-2.0's by its safetensors metadata and as others counted its index; the others' as ours come out, to hold.
COUNTS = {"longcat-2.0": (1_775_560_491_136, 88_780), "longcat-flash-lite-sparse": (69_127_158_912, 11_220)}
COUNTS["deepseek-v3.2"] = (685_355_329_792, 46_493)  # with the second copies of embedding and head that it has
INDEXERS = {"longcat-2.0": 38 + 1, "longcat-flash-lite-sparse": 14 + 1, "deepseek-v3.2": 61 + 1}


@pytest.mark.parametrize("preset", COUNTS)
def test_published_sizes(preset):
    """The preset's checkpoint, by names and shapes: so many elements, and a config.json that says the preset again."""
    config = lab.load(preset).model
    naming = "deepseek" if "deepseek" in preset else "longcat"
    with torch.device("meta"):
        state = LongcatLM(config).state_dict()
    parts = layout(config, naming, state)
    assert (sum(math.prod(part.shape) for part in parts.values()), len(parts)) == COUNTS[preset]
    assert sum(math.prod(part.shape) for part in parts.values() if not part.copy) == sum(tensor.numel() for tensor in state.values())
    assert sum(name.endswith(".indexer.wk.weight") for name in parts) == INDEXERS[preset]
    if naming == "longcat":
        pairs = Counter(name.split(".")[4] for name in parts if ".indexer.wk." in name and ".mtp." not in name)
        assert pairs == {"0": config.num_layers}
    data = json.loads(json.dumps(config_json(config, naming)))
    again, family = model_config(Keys(data, Path("config.json")), parts)
    assert family == naming

    def computed(c):
        """Without what only training reads."""
        trained = {"moe": {"bias_rule", "bias_update_rate", "expected_real_experts", "balance_loss", "balance_loss_weight"}}
        trained["mtp"] = {"loss_weight", "loss_weight_schedule", "detach", "recompute"}
        return {
            role: {k: v for k, v in part.items() if k not in trained.get(role, ())} if isinstance(part, dict) else part
            for role, part in c.model_dump().items()
        }

    wanted, found = computed(config), computed(again)
    wanted["attention"]["latent_norm_eps"] = found["attention"]["latent_norm_eps"]  # None here, the same as a number there
    assert found == wanted


# Flash-Lite-Sparse's config.json as published (arXiv 2608.01662's release), without a model_type; LongCat-2.0's differs in numbers,
# in attention_method and in the last line.
LITE = {"architectures": ["LongcatCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "vocab_size": 131072}
LITE |= {"hidden_size": 3072, "ffn_hidden_size": 6144, "expert_ffn_hidden_size": 1024, "num_layers": 14, "num_attention_heads": 32}
LITE |= {"kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64, "v_head_dim": 128, "qk_nope_head_dim": 128}
LITE |= {"mla_scale_q_lora": True, "mla_scale_kv_lora": True, "routed_scaling_factor": 6.0, "n_routed_experts": 256, "use_mla": 1}
LITE |= {"max_position_embeddings": 983040, "rms_norm_eps": 1e-05, "use_cache": True, "rope_theta": 1e6, "attention_method": "LSA"}
YARN = {"original_max_position_embeddings": 8192, "rope_type": "deepseek_yarn", "factor": 120, "beta_fast": 32, "beta_slow": 1}
LITE |= {"rope_scaling": YARN | {"mscale": 1, "mscale_all_dim": 1}, "zero_expert_num": 128, "zero_expert_type": "identity"}
LITE |= {"moe_topk": 12, "oe_vocab_size_ratio": 78, "oe_neighbor_num": 4, "oe_split_num": 4, "mtp_num_layers": 1}
LITE |= {"index_n_heads": 16, "index_head_dim": 128, "index_topk": 2048, "index_k_norm_type": "rms", "cli_factor": 2}
LITE |= {"index_local_tokens": 1024, "index_init_tokens": 16, "eos_token_id": 2}
TWO = LITE | {"attention_method": "MLA", "num_layers": 38, "model_type": None, "moe_impl": "mix", "moe_switch_token_num": 1024}
TWO |= {"mtp_num_layers": 3, "mtp_replicate_modules": True, "mtp_disable_over_tokenizer": True, "dsa_mtp_cli": True}
MODULE = {"model.mtp.norm.weight", "model.mtp.oe_embed_tokens0.weight"}


def read(data, names):
    return model_config(Keys(data, Path("config.json")), names)[0]


def test_published_keys_are_all_understood(recwarn):
    lite, two = read(LITE, {"model.mtp.norm.weight"}), read(TWO, MODULE)
    assert not recwarn.list
    preset = lab.load("longcat-flash-lite-sparse").model
    for role in ("embedding", "rope", "norm", "ffn", "layer"):
        assert getattr(lite, role) == getattr(preset, role), role
    same = {"latent_norm_eps": None, "dsa_mtp_cli": True}  # of one step nothing is shared
    assert lite.attention.model_copy(update=same) == preset.attention
    assert (two.mtp.num_nextn_predict_layers, two.mtp.own_ngram_tables, two.attention.dsa_mtp_cli) == (3, True, True)
    assert two.attention.kind == "lsa" and not lite.mtp.own_ngram_tables


def without(*names):
    return {key: value for key, value in LITE.items() if key not in names}


REFUSED = [
    (without("index_topk"), MODULE, "'index_topk' is missing"),
    (LITE | {"attention_method": "GQA"}, MODULE, "'attention_method' is 'GQA'"),
    (LITE | {"index_k_norm_type": "batch"}, MODULE, "index_k_norm_type"),
    (LITE | {"index_topk": 1000}, MODULE, "below index_init_tokens + index_local_tokens"),
    (LITE | {"q_lora_rank": None}, MODULE, "q_lora_rank is empty"),
    (LITE | {"mtp_disable_over_tokenizer": False}, MODULE, "never read them"),
    (LITE | {"use_longcat_dsa": False}, MODULE, "'use_longcat_dsa' is False"),
    ({**without("index_n_heads", "index_head_dim", "index_topk"), "attention_method": "MLA"}, MODULE, "'index_init_tokens' is 16"),
]


@pytest.mark.parametrize(("data", "names", "said"), REFUSED, ids=[row[2] for row in REFUSED])
def test_keys_that_cannot_be_expressed_are_named(data, names, said):
    with pytest.raises(lab.LabError) as caught:
        read(data, names)
    sentence = str(caught.value)
    assert said in sentence and "\n" not in sentence and sentence.endswith("."), sentence


def test_a_missing_kind_of_norm_is_told_by_the_bias():
    names = {"model.layers.0.self_attn.0.indexer.k_norm.weight"}
    assert read(without("index_k_norm_type"), names).attention.index_k_norm_type == "rms"
    names.add("model.layers.0.self_attn.0.indexer.k_norm.bias")
    assert read(without("index_k_norm_type"), names).attention.index_k_norm_type == "layer"


SAVES = [
    ({"attention": DSA | {"index_local_tokens": 2}}, "attention.index_local_tokens"),
    ({"attention": DSA | {"index_init_tokens": 2}}, "attention.index_init_tokens"),
    ({"attention": DSA | {"index_k_norm_type": "rms"}}, "attention.index_k_norm_type rms"),
    ({"attention": DSA | {"index_rope_layout": "interleaved"}}, "attention.index_rope_layout interleaved"),
    ({"attention": DSA | {"cli_factor": 2}}, "attention.cli_factor"),
    ({"attention": DSA | {"dsa_mtp_cli": True}, "mtp": STEPS}, "attention.dsa_mtp_cli"),
]


@pytest.mark.parametrize(("parts", "said"), SAVES, ids=[row[1] for row in SAVES])
def test_models_that_deepseeks_names_cannot_describe(parts, said, tmp_path):
    with pytest.raises(lab.LabError, match=said):
        lab.save_pretrained(built(DEEPSEEK | parts), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_kinds_of_layers_that_transformers_wrote(tmp_path):
    lab.save_pretrained(built(DEEPSEEK), tmp_path / "a")
    data = keys_of(tmp_path / "a")
    assert data["model_type"] == "deepseek_v32"
    for keys, said in (
        ({"mlp_layer_types": ["sparse", "dense"]}, "'mlp_layer_types' must be 2 words"),
        ({"layer_types": ["indexed_attention", "full_attention"]}, "'layer_types' names another kind"),
        ({"index_topk": None}, "'index_topk' is missing"),
        ({"index_init_tokens": 4}, "'index_init_tokens' is 4"),
    ):
        with pytest.raises(lab.LabError, match=said):
            read(data | keys, ())
    kinds = {"mlp_layer_types": ["dense", "sparse"], "layer_types": ["indexed_attention"] * 2, "first_k_dense_replace": 3}
    assert read(data | kinds, ()).layer.first_k_dense_replace == 1  # the list counts, as in transformers
