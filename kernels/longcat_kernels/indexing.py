"""Indexing on a CPU, compiled: which keys each query attends to, and the scores of those. See indexing.cpp for how."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.autograd import Function

from longcat_kernels.library import SUFFIX, library

POOLINGS = ("mean", "minmax")


def index_topk(q: Tensor, k: Tensor, w: Tensor, first: Tensor | None, topk: int, sinks: int = 0, window: int = 0) -> Tensor:
    """The keys that each query attends to: sinks, window, and the best of the rest by I, `topk` together; without gradient.

        I_{t,s} = sum_j w_{t,j} ReLU(q_{t,j} . k_s)

    Query t stands at key S - T + t and sees the keys `first` ... S - T + t. Sinks are the first keys it sees, and the window ends with
    its own. Of equal scores the earlier key goes first. A product that is NaN counts as 0; a key whose score is NaN or -inf is not
    taken. Scores are computed for queries that see more than `topk` keys, and kept for none: the work space is a copy of k, and some
    MiB a thread. Same bits each time and for any number of threads (`torch.get_num_threads()`), and the same scores whatever else is
    in the call: a token with a cache gets what it gets in the whole sequence.

    Args:
        q: [B, T, H_I, d_I], on a CPU, float32 or float64 like k [B, S, d_I] and w [B, T, H_I]; a k whose last dimension is dense is read
            as it lies.
        first: int64 [B, T], the first key of each query's document; None: key 0.
        topk: at least 1, and at least sinks + window.

    Returns:
        int32 [B, T, min(topk, S)]: key numbers in rising order, -1 in front where fewer are visible.

    Raises:
        NotAvailable: there is no compiled library here (`why_not()` says why).
        ValueError: shapes, dtypes, devices or numbers that do not fit together.
        RuntimeError: no memory.

    Source: DeepSeek-V3.2 report, eq. 1 and 2; LSA (arXiv 2608.01662). `index_topk` in longcat_lab's op.py is the same in PyTorch.
    """
    return _topk(q, k, w, first, topk, sinks, window, 0, 1, 1, "mean")


def hierarchical_topk(
    q: Tensor,
    k: Tensor,
    w: Tensor,
    first: Tensor | None,
    topk: int,
    sinks: int = 0,
    window: int = 0,
    *,
    page: int = 128,
    block: int = 8,
    pages: int = 1024,
    pooling: str = "mean",
) -> Tensor:
    """`index_topk` among the tokens of each query's best `pages` pages of `page` keys, ranked by one key for each `block` of them.

    What it computes, and what it settles, is said at `hierarchical_topk` of longcat_lab's hierarchical_op.py, the same in PyTorch.
    Arguments, result and errors beside these are those of `index_topk`.

    Args:
        block: divides page; pages: at least 1, the query's own page among them.
        pooling: "mean" or "minmax".

    Source: LSA (arXiv 2608.01662), hierarchical indexing.
    """
    if page < 1 or block < 1 or page % block:
        raise ValueError(f"block is {block}, and must divide page, which is {page}")
    if pages < 1:
        raise ValueError(f"pages is {pages}, and must be at least 1")
    if pooling not in POOLINGS:
        raise ValueError(f"pooling is '{pooling}', and must be {' or '.join(POOLINGS)}")
    return _topk(q, k, w, first, topk, sinks, window, page, block, pages, pooling)


def _topk(
    q: Tensor,
    k: Tensor,
    w: Tensor,
    first: Tensor | None,
    topk: int,
    sinks: int,
    window: int,
    page: int,
    block: int,
    pages: int,
    pooling: str,
) -> Tensor:
    _check(q, k, w)
    if min(sinks, window) < 0 or topk < max(1, sinks + window):
        raise ValueError(f"topk is {topk}, and must be at least 1 and at least sinks + window, which are {sinks} and {window}")
    if first is not None:
        if first.device.type != "cpu" or first.dtype != torch.int64 or first.shape != q.shape[:2]:
            wanted = f"{[*q.shape[:2]]} of torch.int64 on a CPU"
            raise ValueError(f"first is {list(first.shape)} of {first.dtype} on {first.device}, and must be {wanted}")
        first = first.contiguous()
    q, k, w = q.contiguous(), _dense_rows(k), w.contiguous()
    keys = k.shape[1]
    out = torch.empty(*q.shape[:2], min(topk, keys), dtype=torch.int32)
    # Numbers beyond these mean the same, and would overflow where they are multiplied.
    page = min(page, 2**31)
    limits = [topk, sinks, window, page, min(block, page), min(pages, keys), int(pooling == "minmax")]
    sizes = _numbers([q.shape[0], q.shape[1], keys, *q.shape[2:], k.stride(0), _row(k), *limits])
    call = getattr(library(), f"longcat_index_topk_{SUFFIX[q.dtype]}")
    if not call(*_addresses(q, k, w, first, out), sizes, torch.get_num_threads()):
        raise RuntimeError("no memory for the selection's work space")
    return out


def selected_scores(q: Tensor, k: Tensor, w: Tensor, indices: Tensor) -> Tensor:
    """I_{t,s} of `index_topk` at the keys of a selection alone; -inf where there is none (-1).

    A gradient that comes in at such a place is ignored, whatever it is. The result and the gradients have the same bits each time and
    for any number of threads (`torch.get_num_threads()`); differentiable once, in q, k and w.

    Args:
        q, k, w: as in `index_topk`.
        indices: int32 [B, T, K], each -1 or the number of a key, in any order.

    Returns:
        [B, T, K], in q's dtype.

    Raises:
        NotAvailable: there is no compiled library here (`why_not()` says why).
        ValueError: shapes, dtypes or devices that do not fit together, or the number of no key.
        RuntimeError: no memory; or differentiated twice.

    Memory kept for the backward pass: the inputs. The backward pass takes up to seven times k's for its sums beside.
    Source: DeepSeek-V3.2 report, eq. 1; `selected_scores` in longcat_lab's op.py is the same in PyTorch.
    """
    _check(q, k, w)
    if indices.device.type != "cpu" or indices.dtype != torch.int32 or indices.dim() != 3 or indices.shape[:2] != q.shape[:2]:
        wanted = f"{[*q.shape[:2]]} and K, torch.int32 on a CPU"
        raise ValueError(f"indices is {list(indices.shape)} of {indices.dtype} on {indices.device}, and must be {wanted}")
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, w)):
        return _Selected.apply(q, k, w, indices)
    return _forward(q.contiguous(), _dense_rows(k), w.contiguous(), indices.contiguous())


class _Selected(Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, w: Tensor, indices: Tensor) -> Tensor:
        q, k, w, indices = q.contiguous(), _dense_rows(k), w.contiguous(), indices.contiguous()
        ctx.save_for_backward(q, k, w, indices)
        return _forward(q, k, w, indices)

    @staticmethod
    def backward(ctx, d_out: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True; torch's own once_differentiable lets it pass where d_out is a constant
            raise RuntimeError("the compiled index scores are differentiable once; for second derivatives set LONGCAT_LAB_KERNELS=off")
        q, k, w, indices = ctx.saved_tensors
        grads = [torch.empty(t.shape, dtype=t.dtype) if wanted else None for t, wanted in zip((q, k, w), ctx.needs_input_grad)]
        _call("backward", q, k, w, indices, None, d_out.contiguous(), *grads)
        return *grads, None


def _forward(q: Tensor, k: Tensor, w: Tensor, indices: Tensor) -> Tensor:
    out = q.new_empty(indices.shape)
    _call("forward", q, k, w, indices, out)
    return out


def _call(which: str, q: Tensor, k: Tensor, w: Tensor, indices: Tensor, out: Tensor | None, *more: Tensor | None) -> None:
    sizes = _numbers([q.shape[0], q.shape[1], k.shape[1], *q.shape[2:], indices.shape[2], k.stride(0), _row(k)])
    call = getattr(library(), f"longcat_selected_{which}_{SUFFIX[q.dtype]}")
    outcome = call(*_addresses(q, k, w, indices, out), sizes, torch.get_num_threads(), *_addresses(*more))
    if outcome == 2:
        raise ValueError(f"indices has numbers that are neither -1 nor those of the {k.shape[1]} keys")
    if not outcome:
        raise RuntimeError("no memory for the index scores' work space")


def _check(q: Tensor, k: Tensor, w: Tensor) -> None:
    for name, tensor, dims in (("q", q, 4), ("k", k, 3), ("w", w, 3)):
        if tensor.device.type != "cpu":
            raise ValueError(f"{name} is on {tensor.device}, and this operator runs on a CPU")
        if tensor.dtype != q.dtype or tensor.dtype not in SUFFIX:
            raise ValueError(f"{name} is {tensor.dtype}, and q, k and w must all be float32 or all float64")
        if tensor.dim() != dims:
            raise ValueError(f"{name} is {list(tensor.shape)}, and must have {dims} dimensions")
    batch, queries, heads, width = q.shape
    if k.shape[0] != batch or k.shape[2] != width:
        raise ValueError(f"k is {list(k.shape)}, and [{batch}, S, {width}] fits q")
    if w.shape != q.shape[:3]:
        raise ValueError(f"w is {list(w.shape)}, and {[batch, queries, heads]} fits q")
    if min(heads, width, k.shape[1]) == 0:
        raise ValueError("heads, width and the number of keys must be at least 1")


def _dense_rows(k: Tensor) -> Tensor:
    """`k`, copied only where BLAS cannot read its rows as they lie."""
    rows, width = k.shape[1:]
    dense = (width == 1 or k.stride(2) == 1) and (rows == 1 or width <= k.stride(1) < 2**31)
    return k if dense else k.contiguous()


def _row(k: Tensor) -> int:
    """Distance from one key to the next; a single one's is never used, and BLAS wants it no shorter than a key."""
    return k.stride(1) if k.shape[1] > 1 else k.shape[2]


def _numbers(values: list[int]) -> ctypes.Array:
    return (ctypes.c_int64 * len(values))(*values)


def _addresses(*tensors: Tensor | None) -> list[int | None]:
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]
