"""`lab.fit(..., nproc=4)`: torchrun beside this process, and its workers followed, stopped and heard through the run's folder.

The lock of the folder is held here, also while dead workers are started again: a request to stop is never lost, and who follows the run
does not take a restart for its end. The workers end with torchrun, and torchrun ends with this process.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from longcat_lab.config import RunConfig
from longcat_lab.config.plugins import check_portable, contents
from longcat_lab.config.yaml import write_yaml
from longcat_lab.errors import Diverged, LabError
from longcat_lab.files import read_json, sentence_of, write_whole
from longcat_lab.parallel.faults import LOST, PARENT
from longcat_lab.parallel.fitting import check_config
from longcat_lab.training import provenance, requests
from longcat_lab.training.environment import environment_for
from longcat_lab.training.fit import HELD, take
from longcat_lab.training.run import Run
from longcat_lab.training.sitting import finish_the_step

LOG, CONFIG = "train.log", "config.yaml"
RESTARTS = 3
LOOK_EVERY = 0.2  # seconds
GONE_IN = 30.0  # seconds within which all workers have ended after torchrun was killed
SAYS = "longcat-lab: "
STOPPED = SAYS + "stopped;"
_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


class View(Protocol):
    """What a person sees of a run while it is followed; in place of the bar of a terminal."""

    def look(self) -> None:
        """Shows what is new in the folder. Called several times a second."""

    def end(self, said: str) -> None:
        """Nobody works in the folder any more; `said`: why the call fails, or empty."""


view_of: Callable[[Path, int], View | None] | None = None  # a notebook's, for the folder and the number of processes; None: the bar


def fit(config: RunConfig, path: str | Path | None, nproc: int, progress: bool, stop: Callable[[], bool] | None) -> Run:
    """See `training.fit`.

    Raises:
        LabError: what the first worker said that failed for a reason of its own; or they died more than RESTARTS times.
        KeyboardInterrupt: after the end of the step, with a checkpoint; a second one ends all workers at once.
    """
    check(config, nproc)
    identity = provenance.identity(config)
    folder = (Path(path) if path is not None else Path("runs/single") / identity).absolute()
    with contextlib.ExitStack() as shown, contextlib.ExitStack() as held:  # what is shown of the end is shown when all have ended
        workers = None
        if take(folder, identity, held).get("status") != "finished":
            write_whole(folder / CONFIG, lambda file: file.write_text(write_yaml(config.to_dict()), encoding="utf-8"))
            workers = held.enter_context(_Workers(config, folder, nproc))
        look = shown.enter_context(_watched(config, folder, nproc, progress))  # takes seconds to load, as the workers do
        if workers is not None:
            interrupted = workers.follow(look, stop)
            workers.conclude()
            if interrupted and (read_json(folder / "run.json") or {}).get("status") != "finished":
                raise KeyboardInterrupt
    return Run(folder if path is None else path)


def check(config: RunConfig, nproc: int) -> None:
    """What can be known before anything starts.

    Raises:
        LabError: so many processes cannot train this configuration, or not from here.
    """
    check_number(nproc)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise LabError("A launcher has started this process and others for the run: leave nproc out.")
    check_portable(config)
    check_config(config, nproc)
    if provenance.code_hash.__wrapped__() != provenance.code_hash():  # the workers would train another run
        raise LabError("The code of longcat_lab has changed since this process imported it: start it anew, then train again.")
    for file, content in contents(config.plugins).items():
        with contextlib.suppress(OSError):
            if Path(file).read_bytes() != content:
                raise LabError(f"The plugin {file} was edited after this configuration was loaded: load it again.")


def check_number(nproc: int) -> None:
    if not isinstance(nproc, int) or nproc < 1:
        raise LabError(f"nproc {nproc!r} is no number of processes: give 1 or more, or None for this process alone.")


@contextlib.contextmanager
def _watched(config: RunConfig, folder: Path, nproc: int, progress: bool) -> Iterator[Callable[[], None]]:
    """Gives what is to be called while the workers train. What is only shown costs no run."""
    view: View | None = None
    if progress:
        with contextlib.suppress(Exception):
            view = view_of(folder, nproc) if view_of is not None else None
        view = view or _Bar(config, folder)

    def look() -> None:
        if view is not None:
            with contextlib.suppress(Exception):
                view.look()

    said = ""
    try:
        yield look
    except LabError as error:
        said = str(error)
        raise
    finally:
        if view is not None:
            with contextlib.suppress(Exception):
                view.end(said)


class _Bar:
    """The bar of a terminal."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        self._steps, self._folder, self._bar = config.training.steps, folder, None

    def look(self) -> None:
        from tqdm.auto import tqdm

        if self._bar is None:
            self._bar = tqdm(total=self._steps, unit="step", mininterval=0.5)
        told = read_json(self._folder / "progress.json")
        if isinstance(told, dict) and told.get("step") != self._bar.n:
            self._bar.set_postfix(loss=f"{told['loss']:.3f}", refresh=False)
            self._bar.n = told["step"]
            self._bar.refresh()

    def end(self, said: str) -> None:
        if self._bar is not None:
            self._bar.close()


