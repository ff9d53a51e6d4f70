"""The folder of a sweep: where things are, and how they are written so that nothing is ever half there; `lock` says who may write.

FOLDER/ablation.yaml                      the resolved question
FOLDER/jobs/VARIANT/seed-S/run.json       the truth about one job
FOLDER/superseded/IDENTITY/VARIANT/seed-S finished jobs that a change has replaced; see `superseded`
FOLDER/results.parquet                    one row per job, and one per arm that is evaluated from it
FOLDER/plugins/NAME.py                    what jobs import; see `plugin_copies`
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longcat_lab.ablation import evaluated, plugin_copies
from longcat_lab.ablation.lock import LOCK, Lock, holder, is_free, said_holder
from longcat_lab.errors import LabError
from longcat_lab.files import read_json, write_whole

if TYPE_CHECKING:
    import pandas as pd

    from longcat_lab.ablation.match import Solution
    from longcat_lab.ablation.spec import Ablation

ENGINE = "engine.json"  # in a job's folder: where the queue that runs it knows it
CONNECTION = ".kernel.json"  # there too, while its kernel lives
DONE = ("finished", "diverged", "failed", "interrupted")


def job_folder(folder: Path, variant: str, seed: int) -> Path:
    return folder / "jobs" / variant / f"seed-{seed}"


# ---- writing


def write_question(folder: Path, ablation: Ablation, solution: Solution) -> None:
    """ablation.yaml: the question with what was solved, itself a valid question file; says when it was edited after a job had begun."""
    from longcat_lab.ablation import begun
    from longcat_lab.config.yaml import write_yaml

    solved = {name: {"moved": solution.moved.get(name, {}), "totals": totals} for name, totals in solution.totals.items()}
    settled = {name: {**overrides, **solution.moved[name]} for name, overrides in ablation.variants.items()}
    copied, names = plugin_copies.write(folder, solution.plugins), plugin_copies.names(solution.plugins)
    own = {"plugins": list(dict.fromkeys(f"{plugin_copies.HOME}/{names[path]}" for path in ablation.plugins)), "copied": copied}
    if ablation.compare_with:  # so that both folders can be moved together
        own["compare_with"] = os.path.relpath(ablation.compare_with, folder)
    now = ablation.model_copy(update={"variants": settled, "solved": solved, **own, "changes": [], "before": {}}).to_dict()
    now = stated(now | {"resources": ablation.resources.model_dump(mode="json", exclude_defaults=True)})
    if (folder / "ablation.yaml").is_file():
        before = read_question(folder)
        changes, first = list(before.get("changes") or []), dict(before.get("before") or {})
        edited = begun.edited(before, now)
        edited += [name for name, told in copied.items() if told["sha256"] != (before.get("copied") or {}).get(name, told).get("sha256")]
        jobs = begun.begun(folder)  # also those that this question does not plan: their answers may have been looked at
        edited += sorted(
            {key for key, _, _ in begun.disagreements(before, jobs)} - set(edited)
        )  # the file was edited itself, and run again
        if edited and jobs:
            when = begun.edited_when(jobs, {(name, seed) for name in settled for seed in ablation.seeds})
            changes.append(f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC: {', '.join(edited)} edited when {when}")
            was = (before | begun.at_start(before, jobs)).items()
            first = {key: value for key, value in was if key in edited} | first  # the oldest wording stays
        now |= stated({"changes": changes, "before": first})
    text = write_yaml(now)
    write_whole(folder / "ablation.yaml", lambda part: part.write_text(text, encoding="utf-8"))


def stated(question: dict[str, Any]) -> dict[str, Any]:
    """A question's keys without the empty ones."""
    return {key: value for key, value in question.items() if value not in (None, [], {}, "")}


def read_question(folder: Path) -> dict[str, Any]:
    """The content of ablation.yaml, unchecked."""
    from longcat_lab.config.yaml import read_yaml

    return read_yaml(folder / "ablation.yaml")


# ---- reading


def read_run(folder: Path) -> dict[str, Any] | None:
    """The run.json of a job's folder; a job that says it runs while no process holds its folder is reported as interrupted."""
    run = read_json(folder / "run.json")
    if run and run.get("status") == "running" and is_free(folder):
        run = read_json(folder / "run.json") or run  # it may have ended between the two looks
        if run.get("status") == "running":
            run |= {"status": "interrupted", "reason": "its process is gone without a word"}
    return run


def attempts(run: dict[str, Any] | None) -> int:
    """How often a process has begun the job of a run.json."""
    return int(((run or {}).get("job") or {}).get("attempts", 0))


def check_folder(folder: Path, name: str) -> None:
    """Refuse a folder that is not this ablation's; touches nothing.

    Raises:
        LabError: something else is there, or it cannot be looked into.
    """
    try:
        if not folder.exists():
            return
        if not folder.is_dir():
            raise LabError(f"{folder} is a file; choose another folder with --out.")
        if not {entry.name for entry in folder.iterdir()} - {LOCK, "tuning"}:  # what is tuned comes before the question is written
            return
        there = (folder / "ablation.yaml").is_file()
    except OSError as error:
        raise LabError(f"Cannot look into {folder}: {error.strerror}; choose another folder with --out.") from None
    if not there:
        raise LabError(f"{folder} holds other files and no sweep; choose an empty or a new folder with --out.")
    if (other := read_question(folder).get("name")) != name:
        raise LabError(f"{folder} holds the sweep '{other}', not '{name}'; choose another folder with --out.")


# ---- results


