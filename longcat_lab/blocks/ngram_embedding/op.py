"""Fusion of the token's row with the rows of its n-grams."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def fuse_reference(token: Tensor, rows: Tensor, projection: Tensor, base_scale: float, ngram_scale: float) -> Tensor:
    """e = a E_0[t] + b sum_i W_i r_i, branch by branch.

    Args:
        token: [B, T, H], E_0[t]; rows: [B, T, E, d]; projection: [H, E d], W_1 ... W_E side by side.

    Returns:
        [B, T, H].

    Memory: E + 1 tensors of the output's size. Source: arXiv 2601.21204 eq. 3 (a = b = 1 / (E + 1)).
    """
    branches = [F.linear(r, w) for r, w in zip(rows.unbind(-2), projection.split(rows.shape[-1], 1), strict=True)]
    return base_scale * token + ngram_scale * torch.stack(branches).sum(0)


def fuse(token: Tensor, rows: Tensor, projection: Tensor, base_scale: float, ngram_scale: float) -> Tensor:
    """`fuse_reference` as one product of [W_1 ... W_E] with the concatenated rows: the branches are never laid out."""
    together = F.linear(rows.flatten(-2), projection)
    if base_scale == ngram_scale:
        return base_scale * (token + together) if base_scale != 1 else token + together
    return base_scale * token + ngram_scale * together
