"""Indexing and sparse attention in plain PyTorch: scores, selection, core. What is fast sits behind `ops.py`.

Shapes: B rows, T queries, S keys, H heads, K selected keys. Query t of a row stands at key S - T + t and sees the keys from `first`
(the start of its document) up to itself. A selection is int32 [B, T, K]: key numbers in rising order, -1 in front where fewer are
visible; so a window of the last W keys is its last W places.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longcat_lab.blocks.context import visible_keys


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


def select(rank: Tensor, visible: Tensor, topk: int, sinks: int = 0, window: int = 0) -> Tensor:
    """The keys that each query attends to: sinks, window, and the best of the rest, `topk` together (all where fewer are visible).

        S_t = first `sinks` visible keys + last `window` visible keys + argtop_(topk - sinks - window) of rank_{t,s} over the others

    Sinks are the document's first tokens and the window ends with the query's own position. Of equal ranks the earlier key goes first,
    so that the set does not depend on keys that are not visible. Without sinks and window this is DSA's rule.

    Args:
        rank: [B, T, S]; visible: bool [B or 1, T, S].
        topk: K, at least sinks + window.

    Returns:
        a selection, int32 [B, T, min(topk, S)].

    Source: DeepSeek-V3.2 report, eq. 2; LSA (arXiv 2608.01662), streaming-aware indexing.
    """
    if sinks or window:
        # A rank above all others takes a key in for certain. The two fixed sets overlap only where all is selected anyway.
        number = visible.cumsum(-1)  # 1 for the oldest visible key
        rank = rank.masked_fill((number <= sinks) | (number > number[..., -1:] - window), torch.inf)
    best = rank.masked_fill(~visible, -torch.inf).sort(dim=-1, descending=True, stable=True).indices[..., :topk]
    return best.masked_fill(~visible.expand_as(rank).gather(-1, best), -1).sort(-1).values.int()


def index_topk(
    q: Tensor, k: Tensor, w: Tensor, first: Tensor | None, topk: int, sinks: int = 0, window: int = 0, chunk: int = 256
) -> Tensor:
    """`select` by `index_scores`, `chunk` queries at a time: memory O(chunk H_I S), no gradient.

    Args:
        q, k, w: as in `index_scores`; first: as in `visible_keys`; topk, sinks, window: as in `select`.

    Returns:
        a selection, int32 [B, T, min(topk, S)].
    """
    queries, keys, parts = q.shape[1], k.shape[1], []
    with torch.no_grad():
        for begin in range(0, queries, chunk):
            end = min(begin + chunk, queries)
            seen = visible_keys(first, queries, keys, q.device, begin, end)
            parts.append(select(index_scores(q[:, begin:end], k, w[:, begin:end]), seen, topk, sinks, window))
    return torch.cat(parts, 1)


def rows(x: Tensor, indices: Tensor) -> Tensor:
    """The keys' rows of a selection: x [B, S, d] and indices [B, T, K] to [B, T, K, d]; row 0 where there is none."""
    wanted = indices.clamp(min=0).long().flatten(1)[..., None].expand(-1, -1, x.shape[-1])
    return x.gather(1, wanted).unflatten(1, indices.shape[1:])


def selected_scores(q: Tensor, k: Tensor, w: Tensor, indices: Tensor) -> Tensor:
    """I_{t,s} of `index_scores` at the selected keys alone, [B, T, K]; -inf where there is none. For small sizes: O(T K d_I) memory."""
    wide = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        products = q.to(wide) @ rows(k.to(wide), indices).transpose(-1, -2)  # [B, T, H_I, K]
        scores = (w.to(wide)[:, :, None] @ products.relu()).squeeze(2)
    return scores.masked_fill(indices < 0, -torch.inf)


def sparse_attention(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """o_{t,h} = sum_{s in S_t} a_{t,h,s} v_s,  a = softmax over S_t of scale q_{t,h} . k_s: one key and value for all heads.

    That is MLA in its absorbed form: k_s = [c_s ; k_rope_s], v_s = c_s. For small sizes: O(T K (d + d_v)) memory.

    Args:
        q: [B, T, H, d]; k: [B, S, d]; v: [B, S, d_v]; indices: a selection, at least one key a query.

    Returns:
        o [B, T, H, d_v]; and p_{t,s} = (1/H) sum_h a_{t,h,s}, [B, T, K], 0 where there is no key, without gradient.
    """
    scores = (q @ rows(k, indices).transpose(-1, -2)) * scale
    weights = scores.masked_fill((indices < 0)[:, :, None], -torch.inf).softmax(-1)
    return weights @ rows(v, indices), weights.detach().mean(2)


def merged_attention(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, scale: float, window: int) -> Tensor:
    """`sparse_attention` in two parts, as two streams make it: the window, and all other keys, each with a softmax of its own.

        o = sum_i exp(lse_i - lse) o_i,   lse = log sum_i exp(lse_i)

    is one softmax over both. A query without a key in a part gets nothing from it.

    Args:
        indices: a selection whose last `window` places are the window's; others: as in `sparse_attention`.

    Returns:
        o [B, T, H, d_v].

    Source: LSA (arXiv 2608.01662), the core that attends to window and selected tokens in two streams.
    """
    split, parts = indices.shape[-1] - window, []
    for own in (indices[..., :split], indices[..., split:]):
        scores = (q @ rows(k, own).transpose(-1, -2)) * scale
        scores = scores.masked_fill((own < 0)[:, :, None], torch.finfo(q.dtype).min)  # not -inf, whose softmax is no number
        there = (own >= 0).any(-1)[:, :, None]
        parts.append((scores.softmax(-1) @ rows(v, own), scores.logsumexp(-1).masked_fill(~there, -torch.inf)))
    total = torch.logaddexp(parts[0][1], parts[1][1])
    return sum((lse - total).exp()[..., None] * out for out, lse in parts)


def mean_selected(length: int, topk: int) -> float:
    """Mean over the positions t = 1 ... length of min(t, topk): keys that a query of one document attends to."""
    early = min(length, topk)
    return (early * (early + 1) / 2 + (length - early) * topk) / length
