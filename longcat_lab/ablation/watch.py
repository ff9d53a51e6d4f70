"""The thread of a job that ends its kernel: when the job is asked to stop, its driver is gone, or it takes more than it may."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from typing import Any

from longcat_lab.ablation import ends, store
from longcat_lab.ablation.ends import End
from longcat_lab.ablation.resources import Resources

DRIVER = "LONGCAT_LAB_DRIVER"  # environment variable: the pid of the driver, without which the job does not want to live
LOOK = 0.1  # seconds between looks at driver and clock
WEIGH = 0.5  # seconds between looks at the memory, and LIST between looks at which processes there are: that takes 5 ms
LIST = 2.0
DRIVER_GONE = 0.7  # seconds that are left to a job whose driver is gone


class Watch(threading.Thread):
    """Ends the kernel when there is a reason to; a thread, because the main one waits for the kernel.

    Attributes:
        end: why the job must end; None while it may go on.
        record: writes how it ended, for a main thread that no longer comes to it.
        ending: held by the thread that writes how the job ended.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.driver = int(os.environ.get(DRIVER, 0))
        self.end: End | None = None
        self.grace = 10.0  # seconds to finish a step and write a checkpoint
        self.limit: float | None = None  # on the clock of time.monotonic
        self.asked = Resources()
        self.manager: Any = None
        self.lock: store.Lock | None = None
        self.process: Any = None
        self.record: Any = lambda end: None
        self.ending = threading.Lock()
        self._weighed = self._listed = 0.0  # when next
        self._tree: list[Any] = []

    def hold_to(self, asked: Resources) -> None:
        """From now on the job is held to these limits; its time begins."""
        self.asked, self.grace = asked, asked.grace_seconds
        self.limit = time.monotonic() + asked.seconds if asked.seconds else None

    def stop(self, number: int, frame: Any) -> None:
        self.end = self.end or End(ends.STOPPED, f"stopped by {signal.Signals(number).name}")

    def run(self) -> None:
        from longcat_lab.ablation.kernel import end_below, kernel_process, kill_group

        while self.end is None:
            self._look(kernel_process(self.manager))
            time.sleep(LOOK)
        # First as a person would: an interrupt, so that the notebook can save what it has; then by force.
        grace = 0.0 if self.end.kind == ends.MEMORY else min(self.grace, DRIVER_GONE) if self.end.kind == ends.DRIVER else self.grace
        deadline, asked = time.monotonic() + grace, False
        while time.monotonic() < deadline:
            if not asked and (process := kernel_process(self.manager)):
                self._note(process)
                kill_group(process.pid, signal.SIGINT)
                asked = True
            time.sleep(0.05)
        if process := self.process or kernel_process(self.manager):
            kill_group(process.pid)
        end_below()  # what the kernel started has groups of its own
        time.sleep(max(10.0, grace))  # the main thread normally ends the process before this is over
        with self.ending:
            self.record(self.end)
            os._exit(3)

    def _look(self, process: Any) -> None:
        if self.driver and os.getppid() != self.driver:
            self.end = self.end or End(ends.DRIVER, "the driver is gone")
        elif self.limit is not None and time.monotonic() > self.limit:
            self.end = self.end or End(ends.TIME, f"time-out: it ran for the {self.asked.time} of resources.time")
        elif self.process is None and process:
            self._note(process)
        elif self.asked.bytes and time.monotonic() > self._weighed:
            taken = self._weigh(self.asked.bytes)
            self._weighed = time.monotonic() + (WEIGH if taken < self.asked.bytes / 2 else LOOK)
            if taken > self.asked.bytes:
                said = f"out of memory: its processes took {taken / 1e9:.3g} GB, more than the {self.asked.memory} of resources.memory"
                self.end = self.end or End(ends.MEMORY, said)

    def _note(self, process: Any) -> None:
        import psutil

        self.process = process
        with contextlib.suppress(psutil.Error, OSError):  # already gone, or the disk is full: nothing to note
            self.lock.note(kernel=process.pid, kernel_started=psutil.Process(process.pid).create_time())

    def _weigh(self, limit: int) -> int:
        """Bytes that this process and all below it hold. Pages that several share count once, where it decides."""
        import psutil

        from longcat_lab.ablation.kernel import below

        if time.monotonic() > self._listed:
            self._tree, self._listed = [psutil.Process(), *below()], time.monotonic() + LIST
        resident = sum(_held(each, "memory_info", "rss") for each in self._tree)
        if resident <= limit:
            return resident
        # Proportional sizes cost a walk over all pages, so they are asked for at the limit alone.
        return sum(_held(each, "memory_full_info", "pss") or _held(each, "memory_info", "rss") for each in self._tree)


def _held(process: Any, ask: str, kind: str) -> int:
    import psutil

    try:
        return int(getattr(getattr(process, ask)(), kind, 0))
    except psutil.Error:
        return 0
