"""The lightning indexer in config.json, both ways: DeepSeek-V3.2's keys, and LongCat-2.0's and Flash-Lite-Sparse's."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from longcat_lab.blocks import BlockConfig
from longcat_lab.config.model import ModelConfig
from longcat_lab.model.pretrained.keys import Keys

SIZES = ("index_n_heads", "index_head_dim", "index_topk")
# What an attention without an indexer, and DeepSeek's with one, have of LongCat's additions.
# Settings without a key of their own, which config.json carries in a note: what is computed, and how an indexer goes on learning.
NOTED = ("index_query_latent", "index_score_scale", "index_mtp_newest", "hierarchical", "distill")
WITHOUT = {"index_init_tokens": 0, "index_local_tokens": 0, "cli_factor": 1, "dsa_mtp_cli": False}


def is_sparse(config: ModelConfig) -> bool:
    """Whether attention selects its keys by an indexer."""
    return config.attention.kind in ("dsa", "lsa")


def longcat_indexer(keys: Keys, names: Collection[str]) -> dict[str, Any]:
    """Settings of `lsa` beyond those of MLA; none where no key speaks of an indexer.

    LongCat-2.0 has `attention_method` MLA beside its indexer's keys, Flash-Lite-Sparse has LSA: the keys decide. What the published
    files leave out is taken from the engines that serve them: the indexer's RoPE is interleaved (`indexer_rope_interleave`), and a
    bias among the tensors tells LayerNorm from RMSNorm where `index_k_norm_type` is missing.

    Raises:
        LabError: some of the sizes are missing, or a key asks for what the attention does not have.
    """
    method = keys.get(str, "attention_method", default="MLA")
    if method not in ("MLA", "LSA"):
        raise keys.error(f"'attention_method' is {method!r}, which cannot be expressed: only MLA and LSA can.")
    if method == "MLA" and all(keys.data.get(name) is None for name in SIZES):
        keys.fixed("use_longcat_dsa", False)
        for name, value in WITHOUT.items():
            keys.fixed(name, value)
        return {}
    keys.fixed("use_longcat_dsa", True)
    layer_norm = any(name.endswith(".indexer.k_norm.bias") for name in names)
    return {
        "kind": "lsa",
        **{name: keys.get(int, name) for name in SIZES},
        **{name: keys.get(type(value), name, default=value) for name, value in WITHOUT.items()},
        "index_k_norm_type": keys.get(str, "index_k_norm_type", default="layer" if layer_norm else "rms"),
        "index_rope_layout": _layout(keys, True),
    }


def deepseek_indexer(keys: Keys) -> dict[str, Any]:
    """Settings of `dsa` beyond those of MLA; none where neither `model_type` nor a key speaks of an indexer.

    Raises:
        LabError: some of the sizes are missing, or a key asks for what these models do not have.
    """
    for name, value in WITHOUT.items():
        keys.fixed(name, value)
    if keys.data.get("model_type") != "deepseek_v32" and all(keys.data.get(name) is None for name in SIZES):
        return {}
    keys.fixed("index_k_norm_type", "layer")
    return {"kind": "dsa", **{name: keys.get(int, name) for name in SIZES}, "index_rope_layout": _layout(keys, False)}


def _layout(keys: Keys, default: bool) -> str:
    return "interleaved" if keys.get(bool, "indexer_rope_interleave", default=default) else "half-split"


def without_keys(attention: BlockConfig) -> dict[str, Any]:
    """Settings of an indexer that no published config.json has a key for, where they are not what the published models do."""
    own, fields = attention.to_dict(), type(attention).model_fields
    plain = {name: fields[name].get_default(call_default_factory=True) for name in NOTED}
    return {name: own[name] for name in NOTED if getattr(attention, name) != plain[name]}


def longcat_indexer_keys(attention: BlockConfig, refuse: Callable[[bool, str], None]) -> dict[str, Any]:
    """The keys of an attention with an indexer, as LongCat-2.0 and Flash-Lite-Sparse have them, and the layout of its RoPE.

    Raises:
        LabError: by way of `refuse`, for indexers at other places, and for selection without them.
    """
    refuse(attention.cli_offset > 0, f"attention.cli_offset {attention.cli_offset}")
    refuse(attention.selection.kind != "indexer", f"attention.selection.kind {attention.selection.kind}")
    return {
        "attention_method": "LSA",
        **{name: getattr(attention, name) for name in (*SIZES, *WITHOUT, "index_k_norm_type")},
        "indexer_rope_interleave": attention.index_rope_layout == "interleaved",
    }


def deepseek_indexer_keys(config: ModelConfig, refuse: Callable[[bool, str], None]) -> dict[str, Any]:
    """The keys of DeepSeek-V3.2.

    Raises:
        LabError: by way of `refuse`, for what V3.2 does not have.
    """
    a, steps = config.attention, config.mtp.num_nextn_predict_layers if config.mtp else 0
    refuse(a.index_init_tokens > 0, "attention.index_init_tokens")
    refuse(a.index_local_tokens > 0, "attention.index_local_tokens")
    refuse(a.cli_factor > 1, "attention.cli_factor above 1")
    refuse(a.selection.kind != "indexer", f"attention.selection.kind {a.selection.kind}")
    refuse(a.dsa_mtp_cli and steps > 1, "attention.dsa_mtp_cli for several steps")
    refuse(a.index_k_norm_type != "layer", f"attention.index_k_norm_type {a.index_k_norm_type}")
    refuse(a.index_rope_layout != "half-split", f"attention.index_rope_layout {a.index_rope_layout}")  # transformers has no other
    return {name: getattr(a, name) for name in SIZES}
