"""Causal attention inside documents: the core that MLA calls."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_document_mask(document_ids: Tensor) -> Tensor:
    """True where a query may look: at its own document, not ahead of itself.

    Args:
        document_ids: [B, T], equal inside a document.

    Returns:
        bool [B, 1, T, T] (query, key), to be broadcast over heads.
    """
    length = document_ids.shape[-1]
    causal = torch.ones(length, length, dtype=torch.bool, device=document_ids.device).tril()
    return ((document_ids[:, :, None] == document_ids[:, None, :]) & causal)[:, None]


def attention_reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """o_t = sum_s softmax_s(q_t . k_s / sqrt(d)) v_s over the visible s.

    Args:
        q, k: [B, heads, T, d]; v: [B, heads, T, d_v].
        mask: bool [B, 1, T, T], True where visible; None means plain causal.

    Returns:
        [B, heads, T, d_v].
    """
    if mask is None:
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    scores = (q @ k.transpose(-1, -2)) / math.sqrt(q.shape[-1])
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """`attention_reference` by torch's fused kernel of the device at hand."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
