"""Engram: the gate, the short convolution, and the whole equation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from longcat_lab.blocks.rms_norm.op import rms_norm_reference

LEAST_SCORE = 1e-6  # of |s| under the root, whose slope at 0 has no bound; as in the published code


def gate(h: Tensor, key: Tensor) -> Tensor:
    """alpha = sigmoid(sign(s) sqrt|s|), s = <h, key> / sqrt(H). h, key: [B, T, H], normed; [B, T]."""
    s = (h * key).sum(-1) * h.shape[-1] ** -0.5
    return torch.sigmoid(s.sign() * s.abs().clamp_min(LEAST_SCORE).sqrt())


def convolve_reference(x: Tensor, weight: Tensor, dilation: int, documents: Tensor | None) -> Tensor:
    """y_t = sum_j w_j * x_{t - j dilation}, where that token exists in the same document: a causal depthwise convolution.

    Args:
        x: [B, T, H]; weight: [k, H], the current token's first; dilation: tokens; documents: int64 [B, T], or None for one a row.

    Returns:
        [B, T, H]. Memory: k tensors of x's size.
    """
    lags, length = [], x.shape[1]
    for j in range(len(weight)):
        source = torch.arange(length, device=x.device) - j * dilation
        there = (source >= 0).expand(x.shape[:2])
        if documents is not None:
            there = there & (documents[:, source.clamp_min(0)] == documents)
        lags.append(x[:, source.clamp_min(0)] * there[..., None])
    return torch.einsum("btkh,kh->bth", torch.stack(lags, 2), weight)


def convolve(x: Tensor, weight: Tensor, dilation: int, documents: Tensor | None) -> Tensor:
    """`convolve_reference` as one multiply-add a tap on the part of the row that the tap reaches: taps are never laid out."""
    y = x * weight[0]
    for j in range(1, len(weight)):
        lag = j * dilation
        if lag >= x.shape[1]:
            break
        moved = x[:, :-lag]
        if documents is not None:
            moved = moved * (documents[:, lag:] == documents[:, :-lag])[..., None]
        y[:, lag:] += moved * weight[j]
    return y


def engram_reference(
    h: Tensor,
    e: Tensor,
    key: Tensor,
    value: Tensor,
    gains: tuple[Tensor, Tensor, Tensor],
    conv: Tensor,
    dilation: int,
    documents: Tensor | None,
    eps: float,
) -> Tensor:
    """h + v + SiLU(DWConv(RMSN(v))) with v = sigmoid(sign(s) sqrt|s|) W_V e and s = <RMSN(h), RMSN(W_K e)> / sqrt(H).

    Args:
        h: [B, T, H]; e: [B, T, w], the concatenated rows; key, value: [H, w].
        gains: [H] each, of the norms of h, of the key and of v; eps: theirs.
        conv, dilation, documents: see `convolve_reference`.

    Returns:
        [B, T, H]. Source: Engram (arXiv 2601.07372).
    """
    alpha = gate(rms_norm_reference(h, gains[0], eps), rms_norm_reference(F.linear(e, key), gains[1], eps))
    v = alpha[..., None] * F.linear(e, value)
    return h + v + F.silu(convolve_reference(rms_norm_reference(v, gains[2], eps), conv, dilation, documents))
