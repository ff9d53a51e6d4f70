"""Root-mean-square normalisation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y = w * x / sqrt(mean(x^2) + eps), the mean over the last dimension, in at least fp32.

    Args:
        x: [..., H].
        weight: [H].
        eps: added to the mean square (no unit of its own: that of x squared).

    Returns:
        [..., H], in x's dtype.

    Source: Zhang and Sennrich 2019 (arXiv 1910.07467), eq. 4.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps))).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm_reference` by torch's own kernel, which every device has."""
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)
