"""Attention to selected keys on a CPU, compiled: see sparse_attention.cpp for how."""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from longcat_kernels.library import SUFFIX, library

AMISS = {
    2: "indices must hold rising key numbers that each query may see, with -1 in front alone",
    3: "indices do not end with the window that was promised; pass window=0, or selections whose last places are the window",
}


def sparse_attention(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, scale: float, window: int = 0) -> tuple[Tensor, Tensor]:
    """o_{t,h} = sum over the selected s of a_{t,h,s} v_s,  a = softmax of scale q_{t,h} . k_s: one key and value for all heads.

    A query without any key gets 0, and passes no gradient. The result and the gradients have the same bits each time and for any
    number of threads (`torch.get_num_threads()`; backward, one thread does a row of the batch); differentiable once. Where v is
    the first columns of k (`v = k[..., :d_v]`), both gradients are made as one, which k gets; v itself then shows none.

    Args:
        q: [B, T, H, d], on a CPU, float32 or float64 like k [B, S, d] and v [B, S, d_v]; T at most S. All widths at least 1.
        indices: int32 [B, T, K], key numbers in rising order, -1 in front where fewer are wanted; query t sees keys up to S - T + t.
        window: W > 0 promises that each query's last W places (all it has, where it has fewer) are the W keys up to its own: what the
            queries before it used is then not asked for again. The bits of the result are those of W = 0.

    Returns:
        o [B, T, H, d_v]; and p_{t,s} = (1/H) sum_h a_{t,h,s}, [B, T, K], 0 where there is no key, without gradient.

    Raises:
        NotAvailable: there is no compiled library here (`why_not()` says why).
        ValueError: shapes, dtypes or devices that do not fit together; indices that are no selection, or without the window.
        RuntimeError: no memory; or differentiated twice.

    Memory kept for the backward pass: the inputs, o, and [B, T, H] logarithms of the sums. Work space: O(H (d + d_v) + K) a thread, and a
    copy of k and v where their rows are not whole vectors of 64 bytes (32 where the processor has no more), or not dense.
    Source: DeepSeek-V3.2 report, section 2.1, and LSA (arXiv 2608.01662); `sparse_attention` of longcat_lab is the same in PyTorch.
    """
    _check(q, k, v, indices, window)
    value_width, window = v.shape[2], min(window, indices.shape[2])
    columns = v.data_ptr() == k.data_ptr() and v.stride() == k.stride() and value_width <= k.shape[2]
    # One gradient for both needs more than shared memory: v must come from this very k (a detached or a sibling view does not).
    joint = columns and v._base is k and k.requires_grad and v.requires_grad and not v.retains_grad
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
        return _SparseAttention.apply(q, k, None if joint else v, indices, float(scale), window, value_width, columns)
    return _forward(q, *_rows(k, v, columns, value_width), indices, float(scale), window)[:2]


