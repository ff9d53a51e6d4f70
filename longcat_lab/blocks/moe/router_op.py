"""Routing: which slots a token takes, with what weights; LongCat's form and DeepSeek's."""

from __future__ import annotations

import torch
from torch import Tensor


def route_reference(
    u: Tensor,
    classifier: Tensor,
    bias: Tensor,
    topk: int,
    scale: float,
    scoring: str = "softmax",
    renormalise: bool = False,
    groups: int = 1,
    topk_groups: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """p = softmax(W_r u) over all N + Z slots, S = TopK(p + b), g_i = scale * p_i for i in S.

    Args:
        u: [T, H] normed input; classifier: [N + Z, H]; both are taken to at least fp32.
        bias: [N + Z], moves the selection and never the weights; no gradient.
        topk: slots picked a token; scale: `routed_scaling_factor`.
        scoring: `softmax` (LongCat), or `sigmoid` of each slot alone (DeepSeek-V3).
        renormalise: divide the picked p by their sum (DeepSeek-V3's `norm_topk_prob`), before the scale.
        groups, topk_groups: pick only inside the `topk_groups` groups with the largest sum of their two best p + b.

    Returns:
        slots int64 [T, K] (N and above are zero-computation experts), weights [T, K], and p [T, N + Z]. The gradient reaches the
        classifier through the picked p only.

    Source: LongCat-Flash (arXiv 2509.01322) section 2.1; DeepSeek-V3 (arXiv 2412.19437) eq. 12 to 16. This is also the fast form.
    """
    wide = torch.promote_types(u.dtype, torch.float32)
    logits = u.to(wide) @ classifier.to(wide).T
    p = logits.softmax(-1) if scoring == "softmax" else logits.sigmoid()
    slots = pick(p.detach() + bias, topk, groups, topk_groups)
    return slots, weigh(p, slots, scale, renormalise), p


def pick(choice: Tensor, topk: int, groups: int = 1, topk_groups: int = 1) -> Tensor:
    """The `topk` largest of choice [T, N + Z], int64 [T, K]; only inside the best `topk_groups` of `groups` equal groups."""
    if topk_groups < groups:
        split = choice.unflatten(-1, (groups, -1))
        best = split.topk(2, dim=-1).values.sum(-1).topk(topk_groups, dim=-1).indices
        kept = torch.zeros_like(split[..., 0], dtype=torch.bool).scatter(-1, best, True)
        choice = split.masked_fill(~kept[..., None], -torch.inf).flatten(-2)
    return torch.topk(choice, topk, dim=-1).indices


def weigh(p: Tensor, slots: Tensor, scale: float, renormalise: bool = False) -> Tensor:
    """g = scale * p at the picked slots, divided by their sum where asked for. [T, K]."""
    weights = p.gather(-1, slots)
    if renormalise:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return scale * weights
