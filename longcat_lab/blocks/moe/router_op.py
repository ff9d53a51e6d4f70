"""Routing of LongCat-Flash: softmax scores, a bias for selection only, no renormalisation; and the rule that moves the bias."""

from __future__ import annotations

import torch
from torch import Tensor


def route_reference(u: Tensor, classifier: Tensor, bias: Tensor, topk: int, scale: float) -> tuple[Tensor, Tensor]:
    """p = softmax(W_r u) over all N + Z slots, S = TopK(p + b), g_i = scale * p_i for i in S.

    Args:
        u: [T, H] normed input; classifier: [N + Z, H]; both are taken to at least fp32.
        bias: [N + Z], moves the selection and never the weights; no gradient.
        topk: slots picked a token; scale: `routed_scaling_factor`.

    Returns:
        slots int64 [T, K] (N and above are zero-computation experts) and weights [T, K]. The gradient reaches the classifier
        through the picked p only.

    Source: LongCat-Flash (arXiv 2509.01322) section 2.1. This is also the fast form.
    """
    wide = torch.promote_types(u.dtype, torch.float32)
    scores = (u.to(wide) @ classifier.to(wide).T).softmax(-1)
    slots = torch.topk(scores.detach() + bias, topk, dim=-1).indices
    return slots, scale * scores.gather(-1, slots)


def budget_bias_step(counts: Tensor, tokens: int, topk: int, expected_real_experts: float, n_routed: int, rate: float) -> Tensor:
    """db_i = rate * (K_e / (K N) - T_i / (K T)) for the N real experts, 0 for the zero-computation ones.

    Its fixed point gives every real expert K_e / N of the tokens, hence K_e real experts a token in the mean.

    Args:
        counts: int64 [N + Z], tokens that picked each slot since the last step; tokens: T, their number.

    Returns:
        fp32 [N + Z].

    Source: LongCat-Flash eq. 2 (the integral rule of its budget controller).
    """
    step = rate * (expected_real_experts / (topk * n_routed) - counts.double() / (topk * tokens))
    step[n_routed:] = 0
    return step.float()
