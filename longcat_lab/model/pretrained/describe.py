"""ModelConfig to config.json, for the two families of names."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from longcat_lab.config.model import ModelConfig
from longcat_lab.errors import LabError
from longcat_lab.model.pretrained.config import LATENT_NORM_EPS, OWN_KEY, Naming
from longcat_lab.model.pretrained.rope import rope_keys
from longcat_lab.model.pretrained.sparse import deepseek_indexer_keys, is_sparse, longcat_indexer_keys, without_keys

KINDS = {  # of each role, those that checkpoints can describe
    "attention": ("mla", "dsa", "lsa"),
    "rope": ("rope", "yarn"),
    "norm": ("rms_norm",),
    "ffn": ("swiglu",),
    "moe": ("moe",),
}


def config_json(config: ModelConfig, naming: Naming) -> dict[str, Any]:
    """The config.json of a model, with the keys of the published ones.

    Raises:
        LabError: the model has a part that this family cannot describe.
    """
    c, a, m, mtp = config, config.attention, config.moe, config.mtp
    refuse = _refusals(naming)
    for role, kinds in KINDS.items():
        refuse(getattr(c, role).kind not in kinds, f"{role}.kind {getattr(c, role).kind}")
    refuse(c.embedding.kind != "token", f"embedding.kind {c.embedding.kind}")
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
    if mtp is not None and naming == "longcat" and not mtp.own_embedding and math.isclose(fold_factors(c)[0], 1):
        noted["mtp_own_embedding"] = False
    if is_sparse(c):
        noted.update(without_keys(a))
    return {**data, OWN_KEY: noted} if noted else data


def fold_factors(config: ModelConfig) -> tuple[float, float]:
    """What the token's rows and the projections are multiplied by when they are written: checkpoints know the plain mean alone.

    c (a E_0 + b W r) is the mean of (E + 1) c a E_0 and (E + 1) c b W, so every fusion and a constant amplifier can be written.
    """
    ngram = getattr(config.embedding, "ngram", None)
    if ngram is None or not hasattr(ngram, "output_scales"):
        return 1.0, 1.0
    a, b, _ = ngram.output_scales(config.hidden_size)
    return a * (ngram.tables + 1), b * (ngram.tables + 1)


def _ngram_json(c: ModelConfig, refuse: Callable[[bool, str], None]) -> dict[str, Any]:
    ngram, place = c.embedding.ngram, "embedding.ngram"
    kinds = ("ngram_embedding", "ngram_sum", "ngram_amplified")
    refuse(ngram.kind not in kinds, f"{place}.kind {ngram.kind}")
    refuse(ngram.hash != "polynomial" or ngram.prime_sizes, f"{place}.hash other than polynomial with staggered sizes")
    refuse(ngram.table_rows is not None or ngram.table_width is not None, f"{place}.table_rows or table_width")
    refuse(ngram.pad != "zero", f"{place}.pad {ngram.pad}")
    refuse(ngram.boundary == "none" or not ngram.eos_looks_back, f"{place}.boundary none, or an end of sequence that does not look back")
    refuse(ngram.amplifier == "layer_norm", f"{place}.amplifier layer_norm")
    refuse(ngram.injection_layers != [0], f"{place}.injection_layers")
    ratio, prefix = ("oe_vocab_size_ratio", "oe") if is_sparse(c) else ("ngram_vocab_size_ratio", "emb")
    ends = {"eos_token_id": ngram.eos_token_id} if ngram.boundary == "eos" else {}
    return {ratio: ngram.vocab_ratio, f"{prefix}_neighbor_num": ngram.order, f"{prefix}_split_num": ngram.splits, **ends}


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
    if is_sparse(c):  # published without a model_type
        data |= {"architectures": ["LongcatCausalLM"], **longcat_indexer_keys(a, refuse)}
    else:
        data["model_type"] = "longcat_flash_ngram" if ngram else "longcat_flash"
    if mtp is not None and mtp.num_nextn_predict_layers > 1:
        data |= {"mtp_num_layers": mtp.num_nextn_predict_layers, "mtp_replicate_modules": True}
    if ngram:
        data |= _ngram_json(c, refuse)
        if mtp is not None and mtp.own_ngram_tables:
            data["mtp_disable_over_tokenizer"] = True
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
    sparse = deepseek_indexer_keys(c, refuse) if is_sparse(c) else {"rope_interleave": True}
    return {
        "model_type": "deepseek_v32" if is_sparse(c) else "deepseek_v3",
        "architectures": ["DeepseekV32ForCausalLM" if is_sparse(c) else "DeepseekV3ForCausalLM"],
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
        **sparse,
    }
