"""Rows of a table that is divided over the processes of a group: row numbers go out, each once, and rows come back."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from longcat_lab.parallel.collectives import count_traffic, gathered, group_size, place_in
from longcat_lab.parallel.exchange import exchange, exchange_counts

Way = tuple[list[int], list[int], ProcessGroup]  # rows to send and to receive, by process


class Found(NamedTuple):
    """values [..., width]; distinct: how many different rows this process asked for; asked: int64 [R], numbers *in its own shard* of the
    rows that all processes asked this one for, by process and ascending (a row comes as often as processes ask for it)."""

    values: Tensor
    distinct: int
    asked: Tensor


def shard_size(total: int, processes: int, place: int) -> int:
    """Rows of a table of `total` at `place`: ceil(total / processes) from the front, as torch.chunk; the last ones may be fewer or none."""
    longest = -(-total // processes)
    return max(0, min(longest, total - place * longest))


def owner_and_offset(rows: Tensor, total: int, processes: int) -> tuple[Tensor, Tensor]:
    """rows int64 [...]: the place that holds each of them, and its number there."""
    longest = -(-total // processes)
    return rows // longest, rows % longest


def sharded_rows(weight: Tensor, rows: Tensor, total: int, group: ProcessGroup | None, sparse: bool = False) -> Tensor:
    """F.embedding of a table of `total` rows, of which this process holds `weight`. All of the group call it, also without a row to ask.

    Args:
        weight: [shard_size(total, g, place), width], on this process.
        rows: int64 [...], numbers in the whole table.
        sparse: the gradient of `weight` is sparse (COO; the rows that somebody asked for, ascending, each once); else dense.

    Returns:
        [..., width]. The gradient is summed by row at home, then at the owner in order of the processes: bits do not depend on timing.

    Raises:
        IndexError: a row that the table does not have.
        ValueError: `weight` is not the shard of this place.

    Sent for "embedding": 8 (g - 1) bytes of counts, 8 for each different row of another process's, width x itemsize for each row that
    another process asked for; in the backward pass width x itemsize for each different row of another process's.
    """
    return F.embedding(rows, weight, sparse=sparse) if group_size(group) == 1 else look_up(weight, rows, total, group, sparse).values


def look_up(weight: Tensor, rows: Tensor, total: int, group: ProcessGroup | None, sparse: bool = False) -> Found:
    """`sharded_rows`, with what statistics need."""
    size = group_size(group)
    if len(weight) != shard_size(total, size, place_in(group)):
        raise ValueError(
            f"place {place_in(group)} of {size} holds {len(weight)} rows of a table of {total}, and should hold "
            f"{shard_size(total, size, place_in(group))}"
        )
    ids, inverse = rows.flatten().unique(return_inverse=True)  # ascending, and so by owner
    if size == 1:
        return Found(F.embedding(rows, weight, sparse=sparse), len(ids), ids)
    if len(ids) and not 0 <= int(ids[0]) <= int(ids[-1]) < total:
        raise IndexError(f"rows {int(ids[0])} to {int(ids[-1])} are asked for, and the table has {total}: 0 to {total - 1}")
    with count_traffic("embedding"):
        owner, offset = owner_and_offset(ids, total, size)
        counts = torch.bincount(owner, minlength=size)
        send, receive = torch.stack((counts, exchange_counts(counts, group))).tolist()
        asked = exchange(offset, send, receive, group)
        found = _Rows.apply(weight, asked, inverse, (receive, send, group), sparse)
    return Found(found.view(*rows.shape, weight.shape[1]), len(ids), asked)


class _Rows(Function):
    """weight [n, width] to [rows, width]. `way` is the answers'."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, asked: Tensor, inverse: Tensor, way: Way, sparse: bool) -> Tensor:
        ctx.save_for_backward(asked, inverse)
        ctx.shape, ctx.way, ctx.sparse = weight.shape, way, sparse
        return exchange(weight.index_select(0, asked), *way).index_select(0, inverse)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        asked, inverse = ctx.saved_tensors
        answered, heard, group = ctx.way
        with count_traffic("embedding"):
            values = exchange(sum_by_row(inverse, d)[1], heard, answered, group)
        rows, values = sum_by_row(asked, values)
        if not ctx.sparse:
            return d.new_zeros(ctx.shape).index_copy_(0, rows, values), None, None, None, None
        return _coalesced(rows, values, ctx.shape), None, None, None, None


def sum_by_row(rows: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """rows int64 [n], values [n, d] to the different rows, ascending, and the sums of their values.

    Entries of a row are summed in the order in which they stand, so the bits follow neither timing nor the number of threads.
    """
    if len(rows) == 0:
        return rows, values
    rows, order = torch.sort(rows, stable=True)
    rows, counts = torch.unique_consecutive(rows, return_counts=True)
    return rows, F.embedding_bag(order, values, counts.cumsum(0) - counts, mode="sum")  # a bag is a sum of rows of the values


def sum_over_copies(gradient: Tensor, group: ProcessGroup | None) -> Tensor:
    """The sum, in order of the processes, of the sparse gradients that all of `group` have of the same rows; the same bits for each.

    Args:
        gradient: COO, indices [1, n], values [n, d]; n may differ between processes.

    Sent for "data", with m the largest n: (g - 1) (8 + m (8 + d x itemsize)) bytes.
    """
    if group_size(group) == 1:
        return gradient
    rows, values = sum_by_row(gradient._indices()[0], gradient._values())
    with count_traffic("data"), torch.no_grad():
        sizes = gathered(torch.tensor([len(rows)], device=rows.device), group, 0).tolist()
        if max(sizes) == 0:
            return _coalesced(rows, values, gradient.shape)
        rows, values = gathered(rows, group, 0, sizes), gathered(values, group, 0, sizes)
    return _coalesced(*sum_by_row(rows, values), gradient.shape)


def _coalesced(rows: Tensor, values: Tensor, shape: torch.Size) -> Tensor:
    return torch.sparse_coo_tensor(rows[None], values, shape, is_coalesced=True, check_invariants=False)
