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

    Source: Shazeer 2020 (arXiv 2002.05202), eq. 6. This is also the fast form: two matrix products in, one out.
    """
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
