"""The processes that share a checkpoint: what one knows is known to all, and what fails on one fails on all with the same sentence."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from longcat_lab.errors import LabError, is_out_of_memory
from longcat_lab.files import sentence_of


class Processes:
    """The members of `group` (None: all, or the only one), over a group of their own on gloo.

    A save in the background that shares the group of training deadlocks with it, and accelerators' groups take no plain data.

    Args:
        timeout: seconds that a process waits for one that is alive but does not come; None takes torch's half hour.
    """

    def __init__(self, group: dist.ProcessGroup | None, timeout: float | None) -> None:
        self.group, self.rank, self.size = None, 0, 1
        if dist.is_available() and dist.is_initialized():
            ranks = None if group is None else dist.get_process_group_ranks(group)
            wait = None if timeout is None else datetime.timedelta(seconds=timeout)
            # Of a group that is not everybody, its members alone are asked.
            self.group = dist.new_group(ranks, timeout=wait, backend="gloo", use_local_synchronization=ranks is not None)
            self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)

    def from_first(self, find: Callable[[], Any]) -> Any:
        """What `find` gives on the first process, on all."""
        held = [find() if self.rank == 0 else None]
        if self.size > 1:
            with _lost():
                dist.broadcast_object_list(held, group=self.group, group_src=0)
        return held[0]

    def gathered(self, value: Any) -> list[Any]:
        """What all have, by rank."""
        held = [value] * self.size
        if self.size > 1:
            with _lost():
                dist.all_gather_object(held, value, group=self.group)
        return held

    def together(self, make: Callable[[], Any]) -> Any:
        """`make()`; a LabError of any process is raised on all."""
        made, error = None, None
        try:
            made = make()
        except LabError as refused:
            error = str(refused)
        errors = [each for each in self.gathered(error) if each is not None]
        if errors:
            raise LabError(errors[0])
        return made

    def any(self, flags: torch.Tensor) -> torch.Tensor:
        """Elementwise: whether any process says so."""
        if self.size > 1:
            flags = flags.to(torch.uint8)
            with _lost():
                dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self.group)
        return flags.bool()


@contextlib.contextmanager
def _lost() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        fail(error, "agreeing on a checkpoint")


def fail(error: BaseException, doing: str) -> NoReturn:
    """Raises what failed on any of the processes as one LabError for all; memory that ran out, and interrupts, as they are."""
    cause, where = error, ""
    if isinstance(error, CheckpointException):
        rank, (cause, _) = min(error.failures.items(), key=lambda failure: failure[0])
        where = f" on process {rank}"
    if isinstance(cause, LabError) or is_out_of_memory(cause) or not isinstance(cause, Exception):
        raise cause
    if isinstance(cause, OSError):
        raise sentence_of(cause, doing) from error
    why = (str(cause).splitlines() or [type(cause).__name__])[0]
    if not where and isinstance(cause, RuntimeError):  # out of a collective
        raise LabError(f"Another process was lost while {doing} ({why}): start again, the run goes on from its last checkpoint.") from error
    raise LabError(f"Failed while {doing}{where} ({why}).") from error
