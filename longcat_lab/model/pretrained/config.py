"""config.json to ModelConfig and back, for the two families of names."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Literal

from longcat_lab.config.model import ModelConfig
from longcat_lab.errors import LabError
from longcat_lab.model.pretrained.keys import Keys
from longcat_lab.model.pretrained.rope import rope_keys, rope_settings
from longcat_lab.node import ConfigError, validate_node

Naming = Literal["longcat", "deepseek"]

LATENT_NORM_EPS = 1e-6  # transformers' default of its norm class, which it leaves alone for the two latents
OWN_KEY = "longcat_lab"  # in config.json: settings that change what is computed and have no key of their own there
FAMILIES: dict[str, Naming] = {"longcat_flash": "longcat", "longcat_flash_ngram": "longcat", "deepseek_v3": "deepseek"}


def family(keys: Keys) -> Naming:
    """Whose names a checkpoint has: by `model_type`, or by its keys where that is null (LongCat-2.0).

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
    data["attention"].update(scales)
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
        ngram = {"kind": "ngram_embedding", "order": order, "splits": splits, "vocab_ratio": ratio, "normalised_init": False}
        data["embedding"] = {"kind": "token", "ngram": ngram}
    steps = keys.get(int, "num_nextn_predict_layers", "mtp_num_layers", default=1)
    replicated = keys.get(bool, "mtp_replicate_modules", default=False)
    if any(name.startswith("model.mtp.") for name in names):
        if steps < 1:
            raise keys.error(f"'num_nextn_predict_layers' is {steps}, but the files hold a prediction module: leave the key out.")
        if steps > 1 and not replicated:
            raise keys.error(f"{steps} prediction steps with mtp_replicate_modules false cannot be read: only one repeated block can.")
        data["mtp"] = {"kind": "mtp", "num_nextn_predict_layers": steps, "repeat_block": True, "block": "dense"}


def _deepseek(keys: Keys, data: dict[str, Any], names: Collection[str]) -> None:
    layers = data["num_layers"] = keys.get(int, "num_hidden_layers")
    data["layer"] = {"kind": "decoder", "first_k_dense_replace": keys.get(int, "first_k_dense_replace", default=0)}
    data["ffn"] = {"kind": "swiglu", "ffn_hidden_size": keys.get(int, "intermediate_size")}
    data["attention"].update(mla_scale_q_lora=False, mla_scale_kv_lora=False)
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


def config_json(config: ModelConfig, naming: Naming) -> dict[str, Any]:
    """The config.json of a model, with the keys of the published ones.

    Raises:
        LabError: the model has a part that this family cannot describe.
    """
    c, a, m, mtp = config, config.attention, config.moe, config.mtp
    refuse = _refusals(naming)
    for role, kinds in (("attention", ["mla"]), ("rope", ["rope", "yarn"]), ("norm", ["rms_norm"]), ("ffn", ["swiglu"]), ("moe", ["moe"])):
        refuse(getattr(c, role).kind not in kinds, f"{role}.kind {getattr(c, role).kind}")
    refuse(c.embedding.kind != "token", f"embedding.kind {c.embedding.kind}")
    refuse(mtp is not None and mtp.own_ngram_tables, "mtp.own_ngram_tables")
    data = {
        "hidden_size": c.hidden_size,
        "vocab_size": c.vocab_size,
        "max_position_embeddings": c.max_position_embeddings,
        "initializer_range": c.initializer_range,
        "rms_norm_eps": c.norm.eps,
        "num_attention_heads": a.num_attention_heads,
        "num_key_value_heads": a.num_attention_heads,
        "q_lora_rank": a.q_lora_rank,
        "kv_lora_rank": a.kv_lora_rank,
        "qk_nope_head_dim": a.qk_nope_head_dim,
        "qk_rope_head_dim": a.qk_rope_head_dim,
        "head_dim": a.qk_rope_head_dim,  # transformers turns this width
        "v_head_dim": a.v_head_dim,
        "n_routed_experts": m.n_routed_experts,
        "routed_scaling_factor": m.routed_scaling_factor,
        "norm_topk_prob": m.norm_topk_prob,
        "num_nextn_predict_layers": mtp.num_nextn_predict_layers if mtp else 0,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "use_cache": True,
        **rope_keys(c.rope),
    }
    data.update((_longcat_json if naming == "longcat" else _deepseek_json)(c, refuse))
    noted: dict[str, Any] = {}
    if a.latent_norm_eps != LATENT_NORM_EPS:
        noted["latent_norm_eps"] = c.norm.eps if a.latent_norm_eps is None else a.latent_norm_eps
    if mtp is not None and mtp.hidden != "normed":
        noted["mtp_hidden"] = mtp.hidden
    if mtp is not None and naming == "longcat" and not mtp.own_embedding and not folds_scale(c):
        noted["mtp_own_embedding"] = False
    return {**data, OWN_KEY: noted} if noted else data


