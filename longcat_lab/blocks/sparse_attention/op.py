"""The lightning indexer's score and the selection it makes: the reference, O(T S), a mask over dense attention."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE in the half-split layout: the pairs are (0, d/2), (1, d/2 + 1), ...

    Args:
        x: [..., T, d]; cos, sin: [T, d / 2].

    Returns:
        [..., T, d], in the layout of x.
    """
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def index_scores(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    """I_{t,s} = sum_j w_{t,j} ReLU(q_{t,j} . k_s), for every pair of query t and key s, in at least fp32.

    Args:
        q: [B, T, H_I, d_I]; k: [B, S, d_I], one key for all heads; w: [B, T, H_I], any sign, with its scale factors in it.

    Returns:
        [B, T, S]; no mask is applied.

    Source: DeepSeek-V3.2 report, eq. 1.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):  # which would narrow the products again
        products = q.to(wide).flatten(1, 2) @ k.to(wide).transpose(1, 2)
        return (w.to(wide)[:, :, None] @ products.unflatten(1, q.shape[1:3]).relu()).squeeze(2)


def selection(scores: Tensor, visible: Tensor, topk: int, sinks: int = 0, window: int = 0) -> Tensor:
    """The keys that each query attends to: sinks, window, and the best of the rest, `topk` together (all where fewer are visible).

        S_t = first `sinks` visible keys + last `window` visible keys + argtop_(topk - sinks - window) of I_{t,s} over the others

    Visible keys of a query are those of its own document up to itself, so sinks are the document's first tokens and the window ends
    with the query's own position. Of equal scores the earlier key goes first, so that the set does not depend on keys that are not
    visible. Without sinks and window this is DSA's rule.

    Args:
        scores: [B, T, S]; visible: bool [B or 1, T, S].
        topk: K, at least sinks + window.

    Returns:
        bool [B, T, S], a part of `visible`.

    Source: DeepSeek-V3.2 report, eq. 2; LSA (arXiv 2608.01662), streaming-aware indexing.
    """
    if sinks or window:
        # A score above all others takes a key in for certain. The two fixed sets overlap only where all is selected anyway.
        number = visible.cumsum(-1)  # 1 for the oldest visible key
        fixed = (number <= sinks) | (number > number[..., -1:] - window)
        scores = scores.masked_fill(fixed, torch.inf)
    best = scores.masked_fill(~visible, -torch.inf).sort(dim=-1, descending=True, stable=True).indices[..., :topk]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True) & visible


def mean_selected(length: int, topk: int) -> float:
    """Mean over the positions t = 1 ... length of min(t, topk): keys that a query of one document attends to."""
    early = min(length, topk)
    return (early * (early + 1) / 2 + (length - early) * topk) / length
