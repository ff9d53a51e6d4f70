"""Checkpoints both ways, against transformers' own models, and what from_pretrained and save_pretrained promise of files and memory."""

import json
import math
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import longcat_lab as lab
from longcat_lab.config.model import ModelConfig
from longcat_lab.model.lm import LongcatLM
from longcat_lab.model.pretrained.config import model_config
from longcat_lab.model.pretrained.keys import Keys
from longcat_lab.model.pretrained.names import ROUTER, layout

MLA = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12}
SIZES = {"vocab_size": 320, "hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, **MLA}
LONGCAT = {"num_layers": 2, "ffn_hidden_size": 96, "expert_ffn_hidden_size": 32, "moe_topk": 3, "n_routed_experts": 6, "head_dim": 8}
LONGCAT |= SIZES | {"zero_expert_num": 3}
DEEPSEEK = {
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_experts_per_tok": 3,
}
DEEPSEEK |= SIZES | {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "n_shared_experts": 2, "first_k_dense_replace": 1}
DEEPSEEK |= {"num_mtp_layers": 0}
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 8.0, "original_max_position_embeddings": 8, "beta_fast": 4.0, "beta_slow": 1.0}

SPARSE = {key: value for key, value in DEEPSEEK.items() if key != "num_mtp_layers"}
SPARSE |= {"index_n_heads": 8, "index_head_dim": 16, "index_topk": 10}  # of 40 tokens

CASES = {
    "longcat": ("LongcatFlash", LONGCAT),
    "longcat-yarn": ("LongcatFlash", LONGCAT | {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}}),
    "deepseek": ("DeepseekV3", DEEPSEEK),
    "deepseek-plain-queries": ("DeepseekV3", DEEPSEEK | {"q_lora_rank": None, "norm_topk_prob": False}),
    "deepseek-yarn": ("DeepseekV3", DEEPSEEK | {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3}}),
    "deepseek-yarn-amplitude": ("DeepseekV3", DEEPSEEK | {"rope_parameters": YARN | {"mscale_all_dim": 0.5}}),
    "sparse": ("DeepseekV32", SPARSE),
    "sparse-yarn": ("DeepseekV32", SPARSE | {"n_shared_experts": 0, "rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3}}),
}


def hugging(name):
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return getattr(transformers, name)


def random_weights(model):
    """Everything matters: gains off 1, biases that move picks, latents so small that the eps of their norms shows."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0, 0.3) if "norm" in name else parameter.normal_(0.0, 0.12)
            if "q_a_proj" in name or "kv_a_proj" in name:
                parameter.mul_(0.01)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0.0, 0.2)
    return model


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """Makes and saves a transformers model once: (its folder, logits, tokens, its class)."""
    made = {}

    def get(case):
        if case not in made:
            kind, settings = CASES[case]
            torch.manual_seed(len(case))
            cls = hugging(f"{kind}ForCausalLM")
            model = random_weights(cls(hugging(f"{kind}Config")(**settings)).eval())
            folder = tmp_path_factory.mktemp(case)
            model.save_pretrained(folder)
            tokens = torch.randint(0, 320, (2, 40))
            with torch.no_grad():
                made[case] = folder, model(tokens).logits, tokens, cls
        return made[case]

    return get


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens)


def tensors(folder):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def assert_same_tensors(left, right):
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert (tensor.dtype, tensor.shape) == (right[name].dtype, right[name].shape), name
        assert torch.equal(tensor.view(torch.uint8), right[name].view(torch.uint8)), name


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("case", CASES)
def test_same_logits_as_transformers_in_both_directions(case, theirs, tmp_path):
    folder, wanted, tokens, cls = theirs(case)
    model = lab.from_pretrained(folder)
    assert not model.training and isinstance(model.config, ModelConfig)
    assert wanted.std() > 0.3
    torch.testing.assert_close(logits(model, tokens), wanted, rtol=0, atol=1e-4)

    lab.save_pretrained(model, tmp_path / "saved", max_shard_bytes=100_000)
    assert (tmp_path / "saved/model.safetensors.index.json").exists()
    again, info = cls.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(tokens).logits, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", ["longcat", "deepseek"])
def test_the_comparison_sees_bias_and_latent_eps(case, theirs):
    folder, wanted, tokens, _ = theirs(case)
    assert (logits(lab.from_pretrained(folder, latent_norm_eps=1e-5), tokens) - wanted).abs().max() > 1e-3
    model = lab.from_pretrained(folder)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.zero_()
    assert (logits(model, tokens) - wanted).abs().max() > 1e-2


def test_the_comparison_sees_the_selection_and_its_layout(theirs, tmp_path):
    """transformers' indexer turns pairs (0, d/2), its attention (0, 1), (2, 3), ...; 10 of up to 40 keys are selected."""
    folder, wanted, tokens, _ = theirs("sparse")
    assert lab.from_pretrained(folder).config.attention.index_rope_layout == "half-split"
    shutil.copytree(folder, tmp_path / "other")
    for keys in ({"indexer_rope_interleave": True}, {"index_topk": 11}, {"index_topk": 40}):
        data = json.loads((folder / "config.json").read_text()) | keys
        (tmp_path / "other/config.json").write_text(json.dumps(data))
        assert (logits(lab.from_pretrained(tmp_path / "other"), tokens) - wanted).abs().max() > 1e-2, keys


@pytest.mark.parametrize("case", ["longcat", "deepseek", "sparse"])
def test_a_round_trip_keeps_every_tensor_and_every_key(case, theirs, tmp_path):
    folder, *_ = theirs(case)
    lab.save_pretrained(lab.from_pretrained(folder), tmp_path / "saved")
    before, after = tensors(folder), tensors(tmp_path / "saved")
    unused = [f"model.layers.{l}.mlp.experts.{e}.{kind}_proj.weight" for l in range(2) for e in (6, 7, 8) for kind in ("gate", "up")]
    if case == "longcat":
        for name in unused:  # transformers' own zero-expert rows: nobody reads them
            assert not after[name].any() and before[name].shape == after[name].shape
            del before[name], after[name]
    assert_same_tensors(before, after)
    old, new = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "saved"))
    said = {key for key in old if key in new and key not in ("rope_parameters", "dtype")}
    assert {key: new[key] for key in said} == {key: old[key] for key in said}
    assert len(said) >= 20
    assert new["rope_parameters"]["rope_theta"] == old["rope_parameters"]["rope_theta"]


