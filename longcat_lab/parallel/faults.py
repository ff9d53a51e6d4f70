"""When one process of several fails: its reason is told once, by the first process, and every process ends soon.

A process that fails leaves its reason in the store that all share before its connections close. The others, who only see that somebody
has gone, find it there.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from longcat_lab import started
from longcat_lab.errors import LabError

LOST = "Another process was lost"  # how the sentence begins that says no more than that; starting again may help
PARENT = "LONGCAT_LAB_PARENT"  # environment variable: the process that starts this one, without which it does not want to live
REASON = "longcat_lab/failed"
GRACE = 2.0  # seconds that the reason may take to arrive
LAST_WORDS = 10.0  # seconds that a process has when its launcher asks it to end
LOOK_EVERY = 0.2
_GONE = re.compile(r"gloo|NCCL|HCCL|[Cc]onnection (closed|reset|refused)|Broken pipe|[Tt]imed out|timeout")


class Unreachable(LabError):
    """The other processes were never met: no process can speak for this one."""


class Lost(LabError):
    """Another process has gone without a reason that could be found."""


def store() -> Any:
    """What all processes of the run read and write; the launcher or the first process holds it."""
    return dist.distributed_c10d._get_default_store()


def several() -> bool:
    """Whether this process is one of several that have met."""
    return dist.is_initialized() and dist.get_world_size() > 1


def speaks(error: BaseException) -> bool:
    """Whether this process is the one that says this to people."""
    rank = dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))
    return rank == 0 or isinstance(error, Unreachable)


def is_lost(error: BaseException) -> bool:
    """Whether it only says that another process has gone, or does not answer."""
    if isinstance(error, LabError):
        return str(error).startswith(LOST)
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and _GONE.search(str(error)) is not None)


def explained(error: Exception, when: str = "", folder: Path | None = None) -> Exception:
    """What to raise in place of `error`, the same on all processes: the first reason that any of them had. Alone: `error` itself.

    Args:
        when: " at step 3", for the sentence.
        folder: gets the traceback of what nobody expected.
    """
    if not several() or isinstance(error, Lost):
        return error
    if is_lost(error):
        return _reason(error, when)
    if not isinstance(error, LabError):
        error = LabError(_unexpected(error, when, folder))
    with contextlib.suppress(RuntimeError):  # whoever holds the store is gone: then the others know
        store().compare_set(REASON, "", str(error))
    return error


@contextlib.contextmanager
def shared(folder: Path | None = None) -> Iterator[None]:
    """What is raised in here is explained."""
    try:
        yield
    except Exception as error:
        told = explained(error, folder=folder)
        if told is error:
            raise
        raise told from error


def told_by_another() -> bool:
    """Whether some process has failed and said why."""
    return store().check([REASON])


def _reason(error: Exception, when: str) -> LabError:
    end = time.monotonic() + GRACE
    with contextlib.suppress(RuntimeError):
        while time.monotonic() < end:
            if told_by_another():
                return LabError(store().get(REASON).decode())
            time.sleep(LOOK_EVERY)
    if isinstance(error, LabError):
        return Lost(str(error))
    return Lost(f"{LOST}{when} ({_line(error)}): start again, the run goes on from its last checkpoint.")


def _unexpected(error: Exception, when: str, folder: Path | None) -> str:
    rank = dist.get_rank()
    said = f"Process {rank} failed{when} ({type(error).__name__}: {_line(error)})"
    if folder is not None:
        path = folder / f"process-{rank}.txt"
        with contextlib.suppress(OSError):
            path.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
            return f"{said}: its traceback is in {path}."
    return said + "."


def _line(error: BaseException) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__).removesuffix(".")
    text = re.sub(r"\[\S*\.(cc|cpp|h):\d+\] ", "", text)  # where in torch's sources
    return text if len(text) <= 140 else text[:139] + "…"


def end_with_parent() -> None:
    """From now on this process ends at once when the one that started it has ended: nobody else would ever stop it. Also where that one
    ended while this one was still importing; not where it ended before Python had begun.
    """
    own = started.PARENT if os.getpid() == started.PID else os.getppid()  # another one in a fork
    parent = int(os.environ.pop(PARENT, own))

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK_EVERY)
        os._exit(1)

    threading.Thread(target=watch, name="longcat_lab parent", daemon=True).start()


def end_slowly_when_asked() -> None:
    """A launcher ends all when one has failed; those that wait for that one would die before they could say what it was."""
    if threading.current_thread() is not threading.main_thread():
        return

    def leave(number: int, frame: object) -> None:
        timer = threading.Timer(LAST_WORDS, os._exit, [128 + number])
        timer.daemon = True
        timer.start()

    signal.signal(signal.SIGTERM, leave)
