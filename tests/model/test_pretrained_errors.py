"""What from_pretrained and save_pretrained refuse: one sentence that names what is wrong, and nothing half-done."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import longcat_lab as lab
from longcat_lab.config.model import ModelConfig

ATTENTION = {"num_attention_heads": 2, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
MOE = {"n_routed_experts": 3, "zero_expert_num": 1, "moe_topk": 2, "expert_ffn_hidden_size": 8}
BASE = {"hidden_size": 16, "num_layers": 1, "vocab_size": 257, "max_position_embeddings": 32, "attention": ATTENTION, "moe": MOE}
BASE |= {"ffn": {"ffn_hidden_size": 24}}
SIGMOID = {**MOE, "zero_expert_num": 0, "scoring_func": "sigmoid"}
UNSCALED = {**ATTENTION, "mla_scale_q_lora": False, "mla_scale_kv_lora": False}
DEEPSEEK = BASE | {"attention": UNSCALED, "moe": SIGMOID, "layer": {"kind": "decoder"}}
HEAD = "lm_head.weight"
INDEX = "model.safetensors.index.json"


def model(parts):
    return lab.build(ModelConfig.model_validate(BASE | parts))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    lab.save_pretrained(model({}), folder / "longcat")
    lab.save_pretrained(model(DEEPSEEK), folder / "deepseek")
    lab.save_pretrained(model({}), folder / "sharded", max_shard_bytes=20_000)
    return folder


@pytest.fixture
def copied(saved, tmp_path):
    def make(kind="longcat", keys=None, change=None):
        folder = tmp_path / "copy"
        shutil.copytree(saved / kind, folder)
        if keys:
            data = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps({k: v for k, v in {**data, **keys}.items() if v is not ...}))
        if change:
            tensors = load_file(folder / "model.safetensors")
            change(tensors)
            save_file(tensors, folder / "model.safetensors")
        return folder

    return make


def refusal(call, *arguments, **named):
    with pytest.raises(lab.LabError) as caught:
        call(*arguments, **named)
    sentence = str(caught.value)
    assert "\n" not in sentence and sentence.endswith(".") and len(sentence) < 1200
    return sentence


KEYS = {
    "longcat": [
        ({"router_bias": True}, "'router_bias' is True", "only have false"),
        ({"attention_bias": True}, "attention_bias", "only have false"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings", "only have false"),
        ({"hidden_act": "gelu"}, "hidden_act", "'silu'"),
        ({"attention_dropout": 0.1}, "attention_dropout", "0.1"),
        ({"sliding_window": 128}, "sliding_window", "null"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config", "convert the checkpoint"),
        ({"index_topk": 2048}, "'index_n_heads' is missing", "config.json"),
        ({"cli_factor": 2}, "'cli_factor' is 2", "only have 1"),
        ({"nextn_use_scmoe": True}, "nextn_use_scmoe", "false"),
        ({"n_shared_experts": 2}, "n_shared_experts", "0"),
        ({"num_key_value_heads": 1}, "num_key_value_heads", "only 2"),
        ({"head_dim": 64}, "head_dim", "only 4"),
        ({"model_type": "llama"}, "model_type 'llama'", "longcat_flash"),
        ({"model_type": None, "moe_topk": None, "zero_expert_num": ...}, "model_type None", "LongCat-2.0"),
        ({"hidden_size": ...}, "'hidden_size' is missing", "config.json"),
        ({"hidden_size": "16"}, "'hidden_size' is '16'", "whole number"),
        ({"hidden_size": True}, "'hidden_size' is True", "whole number"),
        ({"moe_topk": 9}, "moe_topk is 9", "config.json"),
        ({"zero_expert_type": "mirror"}, "zero_expert_type", "'mirror'"),
        ({"vocab_size": 20}, "vocab_size", "257"),
        ({"emb_split_num": 2}, "neighbor_num", "all three or none"),
        ({"emb_split_num": 2, "oe_split_num": 4}, "emb_split_num", "make them equal"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}, "rope_scaling": None}, "'llama3'", "only default and yarn"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear'", "only default and yarn"),
        ({"rope_parameters": None, "rope_theta": None}, "'rope_theta' is missing", "config.json"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "'rope_parameters' and 'rope_scaling'", "keep one"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "truncate": False}}, "truncate", "False"),
        ({"rope_parameters": {"full": {"rope_theta": 1e4}}, "rope_scaling": None}, "rope_parameters.full", "default"),
    ],
    "deepseek": [
        ({"scoring_func": "softmax"}, "scoring_func", "'sigmoid'"),
        ({"topk_method": "greedy"}, "topk_method", "'noaux_tc'"),
        ({"rope_interleave": False}, "rope_interleave", "true"),
        ({"moe_layer_freq": 2}, "moe_layer_freq", "1"),
        ({"zero_expert_num": 4}, "zero_expert_num", "0"),
        ({"n_group": 2}, "n_group 2", "divide"),
        ({"model_type": "deepseek_v2"}, "deepseek_v2", "deepseek_v32"),
        ({"model_type": "deepseek_v32"}, "'index_n_heads' is missing", "config.json"),
    ],
}


@pytest.mark.parametrize(("kind", "keys", "what", "fix"), [(kind, *row) for kind, rows in KEYS.items() for row in rows], ids=str)
def test_settings_that_cannot_be_expressed_are_named(kind, keys, what, fix, copied):
    folder = copied(kind, keys)
    sentence = refusal(lab.from_pretrained, folder)
    assert what in sentence and fix in sentence and str(folder / "config.json") in sentence, sentence


def test_unknown_keys_are_warned_of_and_bookkeeping_is_not(copied, recwarn):
    harmless = {"auto_map": {"AutoModel": "evil.py"}, "new_feature": False, "eos_token_id": 2, "torch_dtype": "float32"}
    lab.from_pretrained(copied(keys=harmless))
    assert not recwarn.list


def test_an_unknown_key_with_a_value_is_warned_of(copied):
    with pytest.warns(UserWarning, match="new_feature"):
        lab.from_pretrained(copied(keys={"new_feature": 3}))


EXPERT = "model.layers.0.mlp.experts.1.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(HEAD), [f"1 missing ({HEAD})"]),
        (lambda t: t.pop(EXPERT), [f"1 missing ({EXPERT})"]),
        (lambda t: t.update(other=torch.ones(2)), ["1 not known (other)"]),
        (lambda t: t.update({HEAD: torch.ones(257, 8)}), [f"{HEAD} [257, 8] in place of [257, 16]"]),
        (lambda t: t.update({EXPERT: torch.ones(9, 16)}), [f"{EXPERT} [9, 16] in place of [8, 16]"]),
        (lambda t: t.update({HEAD: torch.ones(257, 16, dtype=torch.int8)}), [f"{HEAD} I8"]),
        (lambda t: t.update({HEAD: torch.ones(257, 16).to(torch.float8_e4m3fn)}), [f"{HEAD} F8_E4M3"]),
        (lambda t: (t.clear(), t.update(other=torch.ones(1))), ["and 3", "more", "1 not known (other)"]),
    ],
    ids=range(8),
)
def test_tensors_that_do_not_fit_are_named_with_both_shapes(change, said, copied):
    folder = copied(change=change)
    sentence = refusal(lab.from_pretrained, folder)
    assert all(each in sentence for each in [*said, str(folder)]), sentence


def test_nothing_is_read_before_everything_was_checked(copied, monkeypatch):
    folder = copied(change=lambda t: t.pop(HEAD))
    monkeypatch.setattr("longcat_lab.model.pretrained.read._allocate", lambda *_: pytest.fail("allocated"))
    refusal(lab.from_pretrained, folder)


def test_a_copy_that_is_none_is_warned_of(tmp_path):
    mtp = {"block": "layer", "repeat_block": False}
    lab.save_pretrained(model(DEEPSEEK | {"mtp": mtp}), tmp_path / "a")
    tensors = load_file(tmp_path / "a/model.safetensors")
    tensors["model.layers.1.shared_head.head.weight"] += 1
    save_file(tensors, tmp_path / "a/model.safetensors")
    with pytest.warns(UserWarning, match=r"shared_head\.head\.weight"):
        lab.from_pretrained(tmp_path / "a")
    tensors["model.layers.1.shared_head.head.weight"] = torch.ones(3, 3)
    save_file(tensors, tmp_path / "a/model.safetensors")
    assert "[3, 3] in place of [257, 16]" in refusal(lab.from_pretrained, tmp_path / "a")
    data = json.loads((tmp_path / "a/config.json").read_text()) | {"num_nextn_predict_layers": 2}
    (tmp_path / "a/config.json").write_text(json.dumps(data))
    assert "hold 1 layers after the last" in refusal(lab.from_pretrained, tmp_path / "a")


def test_half_a_prediction_module(copied):
    folder = copied(keys={"num_nextn_predict_layers": ...}, change=lambda t: t.update({"model.mtp.norm.weight": torch.ones(16)}))
    assert "missing (model.mtp.embed_tokens.weight" in refusal(lab.from_pretrained, folder)
    data = json.loads((folder / "config.json").read_text())
    for steps, said in ((0, "hold a prediction module"), (2, "only one repeated block")):
        (folder / "config.json").write_text(json.dumps(data | {"num_nextn_predict_layers": steps}))
        assert said in refusal(lab.from_pretrained, folder)


def test_folders_that_are_no_checkpoint(copied, tmp_path):
    assert "no folder meituan-longcat/LongCat-Flash-Chat" in refusal(lab.from_pretrained, "meituan-longcat/LongCat-Flash-Chat")
    assert "config.json cannot be read" in refusal(lab.from_pretrained, tmp_path)
    folder = copied()
    (folder / "model.safetensors").rename(folder / "other.bin")
    assert "pickles, which can run any code" in refusal(lab.from_pretrained, folder)
    (folder / "other.bin").unlink()
    assert "neither model.safetensors nor" in refusal(lab.from_pretrained, folder)
    for content in ("{", "[]"):
        (folder / "config.json").write_text(content)
        refusal(lab.from_pretrained, folder)


@pytest.mark.parametrize("kept", [0, 4, 100, 10_000, -1])
def test_damaged_files(kept, copied):
    folder = copied()
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    sentence = refusal(lab.from_pretrained, folder)
    assert "damaged or cut short" in sentence and str(path) in sentence


def test_indexes_that_lie(copied, tmp_path):
    folder = copied("sharded")
    good = json.loads((folder / INDEX).read_text())
    names = list(good["weight_map"])

    def with_map(change):
        (folder / INDEX).write_text(json.dumps({"weight_map": change}))
        return refusal(lab.from_pretrained, folder)

    (tmp_path / "outside.safetensors").write_bytes((folder / good["weight_map"][HEAD]).read_bytes())
    for outside in ("../outside.safetensors", str(tmp_path / "outside.safetensors"), "..\\outside.safetensors", "C:\\x.safetensors"):
        assert "no safetensors file inside the folder" in with_map({**good["weight_map"], HEAD: outside})
    assert "no safetensors file" in with_map({**good["weight_map"], HEAD: "pytorch_model.bin"})
    assert "is missing, though" in with_map({**good["weight_map"], HEAD: "model-9.safetensors"})
    other = next(file for file in good["weight_map"].values() if file != good["weight_map"][HEAD])
    assert "does not hold tensor 'lm_head.weight'" in with_map({**good["weight_map"], HEAD: other})
    assert "does not hold tensor 'more'" in with_map({**good["weight_map"], "more": other})
    for broken in ({}, [], {names[0]: 3}):
        assert "no 'weight_map'" in with_map(broken)
    (folder / INDEX).write_text(json.dumps(good))
    shutil.copy(folder / other, folder / "twice.safetensors")
    assert "and in" in with_map({**good["weight_map"], HEAD: "twice.safetensors"})
    (folder / INDEX).write_text(json.dumps(good))
    lab.from_pretrained(folder)


def test_links_out_of_the_folder_are_the_users_own(copied, tmp_path):
    """So lies Hugging Face's cache: snapshots link into blobs."""
    folder = copied()
    (folder / "model.safetensors").rename(tmp_path / "blob")
    (folder / "model.safetensors").symlink_to(tmp_path / "blob")
    lab.from_pretrained(folder)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.int8, 16])
