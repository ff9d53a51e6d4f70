"""Whether the jobs that a sweep's question plans, its table of results and each job's run.json say the same."""

from __future__ import annotations

import math
from typing import Any

from longcat_lab.ablation import evaluated, store
from longcat_lab.ablation.report.check_notebooks import number, same
from longcat_lab.ablation.store import Sweep

TEXTS = ("not_engaged", evaluated.FROM)  # columns of the table that are words and belong to a job's record


def planned(sweep: Sweep) -> list[str]:
    """Every cell of the question in results.parquet, once, and nothing else there; rows and their jobs' run.json alike."""
    import pandas

    a, problems = sweep.ablation, []
    rows = pandas.read_parquet(sweep.folder / "results.parquet").to_dict("records")
    cells = {(name, seed) for name in a.arms for seed in a.seeds}
    seen = [(str(row["variant"]), int(row["seed"])) for row in rows]
    for name, seed in sorted(cells - set(seen)):
        problems.append(f"The planned job {name}/seed-{seed} is unaccounted for: results.parquet has no row of it.")
    for name, seed in sorted(set(seen) - cells):
        problems.append(f"results.parquet has a row of {name}/seed-{seed}, which the question does not plan.")
    for name, seed in sorted({cell for cell in seen if seen.count(cell) > 1}):
        problems.append(f"results.parquet has more than one row of {name}/seed-{seed}.")
    live = not store.is_free(sweep.folder)
    for row in rows:
        problems += _row(sweep, row, live)
    return problems


def _row(sweep: Sweep, row: dict[str, Any], live: bool) -> list[str]:
    """A row of results.parquet against the run.json of its job; `live`: a driver is there, whose table lags behind its jobs."""
    variant, seed = str(row.get(evaluated.FROM) or row["variant"]), int(row["seed"])
    job, place = f"{row['variant']}/seed-{seed}", f"jobs/{variant}/seed-{seed}/run.json"
    run, status = store.read_run(store.job_folder(sweep.folder, variant, seed)), str(row["status"])
    if run is None:
        return [f"results.parquet calls {job} {status}, but {place} is missing."] if status != "planned" else []
    ended = str(run.get("status"))
    if run.get("identity") != row["identity"]:
        # Planned anew: the folder still holds what another configuration left, until the job begins.
        if status == "finished":
            return [f"{place} has the identity {run.get('identity')}, results.parquet has {row['identity']}."]
        return _numbers(row, {}, job, place)
    if live and status in ("planned", "running"):
        return []
    if status == "failed" and ended not in store.DONE:
        return []  # a job that could not even start has its reason in the table only
    if ended != status and ended in store.DONE and status in ("planned", "running"):
        # Its driver did not live to see the end. run.json is the truth, and `report` writes the table anew.
        return [f"results.parquet calls {job} {status}, {place} calls it {ended}: render the report again, which mends the table."]
    if ended != status and {status, ended} != {"running", "interrupted"}:
        return [f"results.parquet calls {job} {status}, {place} calls it {ended}."]
    parts = evaluated.rows(store.result_row(run, variant, seed, row["identity"]), run.get("arms") or {})
    own = next((part for part in parts if part["variant"] == row["variant"]), {})
    problems = _numbers(row, own, job, place)
    for key in ("reason", *TEXTS) if ended == status else ():
        if key in row and (said := str(row[key] or "")) != (wanted := str(own.get(key) or "")):
            problems.append(f"results.parquet has '{said}' as {key} of {job}, {place} has '{wanted}'.")
    lost = [key for key, value in own.items() if isinstance(value, int | float) and key not in row and status == "finished"]
    return problems + [f"results.parquet has no {key} for {job}, which {place} has." for key in lost]


def _numbers(row: dict[str, Any], own: dict[str, Any], job: str, place: str) -> list[str]:
    """The numbers of a row against those of its job; one that a job which has not finished lacks may be missing in the row too."""
    problems = []
    for key, value in row.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or key == "seed":
            continue
        if (row["status"] == "finished" or not math.isnan(value)) and not same(value, own.get(key)):
            problems.append(f"results.parquet has {key} = {value:.10g} for {job}, {place} has {number(own.get(key))}.")
    return problems
