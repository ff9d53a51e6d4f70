"""Attention over selected keys in Triton, all heads of a query reading one key and value (MLA in its absorbed form).

Importing this imports Triton; `available` and `takes` of triton_indexing say where it runs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function

from longcat_kernels.triton_indexing import (
    INTERPRETED,
    available,
    check_dtypes,
    check_selection,
    common,
    dense_rows,
    on_device,
    once,
    padded,
    takes,
)

__all__ = ["available", "sparse_attention", "takes"]
WITH_GRADIENTS = 16  # selected keys of a block where each has a d_k and a d_v in registers


def sparse_attention(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, scale: float, window: int = 0) -> tuple[Tensor, Tensor]:
    """o_{t,h} = sum_{s in S_t} a_{t,h,s} v_s,  a = softmax over S_t of scale q_{t,h} . k_s: one key and value for all heads.

    Sums are in fp32; weights enter the product with v in the inputs' dtype. Not the same bits each time: the gradients of k and v are
    sums of atomic additions, whose order the machine chooses. Where v is the first columns of k in memory, each key is read once.

    Args:
        q: [B, T, H, d]; k: [B, S, d]; v: [B, S, d_v], often the first columns of k.
        indices: a selection, int32 [B, T, K], at least one key a query (one without any gets NaN); -1: no key.
        window: of the selection's last places, how many are neighbours; of no use here, every key is gathered.

    Returns:
        o [B, T, H, d_v] in q's dtype; and p_{t,s} = (1/H) sum_h a_{t,h,s}, fp32 [B, T, K], 0 where
        there is no key, without gradient. o is differentiable once.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
        RuntimeError: differentiated twice.

    Memory kept for the backward pass: the inputs, o, and [B, T, H] logarithms of the sums.
    Source: FlashAttention-2 (arXiv 2307.08691) over gathered keys; DeepSeek-V3.2 report, section 2.1.
    """
    _check(q, k, v, indices)
    dtype = common(q, k, v)
    wide = (dense_rows(t.to(dtype)) for t in (q, k, v))
    o, mass = _SparseAttention.apply(*wide, indices.contiguous(), float(scale))
    return o.to(q.dtype), mass


class _SparseAttention(Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, indices: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        o = torch.empty(*q.shape[:3], v.shape[2], dtype=q.dtype, device=q.device)
        sums = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        mass = torch.empty(indices.shape, dtype=torch.float32, device=q.device)
        sizes, blocks = _sizes(q, k, v, indices, scale), _blocks(q, k, v)
        by_heads, by_keys = _grids(q, indices, blocks)
        with on_device(q):
            _forward_kernel[by_heads](q, k, v, indices, o, sums, *sizes, **blocks)
            _mass_kernel[by_keys](q, k, indices, sums, mass, *sizes, **blocks)
        ctx.save_for_backward(q, k, v, indices, o, sums)
        ctx.scale = scale
        ctx.mark_non_differentiable(mass)
        return o, mass

    @staticmethod
    def backward(ctx, d_o: Tensor, _) -> tuple[Tensor | None, ...]:
        once("sparse_attention")
        q, k, v, indices, o, sums = ctx.saved_tensors
        d_o, d_q = d_o.contiguous(), torch.empty(q.shape, dtype=q.dtype, device=q.device)
        d_k, d_v = (torch.zeros(t.shape, dtype=torch.float32, device=t.device) for t in (k, v))
        inner = torch.empty_like(sums)  # sum over d_v of o d_o, which the first kernel leaves for the second
        sizes, blocks = _sizes(q, k, v, indices, ctx.scale), _blocks(q, k, v)
        with on_device(q):
            by_heads, _ = _grids(q, indices, blocks)
            _query_gradient_kernel[by_heads](q, k, v, indices, o, sums, d_o, inner, d_q, *sizes, **blocks)
            if any(ctx.needs_input_grad[1:3]):
                blocks["CHOSEN"] = WITH_GRADIENTS
                _, by_keys = _grids(q, indices, blocks)
                _key_gradient_kernel[by_keys](q, k, v, indices, sums, d_o, inner, d_k, d_v, k.shape[1], *sizes, **blocks)
        return d_q, d_k.to(k.dtype), d_v.to(v.dtype), None, None


def _sizes(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, scale: float) -> tuple[float, ...]:
    return scale, q.shape[1], indices.shape[2], q.shape[2], *q.stride()[:3], *k.stride()[:2], *v.stride()[:2]


def _blocks(q: Tensor, k: Tensor, v: Tensor) -> dict[str, int | bool]:
    """How the work is cut. k's columns are two parts, so that 576 needs blocks of 512 and 64, not of 1024; v's are one part.

    Heads and selected keys of a block: the most with which the compiler keeps widths of 512 + 64 in registers and shared memory.
    """
    width, value = q.shape[3], v.shape[2]
    same = v.data_ptr() == k.data_ptr() and v.stride() == k.stride() and value <= width
    part = value if same else 2 ** (width.bit_length() - 1)
    wide = INTERPRETED or q.element_size() > 2
    heads, chosen = min(16 if wide else 32, padded(q.shape[2])), 16 if wide else 32
    blocks = {"PART": part, "REST": width - part, "VALUE": value, "SAME": same, "HEADS": heads, "CHOSEN": chosen}
    blocks.update(PART_BLOCK=padded(part), REST_BLOCK=padded(width - part), VALUE_BLOCK=padded(value))
    return {**blocks, "num_warps": 8 if max(width, value) > 256 else 4, "num_stages": 1}


def _grids(q: Tensor, indices: Tensor, blocks: dict[str, int | bool]) -> tuple[tuple[int, int], tuple[int, int]]:
    """(by blocks of heads, by blocks of selected keys), for each query."""
    rows = q.shape[0] * q.shape[1]
    return (rows, triton.cdiv(q.shape[2], blocks["HEADS"])), (rows, triton.cdiv(indices.shape[2], blocks["CHOSEN"]))


def _check(q: Tensor, k: Tensor, v: Tensor, indices: Tensor) -> None:
    check_dtypes(q=q, k=k, v=v)
    if q.dim() != 4:
        raise ValueError(f"q is {list(q.shape)}, and must have batch, queries, heads and width")
    if k.dim() != 3 or k.shape[0] != q.shape[0] or k.shape[2] != q.shape[3]:
        raise ValueError(f"k is {list(k.shape)}, and [{q.shape[0]}, S, {q.shape[3]}] fits q")
    if v.dim() != 3 or v.shape[:2] != k.shape[:2]:
        raise ValueError(f"v is {list(v.shape)}, and {list(k.shape[:2])} with a width fits k")
    check_selection(indices, q)


# --- kernels ------------------------------------------------------------------------------------------------------------------
# A program has one query, so the matrix products' rows are its heads. Names ending in _b, _t, _s, _h are strides along row, query,
# key, head; offsets are int64, because they can exceed 2^31. `sums` are logarithms to base 2 of the softmax's sums. A key is two
# blocks, its first PART columns and the REST.


@triton.jit
def _tile(x, starts, there, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """[rows, BLOCK] from the dense rows that begin at `starts`; 0 where nothing is."""
    column = tl.arange(0, BLOCK)
    return tl.load(x + starts[:, None] + column[None, :], mask=there[:, None] & (column < COLUMNS)[None, :], other=0.0)


@triton.jit
def _products(a, a_rest, b, b_rest, REST: tl.constexpr):
    """a b^T over both parts, in fp32."""
    sums = tl.dot(a, tl.trans(b), input_precision="ieee")
    if REST > 0:
        sums += tl.dot(a_rest, tl.trans(b_rest), input_precision="ieee")
    return sums


@triton.jit
def _forward_kernel(
    q, k, v, indices, o, sums, scale, queries, many, heads, q_b, q_t, q_h, k_b, k_s, v_b, v_s,
    PART: tl.constexpr, REST: tl.constexpr, VALUE: tl.constexpr, SAME: tl.constexpr, HEADS: tl.constexpr, CHOSEN: tl.constexpr,
    PART_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr,
):  # fmt: skip
    """o and sums of one query's HEADS heads: a running softmax over its keys, CHOSEN at a time."""
    row = tl.program_id(0).to(tl.int64)
    b, t = row // queries, row % queries
    h = (tl.program_id(1) * HEADS + tl.arange(0, HEADS)).to(tl.int64)
    query = _tile(q + b * q_b + t * q_t, h * q_h, h < heads, PART, PART_BLOCK)
    query_rest = query
    if REST > 0:
        query_rest = _tile(q + b * q_b + t * q_t + PART, h * q_h, h < heads, REST, REST_BLOCK)
    largest, total = tl.full([HEADS], float("-inf"), tl.float32), tl.zeros([HEADS], tl.float32)
    mixed = tl.zeros([HEADS, VALUE_BLOCK], tl.float32)
    for end in range(many, 0, -CHOSEN):  # from the newest key on: the first block then has one for certain
        place = end - CHOSEN + tl.arange(0, CHOSEN)
        s = tl.load(indices + row * many + place, mask=place >= 0, other=-1).to(tl.int64)
        key = _tile(k + b * k_b, s * k_s, s >= 0, PART, PART_BLOCK)
        key_rest = key
        if REST > 0:
            key_rest = _tile(k + b * k_b + PART, s * k_s, s >= 0, REST, REST_BLOCK)
        score = _products(query, query_rest, key, key_rest, REST) * (scale * 1.4426950408889634)
        score = tl.where((s >= 0)[None, :], score, float("-inf"))
        above = tl.maximum(largest, tl.max(score, 1))
        weight, kept = tl.exp2(score - above[:, None]), tl.exp2(largest - above)
        value = key
        if not SAME:
            value = _tile(v + b * v_b, s * v_s, s >= 0, VALUE, VALUE_BLOCK)
        mixed = mixed * kept[:, None] + tl.dot(weight.to(value.dtype), value, input_precision="ieee")
        total = total * kept + tl.sum(weight, 1)
        largest = above
    column = tl.arange(0, VALUE_BLOCK)
    place = (row * heads + h)[:, None] * VALUE + column[None, :]
    tl.store(o + place, mixed / total[:, None], mask=(h < heads)[:, None] & (column < VALUE)[None, :])
    tl.store(sums + row * heads + h, largest + tl.log2(total), mask=h < heads)


