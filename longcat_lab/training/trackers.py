"""Where metrics go while a run trains: always its own folder, and other places if asked; those never stop a run."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from longcat_lab.config import TrackingConfig
from longcat_lab.files import sentence_of, write_whole


class FileTracker:
    """`metrics.jsonl`, appended and flushed row by row (what is true while the run lives), and `metrics.parquet` from it."""

    def __init__(self, folder: Path, first_step: int) -> None:
        self.folder, self.lines = folder, folder / "metrics.jsonl"
        self.rows = [row for row in _rows(self.lines) if row["step"] <= first_step]  # later ones were logged after the checkpoint
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
    """Weights and Biases as a sink. Whatever goes wrong there is said once, and the run goes on without it."""

    def __init__(self, config: TrackingConfig, folder: Path, name: str, settings: dict[str, Any]) -> None:
        self.run = None
        try:
            import wandb

            self.run = wandb.init(
                project=config.wandb_project,
                name=name,
                dir=str(folder),
                mode=config.wandb,
                config=settings,
                settings=wandb.Settings(silent=True, console="off", init_timeout=20),
            )
        except Exception as error:  # a sink's failure is never the run's
            self._off(error)

    def _off(self, error: Exception) -> None:
        self.run = None
        warnings.warn(f"wandb is off for this run ({type(error).__name__}: {error}); the run's folder has every metric.", stacklevel=3)

    def log(self, row: dict[str, Any]) -> None:
        if self.run is not None:
            try:
                self.run.log({key: value for key, value in row.items() if key != "step"}, step=row["step"])
            except Exception as error:
                self._off(error)

    def finish(self) -> None:
        if self.run is not None:
            try:
                self.run.finish()
            except Exception as error:
                self._off(error)


def _rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break  # the last line of a run that was killed while writing it
    return rows