def folds_scale(config: ModelConfig) -> bool:
    """Whether the n-gram mean has a scale of its own, which no key describes: it is multiplied into the weights that are written."""
    ngram = getattr(config.embedding, "ngram", None)
    return ngram is not None and ngram.normalised_init


def _refusals(naming: Naming) -> Callable[[bool, str], None]:
    def refuse(when: bool, what: str) -> None:
        if when:
            raise LabError(f"A checkpoint with {naming} names cannot describe model.{what}: change that, or keep the run's own checkpoint.")

    return refuse


def _longcat_json(c: ModelConfig, refuse: Callable[[bool, str], None]) -> dict[str, Any]:
    a, m, mtp, ngram = c.attention, c.moe, c.mtp, getattr(c.embedding, "ngram", None)
    refuse(c.layer.kind != "scmoe", f"layer.kind {c.layer.kind}")
    refuse(m.scoring_func != "softmax", f"moe.scoring_func {m.scoring_func}")
    refuse(m.topk_group < m.n_group, "moe.topk_group below n_group")
    refuse(m.n_shared_experts > 0, "moe.n_shared_experts")
    refuse(mtp is not None and mtp.block != "dense", "mtp.block layer")
    refuse(mtp is not None and mtp.blocks > 1, "mtp.repeat_block false")
    data: dict[str, Any] = {
        "model_type": "longcat_flash_ngram" if ngram else "longcat_flash",
        "architectures": ["LongcatFlashNgramForCausalLM" if ngram else "LongcatFlashForCausalLM"],
        "attention_method": "MLA",
        "num_layers": c.num_layers,
        "ffn_hidden_size": c.ffn.ffn_hidden_size,
        "expert_ffn_hidden_size": m.expert_ffn_hidden_size,
        "moe_topk": m.moe_topk,
        "zero_expert_num": m.zero_expert_num,
        "zero_expert_type": m.zero_expert_type,
        "router_bias": False,
        "mla_scale_q_lora": a.mla_scale_q_lora,
        "mla_scale_kv_lora": a.mla_scale_kv_lora,
    }
    if mtp is not None and mtp.num_nextn_predict_layers > 1:
        data |= {"mtp_num_layers": mtp.num_nextn_predict_layers, "mtp_replicate_modules": True}
    if ngram:
        data |= {"ngram_vocab_size_ratio": ngram.vocab_ratio, "emb_neighbor_num": ngram.order, "emb_split_num": ngram.splits}
    return data


def _deepseek_json(c: ModelConfig, refuse: Callable[[bool, str], None]) -> dict[str, Any]:
    a, m, mtp = c.attention, c.moe, c.mtp
    refuse(c.layer.kind != "decoder", f"layer.kind {c.layer.kind}")
    refuse(m.scoring_func != "sigmoid", f"moe.scoring_func {m.scoring_func}")
    refuse(m.zero_expert_num > 0, "moe.zero_expert_num")
    refuse(a.mla_scale_q_lora and a.q_lora_rank is not None, "attention.mla_scale_q_lora")
    refuse(a.mla_scale_kv_lora, "attention.mla_scale_kv_lora")
    refuse(c.embedding.ngram is not None, "embedding.ngram")
    refuse(mtp is not None and mtp.block != "layer", "mtp.block dense")
    refuse(mtp is not None and mtp.own_embedding, "mtp.own_embedding")
    refuse(mtp is not None and mtp.blocks != mtp.num_nextn_predict_layers, "mtp.repeat_block for several steps")
    return {
        "model_type": "deepseek_v3",
        "architectures": ["DeepseekV3ForCausalLM"],
        "num_hidden_layers": c.num_layers,
        "intermediate_size": c.ffn.ffn_hidden_size,
        "moe_intermediate_size": m.expert_ffn_hidden_size,
        "num_experts_per_tok": m.moe_topk,
        "n_shared_experts": m.n_shared_experts,
        "first_k_dense_replace": c.layer.first_k_dense_replace,
        "n_group": m.n_group,
        "topk_group": m.topk_group,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "rope_interleave": True,
    }