def result_row(run: dict[str, Any] | None, variant: str, seed: int, identity: str) -> dict[str, Any]:
    """Status and numbers of the job that is meant by `identity`, those of the arms that are evaluated from it (`ARM/METRIC`) included."""
    row = {"variant": variant, "seed": seed, "status": "planned", "reason": "", "identity": identity, "seconds": None}
    if run is None:
        return row
    if run.get("identity") != identity:
        return {**row, "reason": "configuration, data or code changed since it last ran"}
    measures = {k: v for k, v in (run.get("final") or {}).items() if isinstance(v, int | float)}
    row |= {"status": run.get("status", "planned"), "reason": run.get("reason") or "", "seconds": (run.get("job") or {}).get("seconds")}
    row["not_engaged"] = "; ".join(run.get("not_engaged") or [])
    return {**measures, **(run.get("budget") or {}), **row}


def clear_settled(folder: Path) -> None:
    """Takes away what a run that has ended had no time to remove, because its process was killed: nobody goes on from its checkpoints.

    Nobody may be at work in `folder`.
    """
    for pattern in ("checkpoint-*", ".checkpoint-*.tmp"):
        for path in folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)
    (folder / CONNECTION).unlink(missing_ok=True)


def is_whole(folder: Path, run: dict[str, Any] | None) -> bool:
    """Whether a job with a result has its notebook too. Without `job.end` its own process was killed, after the run in its kernel had
    ended and before the last cell was written down: executed once more, the notebook finds the run and is whole in a moment.
    """
    told = (run or {}).get("job") or {}
    return "end" in told or not (folder / "notebook.ipynb").is_file()


def with_numbers(folder: Path, row: dict[str, Any]) -> dict[str, Any]:
    """A row that says how the job in `folder` ended, with the totals and metrics of its run.json."""
    run = read_run(folder) if row["status"] in DONE else None
    return row if run is None else {**result_row(run, row["variant"], row["seed"], row["identity"]), **row}


def write_results(folder: Path, rows: Iterable[dict[str, Any]]) -> None:
    """results.parquet as a whole."""
    frame = _frame(rows)
    write_whole(folder / "results.parquet", lambda part: frame.to_parquet(part, index=False))


def _frame(rows: Iterable[dict[str, Any]]) -> pd.DataFrame:
    import pandas as pd

    first = ["variant", "seed", "status", "reason", "identity", "seconds"]
    frame = pd.DataFrame(list(rows))
    frame = frame.reindex(columns=first + [column for column in frame.columns if column not in first])
    for column in frame.columns[5:]:
        text = column in ("not_engaged", evaluated.FROM)
        frame[column] = frame[column].fillna("") if text else pd.to_numeric(frame[column])
    return frame


def load_results(folder: str | Path) -> pd.DataFrame:
    """One row per planned job: variant, seed, status, reason, identity, seconds, totals and final metrics (NaN where there is none).

    An arm that is evaluated from a trained variant has rows too: `evaluated_from` is then that variant, status and reason are its job's.
    Jobs that ended after the table was last written (the driver was killed) are read from their own run.json.

    Raises:
        LabError: there is no sweep in `folder`.
    """
    import pandas as pd

    folder = Path(folder)
    path = folder / "results.parquet"
    if not path.is_file():
        raise LabError(f"There is no sweep in {folder}: it has no results.parquet.")
    rows = []
    for row in pd.read_parquet(path).to_dict("records"):
        variant = row.get(evaluated.FROM) or row["variant"]
        run = read_run(job_folder(folder, variant, row["seed"]))
        same = run is not None and run.get("identity") == row["identity"]
        # A job that could not even start has its reason in the table only.
        kept = row["status"] == "failed" and (not same or run.get("status") not in DONE)
        if same and not kept:
            parts = evaluated.rows(result_row(run, variant, row["seed"], row["identity"]), run.get("arms") or {})
            row = next((part for part in parts if part["variant"] == row["variant"]), row)
        rows.append(row)
    return _frame(rows)


@dataclass(frozen=True)
class Sweep:
    """Everything a page needs of a sweep's folder.

    Attributes:
        results: see `load_results`.
        ablation: the question; its plugins are the copies in the sweep's folder.
        runs: (variant, seed) -> run.json, for jobs that have one with the identity of their row in `results`.
    """

    folder: Path
    ablation: Ablation
    results: pd.DataFrame
    runs: dict[tuple[str, int], dict[str, Any]]


def read_sweep(folder: str | Path) -> Sweep:
    """The sweep in `folder`, whole or half done.

    Raises:
        LabError: there is none.
    """
    from longcat_lab.ablation.spec import read

    folder = Path(folder)
    if not (folder / "ablation.yaml").is_file():
        raise LabError(f"There is no sweep in {folder}: it has no ablation.yaml.")
    results = load_results(folder)
    meant = {(str(v), int(s)): i for v, s, i in zip(results["variant"], results["seed"], results["identity"], strict=True)}
    found = {cell: read_run(job_folder(folder, *cell)) for cell in meant}
    runs = {cell: run for cell, run in found.items() if run is not None and run.get("identity") == meant[cell]}
    ablation = read(folder / "ablation.yaml")
    plugin_copies.take_over(folder, ablation.copied, runs.values())
    return Sweep(folder, ablation, results, runs)


__all__ = [
    "CONNECTION",
    "DONE",
    "ENGINE",
    "LOCK",
    "Lock",
    "Sweep",
    "attempts",
    "check_folder",
    "clear_settled",
    "holder",
    "is_free",
    "is_whole",
    "job_folder",
    "load_results",
    "read_question",
    "read_run",
    "read_sweep",
    "result_row",
    "said_holder",
    "stated",
    "with_numbers",
    "write_question",
    "write_results",
]
