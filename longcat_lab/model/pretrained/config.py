"""config.json to ModelConfig, for the two families of names."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any, Literal

from longcat_lab.config.model import ModelConfig
from longcat_lab.model.pretrained.keys import Keys
from longcat_lab.model.pretrained.rope import rope_settings
from longcat_lab.model.pretrained.sparse import NOTED, deepseek_indexer, longcat_indexer
from longcat_lab.node import ConfigError, validate_node

Naming = Literal["longcat", "deepseek"]

LATENT_NORM_EPS = 1e-6  # transformers' default of its norm class, which it leaves alone for the two latents
OWN_KEY = "longcat_lab"  # in config.json: settings that change what is computed and have no key of their own there
FAMILIES: dict[str, Naming] = {
    **dict.fromkeys(("longcat_flash", "longcat_flash_ngram"), "longcat"),
    **dict.fromkeys(("deepseek_v3", "deepseek_v32"), "deepseek"),
}
MTP_TABLE = re.compile(r"(model\.mtp\.(?:.+\.)?)(?:oe_embed_tokens0|ngram_embeddings\.embedders\.0)\.weight")  # group 1: its place


def family(keys: Keys) -> Naming:
    """Whose names a checkpoint has: by `model_type`, or by its keys where that is null or left out (LongCat's sparse models).

    Raises:
        LabError: a family that cannot be read.
    """
    kind = keys.get(str, "model_type", default=None)
    if kind is None and {"expert_ffn_hidden_size", "zero_expert_num", "moe_topk"} <= set(keys.data):
        return "longcat"
    if kind not in FAMILIES:
        raise keys.error(f"model_type {kind!r} cannot be read, only {', '.join(FAMILIES)} can, and LongCat-2.0's keys without one.")
    return FAMILIES[kind]


def model_config(keys: Keys, names: Collection[str], latent_norm_eps: float | None = None) -> tuple[ModelConfig, Naming]:
    """The model that a config.json describes.

    Args:
        keys: of the file.
        names: of all tensors: whether the prediction module is there is told by them alone, since transformers writes its keys
            without its tensors, and Flash was published with its tensors and without the keys.
        latent_norm_eps: of the latents' norms; None: what `save_pretrained` noted in the file, else 1e-6.

    Raises:
        LabError: a key is missing, has a wrong type, or asks for what the model cannot express.
    """
    naming = family(keys)
    noted = keys.get(dict, OWN_KEY, default={})
    length = keys.get(int, "max_position_embeddings")
    eps = latent_norm_eps if latent_norm_eps is not None else noted.get("latent_norm_eps", LATENT_NORM_EPS)
    nope, rope = keys.get(int, "qk_nope_head_dim"), keys.get(int, "qk_rope_head_dim")
    heads = keys.get(int, "num_attention_heads")
    keys.equal("num_key_value_heads", heads)
    keys.equal("qk_head_dim", nope + rope)
    keys.equal("head_dim", rope, nope + rope)
    data: dict[str, Any] = {
        "hidden_size": keys.get(int, "hidden_size"),
        "vocab_size": keys.get(int, "vocab_size"),
        "max_position_embeddings": length,
        "initializer_range": keys.get(float, "initializer_range", default=0.02),
        "rope": rope_settings(keys, length),
        "norm": {"kind": "rms_norm", "eps": keys.get(float, "rms_norm_eps")},
        "attention": {
            "kind": "mla",
            "num_attention_heads": heads,
            "q_lora_rank": keys.get(int, "q_lora_rank", default=None),
            "kv_lora_rank": keys.get(int, "kv_lora_rank"),
            "qk_nope_head_dim": nope,
            "qk_rope_head_dim": rope,
            "v_head_dim": keys.get(int, "v_head_dim"),
            "latent_norm_eps": eps,
        },
    }
    (_longcat if naming == "longcat" else _deepseek)(keys, data, names)
    if data.get("mtp"):
        # The released engines hand the trunk's normed state to the first step.
        data["mtp"]["hidden"] = noted.get("mtp_hidden", "normed")
        data["mtp"]["own_embedding"] = naming == "longcat" and noted.get("mtp_own_embedding", True)
    if data["attention"]["kind"] in ("dsa", "lsa"):
        data["attention"].update({name: noted[name] for name in NOTED if name in noted})
    keys.finish()
    try:
        return validate_node(ModelConfig, data), naming
    except ConfigError as error:
        raise keys.error(f"as settings of a model: {error}") from None


def _longcat(keys: Keys, data: dict[str, Any], names: Collection[str]) -> None:
    layers = keys.get(int, "num_layers")
    keys.equal("num_hidden_layers", layers, 2 * layers)
    data["num_layers"] = layers
    data["layer"] = {"kind": "scmoe"}
    data["ffn"] = {"kind": "swiglu", "ffn_hidden_size": keys.get(int, "ffn_hidden_size", "intermediate_size")}
    scales = {name: keys.get(bool, name, default=True) for name in ("mla_scale_q_lora", "mla_scale_kv_lora")}
    data["attention"].update(scales, **longcat_indexer(keys, names))
    data["moe"] = {
        "kind": "moe",
        "n_routed_experts": keys.get(int, "n_routed_experts"),
        "zero_expert_num": keys.get(int, "zero_expert_num", default=0),
        "zero_expert_type": keys.get(str, "zero_expert_type", default="identity"),
        "moe_topk": keys.get(int, "moe_topk", "num_experts_per_tok"),
        "expert_ffn_hidden_size": keys.get(int, "expert_ffn_hidden_size", "moe_intermediate_size"),
        "routed_scaling_factor": keys.get(float, "routed_scaling_factor"),
        "norm_topk_prob": keys.get(bool, "norm_topk_prob", default=False),
    }
    keys.fixed("n_shared_experts", 0)
    keys.equal("scoring_func", "softmax")
    ratio = keys.get(float, "ngram_vocab_size_ratio", "oe_vocab_size_ratio", default=None)
    order, splits = (keys.get(int, f"emb_{name}", f"oe_{name}", default=None) for name in ("neighbor_num", "split_num"))
    if ratio is not None or order is not None or splits is not None:
        if ratio is None or order is None or splits is None:
            raise keys.error("of the n-gram embedding's ratio, neighbor_num and split_num only some are given: give all three or none.")
        ngram = {"kind": "ngram_embedding", "order": order, "splits": splits, "vocab_ratio": ratio, "normalised_init": "none"}
        end = keys.data.get("eos_token_id")  # the released code ends n-grams there; several ids are said as a list
        if isinstance(end, list) and len(end) == 1 and type(end[0]) is int:
            ngram |= {"boundary": "eos", "eos_token_id": end[0]}
        elif end is not None and not isinstance(end, list):
            ngram |= {"boundary": "eos", "eos_token_id": keys.get(int, "eos_token_id")}
        elif end:
            raise keys.error(f"'eos_token_id' is {end!r}, but n-grams can end at one id only: leave one.")
        data["embedding"] = {"kind": "token", "ngram": ngram}
    steps = keys.get(int, "num_nextn_predict_layers", "mtp_num_layers", default=1)
    replicated = keys.get(bool, "mtp_replicate_modules", default=False)
    if any(name.startswith("model.mtp.") for name in names):
        if steps < 1:
            raise keys.error(f"'num_nextn_predict_layers' is {steps}, but the files hold a prediction module: leave the key out.")
        if steps > 1 and not replicated:
            raise keys.error(f"{steps} prediction steps with mtp_replicate_modules false cannot be read: only one repeated block can.")
        data["mtp"] = {"kind": "mtp", "num_nextn_predict_layers": steps, "repeat_block": True, "block": "dense"}
        if any(MTP_TABLE.fullmatch(name) for name in names):
            keys.fixed("mtp_disable_over_tokenizer", True)  # the tables are carried, not read
            data["mtp"]["own_ngram_tables"] = True


def _deepseek(keys: Keys, data: dict[str, Any], names: Collection[str]) -> None:
    layers = data["num_layers"] = keys.get(int, "num_hidden_layers")
    data["layer"] = {"kind": "decoder", "first_k_dense_replace": _dense_layers(keys, layers)}
    data["ffn"] = {"kind": "swiglu", "ffn_hidden_size": keys.get(int, "intermediate_size")}
    data["attention"].update(mla_scale_q_lora=False, mla_scale_kv_lora=False, **deepseek_indexer(keys))
    groups = keys.get(int, "n_group", default=1)
    data["moe"] = {
        "kind": "moe",
        "n_routed_experts": keys.get(int, "n_routed_experts"),
        "zero_expert_num": 0,
        "moe_topk": keys.get(int, "num_experts_per_tok"),
        "expert_ffn_hidden_size": keys.get(int, "moe_intermediate_size"),
        "n_shared_experts": keys.get(int, "n_shared_experts", default=0),
        "scoring_func": "sigmoid",
        "norm_topk_prob": keys.get(bool, "norm_topk_prob", default=True),
        "n_group": groups,
        "topk_group": keys.get(int, "topk_group", default=groups),
        "routed_scaling_factor": keys.get(float, "routed_scaling_factor"),
        # How it was trained (arXiv 2412.19437 section 4.2), should training go on.
        "bias_rule": "sign",
        "bias_update_rate": 0.001,
    }
    keys.equal("scoring_func", "sigmoid")
    keys.equal("topk_method", "noaux_tc")
    keys.fixed("zero_expert_num", 0)
    steps = keys.get(int, "num_nextn_predict_layers", "num_mtp_layers", default=None)
    found = 0
    while any(name.startswith(f"model.layers.{layers + found}.") for name in names):
        found += 1
    if found:
        if steps is not None and steps != found:
            raise keys.error(f"'num_nextn_predict_layers' is {steps}, but the files hold {found} layers after the last: make them agree.")
        data["mtp"] = {"kind": "mtp", "num_nextn_predict_layers": found, "repeat_block": False, "block": "layer"}


def _dense_layers(keys: Keys, layers: int) -> int:
    """First layers without a mixture: `mlp_layer_types` where transformers wrote it (it is what counts there), else by their number."""
    dense, kinds = keys.get(int, "first_k_dense_replace", default=0), keys.get(list, "mlp_layer_types", default=None)
    if kinds is not None:
        dense = kinds.index("sparse") if "sparse" in kinds else len(kinds)
        if kinds != ["dense"] * dense + ["sparse"] * (layers - dense):
            raise keys.error(f"'mlp_layer_types' must be {layers} words, 'dense' for the first layers and 'sparse' for all others.")
    if any(kind != "indexed_attention" for kind in keys.get(list, "layer_types", default=[])):
        raise keys.error("'layer_types' names another kind than 'indexed_attention', which cannot be expressed: leave it out.")
    return dense