def test_published_and_stacked_experts_are_read_alike(theirs, tmp_path):
    folder, wanted, tokens, _ = theirs("longcat")
    stored = tensors(folder)
    published = {name: t for name, t in stored.items() if not any(f".experts.{e}." in name for e in (6, 7, 8))}
    stacked = {name: t for name, t in stored.items() if ".experts." not in name}
    for l in range(2):
        place = f"model.layers.{l}.mlp.experts"
        gates = [torch.cat([stored[f"{place}.{e}.{kind}_proj.weight"] for kind in ("gate", "up")]) for e in range(9)]
        stacked[f"{place}.gate_up_proj"] = torch.stack(gates)
        stacked[f"{place}.down_proj"] = torch.stack([stored[f"{place}.{e}.down_proj.weight"] for e in range(6)])
    for name, content in {"published": published, "stacked": stacked}.items():
        (tmp_path / name).mkdir()
        shutil.copy(folder / "config.json", tmp_path / name)
        save_file(content, tmp_path / name / "model.safetensors")
        torch.testing.assert_close(logits(lab.from_pretrained(tmp_path / name), tokens), wanted, rtol=0, atol=1e-4)
    lab.save_pretrained(lab.from_pretrained(tmp_path / "published"), tmp_path / "saved", transformers_zero_rows=False)
    assert_same_tensors(published, tensors(tmp_path / "saved"))


def test_older_config_files_are_read_alike(theirs, tmp_path):
    """`rope_theta` and `rope_scaling` in place of `rope_parameters`."""
    folder, wanted, tokens, _ = theirs("deepseek-yarn")
    shutil.copytree(folder, tmp_path / "old")
    data = json.loads((folder / "config.json").read_text())
    parameters = data.pop("rope_parameters")
    data["rope_theta"] = parameters.pop("rope_theta")
    data["rope_scaling"] = {"type": parameters.pop("rope_type"), **parameters}
    (tmp_path / "old/config.json").write_text(json.dumps(data))
    torch.testing.assert_close(logits(lab.from_pretrained(tmp_path / "old"), tokens), wanted, rtol=0, atol=1e-4)


# --- without transformers


