"""The core of sparse attention, apart from its indexer, against dense attention of the same heads; LSA's core against DSA's."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Row, compare
from longcat_lab.blocks.mla.op import attention as dense
from longcat_lab.blocks.sparse_attention.ops import sparse_attention

HEADS, NOPE, ROPE, VALUE, LATENT = 8, 64, 32, 64, 128  # of the micro preset
TOPK, SINKS, WINDOW = 256, 16, 128
PAIRS = {4096: (5, 9), 8192: (3, 7), 16384: (2, 5)}  # of calls against dense attention (16 times the work at 16384), and of the two cores


def random_selection(length: int, topk: int, sinks: int = 0, window: int = 0, chunk: int = 256) -> Tensor:
    """int32 [1, L, K]: sinks, window, and of the other visible keys as many as there is room for, each equally likely."""
    parts = []
    for begin in range(0, length, chunk):
        query, key = torch.arange(begin, min(begin + chunk, length))[:, None], torch.arange(length)
        rank = torch.rand(len(query), length).masked_fill_((key < sinks) | (key > query - window), 2.0)
        values, best = rank.masked_fill_(key > query, -1.0).topk(min(topk, length), sorted=False)
        parts.append(best.masked_fill_(values < 0, -1).sort(-1).values.int())
    return torch.cat(parts)[None]


def _step(call: Callable[..., Tensor], *leaves: Tensor) -> Callable[[], None]:
    """Forward and backward with all gradients, which are let go before the next call as a training step does."""

    def run() -> None:
        for leaf in leaves:
            leaf.grad = None
        out = call(*leaves)
        out.backward(d_outs.setdefault(out.shape, torch.randn(out.shape)))

    d_outs: dict[torch.Size, Tensor] = {}
    return run


def _core(q: Tensor, k: Tensor, indices: Tensor, window: int) -> Callable[[], None]:
    scale = (NOPE + ROPE) ** -0.5
    return _step(lambda q, k: sparse_attention(q, k, k[..., :LATENT], indices, scale, window)[0], q, k)


def _torch(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """F.scaled_dot_product_attention, the value padded to the one width that its fused CPU kernel has."""
    v = F.pad(v, (0, q.shape[-1] - v.shape[-1]))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)[..., :VALUE]


def _masked(indices: Tensor) -> Callable[..., Tensor]:
    """Dense attention under a mask made of the selection: what one does without a sparse operator."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = torch.full((1, indices.shape[1], indices.shape[1] + 1), -torch.inf)  # -1 falls into the last column
        return _torch(q, k, v, mask.scatter_(2, indices.long() % mask.shape[2], 0.0)[:, None, :, :-1])

    return call


def sparse_core() -> Iterator[Row]:
    """Forward and backward in fp32, batch 1, K = 256. Sparse: absorbed, one latent key of width 160 for all heads, its first 128 columns
    the value. Dense: expanded, keys of width 96 and values of width 64 a head, causal. The products between the two forms are in neither.
    """
    for length, (pairs, pairs_of_cores) in PAIRS.items():
        q, k = torch.randn(1, length, HEADS, LATENT + ROPE, requires_grad=True), torch.randn(1, length, LATENT + ROPE, requires_grad=True)
        expanded = [torch.randn(1, HEADS, length, width, requires_grad=True) for width in (NOPE + ROPE, NOPE + ROPE, VALUE)]
        selection = random_selection(length, TOPK)
        dsa = "DSA core", _core(q, k, selection, 0)
        lsa = "LSA core", _core(q, k, random_selection(length, TOPK, SINKS, WINDOW), WINDOW)
        yield compare(f"sparse_core/{length}", lsa, dsa, pairs_of_cores)
        yield compare(f"sparse_core/{length}", dsa, ("torch's SDPA, padded", _step(_torch, *expanded)), pairs)
        if length < 16384:
            own = _step(lambda q, k, v: dense(q, k, v, None), *expanded)
            yield compare(f"sparse_core/{length}", dsa, ("dense as chosen here", own), pairs)
        if length == 4096:
            yield compare(f"sparse_core/{length}", dsa, ("SDPA under a mask", _step(_masked(selection), *expanded)), pairs=2)
