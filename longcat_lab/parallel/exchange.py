"""All-to-all of rows, whole or in two halves between which something else is computed. The gradient goes back the same way, in halves too.

Bytes on the wire: what goes to other processes; what stays costs nothing. Counted for the purpose that holds where an exchange is posted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from longcat_lab.parallel.collectives import add_traffic, group_size, purpose_now


def exchange(x: Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int], group: ProcessGroup | None) -> Tensor:
    """All-to-all of rows: the first send_sizes[0] rows of x go to process 0, and so on; what comes is in order of the senders.

    Args:
        x: [sum of send_sizes, ...]; either may be empty, and all processes take part nevertheless.

    Returns:
        [sum of receive_sizes, ...]. The gradient goes the same way back.

    Raises:
        ValueError: sizes that do not fit x or the group.
    """
    return post_exchange(x, send_sizes, receive_sizes, group).wait()


class Posted:
    """Rows on their way.

    token: [0], stands for them in the graph until they are here.
    """

    def __init__(self, token: Tensor, way: _Way | None) -> None:
        self.token, self.way = token, way

    def wait(self, token: Tensor | None = None) -> Tensor:
        """What came, once it is here: what `exchange` returns, and raises where another process fails. Once.

        Args:
            token: in place of its own, where hooks have put another tensor into the graph for it.
        """
        token = self.token if token is None else token
        return token if self.way is None else _Wait.apply(token, self.way)


def post_exchange(
    x: Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int], group: ProcessGroup | None, at_once: bool = False
) -> Posted:
    """`exchange` in two halves: rows leave now, and what is computed before `wait` runs while they travel.

    So it is in the backward pass: `wait`'s sends the gradient back, and this one's waits for it. Autograd runs what was made later first,
    and thus all that was made between the two while the gradient travels.

    Args:
        at_once: nothing runs meanwhile: each way is waited for where it was begun.
    """
    if group_size(group) == 1:
        return Posted(x, None)
    if len(x) != sum(send_sizes) or not len(send_sizes) == len(receive_sizes) == group.size():
        raise ValueError(
            f"exchange of {len(x)} rows over {group.size()} processes cannot send {list(send_sizes)} and receive {list(receive_sizes)}"
        )
    way = _Way(tuple(send_sizes), tuple(receive_sizes), group, purpose_now(), at_once)
    return Posted(_Post.apply(x, way), way)


def exchange_counts(counts: Tensor, group: ProcessGroup | None) -> Tensor:
    """counts int64 [g, ...], a row for each process, to the rows that were meant for this one, [g, ...] by sender."""
    size = group_size(group)
    if size == 1:
        return counts
    way = _Way((1,) * size, (1,) * size, group, purpose_now(), True)
    way.go(counts)
    return way.arrive()


class _Way:
    """Between the processes of an exchange, forwards and, in the backward pass, backwards. One journey at a time."""

    def __init__(self, send: tuple[int, ...], receive: tuple[int, ...], group: ProcessGroup, purpose: str, at_once: bool) -> None:
        self.send, self.receive, self.group, self.purpose, self.at_once = send, receive, group, purpose, at_once
        self.journey: tuple[Any, Tensor, Tensor] | None = None

    def go(self, x: Tensor, back: bool = False) -> None:
        send, receive = (self.receive, self.send) if back else (self.send, self.receive)
        x, out = x.contiguous(), x.new_empty(sum(receive), *x.shape[1:])
        work = dist.all_to_all_single(out, x, list(receive), list(send), group=self.group, async_op=True)
        row = math.prod(x.shape[1:]) * x.element_size()
        add_traffic((sum(send) - send[self.group.rank()]) * row, self.purpose)
        self.journey = work, x, out  # x is read, and out written, until the wait is over
        if self.at_once:
            work.wait()

    def arrive(self) -> Tensor:
        (work, _, out), self.journey = self.journey, None
        if not self.at_once:
            work.wait()
        return out


class _Post(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, way: _Way) -> Tensor:
        ctx.way = way
        way.go(x)
        return x.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.way.arrive(), None


class _Wait(Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, way: _Way) -> Tensor:
        ctx.way = way
        return way.arrive()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        ctx.way.go(d, back=True)
        return d.new_empty(0), None
