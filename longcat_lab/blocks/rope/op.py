"""Rotary position embedding, in the interleaved layout of MLA: the pairs are (0, 1), (2, 3), ..."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor


def rope_frequencies(dim: int, theta: float) -> Tensor:
    """theta^(-2i / dim) for i < dim / 2: radians a position, float64 [dim / 2]. Source: arXiv 2104.09864, eq. 15."""
    return theta ** (-torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / dim)


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
    return positions.to(torch.float64)[:, None] * rope_frequencies(dim, theta).to(positions.device)


def yarn_frequencies(dim: int, theta: float, factor: float, original: int, beta_fast: float, beta_slow: float) -> Tensor:
    """Frequencies f_i of plain RoPE, stretched where they are slow: f_i (1 - r_i) + (f_i / factor) r_i.

    r_i = clamp((i - low) / (high - low), 0, 1); low and high are the pairs that turn beta_fast and beta_slow times over the
    `original` context, rounded down and up and kept inside 0 ... dim - 1: i(beta) = dim ln(original / (2 pi beta)) / (2 ln theta).

    Returns:
        float64 [dim / 2], radians a position.

    Source: Peng et al. 2023 (arXiv 2309.00071).
    """

    def pair(turns: float) -> float:
        return dim * math.log(original / (2 * math.pi * turns)) / (2 * math.log(theta))

    low, high = max(math.floor(pair(beta_fast)), 0), min(math.ceil(pair(beta_slow)), dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float64, device="cpu") - low) / max(high - low, 0.001)
    plain, stretched = rope_frequencies(dim, theta), ramp.clamp(0, 1)
    return plain * (1 - stretched) + plain / factor * stretched


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
