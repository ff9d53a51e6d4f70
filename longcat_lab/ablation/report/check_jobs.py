"""Whether the jobs of a sweep, its table of results and its executed notebooks say the same."""

from __future__ import annotations

import ast
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longcat_lab.ablation import evaluated, store
from longcat_lab.ablation.report import html
from longcat_lab.ablation.report.record import NOTEBOOK, PAGE
from longcat_lab.ablation.report.render import SOURCE, digest
from longcat_lab.ablation.store import Sweep

if TYPE_CHECKING:
    from nbformat import NotebookNode

FINAL = re.compile(r"""\.record\[["']final["']\]\s*$""")  # the cell of the house's notebook that shows the final metrics
EQUAL = 1e-9


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
    for row in rows:
        problems += _row(sweep, row)
    return problems


def _row(sweep: Sweep, row: dict[str, Any]) -> list[str]:
    """A row of results.parquet against the run.json of its job."""
    variant, seed = str(row.get(evaluated.FROM) or row["variant"]), int(row["seed"])
    place = f"jobs/{variant}/seed-{seed}/run.json"
    run, status = store.read_run(store.job_folder(sweep.folder, variant, seed)), str(row["status"])
    if run is None:
        return [f"results.parquet calls {row['variant']}/seed-{seed} {status}, but {place} is missing."] if status != "planned" else []
    if run.get("identity") != row["identity"]:
        # Planned anew: the folder still holds what another configuration left, until the job begins.
        return [f"{place} has the identity {run.get('identity')}, results.parquet has {row['identity']}."] if status == "finished" else []
    if status != "finished" and run.get("status") in store.DONE and status in ("planned", "running"):
        return []  # it has ended after the table was last written: run.json is the truth then
    if status == "failed" and run.get("status") != "finished":
        return []  # a job that could not even start has its reason in the table only
    if run.get("status") != status and {status, run.get("status")} != {"running", "interrupted"}:
        return [f"results.parquet calls {row['variant']}/seed-{seed} {status}, {place} calls it {run.get('status')}."]
    parts = evaluated.rows(store.result_row(run, variant, seed, row["identity"]), run.get("arms") or {})
    own = next((part for part in parts if part["variant"] == row["variant"]), {})
    problems = []
    for key, value in row.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or key == "seed":
            continue
        wanted = own.get(key)
        if (status == "finished" or not math.isnan(value)) and not _same(value, wanted):
            problems.append(f"results.parquet has {key} = {value:.10g} for {row['variant']}/seed-{seed}, {place} has {_number(wanted)}.")
    lost = [key for key, value in own.items() if isinstance(value, int | float) and key not in row and status == "finished"]
    return problems + [f"results.parquet has no {key} for {row['variant']}/seed-{seed}, which {place} has." for key in lost]


def jobs(sweep: Sweep) -> list[str]:
    """Each job's files: curves, executed notebook with its counts and final metrics, and its page."""
    problems, meant = [], sweep.results.set_index(["variant", "seed"])["identity"].to_dict()
    for name in sweep.ablation.variants:
        for seed in sweep.ablation.seeds:
            folder, job = store.job_folder(sweep.folder, name, seed), f"jobs/{name}/seed-{seed}"
            run = store.read_run(folder)
            if run is None or run.get("status") not in store.DONE or run.get("identity") != meant.get((name, seed), run.get("identity")):
                continue  # not at its end, or what another configuration left
            finished, path = run.get("status") == "finished", folder / NOTEBOOK
            if finished and not (folder / "metrics.parquet").is_file() and (run.get("timings") or {}).get("steps_done"):
                problems.append(f"{job}/metrics.parquet is missing, but the job has finished.")
            if not path.is_file():
                problems += [f"{job}/{NOTEBOOK} is missing, but the job has finished."] if finished else []
                continue
            notebook = read_notebook(path)
            if notebook is None:
                problems.append(f"{job}/{NOTEBOOK} cannot be read as a notebook.")
                continue
            problems += counts(path, finished and not (run.get("job") or {}).get("notebook_error"), f"{job}/{NOTEBOOK}")
            problems += _final(f"{job}/{NOTEBOOK}", notebook, run.get("final") or {}) if finished else []
            problems += _rendered(job, folder, notebook)
    return problems