def test_a_dtype_must_be_one(dtype, copied):
    assert "give a floating-point dtype" in refusal(lab.from_pretrained, copied(), dtype=dtype)


@pytest.mark.parametrize(("device", "said"), [("toaster", "no device 'toaster'"), ("xla", "cannot be used here")])
def test_a_device_must_be_here(device, said, copied):
    assert said in refusal(lab.from_pretrained, copied(), device=device)


SAVES = [
    ({"layer": {"kind": "serial"}}, None, "layer.kind serial"),
    ({"moe": {**MOE, "n_shared_experts": 1}}, None, "moe.n_shared_experts"),
    ({"moe": {**MOE, "scoring_func": "sigmoid"}}, None, "moe.scoring_func sigmoid"),
    ({"moe": {**MOE, "n_group": 2}}, None, "moe.topk_group"),
    ({"mtp": {"block": "layer"}}, None, "mtp.block layer"),
    ({"mtp": {"num_nextn_predict_layers": 2, "repeat_block": False}}, None, "mtp.repeat_block"),
    ({}, "deepseek", "layer.kind scmoe"),
    (DEEPSEEK, "longcat", "layer.kind decoder"),
    (DEEPSEEK | {"moe": MOE}, None, "moe.scoring_func softmax"),
    (DEEPSEEK | {"attention": ATTENTION}, None, "attention.mla_scale_q_lora"),
    (DEEPSEEK | {"mtp": {}}, None, "mtp.block dense"),
    (DEEPSEEK | {"mtp": {"block": "layer", "num_nextn_predict_layers": 2}}, None, "mtp.repeat_block"),
    (DEEPSEEK | {"mtp": {"block": "layer", "own_embedding": True}}, None, "mtp.own_embedding"),
    ({}, "llama", "naming 'llama'"),
]


