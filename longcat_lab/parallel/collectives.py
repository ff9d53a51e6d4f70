"""Collectives that gradients pass through, over process groups, and the bytes that they send.

All take a group or None; None and a group of one process give the input back. Each result has the same bits in each run: sums over
processes run in the backend's fixed order. A backward pass does its collectives in reverse order of the forward pass (that is how
autograd goes through a graph), so they meet as long as all processes of a group call these functions in the same order.

Bytes on the wire, g processes, n bytes of a process's own input (of all-gather: of its slice; of reduce-scatter: of one slice):

    all-to-all       (`exchange.py`) what goes to other processes; what stays costs nothing
    all-gather       (g - 1) n
    reduce-scatter   (g - 1) n
    all-reduce       2 (g - 1) n / g, rounded down to whole bytes: a reduce-scatter and an all-gather

Slices of different lengths are padded to the longest one where the collective wants equal ones, and are counted so.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

PURPOSES = ("expert", "embedding", "context", "tensor", "data", "pipeline", "norm", "other")

_purpose: ContextVar[str] = ContextVar("purpose", default="other")
_open: list[Counter[str]] = []
_lock = threading.Lock()  # on an accelerator, backward passes run in threads of their own


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """`with counted() as traffic`: bytes that this process sends to others in here, by purpose; those of backward passes too."""
    traffic: Counter[str] = Counter()
    with _lock:
        _open.append(traffic)
    try:
        yield traffic
    finally:
        with _lock:
            _open[:] = [other for other in _open if other is not traffic]


@contextmanager
def count_traffic(purpose: str) -> Iterator[None]:
    """What is sent in here, and in the backward passes of what is computed in here, is counted for `purpose`.

    Where activations are recomputed, this stands inside of what is recomputed.

    Raises:
        ValueError: a purpose that there is not.
    """
    _known(purpose)
    token = _purpose.set(purpose)
    try:
        yield
    finally:
        _purpose.reset(token)


def add_traffic(size: int, purpose: str | None = None) -> None:
    """`size` bytes more, for `purpose` (None: that of `count_traffic`): for what is sent without the functions below."""
    purpose = _purpose.get() if purpose is None else _known(purpose)
    with _lock:
        for traffic in _open:
            traffic[purpose] += size


def purpose_now() -> str:
    """What is counted for where this is called: a backward pass, which runs elsewhere, counts for the same."""
    return _purpose.get()


def _known(purpose: str) -> str:
    if purpose not in PURPOSES:
        raise ValueError(f"traffic is counted for {', '.join(PURPOSES)}, and not for '{purpose}'")
    return purpose


def gather_bytes(size: int, processes: int) -> int:
    """Sent by one of `processes` in an all-gather of slices of `size` bytes, or a reduce-scatter into such slices."""
    return (processes - 1) * size


def reduce_bytes(size: int, processes: int) -> int:
    """Sent by one of `processes` in an all-reduce of `size` bytes."""
    return 2 * (processes - 1) * size // processes


def group_size(group: ProcessGroup | None) -> int:
    return 1 if group is None else group.size()


def place_in(group: ProcessGroup | None) -> int:
    return 0 if group is None else group.rank()


def part_sizes(length: int, parts: int) -> tuple[int, ...]:
    """Lengths of `parts` contiguous slices, the longer ones first, as torch.tensor_split makes them."""
    return tuple(length // parts + (place < length % parts) for place in range(parts))


def sum_in_backward(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """x as it is; its gradient is the sum of all processes' gradients. Where all have the same x and go on with it in different ways."""
    return x if group_size(group) == 1 else _SumInBackward.apply(x, group, purpose_now())


