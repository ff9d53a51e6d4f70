"""The sweep's folder in the hands of one process, which leaves no trace if it comes to nothing; and that process's signals."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from longcat_lab.ablation import store
from longcat_lab.errors import LabError
from longcat_lab.files import remove_temporary


@contextlib.contextmanager
def held(folder: Path, name: str) -> Iterator[None]:
    """Hold `folder` for the sweep `name`. Folders and the lock file made here go again if an error comes before anything is written.

    Raises:
        LabError: the folder cannot be used or written, or another process holds it.
    """
    store.check_folder(folder, name)
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    fresh, lock = not (folder / store.LOCK).exists(), None
    try:
        try:
            lock = store.Lock.take(folder)
        except OSError as error:
            raise LabError(f"Cannot write to {folder}: {error.strerror}; choose another folder with --out.") from None
        if lock is None:
            raise LabError(f"Another process ({store.said_holder(folder)}) is running the sweep in {folder}; wait for it or stop it.")
        store.check_folder(folder, name)  # somebody may have been quicker
        remove_temporary(folder)
        yield
    except BaseException:
        if lock is not None and fresh and [entry.name for entry in folder.iterdir()] == [store.LOCK]:
            (folder / store.LOCK).unlink()
        for place in made:
            with contextlib.suppress(OSError):  # something is in it
                place.rmdir()
        raise
    finally:
        if lock is not None:
            lock.release()


@contextlib.contextmanager
def counted(count: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C, SIGTERM and the end of the terminal only call `count`, so that they never fall into the middle of writing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, lambda *_: count()) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
