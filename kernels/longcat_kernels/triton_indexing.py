"""An indexer's scores and selection in Triton: [T, S] scores are there for one chunk of queries at a time, and nothing is sorted.

Importing this imports Triton. In Triton's interpreter (TRITON_INTERPRET=1 before Triton is first imported) it runs on a CPU, which is
for tests: it is slow, and its blocks are small, so that small inputs have several of them.
"""

from __future__ import annotations

import contextlib
import functools
import os

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function

from longcat_kernels.library import SWITCH

INTERPRETED = bool(triton.knobs.runtime.interpret)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Queries and keys of a block of scores, selected keys of a block, keys that a selection reads at a time.
QUERIES, KEYS, CHOSEN, READ = (16, 16, 16, 32) if INTERPRETED else (64, 128, 64, 2048)
KEPT = 2**11 if INTERPRETED else 2**26  # scores kept at a time, 4 bytes each


def available() -> bool:
    """Whether the operators can run here: on an accelerator that Triton compiles for, or on a CPU in Triton's interpreter."""
    if os.environ.get(SWITCH, "").lower() in ("off", "0", "no", "false"):
        return False
    return INTERPRETED or _accelerator() is not None


def takes(*tensors: Tensor) -> bool:
    """Whether the operators work on these and are `available`: all on that device, each of one of `DTYPES`, nothing traced."""
    kind = "cpu" if INTERPRETED else _accelerator()
    plain = all(type(t) in (Tensor, torch.nn.Parameter) and t.device.type == kind and t.dtype in DTYPES for t in tensors)
    return plain and not torch.compiler.is_compiling() and available()


