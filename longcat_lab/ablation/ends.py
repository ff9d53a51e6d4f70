"""How a job can end, by kind: what tells them apart, so that a table can say it and a retry can be decided.

The kind stands in run.json as `job.end`, beside `status` and `reason`.
"""

from __future__ import annotations

import errno
import os
import signal
from dataclasses import dataclass
from pathlib import Path

from longcat_lab.errors import REFUSED

FINISHED, DIVERGED, STOPPED, DRIVER = "finished", "diverged", "stopped", "driver gone"
MEMORY, KERNEL, TIME, DISK, ERROR = "out of memory", "dead kernel", "time-out", "disk full", "error"
KILLED, NODE, PREEMPTED, CANCELLED, START = "killed", "node lost", "preempted", "cancelled", "not started"
SETTLED = ("finished", "diverged")  # statuses that are results: such a job is not run again while its identity is the same
NO_ROOM = 74  # exit status of a job that could not even write how it ended
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class End:
    """How a job ended, where the job itself could not say it."""

    kind: str
    reason: str

    @property
    def status(self) -> str:
        return "interrupted" if self.kind in (STOPPED, DRIVER) else self.kind if self.kind in SETTLED else "failed"


def of_cell(name: str, text: str) -> str:
    """The kind of an exception that ended a notebook's cell: its class's name and what it said."""
    if name in ("MemoryError", "OutOfMemoryError") or text.startswith("Out of memory"):
        return MEMORY
    if name in ("OSError", "RuntimeError", "SafetensorError"):
        if any(f"[Errno {number}]" in text or os.strerror(number) in text for number in FULL):
            return DISK
        if f"[Errno {errno.ENOMEM}]" in text or REFUSED.search(text):
            return MEMORY
    return DISK if text.startswith("No space left") else ERROR


def of_exception(problem: BaseException) -> str:
    """The kind of an exception in the job's own process."""
    inner = problem if isinstance(problem, OSError) else problem.__cause__
    if isinstance(inner, OSError) and inner.errno in FULL:
        return DISK
    return of_cell(type(problem).__name__, str(problem))


class OutOfMemoryKills:
    """Whether the system has killed processes for lack of memory since this was made, as far as it tells."""

    def __init__(self) -> None:
        self.before = _counted()

    def risen(self) -> bool:
        return _counted() > self.before


def _counted() -> int:
    """Processes that were killed for lack of memory: in this process's control group, or on this machine where no group counts them."""
    for path in _counters():
        try:
            words = path.read_text(encoding="ascii").split()
            return int(words[words.index("oom_kill") + 1])
        except (OSError, ValueError, IndexError):
            continue
    return 0


def _counters() -> list[Path]:
    root, found = Path("/sys/fs/cgroup"), []
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2; a container may see its own group as the root
            found += [root / path.lstrip("/") / "memory.events", root / "memory.events"]
        elif "memory" in controllers.split(","):
            found += [root / "memory" / path.lstrip("/") / "memory.oom_control", root / "memory" / "memory.oom_control"]
    # Version 1's group comes first where both are mounted, for then it is the one that holds the memory.
    return [*sorted(found, key=lambda file: file.name != "memory.oom_control"), Path("/proc/vmstat")]


def of_exit(code: int, kills: OutOfMemoryKills | None = None) -> End:
    """What the exit status of a job's own process says, where the job has left no other word."""
    if code == NO_ROOM:
        return End(DISK, "no space left on the disk for its record; see job.log")
    if code >= 0:
        return End(ERROR, f"its process ended with exit status {code}; see job.log")
    name = signal.Signals(-code).name
    if code == -signal.SIGKILL and kills is not None and kills.risen():
        return End(MEMORY, f"out of memory: the system killed its process ({name})")
    return End(KILLED, f"its process was killed by {name}; see job.log")