class _SparseAttention(Function):
    @staticmethod
    def forward(
        ctx, q: Tensor, k: Tensor, v: Tensor | None, indices: Tensor, scale: float, window: int, value_width: int, columns: bool
    ) -> tuple[Tensor, Tensor]:
        out, mass, sums = _forward(q, *_rows(k, v, columns, value_width), indices, scale, window)
        ctx.save_for_backward(q, k, v, indices, out, sums)
        ctx.scale, ctx.window, ctx.value_width, ctx.columns = scale, window, value_width, columns
        ctx.mark_non_differentiable(mass)
        ctx.set_materialize_grads(False)
        return out, mass

    @staticmethod
    def backward(ctx, d_out: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True; torch's own once_differentiable lets it pass where d_out is a constant
            raise RuntimeError("the compiled sparse attention is differentiable once; for second derivatives set LONGCAT_LAB_KERNELS=off")
        if d_out is None:
            return (None,) * 8
        q, k, v, indices, out, sums = ctx.saved_tensors
        keys, values = _rows(k, v, ctx.columns, ctx.value_width)
        need_q, need_k, need_v = ctx.needs_input_grad[:3]
        dq = q.new_empty(q.shape) if need_q else None
        dk = k.new_empty(*k.shape[:2], _whole(k)) if need_k else None
        dv = v.new_empty(*v.shape[:2], _whole(v)) if need_v else None
        made = out, sums, None, _dense(d_out), dq, dk, dv
        _call("backward", _dense(q), keys, values, indices, *made, scale=ctx.scale, window=ctx.window, joint=v is None)
        cut = [None if grad is None else grad[..., : like.shape[2]] for grad, like in ((dk, k), (dv, v))]
        return dq, *cut, None, None, None, None, None


def _forward(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, scale: float, window: int) -> tuple[Tensor, Tensor, Tensor]:
    """(result [B, T, H, d_v], masses [B, T, K], logarithms of the sums [B, T, H]); k and v from `_rows`."""
    out, sums, mass = q.new_empty(*q.shape[:3], v.shape[2]), q.new_empty(q.shape[:3]), q.new_empty(indices.shape)
    _call("forward", _dense(q), k, v, indices, out, sums, mass, scale=scale, window=window)
    return out, mass, sums


def _call(
    which: str, q: Tensor, k: Tensor, v: Tensor, indices: Tensor, *made: Tensor | None, scale: float, window: int, joint: bool = False
) -> None:
    """`made`: o, logarithms of the sums, masses (forward); backward then the gradients of o, q, k and v."""
    indices = indices.contiguous()
    d_out, _, dk, dv = made[3:] or (None,) * 4
    sizes = [*q.shape[:3], k.shape[1], q.shape[3], v.shape[2], indices.shape[2], window]
    for tensor, steps in ((q, 3), (k, 2), (v, 2), (d_out, 3), (dk, 2), (dv, 2)):
        sizes += [0] * steps if tensor is None else tensor.stride()[:steps]
    sizes.append(int(joint))
    call = getattr(library(), f"longcat_sparse_{which}_{SUFFIX[q.dtype]}")
    addresses = [None if t is None else t.data_ptr() for t in (q, k, v, indices, *made)]
    outcome = call(*addresses[:7], (ctypes.c_int64 * len(sizes))(*sizes), scale, torch.get_num_threads(), *addresses[7:])
    if outcome == 0:
        raise RuntimeError("no memory for the sparse attention's work space")
    if outcome in AMISS:
        raise ValueError(AMISS[outcome])


def _whole(rows: Tensor) -> int:
    """The width of `rows` in whole vectors."""
    unit = library().longcat_sparse_vector() // rows.element_size()
    return -(-rows.shape[2] // unit) * unit


def _rows(k: Tensor, v: Tensor | None, columns: bool, value_width: int) -> tuple[Tensor, Tensor]:
    """k and v as whole vectors row by row, copied only where they are not; v as columns of k where it is that already.

    What then is behind a value's width, other columns of k, only meets zeros.
    """
    k = _vectors(k)
    return k, k[..., :value_width] if v is None or columns else _vectors(v)[..., :value_width]


def _vectors(rows: Tensor) -> Tensor:
    more = _whole(rows) - rows.shape[2]
    return F.pad(rows, (0, more)) if more else rows if rows.stride(2) == 1 else rows.contiguous()


def _dense(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()


def _check(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, window: int) -> None:
    for name, tensor, axes in (("q", q, 4), ("k", k, 3), ("v", v, 3), ("indices", indices, 3)):
        if tensor.device.type != "cpu":
            raise ValueError(f"{name} is on {tensor.device}, and this operator runs on a CPU")
        if name == "indices":
            if tensor.dtype != torch.int32:
                raise ValueError(f"indices is {tensor.dtype}, and must be torch.int32")
        elif tensor.dtype != q.dtype or tensor.dtype not in SUFFIX:
            raise ValueError(f"{name} is {tensor.dtype}, and q, k and v must all be float32 or all float64")
        if tensor.dim() != axes:
            raise ValueError(f"{name} is {list(tensor.shape)}, and must have {axes} dimensions")
    batch, queries, _, width = q.shape
    if k.shape[0] != batch or k.shape[2] != width:
        raise ValueError(f"k is {list(k.shape)}, and [{batch}, S, {width}] fits q")
    if v.shape[:2] != k.shape[:2]:
        raise ValueError(f"v is {list(v.shape)}, and {list(k.shape[:2])} with a width fits k")
    if indices.shape[:2] != q.shape[:2]:
        raise ValueError(f"indices is {list(indices.shape)}, and [{batch}, {queries}, K] fits q")
    if queries > k.shape[1]:
        raise ValueError(f"there are {queries} queries and {k.shape[1]} keys, and each query stands at a key of its own")
    if min(q.shape[2:]) == 0 or v.shape[2] == 0:
        raise ValueError("widths and the number of heads must be at least 1")
    if window < 0:
        raise ValueError(f"window is {window}, and must be 0 or a number of keys")
