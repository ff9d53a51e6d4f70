"""One training that goes on beside the kernel, and what is known of its end.

It has a process of its own, which a kernel that restarts or dies does not take along. Blocks that are defined in the notebook cannot
travel to another process: such a model is trained in a thread of the kernel. Both are watched and stopped through the run's folder, and
so is a run that another kernel or a command line trains.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from longcat_lab.ablation.job import one_line
from longcat_lab.config import ConfigError, RunConfig
from longcat_lab.config.plugins import check_portable, contents
from longcat_lab.config.yaml import write_yaml
from longcat_lab.data import prepare
from longcat_lab.errors import LabError
from longcat_lab.files import read_json, sentence_of, write_whole
from longcat_lab.parallel.layout import make_layout
from longcat_lab.training import Run, code_hash, fit, identity, launch
from longcat_lab.training.environment import environment_for
from longcat_lab.training.requests import ask_to_stop, is_training, stop_asked

LOG, CONFIG = "train.log", "config.yaml"
ENDED = ("finished", "interrupted", "failed", "diverged")
LOOK_EVERY = 0.1  # seconds
ROOM = "lower data.batch_size or set training.micro_batch_size"
GOES_ON = "training again goes on from the last checkpoint"
_IN_THE_KERNEL = threading.Lock()  # held while a model trains in a thread of this process


class _StoppedBefore(Exception):
    """Stop was asked before there was anything to stop."""


def travels(config: RunConfig) -> bool:
    """Whether another process builds the same model: its blocks are the package's, or in files of `plugins` as they were imported."""
    try:
        check_portable(config)
        return all(Path(path).read_bytes() == content for path, content in contents(config.plugins).items())
    except (ConfigError, OSError):
        return False


