"""Causal attention inside documents: the core that MLA calls."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """bool [queries, keys]: query t stands at position keys - queries + t and sees itself and what came before."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def causal_document_mask(document_ids: Tensor) -> Tensor:
    """True where a query may look: at its own document, not ahead of itself.

    Args:
        document_ids: [B, T], equal inside a document.

    Returns:
        bool [B, 1, T, T] (query, key), to be broadcast over heads.
    """
    causal = causal_mask(document_ids.shape[-1], document_ids.shape[-1], document_ids.device)
    return ((document_ids[:, :, None] == document_ids[:, None, :]) & causal)[:, None]


def attention_reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None = None) -> Tensor:
    """o_t = sum_s softmax_s(scale * q_t . k_s) v_s over the visible s.

    Args:
        q: [B, heads, T, d]; k: [B, heads, S, d]; v: [B, heads, S, d_v].
        mask: bool [B or 1, 1, T, S], True where visible; None means plain causal.
        scale: 1 / sqrt(d) where left out.

    Returns:
        [B, heads, T, d_v].
    """
    if mask is None:
        mask = causal_mask(q.shape[-2], k.shape[-2], q.device)
    scores = (q @ k.transpose(-1, -2)) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None = None) -> Tensor:
    """`attention_reference` by what is fastest here: the compiled operator on a CPU in fp32 and fp64, else torch's fused kernel of
    the device at hand. A query that sees nothing gets 0 (the reference: NaN).
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if _kernel_takes(q, k, v, mask):
        from longcat_kernels import attention as compiled

        return compiled(q, k, v, mask, scale)
    if mask is None and q.shape[-2] != k.shape[-2]:  # torch's is_causal lets the first query, not the last, stand at its own end
        mask = causal_mask(q.shape[-2], k.shape[-2], q.device)
    width, value_width = q.shape[-1], v.shape[-1]
    if q.device.type == "cpu" and width != value_width:
        # The CPU's fused kernel wants one width; with two, torch lays out all scores. Zeros change neither scores nor values.
        q, k, v = (F.pad(each, (0, max(width, value_width) - each.shape[-1])) for each in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)[..., :value_width]


def shared_key_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """`attention` with one key and one value for all heads: MLA's absorbed form.

    Args:
        q: [B, T, heads, d]; k: [B, S, d]; v: [B, S, d_v]; mask: bool [B or 1, 1, T, S], or None for plain causal.

    Returns:
        [B, T, heads, d_v].
    """
    if mask is None:
        mask = causal_mask(q.shape[1], k.shape[1], q.device)[None, None]
    scores = (q.flatten(1, 2) @ k.transpose(1, 2)).unflatten(1, q.shape[1:3]) * scale  # [B, T, heads, S]
    weights = scores.masked_fill(~mask.transpose(1, 2), -torch.inf).softmax(-1)
    return (weights.flatten(1, 2) @ v).unflatten(1, q.shape[1:3])


def _kernel_takes(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """Below these lengths torch's kernel is as fast or faster; where it need not pad a width, it is so in decoding, too."""
    worth = q.shape[-2] >= 128 if q.shape[-1] == v.shape[-1] else k.shape[-2] >= 64
    if not worth or 0 in (*q.shape, *k.shape, *v.shape) or (mask is not None and mask.dtype != torch.bool):
        return False
    try:
        from longcat_kernels import takes  # here: compiles on its first call
    except ImportError:  # an installation of longcat_lab alone
        return False
    return takes(q, k, v)
