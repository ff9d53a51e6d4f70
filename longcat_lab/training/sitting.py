"""What surrounds one sitting of a run: nobody else in its folder, and stops that wait for the end of a step."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

from longcat_lab.errors import LabError
from longcat_lab.files import sentence_of
from longcat_lab.training import requests

LOOKED_AT = 0.25  # seconds that the lock may be held by somebody who only looks whether it is


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Holds the folder's training lock, which ends with the process, whatever ends it. A request to stop is for one sitting only."""
    from filelock import FileLock, Timeout

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / requests.LOCK)
        lock.acquire(timeout=LOOKED_AT, poll_interval=0.02)
    except Timeout:
        raise LabError(f"Another process trains in {folder}: wait for it, stop it, or give another folder.") from None
    except OSError as error:
        raise sentence_of(error, f"opening {folder}") from None
    try:
        requests.clear(folder)
        yield
    finally:
        requests.clear(folder)
        lock.release()


@contextlib.contextmanager
def finish_the_step() -> Iterator[threading.Event]:
    """Makes the first keyboard interrupt (or SIGTERM) set the event: the run ends between two steps. The second one ends it at once.

    A step that is cut in two could not be resumed with the same bits. Outside the main thread signals are not ours to take.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def ask(number: int, frame: object) -> None:
        signal.signal(number, before[number])
        asked.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
