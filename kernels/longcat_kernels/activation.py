"""The gated activation of SwiGLU on a CPU, compiled: see activation.cpp."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function

from longcat_kernels.library import SUFFIX, library


def silu_times(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU(gate) * up, element by element, in one pass; the backward pass is one, too.

    The same bits each time and for any number of threads (`torch.get_num_threads()`); differentiable once.

    Args:
        gate, up: of one shape, on a CPU, both float32 or both float64.

    Returns:
        A dense tensor of that shape.

    Raises:
        NotAvailable: there is no compiled library here (`why_not()` says why).
        ValueError: shapes, dtypes or devices that do not fit together.
        RuntimeError: differentiated twice.

    Memory kept for the backward pass: gate and up.
    Source: Shazeer 2020 (arXiv 2002.05202), eq. 6, its inner part.
    """
    if gate.device.type != "cpu" or up.device.type != "cpu":
        raise ValueError(f"gate is on {gate.device} and up on {up.device}, and this operator runs on a CPU")
    if gate.dtype != up.dtype or gate.dtype not in SUFFIX:
        raise ValueError(f"gate is {gate.dtype} and up {up.dtype}, and both must be float32 or both float64")
    if gate.shape != up.shape:
        raise ValueError(f"gate is {list(gate.shape)} and up {list(up.shape)}, and they must be of one shape")
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        return _SiLUTimes.apply(gate, up)
    return _forward(gate.contiguous(), up.contiguous())


class _SiLUTimes(Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        return _forward(gate, up)

    @staticmethod
    def backward(ctx, d_out: Tensor) -> tuple[Tensor, Tensor]:
        if torch.is_grad_enabled():  # create_graph=True; torch's own once_differentiable lets it pass where d_out is a constant
            raise RuntimeError("the compiled SwiGLU is differentiable once; for second derivatives set LONGCAT_LAB_KERNELS=off")
        gate, up = ctx.saved_tensors
        d_out, d_gate, d_up = d_out.contiguous(), torch.empty_like(gate), torch.empty_like(up)
        _call("backward", gate, up, d_out, d_gate, d_up)
        return d_gate, d_up


def _forward(gate: Tensor, up: Tensor) -> Tensor:
    out = torch.empty_like(gate)
    _call("forward", gate, up, out)
    return out


def _call(which: str, gate: Tensor, up: Tensor, *more: Tensor) -> None:
    call = getattr(library(), f"longcat_gated_{which}_{SUFFIX[gate.dtype]}")
    call(gate.data_ptr(), up.data_ptr(), gate.numel(), torch.get_num_threads(), *(t.data_ptr() for t in more))
