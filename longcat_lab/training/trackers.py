"""Where metrics go while a run trains: always its own folder, and other places if asked; those never stop a run."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

from longcat_lab.config import TrackingConfig
from longcat_lab.files import read_json, sentence_of, write_whole

PATIENCE = 10.0  # seconds that a run, which is over by then, waits for its tracker
LIMIT = 120.0  # seconds that the tracker's process has altogether when the run is over
STATE = "wandb/state.json"


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

    Nothing waits for it but `finish`, some seconds. Whatever goes wrong there is said once, and the run goes on without it.
    """

    def __init__(self, tracking: TrackingConfig, folder: Path) -> None:
        self.folder, self.process = folder, None
        try:
            if importlib.util.find_spec("wandb") is None:
                raise ModuleNotFoundError("it is not installed: pip install wandb")
            (folder / "wandb").mkdir(exist_ok=True)
            # -P: the modules beside the script must not pass for installed ones.
            script, place = Path(__file__).with_name("wandb_process.py"), folder.resolve()
            command = [sys.executable, "-P", str(script), str(place), tracking.wandb, tracking.wandb_project, str(LIMIT)]
            with open(folder / "wandb" / "process.log", "wb") as said:
                self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=said, stderr=said, start_new_session=True)
        except Exception as error:  # a sink's failure is never the run's
            self._off(f"{type(error).__name__}: {error}")

    def log(self, row: dict[str, Any]) -> None:
        """The row is in metrics.jsonl by now; only looks whether somebody is still there to read it."""
        if self.process is not None and self.process.poll() is not None:
            self._off(self._reason())

    def finish(self) -> None:
        """The sitting is over and its record is written. In the job of a sweep the process goes on to the end of the notebook."""
        if self.process is None:
            return
        process, in_job = self.process, "job" in (read_json(self.folder / "run.json") or {})
        try:
            process.stdin.close()
            if in_job or process.wait(PATIENCE) == 0:
                self.process = None
            else:
                self._off(self._reason())
        except subprocess.TimeoutExpired:
            self._warn(
                f"wandb has not taken all of this run {PATIENCE:g} s after its end and gets {LIMIT:g} s more, see {self.folder / STATE}"
            )
        except Exception as error:
            self._off(f"{type(error).__name__}: {error}")
        threading.Thread(target=process.wait, daemon=True).start()  # somebody must take its exit status

    def _reason(self) -> str:
        return (read_json(self.folder / STATE) or {}).get("reason") or f"its process ended, see {self.folder / 'wandb/process.log'}"

    def _off(self, reason: str) -> None:
        self.process = None
        self._warn(f"wandb is off for this run ({reason})")

    def _warn(self, what: str) -> None:
        warnings.warn(f"{what}; the run's folder has every metric.", stacklevel=4)


def settle(folder: Path, patience: float = PATIENCE) -> None:
    """Waits until a job's notebook is logged where it is tracked, at most `patience` seconds: a batch system ends what a job leaves."""
    import psutil

    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        state = read_json(folder / STATE) or {}
        if state.get("state") not in ("starting", "logging") or not psutil.pid_exists(state.get("pid", 0)):
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
