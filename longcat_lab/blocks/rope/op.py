"""Rotary position embedding, in the interleaved layout of MLA: the pairs are (0, 1), (2, 3), ..."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def rope_angles(positions: Tensor, dim: int, theta: float) -> Tensor:
    """angle[p, i] = p * theta^(-2i / dim), in radians.

    Args:
        positions: [T], any integer type.
        dim: rotated width, even.
        theta: base of the geometric series of wavelengths.

    Returns:
        [T, dim / 2], float64: positions near a million lose their fraction in fp32.

    Source: Su et al. 2021 (arXiv 2104.09864), eq. 15.
    """
    frequencies = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / dim)
    return positions.to(torch.float64)[:, None] * frequencies


def rotate_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each pair (x_2i, x_2i+1) as a complex number times exp(j * angle_i).

    Args:
        x: [..., T, dim]; cos, sin: [T, dim / 2], of `rope_angles`.

    Returns:
        [..., T, dim], interleaved as x is.
    """
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rotate_reference` in real numbers, for dtypes and devices without complex ones."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rotate_reference` where the device has complex numbers of this precision (they are faster there), else `rotate_pairs`."""
    return (rotate_reference if _has_complex(x.device, x.dtype) else rotate_pairs)(x, cos, sin)


@functools.cache
def _has_complex(device: torch.device, dtype: torch.dtype) -> bool:
    if dtype not in (torch.float32, torch.float64):
        return False
    try:
        pair = torch.view_as_complex(torch.ones(1, 2, device=device, dtype=dtype))
        torch.view_as_real(pair * pair)
    except (RuntimeError, NotImplementedError):
        return False
    return True