@triton.jit
def _mass_kernel(
    q, k, indices, sums, mass, scale, queries, many, heads, q_b, q_t, q_h, k_b, k_s, v_b, v_s,
    PART: tl.constexpr, REST: tl.constexpr, VALUE: tl.constexpr, SAME: tl.constexpr, HEADS: tl.constexpr, CHOSEN: tl.constexpr,
    PART_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr,
):  # fmt: skip
    """Mean over all heads of the weights of one query and CHOSEN of its keys; the softmax's sums are known by now."""
    row = tl.program_id(0).to(tl.int64)
    b, t = row // queries, row % queries
    place = tl.program_id(1) * CHOSEN + tl.arange(0, CHOSEN)
    s = tl.load(indices + row * many + place, mask=place < many, other=-1).to(tl.int64)
    key = _tile(k + b * k_b, s * k_s, s >= 0, PART, PART_BLOCK)
    key_rest = key
    if REST > 0:
        key_rest = _tile(k + b * k_b + PART, s * k_s, s >= 0, REST, REST_BLOCK)
    weights = tl.zeros([CHOSEN], tl.float32)
    for begin in range(0, heads, HEADS):
        h = (begin + tl.arange(0, HEADS)).to(tl.int64)
        query = _tile(q + b * q_b + t * q_t, h * q_h, h < heads, PART, PART_BLOCK)
        query_rest = query
        if REST > 0:
            query_rest = _tile(q + b * q_b + t * q_t + PART, h * q_h, h < heads, REST, REST_BLOCK)
        score = _products(query, query_rest, key, key_rest, REST) * (scale * 1.4426950408889634)
        total = tl.load(sums + row * heads + h, mask=h < heads, other=float("inf"))  # which makes a weight 0
        weights += tl.sum(tl.exp2(score - total[:, None]), 0)
    tl.store(mass + row * many + place, tl.where(s >= 0, weights / heads, 0.0), mask=place < many)


