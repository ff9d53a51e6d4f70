"""The operators of `op.py` by what is fastest here: compiled for a CPU, Triton on a GPU, the vendor's on an NPU, else plain PyTorch in
chunks of queries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from longcat_lab.blocks.sparse_attention import op
from longcat_lab.blocks.sparse_attention.hierarchical_op import hierarchical_topk as hierarchical_reference

CHUNK_ELEMENTS = 1 << 22  # of gathered rows at a time, where nothing better than plain PyTorch is there


def index_topk(q: Tensor, k: Tensor, w: Tensor, first: Tensor | None, topk: int, sinks: int = 0, window: int = 0) -> Tensor:
    """`op.index_topk`; near-ties may fall differently where sums are ordered differently."""
    with torch.no_grad():
        fast = _fast("index_topk", q, k, w) or _vendor("index_topk", q, k, w, first, topk, sinks, window) or op.index_topk
        return fast(q, k, w, first, topk, sinks, window)


def hierarchical_topk(q: Tensor, k: Tensor, w: Tensor, first: Tensor | None, topk: int, sinks: int, window: int, **pages: Any) -> Tensor:
    """`hierarchical_op.hierarchical_topk`, likewise."""
    with torch.no_grad():
        fast = _compiled("hierarchical_topk", q, k, w) or hierarchical_reference
        return fast(q, k, w, first, topk, sinks, window, **pages)


def selected_scores(q: Tensor, k: Tensor, w: Tensor, indices: Tensor) -> Tensor:
    """`op.selected_scores` in memory O(T K)."""
    fast = _fast("selected_scores", q, k, w)
    if fast is not None:
        return fast(q, k, w, indices)
    return _in_chunks(lambda q, w, indices: op.selected_scores(q, k, w, indices), k.shape[-1] + q.shape[2], q, w, indices)


def sparse_attention(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, scale: float, window: int = 0) -> tuple[Tensor, Tensor]:
    """`op.sparse_attention` in memory O(T (K + H d)), its backward too.

    Args:
        window: promise that each query's last places are the keys that end with itself, up to so many: they need not be fetched ahead.
    """
    fast = attention_for(q, k, v)
    if fast is not None:
        return fast(q, k, v, indices, scale, window)
    return _in_chunks(lambda q, indices: op.sparse_attention(q, k, v, indices, scale), k.shape[-1] + v.shape[-1] + q.shape[2], q, indices)


def attention_for(q: Tensor, k: Tensor, v: Tensor) -> Callable[..., Any] | None:
    """What `sparse_attention` uses for these; None: plain PyTorch."""
    return _fast("sparse_attention", q, k, v) or _vendor("sparse_attention", q, k, v)


def _fast(name: str, *tensors: Tensor) -> Callable[..., Any] | None:
    if tensors[0].device.type == "cpu":
        return _compiled(name, *tensors)
    try:
        from longcat_kernels import triton_indexing, triton_sparse_attention
    except ImportError:  # no Triton, or an installation of longcat_lab alone
        return None
    place = triton_sparse_attention if name == "sparse_attention" else triton_indexing
    return getattr(place, name) if triton_indexing.takes(*tensors) else None


def _vendor(name: str, *arguments: Any) -> Callable[..., Any] | None:
    """The operator that the accelerator's maker has, where its limits hold for these arguments."""
    if arguments[0].device.type == "cpu":
        return None
    try:
        from longcat_kernels import npu
    except ImportError:  # an installation of longcat_lab alone
        return None
    return getattr(npu, name) if getattr(npu, f"takes_{name}")(*arguments) else None


def _compiled(name: str, *tensors: Tensor) -> Callable[..., Any] | None:
    if any(0 in each.shape for each in tensors):
        return None
    try:
        import longcat_kernels
    except ImportError:  # an installation of longcat_lab alone
        return None
    return getattr(longcat_kernels, name) if longcat_kernels.takes(*tensors) else None


def _in_chunks(run: Callable[..., Any], width: int, *by_query: Tensor) -> Any:
    """`run` on some queries at a time; what a chunk gathers is gathered again in backward instead of being kept."""
    indices = by_query[-1]
    batch, queries, chosen = indices.shape
    chunk = max(1, CHUNK_ELEMENTS // (batch * chosen * width))
    if chunk >= queries:
        return run(*by_query)
    parts = [
        checkpoint(run, *(each[:, at : at + chunk] for each in by_query), use_reentrant=False, preserve_rng_state=False)
        for at in range(0, queries, chunk)
    ]
    if isinstance(parts[0], tuple):
        return tuple(torch.cat(each, 1) for each in zip(*parts, strict=True))
    return torch.cat(parts, 1)
