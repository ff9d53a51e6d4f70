"""Where jobs run. An executor takes a job and gives a handle; each engine is one file here, or one of yours by `register_executor`.

An executor is made by `make(resources, jobs, folder, rooms)`, before anything is written: there it says in one sentence what cannot be.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from longcat_lab.ablation.ends import End
from longcat_lab.ablation.job import BUSY
from longcat_lab.ablation.jobs import Job
from longcat_lab.ablation.resources import Resources
from longcat_lab.ablation.rooms import Rooms
from longcat_lab.errors import LabError
from longcat_lab.node import nearest

PATIENCE = 20.0  # seconds that stopped jobs have to save what they can; more than a job gives its kernel
GROUP = "longcat_lab.executors"  # entry points of installed packages: NAME = module:make


class Refused(LabError):
    """The engine takes no more jobs now; the job can be submitted again later."""


class Handle(Protocol):
    """One submitted job.

    Two methods more are asked where a handle has them: `waits()`, whether it stands in a queue, and `why()`, the `End` of a job that is
    over as its engine tells it (cancelled, its node lost), or None.
    """

    def poll(self) -> int | None:
        """None while it lives, then its exit status (negative: the signal that killed it)."""

    def stop(self, force: bool = False) -> None:
        """Ask it to end and return at once; with `force`, end it and all that it started. May take effect with the next `poll` of any."""


class Executor(Protocol):
    """Starts `python -m longcat_lab.ablation.job FOLDER` somewhere that sees the sweep's folder.

    Attributes that are used where there are any: `slots`, how many jobs it takes at a time (fewer are set where fewer are left to run);
    `patience`, the seconds that its jobs have to stop; `attempts`, job -> attempts that had begun before the one that it follows;
    `wait(seconds)`, which returns before where a job may have ended; `reserve(threads)`, how many one job computes with; `told()`, what is
    to be said of jobs that wait, each sentence once; `close()`, called when nothing runs any more.
    """

    def submit(self, job: Job) -> Handle:
        """Start a job, or follow it where an earlier driver has started it and it still runs.

        Raises:
            Refused: it takes no more jobs now.
            OSError: this job cannot be started.
            LabError: no job like this one ever can.
        """


Make = Callable[[Resources, int | None, Path, Rooms], Executor]
EXECUTORS: dict[str, str | Make] = {
    "local": "longcat_lab.ablation.executors.local:make",
    "slurm": "longcat_lab.ablation.executors.slurm:make",
}


def register_executor(name: str, make: Make) -> None:
    """Make `--executor NAME` known in this process."""
    EXECUTORS[name] = make


def _installed() -> dict[str, Any]:
    from importlib.metadata import entry_points

    return {entry.name: entry for entry in entry_points(group=GROUP)}


def check(executor: str | Executor) -> None:
    """Raises `LabError` if there is no executor of that name."""
    if isinstance(executor, str) and executor not in EXECUTORS and executor not in (more := _installed()):
        raise LabError(f"Unknown executor '{executor}'{nearest(executor, [*EXECUTORS, *more])}")


def make(executor: str | Executor, resources: Resources, jobs: int | None, folder: Path, rooms: Rooms) -> Executor:
    """The executor of that name, or the given one.

    Raises:
        LabError: there is none of that name, or a job asks for more than it has.
    """
    check(executor)
    if not isinstance(executor, str):
        return executor
    found = EXECUTORS.get(executor) or _installed()[executor].load()
    if isinstance(found, str):
        module, _, name = found.partition(":")
        found = getattr(import_module(module), name)
    return found(resources, jobs, folder, rooms)


def why(handle: Handle) -> End | None:
    """How the engine says that a job ended, where it says anything."""
    told = getattr(handle, "why", None)
    return told() if told else None


def told(executor: Executor) -> list[str]:
    """What an executor has to say since it was last asked."""
    tell = getattr(executor, "told", None)
    return tell() if tell else []


def waits(handle: Handle) -> bool:
    """Whether a job stands in a queue."""
    told = getattr(handle, "waits", None)
    return bool(told and told())


__all__ = ["BUSY", "EXECUTORS", "Executor", "Handle", "Refused", "check", "make", "register_executor", "told", "waits", "why"]