@triton.jit
def _query_gradient_kernel(
    q, k, v, indices, o, sums, d_o, inner, d_q, scale, queries, many, heads, q_b, q_t, q_h, k_b, k_s, v_b, v_s,
    PART: tl.constexpr, REST: tl.constexpr, VALUE: tl.constexpr, SAME: tl.constexpr, HEADS: tl.constexpr, CHOSEN: tl.constexpr,
    PART_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr,
):  # fmt: skip
    """d_q of one query's HEADS heads: d_score = weight (d_o . v_s - o . d_o) scale, d_q = sum_s d_score k_s."""
    row = tl.program_id(0).to(tl.int64)
    b, t = row // queries, row % queries
    h = (tl.program_id(1) * HEADS + tl.arange(0, HEADS)).to(tl.int64)
    query = _tile(q + b * q_b + t * q_t, h * q_h, h < heads, PART, PART_BLOCK)
    query_rest = query
    if REST > 0:
        query_rest = _tile(q + b * q_b + t * q_t + PART, h * q_h, h < heads, REST, REST_BLOCK)
    slope = _tile(d_o, (row * heads + h) * VALUE, h < heads, VALUE, VALUE_BLOCK)
    result = _tile(o, (row * heads + h) * VALUE, h < heads, VALUE, VALUE_BLOCK)
    product = tl.sum(result.to(tl.float32) * slope.to(tl.float32), 1)
    tl.store(inner + row * heads + h, product, mask=h < heads)
    total = tl.load(sums + row * heads + h, mask=h < heads, other=float("inf"))
    d_query = tl.zeros([HEADS, PART_BLOCK], tl.float32)
    d_rest = tl.zeros([HEADS, REST_BLOCK], tl.float32)
    for start in range(0, many, CHOSEN):
        place = start + tl.arange(0, CHOSEN)
        s = tl.load(indices + row * many + place, mask=place < many, other=-1).to(tl.int64)
        key = _tile(k + b * k_b, s * k_s, s >= 0, PART, PART_BLOCK)
        key_rest = key
        if REST > 0:
            key_rest = _tile(k + b * k_b + PART, s * k_s, s >= 0, REST, REST_BLOCK)
        value = key
        if not SAME:
            value = _tile(v + b * v_b, s * v_s, s >= 0, VALUE, VALUE_BLOCK)
        score = _products(query, query_rest, key, key_rest, REST) * (scale * 1.4426950408889634)
        weight = tl.where((s >= 0)[None, :], tl.exp2(score - total[:, None]), 0.0)
        d_weight = tl.dot(slope, tl.trans(value), input_precision="ieee")
        d_score = (weight * (d_weight - product[:, None]) * scale).to(key.dtype)
        d_query += tl.dot(d_score, key, input_precision="ieee")
        if REST > 0:
            d_rest += tl.dot(d_score, key_rest, input_precision="ieee")
    column, starts = tl.arange(0, PART_BLOCK), (row * heads + h)[:, None] * (PART + REST)
    tl.store(d_q + starts + column[None, :], d_query, mask=(h < heads)[:, None] & (column < PART)[None, :])
    if REST > 0:
        column = tl.arange(0, REST_BLOCK)
        tl.store(d_q + starts + PART + column[None, :], d_rest, mask=(h < heads)[:, None] & (column < REST)[None, :])


