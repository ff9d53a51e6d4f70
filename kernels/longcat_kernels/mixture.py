"""The real-expert part of a mixture of experts on a CPU, compiled: see mixture.cpp for how."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function

from longcat_kernels.library import SUFFIX, library


def mixture(u: Tensor, slots: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """value_t = sum over k with 0 <= i < N of weights[t,k] W_down[i] (SiLU(W_gate[i] u_t) * (W_up[i] u_t)), i = slots[t,k].

    Picks outside 0 to N - 1 are neither gathered nor multiplied, and their weights' gradients are 0. The result and the gradients
    have the same bits each time and for any number of threads (`torch.get_num_threads()`); differentiable once.

    Args:
        u: [T, H], on a CPU, float32 or float64 like the other three; slots: int64 [T, K]; weights: [T, K].
        gate_up: [N, 2 F, H] (gate rows first); down: [N, H, F]. All widths at least 1.

    Returns:
        [T, H], in u's dtype.

    Raises:
        NotAvailable: there is no compiled library here (`why_not()` says why).
        ValueError: shapes, dtypes or devices that do not fit together.
        RuntimeError: no memory; or differentiated twice.

    Memory kept for the backward pass: the inputs, the sorted picks, and [real picks, 2 F] pre-activations.
    Source: LongCat-Flash (arXiv 2509.01322) eq. 1, its real experts; `experts_reference` of longcat_lab is the same sum in PyTorch.
    """
    _check(u, slots, weights, gate_up, down)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (u, weights, gate_up, down)):
        return _Mixture.apply(u, slots, weights, gate_up, down)
    return _forward(*(t.contiguous() for t in (u, slots, weights, gate_up, down)), keep=False)[0]


class _Mixture(Function):
    @staticmethod
    def forward(ctx, u: Tensor, slots: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        u, slots, weights, gate_up, down = (t.contiguous() for t in (u, slots, weights, gate_up, down))
        out, order, offsets, inner = _forward(u, slots, weights, gate_up, down, keep=True)
        ctx.save_for_backward(u, weights, gate_up, down, order, offsets, inner)
        return out

    @staticmethod
    def backward(ctx, d_out: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True; torch's own once_differentiable lets it pass where d_out is a constant
            raise RuntimeError("the compiled mixture is differentiable once; for second derivatives set LONGCAT_LAB_KERNELS=off")
        u, weights, gate_up, down, order, offsets, inner = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        grads = [torch.empty_like(t) if wanted[i] else None for i, t in ((0, u), (2, weights), (3, gate_up), (4, down))]
        targets = [_address(t) for t in (d_out.contiguous(), *grads)]
        _call("backward", u, weights, gate_up, down, order, offsets, inner, *targets)
        return grads[0], None, *grads[1:]


def _forward(u: Tensor, slots: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, keep: bool) -> tuple[Tensor, ...]:
    """(out, order int64 [P], offsets int64 [N + 1], pre-activations [P, 2 F] or None), P real picks."""
    experts = gate_up.shape[0]
    order, offsets = torch.empty(slots.numel(), dtype=torch.int64), torch.empty(experts + 1, dtype=torch.int64)
    picks = library().longcat_sort_picks(slots.data_ptr(), slots.numel(), experts, order.data_ptr(), offsets.data_ptr())
    inner = u.new_empty(picks, gate_up.shape[1]) if keep else None
    out = torch.empty_like(u)
    _call("forward", u, weights, gate_up, down, order, offsets, inner, out.data_ptr())
    return out, order, offsets, inner


def _call(which: str, u: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, *rest: Tensor | int | None) -> None:
    order, offsets, inner, *targets = rest
    inputs = [_address(t) for t in (u, weights, gate_up, down, order, offsets, inner)]
    sizes = [u.shape[0], weights.shape[1], u.shape[1], gate_up.shape[0], down.shape[2], torch.get_num_threads()]
    if not getattr(library(), f"longcat_{which}_{SUFFIX[u.dtype]}")(*inputs, *sizes, *targets):
        raise RuntimeError("no memory for the mixture's work space: use fewer tokens at once")


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _check(u: Tensor, slots: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> None:
    named = {"u": u, "slots": slots, "weights": weights, "gate_up": gate_up, "down": down}
    for name, tensor in named.items():
        if tensor.device.type != "cpu":
            raise ValueError(f"{name} is on {tensor.device}, and this operator runs on a CPU")
        if name == "slots" and tensor.dtype != torch.int64:
            raise ValueError(f"slots are {tensor.dtype}, and must be torch.int64")
        if name != "slots" and (tensor.dtype != u.dtype or tensor.dtype not in SUFFIX):
            raise ValueError(f"{name} is {tensor.dtype}, and u, weights, gate_up and down must all be float32 or all float64")
    if u.dim() != 2 or gate_up.dim() != 3 or down.dim() != 3 or slots.dim() != 2 or gate_up.shape[1] % 2:
        raise ValueError("u must be [T, H], slots and weights [T, K], gate_up [N, 2 F, H], down [N, H, F]")
    tokens, hidden, (experts, double, _) = *u.shape, gate_up.shape
    expected = {"slots": (tokens, slots.shape[1]), "weights": slots.shape, "gate_up": (experts, double, hidden)}
    for name, shape in (expected | {"down": (experts, hidden, double // 2)}).items():
        if named[name].shape != torch.Size(shape):
            raise ValueError(f"{name} is {list(named[name].shape)}, and {list(shape)} fits the others")
    if min(hidden, double) == 0:
        raise ValueError("H and F must be at least 1")
