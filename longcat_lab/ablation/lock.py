"""Who may write in a folder: one process at a time, of a sweep its driver, of a job the process that executes it."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import socket
import time
import warnings
from pathlib import Path
from typing import Any

from longcat_lab.files import read_json

LOCK = ".lock"
HELD = (errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES)  # what a lock says that another process holds


class Lock:
    """An exclusive lock that ends with its process, whatever ends the process. Its file says who holds it."""

    def __init__(self, file: io.FileIO, before: dict[str, Any]) -> None:
        self._file, self.before = file, before

    @classmethod
    def take(cls, folder: Path, wait: float = 0.0, note: bool = True) -> Lock | None:
        """The lock of `folder` (made if missing), waiting up to `wait` seconds; None while another process holds it.

        On a disk that has no locks it is had at once, and nothing is said of who else has it: a queue that starts no job twice is then
        what keeps two processes apart.

        Args:
            note: say in its file who holds it. For a short look the file stays as the last holder left it.
        """
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / LOCK, "a+b", buffering=0)  # noqa: SIM115 (open as long as the lock is held)
        deadline = time.monotonic() + wait
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in HELD:
                    _warn(folder, error)
                elif time.monotonic() >= deadline:
                    file.close()
                    return None
                else:
                    time.sleep(0.05)
                    continue
            if not _is_at(file, folder / LOCK):  # its folder was removed meanwhile, or made anew
                file.close()
                return cls.take(folder, max(0.0, deadline - time.monotonic()), note)
            lock = cls(file, holder(folder))
            if note:
                lock.note()
            return lock

    def note(self, **what: Any) -> None:
        """Say who holds it, and more, for those who find it held or left behind."""
        data = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), **what}).encode()
        self._file.truncate(0)
        self._file.write(data)

    def release(self) -> None:
        self._file.close()


def _warn(folder: Path, error: OSError) -> None:
    """Once a process: the same words from the same place are shown once."""
    warnings.warn(
        f"The disk of {folder} has no locks ({error.strerror}): two sweeps there at the same time would not see each other.", stacklevel=3
    )


def _is_at(file: io.FileIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def holder(folder: Path) -> dict[str, Any]:
    """What the present or last holder of a folder's lock noted: pid, host, and for a job its kernel."""
    return read_json(folder / LOCK) or {}


def said_holder(folder: Path) -> str:
    """`pid 123 on host`."""
    note = holder(folder)
    return f"pid {note.get('pid', '?')} on {note.get('host', '?')}"


def is_free(folder: Path) -> bool:
    """Whether no process holds the folder's lock."""
    try:
        with open(folder / LOCK, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return True
    except OSError as error:
        return error.errno not in HELD
    return True
