"""Where jobs run. An executor takes a job and gives a handle; this machine is one, a cluster's queue can be another."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Protocol

import longcat_lab
from longcat_lab.ablation import store
from longcat_lab.ablation.job import BUSY, DRIVER
from longcat_lab.ablation.jobs import Job
from longcat_lab.ablation.kernel import end_left_kernel, kill_group
from longcat_lab.errors import LabError
from longcat_lab.node import nearest

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
__all__ = ["BUSY", "EXECUTORS", "Executor", "Handle", "LocalExecutor", "cores", "make"]


class Handle(Protocol):
    """One submitted job."""

    def poll(self) -> int | None:
        """None while it lives, then its exit status (negative: the signal that killed it)."""

    def stop(self, force: bool = False) -> None:
        """Ask it to end and return at once; with `force`, end it and all that it started."""


class Executor(Protocol):
    """Starts `python -m longcat_lab.ablation.job FOLDER` somewhere that sees the sweep's folder."""

    def submit(self, job: Job) -> Handle: ...


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def environment_for(threads: int) -> dict[str, str]:
    """What a process that trains is started with: this process's environment, the same library, and so many threads if none are set."""
    # Thread counts must be there before the process starts: numerical libraries read them once.
    environment = {name: str(threads) for name in THREAD_VARIABLES} | dict(os.environ)
    library = str(Path(longcat_lab.__file__).resolve().parents[1])
    path = [library, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(filter(None, path)))
    return environment


class _LocalHandle:
    def __init__(self, job: Job, process: subprocess.Popen[bytes]) -> None:
        self._job, self._process = job, process

    def poll(self) -> int | None:
        return self._process.poll()

    def stop(self, force: bool = False) -> None:
        if self._process.poll() is None:
            kill_group(self._process.pid, signal.SIGKILL if force else signal.SIGTERM)
        if force:  # the kernel has a process group of its own
            self._process.wait()
            end_left_kernel(store.holder(self._job.folder))


class LocalExecutor:
    """Jobs as processes of this machine, each in its own session, so that Ctrl-C reaches the driver alone.

    Args:
        jobs: how many run at a time; the cores are shared out among them.
    """

    def __init__(self, jobs: int = 1) -> None:
        self.threads = max(1, cores() // jobs)

    def submit(self, job: Job) -> Handle:
        environment = environment_for(self.threads) | {DRIVER: str(os.getpid())}
        job.folder.mkdir(parents=True, exist_ok=True)
        with open(job.folder / "job.log", "wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "longcat_lab.ablation.job", str(job.folder.resolve())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        return _LocalHandle(job, process)


EXECUTORS = {"local": LocalExecutor}


def check(executor: str | Executor) -> None:
    """Raises `LabError` if there is no executor of that name."""
    if isinstance(executor, str) and executor not in EXECUTORS:
        raise LabError(f"Unknown executor '{executor}'{nearest(executor, list(EXECUTORS))}")


def make(executor: str | Executor, jobs: int) -> Executor:
    """The executor of that name for so many jobs at a time, or the given one."""
    check(executor)
    return EXECUTORS[executor](jobs) if isinstance(executor, str) else executor
