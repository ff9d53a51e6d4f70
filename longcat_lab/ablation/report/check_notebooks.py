"""Whether a job's executed notebook, its page and its logged rows say what its run.json says."""

from __future__ import annotations

import ast
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from longcat_lab.ablation import executed, store
from longcat_lab.ablation.report import html, whole
from longcat_lab.ablation.report.record import NOTEBOOK, PAGE
from longcat_lab.ablation.report.rendering import SOURCE, digest, job_title
from longcat_lab.ablation.store import Sweep

if TYPE_CHECKING:
    import pandas
    from nbformat import NotebookNode

FINAL = re.compile(r"""\.record\[["']final["']\]\s*$""")  # the cell of the house's notebook that shows the final metrics
EQUAL = 1e-9
# Columns of the shown budget, and what run.json calls their totals.
TOTALS = {
    "params": "total_params",
    "active params": "active_params",
    "FLOPs/token": "flops_per_token",
    "bytes/token": "state_bytes_per_token",
}


def jobs(sweep: Sweep) -> list[str]:
    """Each job's files: logged rows, executed notebook with its counts, budget and final metrics, and its page."""
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
            problems += _logged(job, folder, finished)
            if not path.is_file():
                kept = finished or (run.get("job") or {}).get("notebook_sha256")
                problems += [f"{job}/{NOTEBOOK} is missing, but the job has {'finished' if finished else 'left one'}."] if kept else []
                continue
            notebook = read_notebook(path)
            if notebook is None:
                problems.append(f"{job}/{NOTEBOOK} cannot be read as a notebook.")
                continue
            problems += _as_executed(f"{job}/{NOTEBOOK}", path, run)
            problems += counts(path, finished and not (run.get("job") or {}).get("notebook_error"), f"{job}/{NOTEBOOK}")
            problems += _final(f"{job}/{NOTEBOOK}", notebook, run.get("final") or {}) if finished else []
            problems += _budget(f"{job}/{NOTEBOOK}", notebook, run.get("budget") or {})
            problems += _rendered(job, folder, job_title(sweep, name, seed), notebook)
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


def _as_executed(name: str, path: Path, run: dict[str, Any]) -> list[str]:
    """The notebook's hash, which its job kept when it ended; jobs of earlier versions kept none."""
    kept = (run.get("job") or {}).get("notebook_sha256")
    return (
        [f"{name} is not the file that its job left: it was changed after the job had ended."]
        if kept not in (None, executed.digest(path))
        else []
    )


# ---- what it logged


def _logged(job: str, folder: Path, finished: bool) -> list[str]:
    """metrics.jsonl against metrics.parquet, which is made of it. A job that was killed may not have written the second to its end."""
    import pandas

    lines, table = folder / "metrics.jsonl", folder / "metrics.parquet"
    if not lines.is_file() or not table.is_file():
        return []
    name = f"{job}/metrics.jsonl and metrics.parquet"
    try:
        rows = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
    except ValueError:
        return [f"{job}/metrics.jsonl has a row that is not JSON, but the job has finished."] if finished else []
    one, other = pandas.DataFrame(rows), pandas.read_parquet(table)
    if not finished and (len(one) != len(other) or "step" not in one or "step" not in other or list(one["step"]) != list(other["step"])):
        return []
    if len(one) != len(other):
        return [f"{name} have {len(one)} and {len(other)} rows."]
    if odd := sorted(set(one) ^ set(other)):
        return [f"{name} do not have the same columns: {', '.join(odd[:5])} {'is' if len(odd) == 1 else 'are'} in one of them."]
    for column in one:
        if (row := _first_odd(one[column], other[column])) is not None:
            return [f"{name} do not agree: row {row + 1} has {column} = {one[column][row]} and {other[column][row]}."]
    return []


def _first_odd(one: pandas.Series, other: pandas.Series) -> int | None:
    """The first row in which two columns differ."""
    if one.dtype.kind in "iufb" and other.dtype.kind in "iufb":
        a, b = one.to_numpy(dtype=float), other.to_numpy(dtype=float)
        same = np.isclose(a, b, rtol=EQUAL, atol=0, equal_nan=True)
    else:
        same = np.array([_listed(a) == _listed(b) for a, b in zip(one, other, strict=True)], dtype=bool)
    return None if same.all() else int(np.argmin(same))


def _listed(value: Any) -> Any:
    """A list, array or value such that equal ones are equal."""
    if isinstance(value, list | tuple | np.ndarray):
        return [_listed(each) for each in value]
    known = value is not None and not (isinstance(value, float) and math.isnan(value))
    return (float(value) if isinstance(value, int | float | np.number) else value) if known else None


# ---- what it shows


