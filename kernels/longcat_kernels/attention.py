"""Softmax attention on a CPU, compiled: see attention.cpp for how."""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor
from torch.autograd import Function

from longcat_kernels.library import SUFFIX, library


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """out_t = sum over the visible s of softmax_s(scale q_t . k_s) v_s.

    What no query of a block may see is not computed: keys ahead of it, documents that are not its own. A query that sees nothing
    gets 0, and passes no gradient. The result and the gradients have the same bits each time and for any number of threads
    (`torch.get_num_threads()`); differentiable once.

    Args:
        q: [B, h, T, d], on a CPU, float32 or float64 like k [B, h, S, d] and v [B, h, S, d_v]; views are read as they lie where
            their last dimension is dense. All widths at least 1.
        mask: bool, broadcast to [B, h, T, S], True where visible; None: causal, the last query sees all keys.
        scale: 1 / sqrt(d) where left out.

    Returns:
        [B, h, T, d_v], a view of a dense [B, T, h, d_v].

    Raises:
        NotAvailable: there is no compiled library here (`why_not()` says why).
        ValueError: shapes, dtypes or devices that do not fit together.
        RuntimeError: no memory; or differentiated twice.

    Memory kept for the backward pass: the inputs, the result, and [B, h, T] logarithms of the sums.
    Source: FlashAttention-2 (arXiv 2307.08691); `attention_reference` of longcat_lab is the same in PyTorch.
    """
    _check(q, k, v, mask)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
        return _Attention.apply(q, k, v, mask, scale)
    return _forward(*(_dense_rows(t) for t in (q, k, v)), _bytes(mask, q, k), scale)[0]


class _Attention(Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        q, k, v = (_dense_rows(t) for t in (q, k, v))
        mask = _bytes(mask, q, k)
        out, sums = _forward(q, k, v, mask, scale)
        ctx.save_for_backward(q, k, v, mask, out, sums)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx, d_out: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True; torch's own once_differentiable lets it pass where d_out is a constant
            raise RuntimeError("the compiled attention is differentiable once; for second derivatives set LONGCAT_LAB_KERNELS=off")
        q, k, v, mask, out, sums = ctx.saved_tensors
        grads = [_empty(t.shape, t) if wanted else None for t, wanted in zip((q, k, v), ctx.needs_input_grad)]
        _call("backward", q, k, v, mask, out, sums, ctx.scale, _dense_rows(d_out), *grads)
        return *grads, None, None


def _forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """(result [B, h, T, d_v], logarithms of the sums [B, h, T])."""
    out, sums = _empty((*q.shape[:3], v.shape[3]), q), q.new_empty(q.shape[:3])
    _call("forward", q, k, v, mask, out, sums, scale)
    return out, sums


def _call(
    which: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, sums: Tensor, scale: float, *more: Tensor | None
) -> None:
    sizes = [*q.shape[:3], *k.shape[2:], v.shape[3], *((1, 1) if mask is None else mask.shape[:2])]
    strides = [step for t in (q, k, v, out, mask, *more) for step in ((0, 0, 0) if t is None else _steps(t))]
    addresses = [_address(t) for t in (q, k, v, out, mask, sums)]
    arrays = (ctypes.c_int64 * len(sizes))(*sizes), (ctypes.c_int64 * len(strides))(*strides)
    call = getattr(library(), f"longcat_attention_{which}_{SUFFIX[q.dtype]}")
    if not call(*addresses, *arrays, scale, torch.get_num_threads(), *(_address(t) for t in more)):
        raise RuntimeError("no memory for the attention's work space")


def _empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """[B, h, T, width], laid out as [B, T, h, width]: what splits and joins heads then need not copy."""
    batch, heads, length, width = shape
    return like.new_empty(batch, length, heads, width).transpose(1, 2)


def _dense_rows(tensor: Tensor) -> Tensor:
    """`tensor`, copied only where BLAS cannot read its rows as they lie."""
    rows, width = tensor.shape[2:]
    dense = (width == 1 or tensor.stride(3) == 1) and (rows == 1 or width <= tensor.stride(2) < 2**31)
    return tensor if dense else tensor.contiguous()


def _steps(tensor: Tensor) -> tuple[int, int, int]:
    """Distances along batch, head and row; a single row's is never used, and BLAS wants it no shorter than a row."""
    batch, head, row, _ = tensor.stride()
    return batch, head, row if tensor.shape[2] > 1 else max(tensor.shape[3], 1)


def _bytes(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """[B or 1, h or 1, T, S], each row dense."""
    if mask is None:
        return None
    mask = mask[(None,) * (4 - mask.dim())].expand(-1, -1, q.shape[2], k.shape[2])
    return mask if mask.stride(3) == 1 else mask.contiguous()


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    for name, tensor in {"q": q, "k": k, "v": v, "mask": mask}.items():
        if tensor is None:
            continue
        if tensor.device.type != "cpu":
            raise ValueError(f"{name} is on {tensor.device}, and this operator runs on a CPU")
        if name == "mask":
            if tensor.dtype != torch.bool:
                raise ValueError(f"mask is {tensor.dtype}, and must be torch.bool")
        elif tensor.dtype != q.dtype or tensor.dtype not in SUFFIX:
            raise ValueError(f"{name} is {tensor.dtype}, and q, k and v must all be float32 or all float64")
        elif tensor.dim() != 4:
            raise ValueError(f"{name} is {list(tensor.shape)}, and must have batch, heads, length and width")
    batch, heads, queries, width = q.shape
    if k.shape[:2] != (batch, heads) or k.shape[3] != width:
        raise ValueError(f"k is {list(k.shape)}, and [{batch}, {heads}, S, {width}] fits q")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v is {list(v.shape)}, and {[*k.shape[:3]]} with a width fits k")
    if min(width, v.shape[3], k.shape[2]) == 0:
        raise ValueError("widths and the number of keys must be at least 1")
    wanted = (batch, heads, queries, k.shape[2])
    if mask is not None and (mask.dim() > 4 or any(m not in (1, n) for m, n in zip(mask.shape[::-1], wanted[::-1]))):
        raise ValueError(f"mask is {list(mask.shape)}, and cannot be broadcast to {list(wanted)}")
