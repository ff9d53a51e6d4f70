"""Where metrics go while a run trains: always its own folder, and other places if asked; those never stop a run."""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import json
import os
import secrets
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

from longcat_lab.config import TrackingConfig
from longcat_lab.errors import LabError
from longcat_lab.files import read_json, sentence_of, write_json, write_whole

PATIENCE = 10.0  # seconds that a process or a job, whose run is over by then, waits before it ends
LIMIT = 120.0  # seconds that the tracker's process has altogether when the run is over
STATE = "wandb/state.json"
OFF = "wandb is off for this run ({})"
KEPT = "the run's folder has every metric."


class FileTracker:
    """`metrics.jsonl`, appended and flushed row by row (what is true while the run lives), and `metrics.parquet` from it."""

    def __init__(self, folder: Path, first_step: int) -> None:
        self.folder, self.lines = folder, folder / "metrics.jsonl"
        self.rows = [row for row in read_rows(self.lines) if row["step"] <= first_step]  # later ones were logged after the checkpoint
        write_whole(self.lines, lambda path: path.write_text("".join(json.dumps(row) + "\n" for row in self.rows)))

    def log(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        try:
            with open(self.lines, "a", encoding="utf-8") as handle:
                handle.write(json.dumps(row) + "\n")
        except OSError as error:
            raise sentence_of(error, f"writing {self.lines}") from error

    def save(self) -> None:
        """Writes metrics.parquet, one row a logged step."""
        import pandas

        write_whole(self.folder / "metrics.parquet", lambda path: pandas.DataFrame(self.rows).to_parquet(path, index=False))

    def finish(self) -> None:
        self.save()


class WandbTracker:
    """Weights and Biases as a sink, fed by a process beside the run that reads the run's folder; see `wandb_process`.

    No run waits for it, neither for a step nor at its end. What goes wrong is said once, stands in FOLDER/wandb/state.json, and the run
    goes on without it.
    """

    def __init__(self, tracking: TrackingConfig, folder: Path) -> None:
        self.folder, self.mode, self.process = folder.resolve(), tracking.wandb, None
        self.sitting, self.begun = secrets.token_hex(4), False
        try:
            if importlib.util.find_spec("wandb") is None:
                raise ModuleNotFoundError("it is not installed: pip install wandb")
            self._begin()
            # -P: the modules beside the script must not pass for installed ones.
            script = Path(__file__).with_name("wandb_process.py")
            command = [sys.executable, "-P", str(script), str(self.folder), self.mode, tracking.wandb_project, str(LIMIT), self.sitting]
            with open(self.folder / "wandb" / "process.log", "wb") as said:
                self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=said, stderr=said, start_new_session=True)
        except Exception as error:  # a sink's failure is never the run's
            self._off(f"{type(error).__name__}: {error}")

    def log(self, row: dict[str, Any]) -> None:
        """The row is in metrics.jsonl by now; only looks whether somebody is still there to read it."""
        if self.process is not None and self.process.poll() is not None:
            self._off(self._reason())

    def finish(self) -> None:
        """The sitting is over and its record is written: the process has what it needs, and goes on by itself for LIMIT seconds at most."""
        process, self.process = self.process, None
        if process is None:
            return
        try:
            process.stdin.close()
            if process.poll() is not None:
                return self._off(self._reason())
            waits = _state(self.folder).get("state") == "starting" and self.mode != "offline"
            threading.Thread(target=self._outlive, args=(process, waits), daemon=True).start()
            if waits:
                place = self.folder / STATE
                self._warn(f"wandb has not answered yet; it gets {LIMIT:g} s more beside this run, and {place} says what came of it")
            if "job" not in (read_json(self.folder / "run.json") or {}):  # a job waits itself, when its notebook is written too
                atexit.register(settle, self.folder, PATIENCE)
        except Exception as error:
            self._off(f"{type(error).__name__}: {error}")

    def _outlive(self, process: subprocess.Popen[bytes], told: bool) -> None:
        """Takes the exit status of a process that goes on when the run is over, and says if it failed."""
        if process.wait() != 0:
            self._off(self._reason(), told)

    def _reason(self) -> str:
        return _state(self.folder).get("reason") or f"its process ended, see {self.folder / 'wandb/process.log'}"

    def _off(self, reason: str, told: bool = False) -> None:
        self.process = None
        with contextlib.suppress(LabError, OSError):  # a folder that takes no file has other ways to tell
            self._say_off(reason)
        if not told:
            self._warn(OFF.format(reason))

    def _begin(self) -> None:
        """The state is that of this sitting now; a process that still ends the one before leaves it alone."""
        name = _state(self.folder).get("id") or f"{read_json(self.folder / 'run.json')['identity']}-{secrets.token_hex(3)}"
        said = {"id": name, "sitting": self.sitting, "pid": os.getpid(), "mode": self.mode, "state": "starting", "reason": None}
        write_json(self.folder / STATE, said)
        self.begun = True

    def _say_off(self, reason: str) -> None:
        found = _state(self.folder)
        if not self.begun or found.get("sitting") == self.sitting:  # else a later sitting has a tracker of its own
            write_json(self.folder / STATE, {**found, "sitting": self.sitting, "mode": self.mode, "state": "off", "reason": reason})

    def _warn(self, what: str) -> None:
        warnings.warn(f"{what}; {KEPT}", stacklevel=4)


def _state(folder: Path) -> dict[str, Any]:
    found = read_json(folder / STATE)
    return found if isinstance(found, dict) else {}


def _at_work(state: dict[str, Any]) -> bool:
    """Whether somebody still logs the run that this state is of."""
    import psutil

    try:
        return state.get("state") in ("starting", "logging") and psutil.Process(state["pid"]).status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, KeyError, TypeError, ValueError, OverflowError):
        return False


def trouble(folder: Path, record: Any) -> str:
    """One sentence if the run in `folder` was to be tracked and is not, or nobody can say yet; empty where all is well.

    Args:
        record: its run.json.
    """
    wanted = record
    for name in ("config", "tracking", "wandb"):
        wanted = wanted.get(name) if isinstance(wanted, dict) else None
    state = _state(folder)
    if wanted in (None, "off") or state.get("state") in (None, "finished"):
        return ""
    if state["state"] == "off":
        return f"{OFF.format(state.get('reason'))}; {KEPT}"
    if not _at_work(state):
        return f"{OFF.format('its process ended')}; {KEPT}"
    waits = state["state"] == "starting" and state.get("mode") != "offline" and record.get("status") != "running"
    return f"wandb has not answered yet, {STATE} says what came of it; {KEPT}" if waits else ""


def settle(folder: Path, patience: float = PATIENCE) -> None:
    """Waits until a run is logged where it is tracked, at most `patience` seconds: a batch system ends what a job leaves.

    Only for a folder on this machine or a server that has answered: one that has not gets its time beside what comes next.
    """
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        state = _state(folder)
        if not _at_work(state) or (state["state"] == "starting" and state.get("mode") != "offline"):
            return
        time.sleep(0.1)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a metrics.jsonl, whether or not somebody writes it now."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break  # the last line of a run that was killed while writing it
    return rows