def _final(name: str, notebook: NotebookNode, final: dict[str, Any]) -> list[str]:
    """The final metrics that the notebook shows against those of run.json."""
    problems, shown = [], False
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        asked = bool(FINAL.search(cell.source))
        for output in cell.get("outputs", []):
            values = mapping(str(output.get("data", {}).get("text/plain", "")))
            if output.output_type != "execute_result" or values is None or not (asked or values.keys() & final.keys()):
                continue
            shown = shown or asked
            for key in sorted(values.keys() | final.keys() if asked else values.keys() & final.keys()):
                if not same(values.get(key), final.get(key)):
                    problems.append(f"{name} shows {key} = {number(values.get(key))}, its run.json has {number(final.get(key))}.")
        if asked and not shown:
            problems.append(f"{name} does not show the final metrics, though one of its cells asks for them.")
    return problems


class _Table(HTMLParser):
    """Rows of the cells' texts of everything that is a table."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.inside = False

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        if tag == "tr":
            self.rows.append([])
        self.inside = tag in ("td", "th") and bool(self.rows)
        if self.inside:
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag not in ("td", "th", "tr", "table")

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.rows[-1][-1] += data


def _budget(name: str, notebook: NotebookNode, budget: dict[str, Any]) -> list[str]:
    """The tables of parameters that the notebook shows: their totals are those of run.json and the sums of their rows, also as text."""
    problems = []
    for output in (output for cell in notebook.cells for output in cell.get("outputs", [])):
        data = output.get("data", {})
        reader = _Table()
        reader.feed(str(data.get("text/html", "")))
        head = next((row for row in reader.rows if set(TOTALS) <= set(row)), None)
        total = next((row for row in reader.rows if head and row[:1] == ["total"] and len(row) == len(head)), None)
        if head is None or total is None:
            continue
        rows = [
            row
            for row in reader.rows
            if len(row) == len(head) and not row[0].startswith("total") and _whole(row[head.index("params")]) is not None
        ]
        for column, key in TOTALS.items():
            at = head.index(column)
            shown, parts = _whole(total[at]), [_whole(row[at]) for row in rows]
            if key in budget and not same(shown, budget[key]):
                problems.append(f"{name} shows {total[at]} as the total of {column}, its run.json has {number(budget[key])}.")
            elif None in parts or (
                rows and shown is not None and not math.isclose(sum(p for p in parts if p is not None), shown, rel_tol=1e-6)
            ):
                problems.append(f"{name} shows {total[at]} as the total of {column}, which is not the sum of its rows.")
        text = str(data.get("text/plain", ""))
        lines = [html.squeezed(line) for line in text.splitlines()]
        if "..." not in text and "\\" not in text:
            lost = [row[0] for row in (*rows, total) if html.squeezed("".join(row)) not in lines]
            problems += (
                [f"{name} shows other numbers for {', '.join(lost)} in its table than in the text of the same output."] if lost else []
            )
    return problems


def _whole(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def _rendered(job: str, folder: Path, title: str, notebook: NotebookNode) -> list[str]:
    """The job's page: made of this state of the notebook, and what the notebook becomes, to the letter."""
    if not (folder / PAGE).is_file():
        return [f"{job}/{PAGE}, the rendered notebook, is missing."]
    text = (folder / PAGE).read_text(encoding="utf-8")
    page = html.shown(text)
    if page.meta.get(SOURCE) != digest(folder):
        return [f"{job}/{PAGE} was made of another state of {NOTEBOOK} or of its job; render the report again."]
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            plain = str(data.get("text/plain", ""))
            if "text/html" not in data and mapping(plain) is not None and html.squeezed(plain) not in page.all_text:
                return [f"{job}/{PAGE} does not show what {NOTEBOOK} says: {' '.join(plain.split())[:60]}…"]
    return whole.job_page(job, folder, title, page, text, notebook)


def mapping(text: str) -> dict[str, Any] | None:
    """A mapping of numbers as a cell shows it."""
    plain = re.sub(r"(?<![\w'\"])(-?)(nan|inf)(?![\w'\"])", lambda m: f"{m[1]}1e999" if m[2] == "inf" else "None", text.strip())
    try:
        found = ast.literal_eval(plain) if plain.startswith("{") else None
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    return found if isinstance(found, dict) and all(isinstance(key, str) for key in found) else None


def same(one: Any, other: Any) -> bool:
    """Whether two values of two files are one: numbers but for rounding, no number and NaN alike."""

    def known(value: Any) -> float | None:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return None if not number or math.isnan(value) else float(value)

    if isinstance(one, str | bool | list | dict) or isinstance(other, str | bool | list | dict):
        return one == other
    a, b = known(one), known(other)
    return a == b if a is None or b is None else math.isclose(a, b, rel_tol=EQUAL, abs_tol=1e-15)


def number(value: Any) -> str:
    return "none" if value is None else f"{value:.10g}" if isinstance(value, int | float) else str(value)
