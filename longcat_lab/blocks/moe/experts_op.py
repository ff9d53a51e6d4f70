"""Weighted sum of the picked experts; picks of zero-computation experts cost one addition and no matrix product."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

# What a zero-computation expert (slot N and above) returns: its input times the pick's weight, its input as it is, or nothing.
ZeroExpertType = Literal["identity", "copy", "drop"]


def experts_reference(
    u: Tensor, slots: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, zero_expert_type: ZeroExpertType = "identity"
) -> Tensor:
    """MoE(u_t) = sum_{i in S_t, i < N} g_ti FFN_i(u_t) + (sum_{i in S_t, i >= N} g_ti) u_t.

    Args:
        u: [T, H]; slots: int64 [T, K]; weights: [T, K].
        gate_up: [N, 2 F, H] (gate rows first); down: [N, H, F].
        zero_expert_type: "identity" is the sum above; "copy" forces g_ti to 1 for i >= N, "drop" forces it to 0.

    Returns:
        [T, H], in u's dtype.

    Source: LongCat-Flash (arXiv 2509.01322) eq. 1; an identity expert returns the MoE's own (normed) input.
    """
    n_routed = gate_up.shape[0]
    forced = {"identity": weights, "copy": torch.ones_like(weights), "drop": torch.zeros_like(weights)}[zero_expert_type]
    out = (forced * (slots >= n_routed)).sum(-1, keepdim=True).to(u.dtype) * u
    for i in range(n_routed):
        token, pick = torch.where(slots == i)
        gate, up = F.linear(u[token], gate_up[i]).chunk(2, -1)
        value = F.linear(F.silu(gate) * up, down[i])
        out = out.index_add(0, token, weights[token, pick, None].to(u.dtype) * value)
    return out


def grouped_product(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """y_p = x_p W_n for the rows p of group n. x [P, K] lies group by group; weights [N, K, M]; ends: int32 [N], where each group ends."""
    return F.grouped_mm(x, weights, offs=ends)


def experts_grouped(
    u: Tensor, slots: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, product: Callable[..., Tensor] = grouped_product
) -> Tensor:
    """The real experts' part by one grouped product a layer: real picks are sorted by expert, the others never leave their place.

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
        gate, up = product(u[picks // topk], gate_up.transpose(1, 2), ends).chunk(2, -1)
        computed = product(F.silu(gate) * up, down.transpose(1, 2), ends)
        values = values.index_copy(0, picks, computed * weights.flatten()[picks, None].to(u.dtype))
    return values.view(tokens, topk, u.shape[-1]).sum(1)


def zero_experts(u: Tensor, slots: Tensor, weights: Tensor, n_routed: int, zero_expert_type: ZeroExpertType) -> Tensor | None:
    """The zero-computation experts' part, [T, H]; None where it is known to be nothing.

    Raises:
        ValueError: a zero_expert_type that there is not.
    """
    if zero_expert_type not in get_args(ZeroExpertType):
        raise ValueError(f"zero_expert_type is '{zero_expert_type}', and can be {', '.join(get_args(ZeroExpertType))}")
    zero = slots >= n_routed
    # Asking for a value makes an accelerator wait; on a CPU it spares the additions of a mixture without such experts.
    if zero_expert_type == "drop" or (u.device.type == "cpu" and not torch.compiler.is_compiling() and not zero.any()):
        return None
    share = (weights * zero).sum(-1, keepdim=True) if zero_expert_type == "identity" else zero.sum(-1, keepdim=True)
    return share.to(u.dtype) * u


def experts(
    u: Tensor, slots: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, zero_expert_type: ZeroExpertType = "identity"
) -> Tensor:
    """`experts_reference`, its real part by what is fastest here: the compiled operator on a CPU in fp32 and fp64, else the grouped
    product where torch or the device's maker has one for this device and dtype (widths in 16-byte rows), else the reference.
    """
    passed = zero_experts(u, slots, weights, gate_up.shape[0], zero_expert_type)
    if kernel_takes(u, gate_up, down):
        from longcat_kernels import mixture

        real = mixture(u, slots, weights.to(u.dtype), gate_up, down)
    elif (product := product_for(u, gate_up, down)) is not None:
        real = experts_grouped(u, slots, weights, gate_up, down, product)
    else:
        real = experts_reference(u, slots, weights, gate_up, down, "drop")
    return real if passed is None else real + passed


def kernel_takes(u: Tensor, gate_up: Tensor, down: Tensor) -> bool:
    """Whether `experts` computes these with the compiled operator."""
    fits = u.device.type == "cpu" and u.dtype in (torch.float32, torch.float64) and u.dtype == gate_up.dtype == down.dtype
    if not fits or 0 in gate_up.shape[1:] or torch.compiler.is_compiling():
        return False
    try:
        from longcat_kernels import usable  # here: compiles on its first call
    except ImportError:  # an installation of longcat_lab alone
        return False
    return usable()


def product_for(u: Tensor, gate_up: Tensor, down: Tensor) -> Callable[..., Tensor] | None:
    """The grouped product that takes these; None: expert by expert."""
    aligned = all(size * u.element_size() % 16 == 0 for size in (u.shape[-1], down.shape[-1]))
    if not aligned or u.dtype != gate_up.dtype:
        return None
    own = _vendor_product(u, gate_up, down)  # first: torch's may be a loop that waits for the device
    return own or (grouped_product if _has_grouped_product(u.device, u.dtype) else None)


def _vendor_product(u: Tensor, gate_up: Tensor, down: Tensor) -> Callable[..., Tensor] | None:
    """The operator that the accelerator's maker has, where it takes these."""
    if u.device.type in ("cpu", "meta"):
        return None
    try:
        from longcat_kernels import npu
    except ImportError:  # an installation of longcat_lab alone
        return None
    return npu.grouped_product if npu.takes_grouped_product(u, gate_up) and npu.takes_grouped_product(u, down) else None


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
