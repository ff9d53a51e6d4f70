"""SwiGLU feed-forward network."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def swiglu_reference(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """y = W_down (SiLU(W_gate x) * (W_up x)), no biases.

    Args:
        x: [..., H]; gate, up: [F, H]; down: [H, F].

    Returns:
        [..., H].

    Source: Shazeer 2020 (arXiv 2002.05202), eq. 6.
    """
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """`swiglu_reference`, its activation by `silu_gated`; the matrix products are torch's."""
    return F.linear(silu_gated(F.linear(x, gate), F.linear(x, up)), down)


def silu_gated(gated: Tensor, raised: Tensor) -> Tensor:
    """SiLU(gated) * raised, in one compiled pass each way on a CPU in fp32 and fp64."""
    if _kernel_takes(gated, raised):
        from longcat_kernels import silu_times

        return silu_times(gated, raised)
    return F.silu(gated) * raised


def _kernel_takes(gated: Tensor, raised: Tensor) -> bool:
    try:
        from longcat_kernels import takes  # here: compiles on its first call
    except ImportError:  # an installation of longcat_lab alone
        return False
    return takes(gated, raised)