def index_topk(q: Tensor, k: Tensor, w: Tensor, first: Tensor | None, topk: int, sinks: int = 0, window: int = 0) -> Tensor:
    """The keys that each query attends to: sinks, window, and those of the highest scores among the rest, `topk` together.

        I_{t,s} = sum_j w_{t,j} ReLU(q_{t,j} . k_s);   query t stands at key S - T + t

    Of equal scores the earlier key goes first. Products of q and k are summed in fp32 (float32 inputs without TF32).

    Args:
        q: [B, T, H_I, d_I]; k: [B, S, d_I]; w: [B, T, H_I].
        first: int [B, T], the first key each query sees; None: key 0.
        topk: K, at least sinks + window.

    Returns:
        int32 [B, T, min(topk, S)]: key numbers in rising order, -1 in front where fewer are visible. No gradient.

    Raises:
        ValueError: shapes, dtypes, devices or numbers that do not fit together.

    Memory: `KEPT` scores of 4 bytes, or one query's of each row where that is more.
    Source: DeepSeek-V3.2 report, eq. 1 and 2; LSA (arXiv 2608.01662), streaming-aware indexing. Radix selection: four passes over a
    query's scores find, 8 bits at a time, the score of rank K; a fifth writes the keys above it, and the first of those equal to it.
    """
    q, k, w = _checked(q.detach(), k.detach(), w.detach())
    (batch, queries, heads, width), keys = q.shape, k.shape[1]
    if topk < max(sinks + window, 1):
        raise ValueError(f"topk is {topk}, below sinks + window ({sinks + window}) or 1: raise it")
    if first is not None:
        if first.shape != q.shape[:2]:
            raise ValueError(f"first is {list(first.shape)}, and {[batch, queries]} fits q")
        first = first.contiguous()
    many = min(topk, keys)
    chosen = torch.empty(batch, queries, many, dtype=torch.int32, device=q.device)
    chunk = max(1, min(queries, KEPT // max(batch * keys, 1)))
    codes = torch.empty(batch, chunk, keys, dtype=torch.uint32, device=q.device)
    with on_device(q):
        for begin in range(0, queries, chunk):
            rows = min(chunk, queries - begin)
            grid = (triton.cdiv(keys, KEYS), triton.cdiv(rows, QUERIES), batch)
            sizes = (begin, rows, chunk, queries, keys, heads, width)
            strides = (*q.stride()[:3], *k.stride()[:2])
            _scores_kernel[grid](
                q, k, w, first, codes, *sizes, *strides, first is not None, QUERIES, KEYS, padded(width), num_warps=8, num_stages=2
            )
            sizes = (begin, rows, chunk, queries, keys, many, sinks, window)
            _select_kernel[(rows, batch)](codes, first, chosen, *sizes, first is not None, READ, num_warps=8)
    return chosen


def selected_scores(q: Tensor, k: Tensor, w: Tensor, indices: Tensor) -> Tensor:
    """I_{t,s} of `index_topk` at the selected keys alone, in fp32; -inf where there is none. Differentiable once in q, k and w.

    Not the same bits each time: k's gradient is a sum of atomic additions, whose order the machine chooses.

    Args:
        q: [B, T, H_I, d_I]; k: [B, S, d_I]; w: [B, T, H_I]; indices: a selection, int32 [B, T, K].

    Returns:
        fp32 [B, T, K].

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
        RuntimeError: differentiated twice.

    Source: DeepSeek-V3.2 report, eq. 1; its sparse training stage needs these scores alone.
    """
    return _SelectedScores.apply(*_checked(q, k, w, indices), indices.contiguous())


class _SelectedScores(Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, w: Tensor, indices: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, w, indices)
        scores = torch.empty(indices.shape, dtype=torch.float32, device=q.device)
        (batch, queries, many), (heads, width) = indices.shape, q.shape[2:]
        grid = (batch * queries, triton.cdiv(many, CHOSEN))
        sizes = (queries, many, heads, width, *q.stride()[:3], *k.stride()[:2])
        with on_device(q):
            _selected_kernel[grid](q, k, w, indices, scores, *sizes, padded(heads), CHOSEN, padded(width))
        return scores

    @staticmethod
    def backward(ctx, d_scores: Tensor) -> tuple[Tensor | None, ...]:
        once("selected_scores")
        q, k, w, indices = ctx.saved_tensors
        (batch, queries, many), (heads, width) = indices.shape, q.shape[2:]
        d_q, d_w = torch.empty(q.shape, dtype=q.dtype, device=q.device), torch.empty_like(w)
        d_k = torch.zeros(k.shape, dtype=torch.float32, device=k.device)
        sizes = (queries, k.shape[1], many, heads, width, *q.stride()[:3], *k.stride()[:2])
        with on_device(q):
            _selected_backward_kernel[(batch * queries,)](
                *(q, k, w, indices, d_scores.contiguous(), d_q, d_k, d_w),
                *(*sizes, padded(heads), CHOSEN, padded(width)),
                num_warps=8 if heads > 32 else 4,
            )
        return d_q, d_k.to(k.dtype), d_w, None


# --- shared with triton_sparse_attention --------------------------------------------------------------------------------------


def padded(width: int) -> int:
    """The power of two that a block of this width is given; a matrix product wants 16 at least."""
    return max(16, triton.next_power_of_2(width))


def common(*tensors: Tensor) -> torch.dtype:
    """The dtype in which these are multiplied; the interpreter multiplies bfloat16 numbers' bits, so there it is float32."""
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    return torch.float32 if INTERPRETED and dtype == torch.bfloat16 else dtype


def dense_rows(tensor: Tensor) -> Tensor:
    """`tensor`, copied only where its rows are not dense."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, whatever the tensors lie on."""
    return contextlib.nullcontext() if tensor.device.type == "cpu" else torch.accelerator.device_index(tensor.device.index)


def once(name: str) -> None:
    """Refuses create_graph=True, which would give wrong second derivatives."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"Triton's {name} is differentiable once; for second derivatives set {SWITCH}=off")


def check_selection(indices: Tensor, q: Tensor) -> None:
    if indices.dtype != torch.int32 or indices.dim() != 3 or indices.shape[:2] != q.shape[:2] or indices.device != q.device:
        described = f"{indices.dtype} {list(indices.shape)} on {indices.device}"
        raise ValueError(f"indices are {described}, and torch.int32 {list(q.shape[:2])} with a number of keys, on {q.device}, fits q")


def check_dtypes(**tensors: Tensor) -> None:
    device = next(iter(tensors.values())).device
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} is {tensor.dtype}, and must be one of {', '.join(map(str, DTYPES))}")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, and the others are on {device}")


def _accelerator() -> str | None:
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return kind.type if kind is not None and kind.type in ("cuda", "xpu") else None


def _checked(q: Tensor, k: Tensor, w: Tensor, indices: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """q and k in one dtype with dense rows, w dense."""
    check_dtypes(q=q, k=k, w=w)
    if q.dim() != 4 or w.shape != q.shape[:3]:
        raise ValueError(f"q is {list(q.shape)} and w {list(w.shape)}, and must be [B, T, H_I, d_I] and [B, T, H_I]")
    if k.dim() != 3 or k.shape[0] != q.shape[0] or k.shape[2] != q.shape[3] or k.shape[1] < (q.shape[1] if indices is None else 1):
        raise ValueError(f"k is {list(k.shape)}, and [{q.shape[0]}, S, {q.shape[3]}] with S at least {q.shape[1]} fits q")
    if indices is not None:
        check_selection(indices, q)
    dtype = common(q, k)
    return dense_rows(q.to(dtype)), dense_rows(k.to(dtype)), w.contiguous()


# --- kernels ------------------------------------------------------------------------------------------------------------------
# Names ending in _b, _t, _s, _h are strides along row, query, key, head; offsets are int64, because B T S can exceed 2^31.


@triton.jit
def _scores_kernel(
    q, k, w, first, codes, begin, rows, chunk, queries, keys, heads, width, q_b, q_t, q_h, k_b, k_s,
    HAS_FIRST: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Scores [B, chunk, S] of the queries begin ... begin + rows - 1; blocks that no query of theirs sees are left as they are.

    Kept as uint32 that order as the scores do: the sign bit turned, and of negative numbers all others too.
    """
    b = tl.program_id(2).to(tl.int64)
    row = tl.program_id(1) * QUERIES + tl.arange(0, QUERIES)
    t, s, d = begin + row, tl.program_id(0) * KEYS + tl.arange(0, KEYS), tl.arange(0, WIDTH)
    newest = keys - queries + tl.minimum(begin + (tl.program_id(1) + 1) * QUERIES, begin + rows) - 1
    seen = tl.program_id(0) * KEYS <= newest
    if HAS_FIRST:
        oldest = tl.min(tl.load(first + b * queries + t, mask=row < rows, other=keys), 0)
        seen = seen & (oldest < (tl.program_id(0) + 1) * KEYS)
    if seen:
        inside = (row < rows)[:, None] & (d < width)[None, :]
        key = tl.load(k + b * k_b + s.to(tl.int64)[:, None] * k_s + d[None, :], mask=(s < keys)[:, None] & (d < width)[None, :], other=0.0)
        sums = tl.zeros([QUERIES, KEYS], tl.float32)
        places = q + b * q_b + t.to(tl.int64)[:, None] * q_t + d[None, :]
        for h in range(heads):
            query = tl.load(places, mask=inside, other=0.0)
            places += q_h
            weight = tl.load(w + (b * queries + t) * heads + h, mask=row < rows, other=0.0).to(tl.float32)
            sums += weight[:, None] * tl.maximum(tl.dot(query, tl.trans(key), input_precision="ieee"), 0.0)
        place = (b * chunk + row)[:, None] * keys + s[None, :]
        bits = tl.where(sums == 0.0, 0.0, sums).to(tl.uint32, bitcast=True)  # -0 is 0
        tl.store(
            codes + place,
            tl.where((bits >> 31) == 1, bits ^ 0xFFFFFFFF, bits | 0x80000000),
            mask=(row < rows)[:, None] & (s < keys)[None, :],
        )


@triton.jit
def _select_kernel(
    codes, first, chosen, begin, rows, chunk, queries, keys, many, sinks, window, HAS_FIRST: tl.constexpr, READ: tl.constexpr
):  # fmt: skip
    """One query's selection: keys oldest ... newest are visible, `many` of them wanted, those from low to high compete."""
    b = tl.program_id(1).to(tl.int64)
    t = begin + tl.program_id(0)
    newest, oldest = keys - queries + t, 0
    if HAS_FIRST:
        oldest = tl.load(first + b * queries + t).to(tl.int32)
    line, out = codes + (b * chunk + tl.program_id(0)) * keys, chosen + (b * queries + t) * many
    step, count = tl.arange(0, READ), newest - oldest + 1
    if count <= many:
        for start in range(0, many, READ):
            place = start + step
            tl.store(out + place, tl.where(place < many - count, -1, newest + 1 - many + place), mask=place < many)
    else:
        low, high, left = oldest + sinks, newest - window, many - sinks - window
        bins = tl.arange(0, 256)
        least = tl.full([], 0, tl.uint32)  # after pass p, the top 8 p bits of the code of rank `left`
        for p in tl.static_range(4):
            counts = tl.zeros([256], tl.int32)
            for start in range(low, high + 1, READ):
                s = start + step
                code = tl.load(line + s, mask=s <= high, other=0)
                counted = s <= high
                if p > 0:
                    counted = counted & ((code >> (32 - 8 * p)) == least)
                counts += tl.histogram(((code >> (24 - 8 * p)) & 255).to(tl.int32), 256, mask=counted)
            # The highest digit that, with all above it, has enough keys; `left` becomes how many are still wanted of that digit.
            enough = tl.cumsum(counts, 0, reverse=True)
            digit = tl.max(tl.where(enough >= left, bins, 0), 0)
            left -= tl.max(tl.where(bins > digit, enough, 0), 0)
            least = (least << 8) | digit.to(tl.uint32)
        written, equals = 0, 0
        for start in range(oldest, newest + 1, READ):
            s = start + step
            competes = (s >= low) & (s <= high)
            code = tl.load(line + s, mask=competes, other=0)
            equal = (competes & (code == least)).to(tl.int32)
            early = (equal == 1) & (equals + tl.cumsum(equal, 0) <= left)
            fixed = (s <= newest) & ((s < low) | (s > high))
            taken = (fixed | early | (competes & (code > least))).to(tl.int32)
            tl.store(out + written + tl.cumsum(taken, 0) - 1, s, mask=taken == 1)
            written += tl.sum(taken, 0)
            equals += tl.sum(equal, 0)


@triton.jit
def _selected_kernel(
    q, k, w, indices, scores, queries, many, heads, width, q_b, q_t, q_h, k_b, k_s,
    HEADS: tl.constexpr, CHOSEN: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Scores of one query and CHOSEN of its keys."""
    row = tl.program_id(0).to(tl.int64)
    b, t = row // queries, row % queries
    h, d, place = tl.arange(0, HEADS).to(tl.int64), tl.arange(0, WIDTH), tl.program_id(1) * CHOSEN + tl.arange(0, CHOSEN)
    query = tl.load(q + b * q_b + t * q_t + h[:, None] * q_h + d[None, :], mask=(h < heads)[:, None] & (d < width)[None, :], other=0.0)
    weight = tl.load(w + row * heads + h, mask=h < heads, other=0.0).to(tl.float32)
    s = tl.load(indices + row * many + place, mask=place < many, other=-1)
    key = tl.load(k + b * k_b + s.to(tl.int64)[:, None] * k_s + d[None, :], mask=(s >= 0)[:, None] & (d < width)[None, :], other=0.0)
    sums = tl.sum(weight[:, None] * tl.maximum(tl.dot(query, tl.trans(key), input_precision="ieee"), 0.0), 0)
    tl.store(scores + row * many + place, tl.where(s >= 0, sums, float("-inf")), mask=place < many)


@triton.jit
def _selected_backward_kernel(
    q, k, w, indices, d_scores, d_q, d_k, d_w, queries, keys, many, heads, width, q_b, q_t, q_h, k_b, k_s,
    HEADS: tl.constexpr, CHOSEN: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One query's gradients, and what it adds to those of its keys (d_k is dense, in fp32)."""
    row = tl.program_id(0).to(tl.int64)
    b, t = row // queries, row % queries
    h, d = tl.arange(0, HEADS).to(tl.int64), tl.arange(0, WIDTH)
    inside = (h < heads)[:, None] & (d < width)[None, :]
    query = tl.load(q + b * q_b + t * q_t + h[:, None] * q_h + d[None, :], mask=inside, other=0.0)
    weight = tl.load(w + row * heads + h, mask=h < heads, other=0.0).to(tl.float32)
    sums, slopes = tl.zeros([HEADS, WIDTH], tl.float32), tl.zeros([HEADS], tl.float32)
    for start in range(0, many, CHOSEN):
        place = start + tl.arange(0, CHOSEN)
        s = tl.load(indices + row * many + place, mask=place < many, other=-1)
        there = (s >= 0)[:, None] & (d < width)[None, :]
        key = tl.load(k + b * k_b + s.to(tl.int64)[:, None] * k_s + d[None, :], mask=there, other=0.0)
        slope = tl.load(d_scores + row * many + place, mask=s >= 0, other=0.0)
        product = tl.dot(query, tl.trans(key), input_precision="ieee")
        slopes += tl.sum(tl.maximum(product, 0.0) * slope[None, :], 1)
        d_product = tl.where(product > 0, weight[:, None] * slope[None, :], 0.0).to(query.dtype)
        sums += tl.dot(d_product, key, input_precision="ieee")
        added = tl.dot(tl.trans(d_product), query, input_precision="ieee")
        tl.atomic_add(d_k + (b * keys + s)[:, None] * width + d[None, :], added, mask=there, sem="relaxed")
    tl.store(d_q + (row * heads + h)[:, None] * width + d[None, :], sums, mask=inside)
    tl.store(d_w + row * heads + h, slopes, mask=h < heads)
