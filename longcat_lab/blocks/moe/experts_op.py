"""Weighted sum of the picked experts; picks of identity experts cost one addition and no matrix product."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor


def experts_reference(u: Tensor, slots: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """MoE(u_t) = sum_{i in S_t, i < N} g_ti FFN_i(u_t) + (sum_{i in S_t, i >= N} g_ti) u_t.

    Args:
        u: [T, H]; slots: int64 [T, K]; weights: [T, K].
        gate_up: [N, 2 F, H] (gate rows first); down: [N, H, F].

    Returns:
        [T, H], in u's dtype.

    Source: LongCat-Flash (arXiv 2509.01322) eq. 1; an identity expert returns the MoE's own (normed) input.
    """
    n_routed = gate_up.shape[0]
    out = (weights * (slots >= n_routed)).sum(-1, keepdim=True).to(u.dtype) * u
    for i in range(n_routed):
        token, pick = torch.where(slots == i)
        gate, up = F.linear(u[token], gate_up[i]).chunk(2, -1)
        value = F.linear(F.silu(gate) * up, down[i])
        out = out.index_add(0, token, weights[token, pick, None].to(u.dtype) * value)
    return out


def experts_grouped(u: Tensor, slots: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """`experts_reference` by one grouped product a layer: real picks are sorted by expert, the others never leave their place.

    The sum over a token's picks runs over a dense [T, K, H] in a fixed order, so that the result does not depend on how a
    scatter-add happens to be scheduled.
    """
    n_routed, (tokens, topk) = gate_up.shape[0], slots.shape
    flat = slots.flatten()
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=n_routed)[:n_routed]
    offsets = counts.cumsum(0)
    picks = order[: int(offsets[-1])]
    values = u.new_zeros(tokens * topk, u.shape[-1])
    if len(picks):
        ends = offsets.to(torch.int32)
        gate, up = F.grouped_mm(u[picks // topk], gate_up.transpose(1, 2), offs=ends).chunk(2, -1)
        computed = F.grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=ends)
        values = values.index_copy(0, picks, computed * weights.flatten()[picks, None].to(u.dtype))
    identity = (weights * (slots >= n_routed)).sum(-1, keepdim=True).to(u.dtype) * u
    return identity + values.view(tokens, topk, -1).sum(1)


def experts(u: Tensor, slots: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """`experts_reference`, by the grouped product where torch has one for this device and dtype (widths in 16-byte rows)."""
    aligned = all(size * u.element_size() % 16 == 0 for size in (u.shape[-1], down.shape[-1]))
    grouped = aligned and u.dtype == gate_up.dtype and _has_grouped_product(u.device, u.dtype)
    return (experts_grouped if grouped else experts_reference)(u, slots, weights, gate_up, down)


@functools.cache
def _has_grouped_product(device: torch.device, dtype: torch.dtype) -> bool:
    """Asked of the device itself: which dtypes it takes differs between backends and releases."""
    if device.type == "meta":
        return False
    try:
        a, b = torch.zeros(8, 16, device=device, dtype=dtype), torch.zeros(1, 16, 16, device=device, dtype=dtype)
        F.grouped_mm(a, b, offs=torch.tensor([8], device=device, dtype=torch.int32))
    except (RuntimeError, NotImplementedError):
        return False
    return True