class Training:
    """One training: made by `start` or `attach`, then it works by itself in a background thread.

    Attributes:
        phase: preparing (the text, the first time), starting, training, and in the end finished, interrupted or failed.
        said: a sentence on the phase: what is being prepared, why it failed or stopped.
        folder: the run's; None while the text is prepared, because the run's name follows from it.
        config: what is trained; None where the folder's configuration cannot be read here.
        nproc: how many processes train, where they are started from here.
    """

    def __init__(self, config: RunConfig | None, root: Path | None, folder: Path | None, nproc: int = 1) -> None:
        self.config, self.folder, self.nproc = config, folder, nproc
        self.phase = "preparing" if folder is None else "training"
        self.said = ""
        self._root, self._stop, self._done, self._left = root, threading.Event(), threading.Event(), threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._signalled = False
        self._log_from = 0
        self._before: int | None = None  # when run.json was written last before this sitting
        self._looked_at: int | None = None

    @classmethod
    def start(cls, config: RunConfig, root: str | Path, nproc: int = 1) -> Training:
        """Trains `config` in `root`/IDENTITY: a finished run is given back at once, a stopped one goes on, one that trains is followed.

        Args:
            nproc: processes, laid out as `config.parallel` says. Several are started by one of their own, which ends with them.

        Raises:
            LabError: they cannot be laid out so, or another process cannot train this.
        """
        (make_layout if nproc == 1 else launch.check)(config, nproc)
        training = cls(config, Path(root).resolve(), None, nproc)
        threading.Thread(target=training._work, name="longcat_lab training", daemon=True).start()
        return training

    @classmethod
    def attach(cls, folder: str | Path, config: RunConfig | None = None) -> Training:
        """Follows what trains in `folder`, whoever started it."""
        training = cls(config, None, Path(folder).resolve())
        threading.Thread(target=training._work, name="longcat_lab following", daemon=True).start()
        return training

    @property
    def ended(self) -> bool:
        return self._done.is_set()

    @property
    def stopping(self) -> bool:
        return self._stop.is_set() and not self.ended

    def stop(self) -> None:
        """Asks for the end after this step, with a checkpoint. Returns at once; it also works before the first step."""
        self._stop.set()

    def leave(self) -> None:
        """No longer follows a run that somebody else trains, which goes on. One that was started here is followed to its end."""
        if self._root is None:
            self._left.set()

    def wait(self, seconds: float | None = None) -> bool:
        """Blocks until it has ended; True if it has."""
        return self._done.wait(seconds)

    @property
    def run(self) -> Run | None:
        """The run as its folder has it now, if it has begun."""
        return None if self.folder is None or not (self.folder / "run.json").exists() else Run(self.folder)

    def log_tail(self, lines: int = 60) -> str:
        """The end of what the process printed in this sitting."""
        try:
            with open(self.folder / LOG, "rb") as handle:
                handle.seek(self._log_from)
                text = handle.read().decode("utf-8", "replace")
        except (OSError, TypeError):
            return ""
        return "\n".join(text.rstrip().splitlines()[-lines:])

    # --- the background thread ----------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            self._train() if self.folder is None else self._follow()
        except _StoppedBefore:
            self._end("interrupted", "Stopped before the first step.")
        except LabError as error:
            self._end("failed", str(error))
        except OSError as error:
            self._end("failed", str(sentence_of(error, f"starting the training in {self.folder or self._root}")))
        except Exception as error:  # whatever it is, the person who waits must hear of it
            self._end("failed", one_line(f"{type(error).__name__}: {error}"))

    def _end(self, phase: str, said: str) -> None:
        self.said, self.phase = said, phase
        self._done.set()

    def _prepares(self, line: str) -> None:
        if self._stop.is_set():
            raise _StoppedBefore
        self.said = line

    def _train(self) -> None:
        prepare(self.config.data, self.config.model.vocab_size, progress=self._prepares)
        name = identity(self.config)
        folder = self._root / name
        if self._stop.is_set():
            raise _StoppedBefore
        folder.mkdir(parents=True, exist_ok=True)
        self._before = _changed(folder / "run.json")
        self.said, self.phase, self.folder = "", "starting", folder
        record = read_json(folder / "run.json") or {}
        if record.get("status") == "finished" and record.get("identity") == name:
            self._end("finished", "")
        elif is_training(folder):
            self._follow()
        elif self.nproc > 1 or travels(self.config):
            self._in_a_process(folder)
        else:
            self._in_this_thread(folder)

    def _in_a_process(self, folder: Path) -> None:
        if code_hash.__wrapped__() != code_hash():  # the process would train another run than the one that this folder is named after
            raise LabError("The code of longcat_lab has changed since this kernel imported it: restart the kernel, then train again.")
        text = write_yaml(self.config.to_dict())
        write_whole(folder / CONFIG, lambda path: path.write_text(text, encoding="utf-8"))
        command = [sys.executable, "-m", "longcat_lab", "train", str(folder / CONFIG), "--out", str(folder)]
        with open(folder / LOG, "ab") as log:
            self._log_from = log.tell()
            process = subprocess.Popen(
                [*command, *(["--nproc", str(self.nproc)] if self.nproc > 1 else [])],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment_for(self.config.training.threads),
                start_new_session=True,  # signals to the kernel, and the kernel's end, do not reach it
            )
        self._process = process
        while process.poll() is None:
            self._look()
            if not self.ended and self._has_said_its_end():
                self._conclude(0)  # it takes a while to go, which nobody needs to wait for; but a dead child must be reaped
        if not self.ended:
            self._conclude(process.returncode)

    def _in_this_thread(self, folder: Path) -> None:
        # One at a time: deterministic kernels and the number of threads are settings of the whole process.
        if not _IN_THE_KERNEL.acquire(blocking=False):
            raise LabError("Another model trains in this kernel already: wait for it, or put the block into a file named under plugins.")
        try:
            self._fit_here(folder)
        finally:
            _IN_THE_KERNEL.release()

    def _fit_here(self, folder: Path) -> None:
        self.phase = "training"
        with open(folder / LOG, "ab") as log:
            self._log_from = log.tell()
        try:
            run = fit(self.config, folder, progress=False, stop=self._stop.is_set)
        except LabError:
            raise
        except Exception:
            with contextlib.suppress(OSError), open(folder / LOG, "a", encoding="utf-8") as log:
                log.write(traceback.format_exc())
            raise
        self._end(run.record["status"], run.record.get("reason") or "")

    def _follow(self) -> None:
        self.phase = "training"
        while is_training(self.folder):
            if self._left.is_set():
                return self._end("interrupted", "No longer followed here; it goes on.")
            self._look()
        self._before = None  # whatever the record says was said by the sitting that was followed
        self._conclude(None)

    def _look(self) -> None:
        if self._stop.is_set() and not stop_asked(self.folder):
            # Again and again: there may be no one to ask yet, and a run that begins takes no requests from before its beginning.
            try:
                ask_to_stop(self.folder)
            except (LabError, OSError) as error:  # it trains on, whether it can be asked or not
                self._stop_without_asking(str(error))
        if self.phase == "starting" and _changed(self.folder / "run.json") != self._before:
            self.phase = "training"
        time.sleep(LOOK_EVERY)

    def _stop_without_asking(self, why: str) -> None:
        """A child process takes a signal, once, as a request; another's run can only be asked through its folder."""
        if self._process is None:
            self.said = f"It cannot be asked to stop: {why}"
        elif self.phase == "training" and not self._signalled:  # before that the signal would kill it without a checkpoint
            self._signalled = True
            self._process.send_signal(signal.SIGTERM)

    def _has_said_its_end(self) -> bool:
        changed = _changed(self.folder / "run.json")
        if changed in (self._before, self._looked_at):
            return False
        ended = (read_json(self.folder / "run.json") or {}).get("status") in ENDED
        if not ended:
            self._looked_at = changed
        return ended and not is_training(self.folder)

    def _conclude(self, code: int | None) -> None:
        """The end of a process: what its record says if it wrote one, else what it printed last, else how it died."""
        if code is not None and is_training(self.folder):  # another process was quicker to train here
            self._follow()
            return
        record = read_json(self.folder / "run.json") or {}
        fresh = self._before is None or _changed(self.folder / "run.json") != self._before
        status, reason = record.get("status"), record.get("reason") or ""
        if (fresh or code == 0) and status in ENDED:
            badly = status in ("failed", "diverged")
            self._end("failed" if badly else status, one_line(reason) or "The training failed without a word." if badly else reason)
        elif code is None:
            self._end("failed", f"The training ended without a word (killed, or the machine went down): {GOES_ON}.")
        elif code < 0:
            name = signal.Signals(-code).name
            hint = f", often for lack of memory: {ROOM}; {GOES_ON}" if code == -signal.SIGKILL else f": {GOES_ON}"
            self._end("failed", f"The training process was killed by {name}{hint}.")
        else:
            lines = [line for line in self.log_tail().splitlines() if line.strip()]
            said = lines[-1].strip().removeprefix("longcat-lab: ") if lines else f"The training process ended with exit status {code}."
            self._end("failed", one_line(said))


def trains_in(root: str | Path) -> list[Path]:
    """Run folders below `root` in which somebody trains now, the latest first."""
    found = [lock.parent for lock in Path(root).glob("*/.training.lock") if is_training(lock.parent)]
    return sorted(found, key=lambda folder: _changed(folder / "run.json") or 0, reverse=True)


def _changed(path: Path) -> Any:
    with contextlib.suppress(OSError):
        return os.stat(path).st_mtime_ns
    return None