def sum_forward(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """The sum of all processes' x; the gradient passes as it is. Where all go on with the sum in the same way."""
    return x if group_size(group) == 1 else _SumForward.apply(x, group, purpose_now())


def own_part(x: Tensor, group: ProcessGroup | None, dim: int) -> Tensor:
    """This process's slice (`part_sizes`) of x along `dim`; the gradient is all-gathered. Where all processes have the same x."""
    if group_size(group) == 1:
        return x
    sizes = part_sizes(x.shape[dim], group.size())
    return _OwnPart.apply(x, group, dim % x.ndim, sizes, purpose_now())


def whole(x: Tensor, group: ProcessGroup | None, dim: int, sizes: Sequence[int] | None = None) -> Tensor:
    """All processes' slices x, one after the other along `dim`; each takes its slice of the gradient.

    Where all processes go on with the whole in the same way, so that each has the whole gradient.

    Args:
        sizes: length of each process's slice; None: all are as long as this one.

    Raises:
        ValueError: x is not as long as `sizes` says.
    """
    if group_size(group) == 1:
        return x
    return _Whole.apply(x, group, dim % x.ndim, _sizes(x, group, dim, sizes), purpose_now())


def gathered(x: Tensor, group: ProcessGroup | None, dim: int, sizes: Sequence[int] | None = None) -> Tensor:
    """As `whole`, but where processes go on in different ways: a slice's gradient is the sum over processes, by reduce-scatter."""
    if group_size(group) == 1:
        return x
    return _Gathered.apply(x, group, dim % x.ndim, _sizes(x, group, dim, sizes), purpose_now())


class _SumInBackward(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> Tensor:
        ctx.rest = rest
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        return _sum(d, *ctx.rest), None, None


class _SumForward(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> Tensor:
        return _sum(x, *rest)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        return d, None, None


class _OwnPart(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, dim: int, sizes: tuple[int, ...], purpose: str) -> Tensor:
        ctx.rest = group, dim, sizes, purpose
        return _slice(x, group, dim, sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        return _gather(d, *ctx.rest), None, None, None, None


class _Whole(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, dim: int, sizes: tuple[int, ...], purpose: str) -> Tensor:
        ctx.rest = group, dim, sizes
        return _gather(x, group, dim, sizes, purpose)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        return _slice(d, *ctx.rest), None, None, None, None


class _Gathered(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> Tensor:
        ctx.rest = rest
        return _gather(x, *rest)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        return _sum_slices(d, *ctx.rest), None, None, None, None


def _sum(x: Tensor, group: ProcessGroup, purpose: str) -> Tensor:
    out = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, group=group)
    add_traffic(reduce_bytes(out.nbytes, group.size()), purpose)
    return out


def _sizes(x: Tensor, group: ProcessGroup, dim: int, sizes: Sequence[int] | None) -> tuple[int, ...]:
    sizes = (x.shape[dim],) * group.size() if sizes is None else tuple(sizes)
    if len(sizes) != group.size() or sizes[group.rank()] != x.shape[dim]:
        raise ValueError(f"process {group.rank()} of {group.size()} has a slice of {x.shape[dim]}, and sizes are {list(sizes)}")
    return sizes


def _slice(x: Tensor, group: ProcessGroup, dim: int, sizes: tuple[int, ...]) -> Tensor:
    """A copy, so that x is not kept for the sake of a part of it."""
    place = group.rank()
    return x.narrow(dim, sum(sizes[:place]), sizes[place]).clone(memory_format=torch.contiguous_format)


def _gather(x: Tensor, group: ProcessGroup, dim: int, sizes: tuple[int, ...], purpose: str) -> Tensor:
    own = _padded(x, dim, max(sizes)).contiguous()
    slices = own.new_empty(len(sizes), *own.shape)
    dist.all_gather_single(slices.flatten(0, 1), own, group=group)
    add_traffic(gather_bytes(own.nbytes, len(sizes)), purpose)
    return torch.cat([part.narrow(dim, 0, size) for part, size in zip(slices.unbind(0), sizes, strict=True)], dim)


def _sum_slices(x: Tensor, group: ProcessGroup, dim: int, sizes: tuple[int, ...], purpose: str) -> Tensor:
    slices = torch.stack([_padded(part, dim, max(sizes)) for part in x.split(sizes, dim)])
    own = torch.empty_like(slices[0])
    dist.reduce_scatter_single(own, slices.flatten(0, 1), group=group)
    add_traffic(gather_bytes(own.nbytes, len(sizes)), purpose)
    return own.narrow(dim, 0, sizes[group.rank()]).contiguous()


def _padded(x: Tensor, dim: int, length: int) -> Tensor:
    missing = length - x.shape[dim]
    return F.pad(x, [0, 0] * (x.ndim - 1 - dim) + [0, missing]) if missing else x