@triton.jit
def _key_gradient_kernel(
    q, k, v, indices, sums, d_o, inner, d_k, d_v, keys, scale, queries, many, heads, q_b, q_t, q_h, k_b, k_s, v_b, v_s,
    PART: tl.constexpr, REST: tl.constexpr, VALUE: tl.constexpr, SAME: tl.constexpr, HEADS: tl.constexpr, CHOSEN: tl.constexpr,
    PART_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr,
):  # fmt: skip
    """What one query adds to d_k and d_v (dense, fp32) of CHOSEN of its keys, summed over all heads before it is added."""
    row = tl.program_id(0).to(tl.int64)
    b, t = row // queries, row % queries
    place = tl.program_id(1) * CHOSEN + tl.arange(0, CHOSEN)
    s = tl.load(indices + row * many + place, mask=place < many, other=-1).to(tl.int64)
    key = _tile(k + b * k_b, s * k_s, s >= 0, PART, PART_BLOCK)
    key_rest = key
    if REST > 0:
        key_rest = _tile(k + b * k_b + PART, s * k_s, s >= 0, REST, REST_BLOCK)
    value = key
    if not SAME:
        value = _tile(v + b * v_b, s * v_s, s >= 0, VALUE, VALUE_BLOCK)
    d_key = tl.zeros([CHOSEN, PART_BLOCK], tl.float32)
    d_rest = tl.zeros([CHOSEN, REST_BLOCK], tl.float32)
    d_value = tl.zeros([CHOSEN, VALUE_BLOCK], tl.float32)
    for begin in range(0, heads, HEADS):
        h = (begin + tl.arange(0, HEADS)).to(tl.int64)
        query = _tile(q + b * q_b + t * q_t, h * q_h, h < heads, PART, PART_BLOCK)
        query_rest = query
        if REST > 0:
            query_rest = _tile(q + b * q_b + t * q_t + PART, h * q_h, h < heads, REST, REST_BLOCK)
        slope = _tile(d_o, (row * heads + h) * VALUE, h < heads, VALUE, VALUE_BLOCK)
        total = tl.load(sums + row * heads + h, mask=h < heads, other=float("inf"))
        product = tl.load(inner + row * heads + h, mask=h < heads, other=0.0)
        # Transposed, [CHOSEN, HEADS]: keys are the rows of the results.
        score = _products(key, key_rest, query, query_rest, REST) * (scale * 1.4426950408889634)
        weight = tl.exp2(score - total[None, :])  # where there is no key, of no use, but a row of its own
        d_weight = tl.dot(value, tl.trans(slope), input_precision="ieee")
        d_score = (weight * (d_weight - product[None, :]) * scale).to(key.dtype)
        d_key += tl.dot(d_score, query, input_precision="ieee")
        if REST > 0:
            d_rest += tl.dot(d_score, query_rest, input_precision="ieee")
        d_value += tl.dot(weight.to(slope.dtype), slope, input_precision="ieee")
    column, starts = tl.arange(0, PART_BLOCK), (b * keys + s)[:, None] * (PART + REST)
    tl.atomic_add(d_k + starts + column[None, :], d_key, mask=(s >= 0)[:, None] & (column < PART)[None, :], sem="relaxed")
    if REST > 0:
        column = tl.arange(0, REST_BLOCK)
        tl.atomic_add(d_k + starts + PART + column[None, :], d_rest, mask=(s >= 0)[:, None] & (column < REST)[None, :], sem="relaxed")
    column = tl.arange(0, VALUE_BLOCK)
    place_v = (b * keys + s)[:, None] * VALUE + column[None, :]
    tl.atomic_add(d_v + place_v, d_value, mask=(s >= 0)[:, None] & (column < VALUE)[None, :], sem="relaxed")
