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
from collections.abc import Callable
from pathlib import Path

import longcat_lab
from longcat_lab.config import RunConfig
from longcat_lab.config.plugins import check_portable, contents
from longcat_lab.config.yaml import write_yaml
from longcat_lab.errors import LabError
from longcat_lab.files import read_json, sentence_of, write_whole
from longcat_lab.parallel.faults import LOST, PARENT
from longcat_lab.parallel.layout import make_layout
from longcat_lab.training import provenance, requests
from longcat_lab.training.fit import HELD, take
from longcat_lab.training.run import Run

LOG, CONFIG = "train.log", "config.yaml"
RESTARTS = 3
LOOK_EVERY = 0.2  # seconds
GONE_IN = 30.0  # seconds within which all workers have ended after torchrun was killed
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
SAYS = "longcat-lab: "
STOPPED = SAYS + "stopped;"
_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


def fit(config: RunConfig, path: str | Path | None, nproc: int, progress: bool, stop: Callable[[], bool] | None) -> Run:
    """See `training.fit`.

    Raises:
        LabError: what the first worker said that failed for a reason of its own; or they died more than RESTARTS times.
        KeyboardInterrupt: after the end of the step, with a checkpoint; a second one ends all workers at once.
    """
    _check(config, nproc)
    identity = provenance.identity(config)
    folder = (Path(path) if path is not None else Path("runs/single") / identity).absolute()
    with contextlib.ExitStack() as held:
        if take(folder, identity, held).get("status") != "finished":
            write_whole(folder / CONFIG, lambda file: file.write_text(write_yaml(config.to_dict()), encoding="utf-8"))
            with _Workers(config, folder, nproc) as workers:
                interrupted = workers.follow(progress, stop)
                workers.conclude()
            if interrupted and (read_json(folder / "run.json") or {}).get("status") != "finished":
                raise KeyboardInterrupt
    return Run(folder if path is None else path)


def _check(config: RunConfig, nproc: int) -> None:
    if not isinstance(nproc, int) or nproc < 1:
        raise LabError(f"nproc {nproc!r} is no number of processes: give 1 or more, or None to train in this process.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise LabError("A launcher has started this process and others for the run: leave nproc out.")
    check_portable(config)
    make_layout(config, nproc)
    if provenance.code_hash.__wrapped__() != provenance.code_hash():  # the workers would train another run
        raise LabError("The code of longcat_lab has changed since this process imported it: start it anew, then train again.")
    for file, content in contents(config.plugins).items():
        with contextlib.suppress(OSError):
            if Path(file).read_bytes() != content:
                raise LabError(f"The plugin {file} was edited after this configuration was loaded: load it again.")


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
        kept = {key: value for key, value in os.environ.items() if key not in _LAUNCHER and not key.startswith(("TORCHELASTIC_", "PET_"))}
        library = str(Path(longcat_lab.__file__).resolve().parents[1])
        path = dict.fromkeys(filter(None, [library, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]))
        return {
            **kept,
            **dict.fromkeys(THREADS, str(self.config.training.threads)),
            "PYTHONPATH": os.pathsep.join(path),
            PARENT: str(os.getpid()),
            HELD: str(self.folder.resolve()),
        }

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

    def follow(self, progress: bool, stop: Callable[[], bool] | None) -> bool:
        """Until they have ended, or failed for good; whether the keyboard asked for it."""
        from tqdm.auto import tqdm

        interrupted = asked = False
        with tqdm(total=self.config.training.steps, disable=not progress, unit="step", mininterval=0.5) as bar:
            while self.agent.poll() is None and not self.final:
                try:
                    self._show(bar)
                    if not asked and stop is not None and stop():
                        asked = requests.ask_to_stop(self.folder)
                    time.sleep(LOOK_EVERY)
                except KeyboardInterrupt:
                    if interrupted:
                        raise
                    interrupted = asked = requests.ask_to_stop(self.folder)
            self._show(bar)
        return interrupted

    def _show(self, bar: object) -> None:
        if bar.disable:
            return
        told = read_json(self.folder / "progress.json")
        if isinstance(told, dict) and told.get("step") != bar.n:
            bar.set_postfix(loss=f"{told['loss']:.3f}", refresh=False)
            bar.n = told["step"]
            bar.refresh()

    def conclude(self) -> None:
        """Raises LabError where they did not end well."""
        if self.final:
            raise LabError(self.final)
        if self.agent.wait() == 0:
            return
        self.listener.join(GONE_IN)
        if self.final:
            raise LabError(self.final)
        raise LabError(
            f"The {self.nproc} processes that train in {self.folder} died {RESTARTS + 1} times, often for lack of memory: the end of "
            f"{self.folder / LOG} says how, and the same call goes on from the last checkpoint."
        )