@pytest.mark.parametrize(("parts", "naming", "said"), SAVES, ids=str)
def test_models_that_the_names_cannot_describe(parts, naming, said, tmp_path):
    assert said in refusal(lab.save_pretrained, model(parts), tmp_path / "out", naming)
    assert not list(tmp_path.iterdir())


def test_saving_is_whole_or_not_at_all(tmp_path, monkeypatch):
    small = model({})
    (tmp_path / "taken").mkdir()
    assert "exists" in refusal(lab.save_pretrained, small, tmp_path / "taken")
    for size in (0, -1, 1.5, True):
        assert "max_shard_bytes" in refusal(lab.save_pretrained, small, tmp_path / "out", max_shard_bytes=size)
    assert "extra sets vocab_size" in refusal(lab.save_pretrained, small, tmp_path / "out", extra={"vocab_size": 3})
    assert "meta device" in refusal(lab.save_pretrained, model({}).to("meta"), tmp_path / "out")
    assert "not a Linear" in refusal(lab.save_pretrained, torch.nn.Linear(2, 2), tmp_path / "out")

    from safetensors import SafetensorError

    written = []

    def full(tensors, path, metadata):
        written.append(path)
        if len(written) == 2:
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        save_file(tensors, path, metadata)

    monkeypatch.setattr("safetensors.torch.save_file", full)  # taken from there at each call
    assert "No space left" in refusal(lab.save_pretrained, small, tmp_path / "out", max_shard_bytes=20_000)
    assert [path.name for path in tmp_path.iterdir()] == ["taken"] and len(written) == 2


def test_further_keys_are_written(tmp_path):
    lab.save_pretrained(model({}), tmp_path / "a", extra={"eos_token_id": 256})
    assert json.loads((tmp_path / "a/config.json").read_text())["eos_token_id"] == 256
