"""Jobs as processes of this machine, within its cores and cards."""

from __future__ import annotations

import importlib.util
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

from longcat_lab.ablation import store
from longcat_lab.ablation.ends import DRIVER as DRIVER_GONE
from longcat_lab.ablation.ends import START, End, OutOfMemoryKills, of_exit
from longcat_lab.ablation.jobs import Job
from longcat_lab.ablation.kernel import end_left_kernel, kill_group
from longcat_lab.ablation.resources import Resources
from longcat_lab.ablation.rooms import VISIBLE, Rooms
from longcat_lab.ablation.warm import Forked, Warm
from longcat_lab.ablation.watch import DRIVER
from longcat_lab.errors import LabError
from longcat_lab.training.environment import THREADS, environment_for

LOG = "job.log"
MOST = 4  # jobs at a time where nobody says how many


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def make(resources: Resources, jobs: int | None, folder: Path, rooms: Rooms) -> LocalExecutor:
    """See `executors`. As many jobs at a time as were asked for, or as cores and cards allow where that is fewer.

    Raises:
        LabError: one job asks for more cores, cards or memory than this machine has.
    """
    import psutil

    there, cards = cores(), rooms.cards() if resources.cards else []
    memory = psutil.virtual_memory().total
    for key, wanted, has in (("cores", resources.cores or 0, there), ("cards", resources.cards, len(cards))):
        if wanted > has:
            raise LabError(f"resources.{key} asks for {wanted}, and this machine has {has or 'none'}: ask for fewer, or use a cluster.")
    if resources.bytes and resources.bytes > memory:
        raise LabError(
            f"resources.memory asks for {resources.memory}, and this machine has {memory / 1e9:.3g} GB: ask for less, or use a cluster."
        )
    slots = jobs or (len(cards) // resources.cards if resources.cards else min(MOST, there))
    for wanted, has in ((resources.cores, there), (resources.cards, len(cards)), (resources.bytes, memory)):
        if wanted:
            slots = min(slots, has // wanted)
    return LocalExecutor(slots, resources, cards)


class LocalExecutor:
    """Each job has a session of its own, so that Ctrl-C reaches the driver alone.

    Args:
        slots: how many run at a time; the cores are shared out among them where `resources` asks for no number.
        cards: what the environment calls the cards of this machine; no two jobs get the same one.
    """

    def __init__(self, slots: int = 1, resources: Resources | None = None, cards: list[str] | None = None) -> None:
        self.slots, self.resources, self.free = slots, resources or Resources(), list(cards or [])
        self.patience = 2 * self.resources.grace_seconds
        self._warm: list[Warm] = []

    @property
    def threads(self) -> int:
        return self.resources.cores or max(1, cores() // self.slots)

    def reserve(self, threads: int) -> None:
        """Each job computes with so many threads, whatever its environment says: fewer run at a time where they would share cores."""
        if not self.resources.cores:
            self.slots = max(1, min(self.slots, cores() // threads))

    def submit(self, job: Job) -> LocalHandle:
        shared = environment_for(self.threads, keep=self.resources.cores is None)
        taken = [self.free.pop(0) for _ in range(self.resources.cards)]
        environment = shared | {DRIVER: str(os.getpid())} | (dict.fromkeys(VISIBLE, ",".join(taken)) if taken else {})
        folder = job.folder.resolve()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            process = self._warmed(job, shared).submit(folder, folder / LOG, environment) if self.forks else _cold(folder, environment)
        except OSError:
            self.free += taken
            raise
        return LocalHandle(self, job, process, taken)

    @property
    def forks(self) -> bool:
        """Whether jobs are forks of one process. A process that has opened a card must not be forked; importing torch opens NPUs."""
        return self.resources.warm and hasattr(os, "fork") and importlib.util.find_spec("torch_npu") is None

    def _warmed(self, job: Job, environment: dict[str, str]) -> Warm:
        """The process of which jobs are forks, another one where the library was edited since."""
        if not self._warm or not self._warm[-1].fits:  # jobs of an earlier one run on
            ours = "longcat_lab" in job.notebook.read_text(encoding="utf-8", errors="replace")
            self._warm.append(Warm(environment, ours))
        return self._warm[-1]

    def wait(self, seconds: float) -> None:
        """Until a process that forks has something to tell; at most so long."""
        heard = [warm.ours for warm in self._warm if warm.ours.fileno() >= 0]
        if not heard:
            return time.sleep(seconds)
        if select.select(heard, [], [], seconds)[0]:
            for warm in self._warm:
                warm.listen()

    def close(self) -> None:
        """Nothing is submitted any more; jobs that still run end."""
        while self._warm:
            self._warm.pop().close()


def _cold(folder: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    with open(folder / LOG, "wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "longcat_lab.ablation.job", str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )


class LocalHandle:
    """One process, and the cards that it holds until it has ended."""

    def __init__(self, executor: LocalExecutor, job: Job, process: subprocess.Popen[bytes] | Forked, cards: list[str]) -> None:
        self._executor, self._job, self._process, self._cards = executor, job, process, cards
        self._kills = OutOfMemoryKills()

    def poll(self) -> int | None:
        code = self._process.poll()
        if code is not None and self._cards:
            self._executor.free += self._cards
            self._cards = []
        return code

    def stop(self, force: bool = False) -> None:
        if self._process.poll() is None and (pid := self._process.pid):
            kill_group(pid, signal.SIGKILL if force else signal.SIGTERM)
        if force:  # the kernel has a process group of its own
            self._process.wait()
            end_left_kernel(store.holder(self._job.folder))

    def why(self) -> End | None:
        code = self._process.poll()
        if code == 1 and (error := getattr(self._process, "error", None)):
            return End(DRIVER_GONE if self._process.lost else START, f"could not be started: {error}")
        return None if code is None or code >= 0 else of_exit(code, self._kills)


__all__ = ["THREADS", "LocalExecutor", "LocalHandle", "cores", "make"]