def config(**parts):
    rope = {"kind": "yarn", "theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 16}
    attention = {"num_attention_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "v_head_dim": 12}
    moe = {"n_routed_experts": 6, "zero_expert_num": 2, "moe_topk": 3, "expert_ffn_hidden_size": 32}
    base = {"hidden_size": 64, "num_layers": 2, "vocab_size": 300, "max_position_embeddings": 64, "rope": rope}
    return ModelConfig.model_validate(base | {"attention": attention, "moe": moe, "ffn": {"ffn_hidden_size": 96}} | parts)


def deepseek_parts(**mtp):
    attention = {"num_attention_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16, "mla_scale_q_lora": False, "mla_scale_kv_lora": False}
    moe = {"n_routed_experts": 8, "zero_expert_num": 0, "moe_topk": 3, "expert_ffn_hidden_size": 32, "scoring_func": "sigmoid"}
    parts = {"attention": attention, "moe": moe, "layer": {"kind": "decoder", "first_k_dense_replace": 1}}
    return parts | {"mtp": {"block": "layer", "repeat_block": False, "num_nextn_predict_layers": 2, **mtp}}


def built(model_config):
    return random_weights(lab.build(model_config)).eval()


def everything(model, tokens):
    """Logits of the next token and of all prediction steps."""
    with torch.no_grad():
        hidden = model.hidden(tokens)
        steps = model.ahead(hidden, tokens) if model.mtp is not None else []
        return torch.stack([model.lm_head(each) for each in (model.norm(hidden), *steps)])


NGRAM = {"kind": "token", "ngram": {"order": 3, "splits": 2, "vocab_ratio": 7.3}}
ROUND = {
    "longcat mtp": {"mtp": {"own_embedding": True, "hidden": "normed"}},
    "longcat mtp, three steps, shared rows, raw": {"mtp": {"num_nextn_predict_layers": 3}},
    "deepseek mtp": deepseek_parts(),
    "deepseek mtp, normed": deepseek_parts(hidden="normed"),
    "n-grams": {"embedding": NGRAM | {"ngram": NGRAM["ngram"] | {"normalised_init": "none", "boundary": "eos", "eos_token_id": 7}}},
    "n-grams with a scale, and mtp": {"embedding": NGRAM, "mtp": {}},
    "n-grams summed and amplified, and mtp": {
        "embedding": NGRAM
        | {
            "ngram": NGRAM["ngram"]
            | {"kind": "ngram_amplified", "normalised_init": "rows", "fusion": "sum", "base_scale": 0.5, "ngram_scale": 2.0}
        },
        "mtp": {},
    },
    "latent eps of its own": {"attention": {"num_attention_heads": 4, "latent_norm_eps": 1e-3}},
    "copy experts": {"moe": {"n_routed_experts": 4, "zero_expert_num": 2, "moe_topk": 2, "zero_expert_type": "copy"}},
}


@pytest.mark.parametrize("case", ROUND)
def test_what_was_built_here_comes_back(case, tmp_path):
    model, tokens = built(config(**ROUND[case])), torch.randint(0, 300, (2, 20))
    lab.save_pretrained(model, tmp_path / "a")
    again = lab.from_pretrained(tmp_path / "a")
    torch.testing.assert_close(everything(again, tokens), everything(model, tokens), rtol=0, atol=1e-4)
    lab.save_pretrained(again, tmp_path / "b", max_shard_bytes=100_000)
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 1
    assert_same_tensors(tensors(tmp_path / "a"), tensors(tmp_path / "b"))
    assert json.loads((tmp_path / "a/config.json").read_text()) == json.loads((tmp_path / "b/config.json").read_text())


def test_names_of_the_prediction_modules(tmp_path):
    dense = ["input_layernorm", "post_attention_layernorm", "self_attn.o_proj", "transformer_layer.mlp.up_proj"]
    lab.save_pretrained(built(config(mtp={"own_embedding": True})), tmp_path / "longcat")
    names = {name for name in tensors(tmp_path / "longcat") if "mtp" in name}
    assert {f"model.mtp.layers.0.{name}.weight" for name in ("enorm.m", "hnorm.m", "eh_proj", *dense)} < names
    assert {"model.mtp.embed_tokens.weight", "model.mtp.norm.weight"} < names and len(names) == 17

    lab.save_pretrained(built(config(**deepseek_parts())), tmp_path / "deepseek")
    stored = tensors(tmp_path / "deepseek")
    for layer in (2, 3):
        assert torch.equal(stored[f"model.layers.{layer}.embed_tokens.weight"], stored["model.embed_tokens.weight"])
        assert torch.equal(stored[f"model.layers.{layer}.shared_head.head.weight"], stored["lm_head.weight"])
        assert {f"model.layers.{layer}.{name}.weight" for name in ("enorm", "hnorm", "eh_proj", "shared_head.norm", "mlp.gate")} < set(
            stored
        )


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_deepseek_prediction_layers_are_those_of_transformers(tmp_path, monkeypatch):
    """Both steps, each with a block of its own; transformers hands a step's normed state to the next."""
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # no pool of threads: nothing here depends on the machine's load
    parts = deepseek_parts(hidden="normed")
    parts["attention"]["latent_norm_eps"] = 1e-6
    model, tokens = built(config(**parts, rope={"kind": "rope"})), torch.randint(0, 300, (2, 20))
    lab.save_pretrained(model, tmp_path / "a")
    main = hugging("DeepseekV3ForCausalLM").from_pretrained(tmp_path / "a").eval()
    main._keys_to_ignore_on_load_unexpected = [r"model\.layers\.[23]\."]  # where transformers looks for them; it knows layer 61 alone
    mtp = sys.modules["transformers"].modeling_layers.MtpModel.from_pretrained(main).eval()
    ours = model.state_dict()
    for step in range(2):
        there = mtp.layers[step].state_dict()
        for name, at in {"eh_proj.weight": "eh_proj.weight", "post_norm.weight": "norm.weight"}.items():
            assert torch.equal(there[name], ours[f"mtp.layers.{step}.{at}"])
    with torch.no_grad():
        hidden = main(tokens, output_hidden_states=True).hidden_states[-1]
        found = model.ahead(model.hidden(tokens), tokens)
        for step, each in enumerate(found, 1):
            embedded, positions = main.model.embed_tokens(tokens[:, step:]), torch.arange(20 - step)[None]
            turned = main.model.rotary_emb(embedded, positions)
            hidden = mtp.layers[step - 1](embedded, hidden[:, :-1], turned, None, positions, None)
            torch.testing.assert_close(each[:, : 20 - step], hidden, rtol=0, atol=1e-4)


def test_flash_lite_and_longcat_2_names_of_the_tables(tmp_path):
    model = built(config(**ROUND["n-grams"]))
    lab.save_pretrained(model, tmp_path / "lite")
    stored, data = tensors(tmp_path / "lite"), json.loads((tmp_path / "lite/config.json").read_text())
    assert stored["model.ngram_embeddings.embedders.1.weight"].shape == (int(7.3 * 300 + 3), 16)
    assert stored["model.ngram_embeddings.post_projs.3.weight"].shape == (64, 16)
    word = {"model.ngram_embeddings.word_embeddings.weight": stored["model.embed_tokens.weight"].clone()}
    two = {
        name.replace("ngram_embeddings.embedders.", "oe_embed_tokens").replace("ngram_embeddings.post_projs.", "oe_embed_proj"): tensor
        for name, tensor in stored.items()
    }
    moved = {name: tensor for name, tensor in stored.items() if name != "model.embed_tokens.weight"} | word
    renamed = {"emb_neighbor_num": "oe_neighbor_num", "emb_split_num": "oe_split_num", "ngram_vocab_size_ratio": "oe_vocab_size_ratio"}
    other = {renamed.get(key, key): value for key, value in data.items()} | {"model_type": None}
    tokens = torch.randint(0, 300, (2, 20))
    for name, content, keys in (("both", stored | word, data), ("moved", moved, data), ("two", two, other)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(keys))
        save_file(content, tmp_path / name / "model.safetensors")
        assert torch.equal(logits(lab.from_pretrained(tmp_path / name), tokens), logits(model, tokens))


FLASH = {"model_type": "longcat_flash", "hidden_size": 6144, "num_layers": 28, "num_attention_heads": 64, "vocab_size": 131072}
FLASH |= {"q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
FLASH |= {"ffn_hidden_size": 12288, "expert_ffn_hidden_size": 2048, "n_routed_experts": 512, "zero_expert_num": 256, "moe_topk": 12}
FLASH |= {"routed_scaling_factor": 6.0, "rms_norm_eps": 1e-5, "rope_theta": 1e7, "max_position_embeddings": 131072}
LITE = FLASH | {"model_type": "longcat_flash_ngram", "hidden_size": 3072, "num_layers": 14, "num_attention_heads": 32}
LITE |= {"ffn_hidden_size": 6144, "expert_ffn_hidden_size": 1024, "n_routed_experts": 256, "zero_expert_num": 128}
LITE |= {"ngram_vocab_size_ratio": 78, "emb_neighbor_num": 4, "emb_split_num": 4}


@pytest.mark.parametrize(("data", "total", "wide"), [(FLASH, 561_862_880_256, 132_142_080), (LITE, 69_073_335_552, 16_520_448)])
def test_published_models_have_the_published_number_of_elements(data, total, wide):
    """Totals of their safetensors metadata; `wide` of those in fp32, the routers."""
    config, naming = model_config(Keys(data, Path("config.json")), {"model.mtp.norm.weight"})
    with torch.device("meta"):
        state = LongcatLM(config).state_dict()
    needed = {name: part for name, part in layout(config, naming, state, zero_rows=False).items() if not part.optional}
    assert sum(math.prod(part.shape) for part in needed.values()) == total
    assert sum(math.prod(part.shape) for part in needed.values() if ROUTER.search(part.ours)) == wide


def test_dtypes_are_those_of_the_files_and_routers_stay_wide(tmp_path):
    model = built(config(mtp={}))
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data if "router" in name else parameter.data.bfloat16()
    lab.save_pretrained(model, tmp_path / "a")
    again = lab.from_pretrained(tmp_path / "a")
    kinds = {name: tensor.dtype for name, tensor in again.state_dict().items()}
    assert {kind for name, kind in kinds.items() if ".router." in name} == {torch.float32}
    assert {kind for name, kind in kinds.items() if ".router." not in name} == {torch.bfloat16}
    assert logits(again, torch.randint(0, 300, (1, 9))).dtype == torch.bfloat16
    lab.save_pretrained(again, tmp_path / "b")
    assert_same_tensors(tensors(tmp_path / "a"), tensors(tmp_path / "b"))
    assert json.loads((tmp_path / "b/config.json").read_text())["dtype"] == "bfloat16"
    wide = lab.from_pretrained(tmp_path / "a", dtype=torch.float32)
    assert {tensor.dtype for tensor in wide.state_dict().values()} == {torch.float32}
    assert all(p.requires_grad for p in wide.parameters()) and not any(b.is_meta for b in wide.buffers())
    narrow = lab.from_pretrained(tmp_path / "a", dtype=torch.float16)
    assert narrow.layers[0].mlp.router.classifier.weight.dtype == torch.float32 and narrow.lm_head.weight.dtype == torch.float16


def test_a_model_that_was_read_can_be_trained(tmp_path):
    lab.save_pretrained(built(config(embedding=NGRAM)), tmp_path / "a")
    model = lab.from_pretrained(tmp_path / "a").train()
    model(torch.randint(0, 300, (2, 9))).square().mean().backward()
    for module in model.modules():
        getattr(module, "after_step", lambda: None)()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


MEASURE = """
    import sys, torch
    from pathlib import Path
    import longcat_lab as lab

    def memory(key):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key + ":"))

    small, large, out = map(Path, sys.argv[1:])
    lab.save_pretrained(lab.from_pretrained(small), out / "small")  # what is loaded at first use
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    model = lab.from_pretrained(large)
    size = sum(t.nbytes for t in model.state_dict().values())
    read = memory("VmHWM") - before
    lab.save_pretrained(model, out / "large", transformers_zero_rows=False)
    print(size, read, memory("VmHWM") - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_is_that_of_the_model(tmp_path):
    """Peak of a process that reads and writes 160 MB in one file. (ru_maxrss would count the parent's memory before exec.)"""
    moe = {"n_routed_experts": 16, "zero_expert_num": 8, "expert_ffn_hidden_size": 512}
    with torch.device("meta"):
        large = LongcatLM(config(hidden_size=512, vocab_size=8192, moe=moe, ffn={"ffn_hidden_size": 1024}, num_layers=2)).to_empty(
            device="cpu"
        )
    with torch.no_grad():
        for parameter in large.parameters():
            parameter.fill_(1e-3)
    lab.save_pretrained(large, tmp_path / "large", transformers_zero_rows=False)
    lab.save_pretrained(built(config()), tmp_path / "small")
    del large
    command = [sys.executable, "-c", textwrap.dedent(MEASURE), tmp_path / "small", tmp_path / "large", tmp_path]
    (tmp_path / "out").mkdir()
    done = subprocess.run([*command[:-1], tmp_path / "out"], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    size, read, both = map(int, done.stdout.split())
    assert size > 150e6
    assert read < 1.5 * size and both < 1.5 * size, (size, read, both)
