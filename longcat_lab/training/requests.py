"""What may be asked of a run from outside its process, through files in its folder: whether anyone trains there, and to stop."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from longcat_lab.files import write_json

LOCK = ".training.lock"  # held while a process trains in the folder; the system frees it however the process ends
STOP = "stop.json"


def is_training(folder: str | Path) -> bool:
    """Whether a process, this one or another, trains in `folder` now. Makes nothing there."""
    import fcntl

    try:
        with open(Path(folder) / LOCK, "rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two that look must not see each other
            except OSError as error:  # some cluster file systems have no such locks at all: nobody is known to train there
                return error.errno in (errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES)
    except OSError:  # no such file
        return False
    return False


def ask_to_stop(folder: str | Path) -> bool:
    """Asks the run that trains in `folder` to end after the step it is in, with a checkpoint and status `interrupted`.

    Returns at once: True when the request is written, False when nobody trains there (then nothing is written). A run that is just taking
    its lock clears what was asked before: ask again until `is_training` says that it has ended.

    Raises:
        LabError: the folder cannot be written.
    """
    if not is_training(folder):
        return False
    write_json(Path(folder) / STOP, {"asked": datetime.now(UTC).isoformat(timespec="seconds")})
    return True


def stop_asked(folder: str | Path) -> bool:
    """Whether a request to stop lies in `folder` that no run has answered yet."""
    return os.path.exists(os.path.join(folder, STOP))


def asked_in(folder: str | Path) -> Callable[[], bool]:
    """`stop_asked(folder)` without arguments, at the price of one system call: the loop asks after each step."""
    path = os.path.join(os.path.abspath(folder), STOP)
    return lambda: os.path.exists(path)


def clear(folder: str | Path) -> None:
    """Removes the request; for the process that holds the lock."""
    with contextlib.suppress(OSError):
        os.unlink(os.path.join(folder, STOP))
