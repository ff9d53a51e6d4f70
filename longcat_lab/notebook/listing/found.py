"""Which runs lie below a folder, and what their records say, without opening a table of metrics."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from longcat_lab.ablation import store, superseded
from longcat_lab.files import read_json
from longcat_lab.training.requests import is_training


@dataclass(frozen=True)
class Found:
    """A run as it was when it was looked at.

    Attributes:
        name: the path of its folder, relative to where runs were looked for.
        status: as in its record; a run that says it runs while nobody trains in its folder is `interrupted`.
        record: the content of run.json.
        row: one flat row of plain values, for a table of runs.
    """

    name: str
    path: Path
    status: str
    record: dict[str, Any]
    row: dict[str, Any]


def find(folder: Path) -> tuple[list[Found], int]:
    """Every run below `folder` (or in it), newest first, and how many folders hold something like a run that cannot be read."""
    places, skipped = run_folders(folder)
    read = [_read(path, path.relative_to(folder).as_posix() if path != folder else path.resolve().name) for path in places]
    found = [run for run in read if run]
    skipped += len(read) - len(found)
    return sorted(found, key=lambda run: (run.row["started"], run.name), reverse=True), skipped


def run_folders(folder: Path) -> tuple[list[Path], int]:
    """Folders below `folder` (or itself) with a run's record, in no order, and how many others hold metrics without one.

    Results that a sweep has set aside (`superseded`) are not among them, unless `folder` is inside.
    """
    found, without = [], 0
    for place, folders, files in os.walk(folder):
        if "run.json" in files:
            folders.clear()  # checkpoints, trackers' files
            found.append(Path(place))
        else:
            without += "metrics.jsonl" in files
            folders[:] = [name for name in folders if not name.startswith(".") and name != superseded.NAME]
    return found, without


def _read(path: Path, name: str) -> Found | None:
    record = read_json(path / "run.json")
    try:
        status = _status(path, record)
        return Found(name, path, status, record, _row(path, name, status, record))
    except Exception:  # not a record of this library, or gone meanwhile: whatever it holds, the others must still be listed
        return None


def _status(path: Path, record: dict[str, Any]) -> str:
    status = str(record["status"])
    if status != "running" or is_training(path) or not store.is_free(path):
        return status
    status = str((read_json(path / "run.json") or record)["status"])  # it may have ended between the two looks
    return "interrupted" if status == "running" else status


def _row(path: Path, name: str, status: str, record: dict[str, Any]) -> dict[str, Any]:
    timings, config, budget = record.get("timings") or {}, record["config"], record.get("budget") or {}
    told = read_json(path / "progress.json") if status != "finished" else None
    told = told if isinstance(told, dict) and "steps_done" not in timings else {}
    step, seconds = told.get("step", timings.get("steps_done", 0)), timings.get("training_seconds")
    seconds = told.get("seconds", seconds)
    started = timings.get("started") or (record.get("job") or {}).get("started")
    when = datetime.fromisoformat(started) if started else datetime.fromtimestamp((path / "run.json").stat().st_mtime, UTC)
    when = when if when.tzinfo else when.replace(tzinfo=UTC)
    row = {
        "name": name,
        "status": status,
        "step": int(step),
        "steps": int(config["training"]["steps"]),
        "started": when,
        "seconds": seconds,
        "validation_bpb": None,
        "params": budget.get("total_params"),
        "active": budget.get("active_params"),
        "flops_per_token": budget.get("flops_per_token"),
        "seed": config["seed"],
        "sweep": record.get("sweep"),
        "variant": record.get("variant"),
        "reason": record.get("reason"),
        "tokens_per_second": told.get("tokens_per_second", timings.get("tokens_per_second")),
        "peak_memory_bytes": timings.get("peak_memory_bytes"),
        "loss": told.get("loss"),
    }
    final = {key: value for key, value in (record.get("final") or {}).items() if isinstance(value, int | float)}
    return {**row, **{key: value for key, value in final.items() if row.get(key) is None}}