def read_notebook(path: Path) -> NotebookNode | None:
    """The notebook, or None where the file is none."""
    import nbformat

    try:
        return nbformat.read(path, as_version=4)
    except Exception:  # it has many ways to be none
        return None


def counts(path: Path, whole: bool, name: str = "") -> list[str]:
    """Whether the execution counts of a notebook's code cells are 1, 2, ... from the top; `whole`: up to its last cell."""
    notebook, name = read_notebook(path), name or path.name
    if notebook is None:
        return [f"{name} cannot be read as a notebook."]
    found = [cell.get("execution_count") for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    run = [count for count in found if count is not None]
    if run != list(range(1, len(run) + 1)) or found[: len(run)] != run:
        said = ", ".join("–" if count is None else str(count) for count in found)
        return [f"The execution counts of {name} are {said}, not 1 to {len(found)}: it was not executed once from top to bottom."]
    if whole and len(run) < len(found):
        return [f"{name} was executed up to its code cell {len(run)} of {len(found)}, but its job has finished."]
    return []


def _final(name: str, notebook: NotebookNode, final: dict[str, Any]) -> list[str]:
    """The final metrics that the notebook shows against those of run.json."""
    problems, shown = [], False
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        asked = bool(FINAL.search(cell.source))
        for output in cell.get("outputs", []):
            values = _mapping(str(output.get("data", {}).get("text/plain", "")))
            if output.output_type != "execute_result" or values is None or not (asked or values.keys() & final.keys()):
                continue
            shown = shown or asked
            for key in sorted(values.keys() | final.keys() if asked else values.keys() & final.keys()):
                if not _same(values.get(key), final.get(key)):
                    problems.append(f"{name} shows {key} = {_number(values.get(key))}, its run.json has {_number(final.get(key))}.")
        if asked and not shown:
            problems.append(f"{name} does not show the final metrics, though one of its cells asks for them.")
    return problems


def _mapping(text: str) -> dict[str, Any] | None:
    """A mapping of numbers as a cell shows it."""
    plain = re.sub(r"(?<![\w'\"])(-?)(nan|inf)(?![\w'\"])", lambda m: f"{m[1]}1e999" if m[2] == "inf" else "None", text.strip())
    try:
        found = ast.literal_eval(plain) if plain.startswith("{") else None
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    return found if isinstance(found, dict) and all(isinstance(key, str) for key in found) else None


def _rendered(job: str, folder: Path, notebook: NotebookNode) -> list[str]:
    """The job's page: made of this state of the notebook, and showing what its outputs say."""
    if not (folder / PAGE).is_file():
        return [f"{job}/{PAGE}, the rendered notebook, is missing."]
    page = html.shown((folder / PAGE).read_text(encoding="utf-8"))
    if page.meta.get(SOURCE) != digest(folder / NOTEBOOK):
        return [f"{job}/{PAGE} was made of another state of {NOTEBOOK}; render the report again."]
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            text = str(data.get("text/plain", ""))
            if "text/html" not in data and _mapping(text) is not None and html.squeezed(text) not in page.all_text:
                return [f"{job}/{PAGE} does not show what {NOTEBOOK} says: {' '.join(text.split())[:60]}…"]
    return []


def _same(one: Any, other: Any) -> bool:
    def known(value: Any) -> float | None:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return None if not number or math.isnan(value) else float(value)

    if isinstance(one, str | bool | list | dict) or isinstance(other, str | bool | list | dict):
        return one == other
    a, b = known(one), known(other)
    return a == b if a is None or b is None else math.isclose(a, b, rel_tol=EQUAL, abs_tol=1e-15)


def _number(value: Any) -> str:
    return "none" if value is None else f"{value:.10g}" if isinstance(value, int | float) else str(value)