class _Workers:
    """torchrun and its workers, for as long as the context lasts."""

    def __init__(self, config: RunConfig, folder: Path, nproc: int) -> None:
        self.config, self.folder, self.nproc = config, folder, nproc
        self.final = self.last = ""  # sentences of the workers: one that another attempt would only repeat, and any
        torchrun = [sys.executable, "-m", "longcat_lab.parallel.agent", "--standalone", "--nproc-per-node", nproc]
        worker = ["-m", "longcat_lab", "train", folder / CONFIG, "--out", folder]
        try:
            self.log = (folder / LOG).open("ab")
            self.agent = subprocess.Popen(
                [str(each) for each in (*torchrun, "--max-restarts", RESTARTS, *worker)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=self._environment(),
                start_new_session=True,  # an interrupt on the terminal is for this process, which passes it on in its own way
            )
        except OSError as error:
            raise sentence_of(error, f"starting the processes of {folder}") from None
        self.listener = threading.Thread(target=self._listen, name="longcat_lab workers", daemon=True)
        self.listener.start()

    def _environment(self) -> dict[str, str]:
        started = environment_for(self.config.training.threads, keep=False)
        kept = {key: value for key, value in started.items() if key not in _LAUNCHER and not key.startswith(("TORCHELASTIC_", "PET_"))}
        return {**kept, PARENT: str(os.getpid()), HELD: str(self.folder.resolve())}

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, *_: object) -> None:
        if self.agent.poll() is None:
            self.agent.kill()  # the workers see it and end
        self.agent.wait()
        self.listener.join(GONE_IN)  # until the last one has let go of its end of the pipe
        self.log.close()

    def _listen(self) -> None:
        for line in self.agent.stdout:
            with contextlib.suppress(OSError, ValueError):  # a full disk is for the workers to tell
                self.log.write(line)
                self.log.flush()
            text = line.decode("utf-8", "replace").rstrip()
            if text.startswith(SAYS) and not text.startswith(STOPPED):
                self.last = text.removeprefix(SAYS)
                if not self.last.startswith(LOST):
                    self.final = self.final or self.last

    def follow(self, look: Callable[[], None], stop: Callable[[], bool] | None) -> bool:
        """Until they have ended, or failed for good; whether the keyboard (or SIGTERM) asked for it."""
        asked = False
        with finish_the_step() as interrupted:
            while self.agent.poll() is None and not self.final:
                look()
                if not asked and (interrupted.is_set() or (stop is not None and stop())):
                    asked = requests.ask_to_stop(self.folder)
                time.sleep(LOOK_EVERY)
            look()
        return interrupted.is_set()

    def conclude(self) -> None:
        """Raises LabError where they did not end well."""
        if not self.final and self.agent.wait() == 0:
            record = read_json(self.folder / "run.json") or {}
            passed = [record["passed_over"]] if "passed_over" in record else []
            for said in (*record.get("left_out", []), *passed):  # the workers' own warnings are in the log
                warnings.warn(said, stacklevel=4)
            return
        if not self.final:
            self.listener.join(GONE_IN)
        if self.final:
            diverged = (read_json(self.folder / "run.json") or {}).get("status") == "diverged"
            raise Diverged(self.final) if diverged else LabError(self.final)
        raise LabError(
            f"The {self.nproc} processes that train in {self.folder} died {RESTARTS + 1} times, often for lack of memory: the end of "
            f"{self.folder / LOG} says how, and the same call goes on from the last checkpoint."
        )
