"""Keeping the load: the rule that moves the router's bias to the budget K_e, and the device-level balance loss."""

from __future__ import annotations

import torch
from torch import Tensor


def budget_error(counts: Tensor, tokens: int, topk: int, expected_real_experts: float, n_routed: int) -> Tensor:
    """e_i = K_e / (K N) - T_i / (K T) for the N real experts, 0 for the zero-computation ones.

    Where it stands at zero, every real expert gets K_e / N of the tokens, hence K_e real experts a token in the mean.

    Args:
        counts: int64 [N + Z], tokens that picked each slot since the last update; tokens: T, their number.

    Returns:
        float64 [N + Z].

    Source: LongCat-Flash (arXiv 2509.01322) eq. 2, without its rate.
    """
    error = expected_real_experts / (topk * n_routed) - counts.double() / (topk * tokens)
    error[n_routed:] = 0
    return error


def controller_step(errors: Tensor, k_p: float, k_i: float, k_d: float) -> Tensor:
    """db = k_p (e_t - e_{t-1}) + k_i e_t + k_d (e_t - 2 e_{t-1} + e_{t-2}): one step of b = k_p e + k_i sum(e) + k_d (e_t - e_{t-1}).

    Written as a step, so that gains may decay while b keeps what it has. (0, rate, 0) is LongCat's rule.

    Args:
        errors: [3, N + Z], e_t, e_{t-1}, e_{t-2}; zeros before the first.
    """
    now, before, earlier = errors
    return k_p * (now - before) + k_i * now + k_d * (now - 2 * before + earlier)


def sign_step(counts: Tensor, rate: float) -> Tensor:
    """db_i = rate * sign(mean_j T_j - T_i) over all N + Z slots: the usual rule, whose target is the uniform share.

    It cannot hold a budget other than K N / (N + Z), and its step does not shrink with the error.
    Source: DeepSeek-V3 (arXiv 2412.19437) section 2.1.2.
    """
    return rate * torch.sign(counts.double().mean() - counts.double())


def balance_loss(
    p: Tensor,
    counts: Tensor,
    groups: int,
    expected_real_experts: float,
    topk: int,
    n_routed: int,
    tokens: float | None = None,
) -> tuple[Tensor, Tensor]:
    """L = sum_j f_j P_j over D groups of real experts and one of all zero-computation experts; 1 where all is balanced.

        P_j = (1 / T) sum_{i in G_j} sum_t p_ti,   f_j = D / (K_e T) picks in G_j,   f_zero = 1 / ((K - K_e) T) picks in Z

    Args:
        p: [T, N + Z], rows sum to 1; counts: int64 [N + Z], picks of these T tokens (slots, not tokens that picked a group).
        groups: D, the devices that the real experts lie on; divides n_routed.
        tokens: T that both means are over, where that is not the number of rows of p (others hold the rest of the batch, and `counts` is
            the mean over the holders).

    Returns:
        the loss, and the gradient f_group(i) of L by each mean probability, [N + Z].

    Source: LongCat-Flash (arXiv 2509.01322), device-level load balance loss.
    """
    tokens, zeros = max(len(p) if tokens is None else tokens, 1), len(counts) - n_routed  # a batch of nothing but padding: 0
    real = groups / (expected_real_experts * tokens) * counts[:n_routed].view(groups, -1).sum(1)
    shares = [real.repeat_interleave(n_routed // groups)]
    if zeros:
        shares.append((counts[n_routed:].sum() / (max(topk - expected_real_experts, 1e-9) * tokens)).expand(zeros))
    f = torch.cat(shares).to(p.dtype)
    return f @ (p.sum(0) / tokens), f


class _AddLoss(torch.autograd.Function):
    """Identity on `carrier`; in backward `loss` gets the gradient `weight`, as if weight * loss were part of the step's loss."""

    @staticmethod
    def forward(carrier: Tensor, loss: Tensor, weight: float) -> Tensor:
        return carrier.view_as(carrier)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.weight, ctx.dtype = inputs[2], inputs[1].dtype

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        return gradient, torch.full((), ctx.weight, dtype=ctx.dtype, device=gradient.device), None


def add_loss(carrier: Tensor, loss: Tensor, weight: float) -> Tensor:
    """`carrier` unchanged; whatever is computed from it, backward through it also adds the gradient of weight * loss (a scalar).

    So a layer can have a loss of its own wherever it stands, without anyone collecting it (a pipeline stage, a recomputed layer).
    """
    return _AddLoss.apply(carrier, loss, weight)
