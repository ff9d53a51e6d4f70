"""The page for a reviewer: the report notebook executed on a sweep's folder, and every job's notebook rendered, offline files all."""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import html as entities
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longcat_lab.ablation import store
from longcat_lab.ablation.executed import LARGEST, cut_largest
from longcat_lab.ablation.executed import digest as digest_of
from longcat_lab.ablation.job import one_line
from longcat_lab.ablation.report import html
from longcat_lab.ablation.report.record import NOTEBOOK, PAGE
from longcat_lab.errors import LabError
from longcat_lab.files import read_json, write_whole

if TYPE_CHECKING:
    from nbformat import NotebookNode

WIDGET = "application/vnd.jupyter.widget-view+json"
HIDDEN = "not-on-the-page"  # tag of cells that say to a notebook's reader what the page says by itself
SOURCE = "lab-source"  # name of the meta element that says of which notebook a page was made
MADE = "lab-made"  # name of the one that says by what; see `makers`
FAILED = "papermill-error-cell-tag"  # tag of papermill's cells around a failure, for which the page has words of its own


NOTEBOOK_OF_THE_PAGE = Path(__file__).resolve().parents[3] / "notebooks" / "report.ipynb"


@functools.cache
def makers() -> str:
    """What decides the HTML that a notebook becomes: versions of libraries, and of this package's own part in it."""
    known = []
    for name in ("nbconvert", "mistune", "pygments", "beautifulsoup4", "bleach"):
        with contextlib.suppress(PackageNotFoundError):
            known.append(f"{name} {version(name)}")
    own = b"".join((Path(__file__).with_name(name)).read_bytes() for name in ("html.py", "page.css", "page.js", "rendering.py"))
    return ", ".join([*known, f"own {hashlib.sha256(own).hexdigest()[:8]}"])


def render(folder: str | Path, notebook: str | Path | None = None) -> Path:
    """Make FOLDER/report.html (and the executed FOLDER/report.ipynb) from whatever is in the folder, half a sweep included, and beside
    each job's executed notebook its page, where it is missing or of another state of the notebook.

    Args:
        notebook: the report notebook, with a parameter `sweep_folder`; the repository's notebooks/report.ipynb when left out.

    Raises:
        LabError: there is no sweep in the folder, or the notebook fails on it; an earlier page is then still there.
    """
    folder = Path(folder).resolve()
    sweep = store.read_sweep(folder)
    source = Path(notebook) if notebook is not None else NOTEBOOK_OF_THE_PAGE
    if not source.is_file():
        raise LabError(f"The report notebook {source} is not there.")

    import nbformat
    from nbclient.exceptions import DeadKernelError
    from papermill import PapermillExecutionError

    from longcat_lab.ablation.kernel import execute

    settle_results(sweep)
    for (variant, seed), run in sweep.runs.items():
        if run.get("status") in store.DONE:
            job_page(store.job_folder(folder, variant, seed), job_title(sweep, variant, seed))
    part, executed = folder / f".report-{os.getpid()}.ipynb", folder / "report.ipynb"
    try:
        execute(source, part, {"sweep_folder": str(folder)})
    except (PapermillExecutionError, DeadKernelError, OSError) as problem:
        said = f"{problem.ename}: {problem.evalue}" if isinstance(problem, PapermillExecutionError) else str(problem)
        raise LabError(f"The report of {folder} failed ({one_line(said)}); see {executed}.") from None
    finally:
        if part.is_file():
            os.replace(part, executed)
    page = page_text(sweep, nbformat.read(executed, as_version=4))
    write_whole(folder / "report.html", lambda part: part.write_text(page, encoding="utf-8"))
    return folder / "report.html"


def settle_results(sweep: store.Sweep) -> None:
    """Write results.parquet anew where its driver did not live to see how jobs ended; nothing while a driver lives."""
    import pandas as pd

    path = sweep.folder / "results.parquet"
    written = pd.read_parquet(path)
    if list(written["status"]) == list(sweep.results["status"]) or (lock := store.Lock.take(sweep.folder)) is None:
        return
    try:
        write_whole(path, lambda part: sweep.results.to_parquet(part, index=False))
    finally:
        lock.release()


def page_shell(sweep: store.Sweep) -> tuple[str, str]:
    """What stands before and after the body of a sweep's page."""
    return html.shell(f"{sweep.ablation.name}: {sweep.ablation.question}", script=True, meta={MADE: makers()})


def page_text(sweep: store.Sweep, notebook: NotebookNode) -> str:
    """The page of an executed report notebook."""
    return to_body(notebook, code=False).join(page_shell(sweep))


def job_title(sweep: store.Sweep, variant: str, seed: int) -> str:
    return f"{sweep.ablation.name}: {variant}, seed {seed}"


def job_page(folder: Path, title: str) -> Path | None:
    """A job's executed notebook as FOLDER/notebook.html, its code included, at most 1 MB; as it is if it is of this notebook already.

    None where the job has left no notebook that can be read.
    """
    page = folder / PAGE
    try:
        known = page.read_text(encoding="utf-8")[:2000] if page.is_file() else ""
        if all(f'name="{name}" content="{entities.escape(mark)}"' in known for name, mark in _marks(folder).items()):
            return page
        text = job_text(folder, title)
    except Exception:  # a half-written file has many ways to be none; the job's fate is told elsewhere
        return None
    write_whole(page, lambda part: part.write_text(text, encoding="utf-8"))
    return page


def _marks(folder: Path) -> dict[str, str]:
    return {SOURCE: digest(folder), MADE: makers()}


def digest(folder: Path) -> str:
    """What tells one state of a job's notebook from another, and how its job ended."""
    said = "\0".join(_fate(folder))
    return digest_of(folder / NOTEBOOK) + (f"-{hashlib.sha256(said.encode()).hexdigest()[:8]}" if said.strip("\0") else "")


def _fate(folder: Path) -> tuple[str, str]:
    """Status and reason of a job that did not end well; empty otherwise."""
    run = read_json(folder / "run.json") or {}
    status = str(run.get("status"))
    return (status, str(run.get("reason") or "")) if status in ("failed", "interrupted") else ("", "")


def job_shell(folder: Path, title: str) -> tuple[str, str]:
    """What stands before and after the notebook on a job's page."""
    before, after = html.shell(title, style=_code_style(), meta=_marks(folder))
    up = '<p class="lab-up"><a href="../../../report.html">Back to the page of the sweep</a> · <a href="notebook.ipynb">ipynb</a></p>'
    return before + up, after


@functools.cache
def _code_style() -> str:
    from pygments.formatters import HtmlFormatter

    dark = HtmlFormatter(style="github-dark").get_style_defs(".highlight")
    light = HtmlFormatter(style="default").get_style_defs(".highlight")
    return f"{light}\n@media (prefers-color-scheme: dark) {{ {dark} }}\n@media print {{ {light} }}\n.highlight {{ background: none; }}"


def job_text(folder: Path, title: str) -> str:
    """A job's page; raises whatever a file that is no notebook makes its reader raise."""
    import nbformat

    notebook = nbformat.read(folder / NOTEBOOK, as_version=4)
    shell, (status, reason) = job_shell(folder, title), _fate(folder)

    def whole() -> str:
        return (_failure(notebook, status, reason) + to_body(notebook, code=True)).join(shell)

    text = whole()
    while len(text.encode()) > LARGEST and cut_largest(notebook, "the notebook beside this page has it"):
        text = whole()
    return text


def _failure(notebook: NotebookNode, status: str, reason: str) -> str:
    """Why the job ended as it did, above everything else; empty where it ended well."""
    errors = [output for cell in notebook.cells for output in cell.get("outputs", []) if output.output_type == "error"]
    raised = f"{errors[0].ename}: {_colourless(errors[0].evalue)}" if errors else ""
    if status == "failed":
        words = f"This job failed: {raised or reason}"
    elif status == "interrupted":
        words = f"This job was interrupted: {reason or raised}"
    elif raised:
        words = f"A cell raised after the run had finished: {raised}"
    else:
        return ""
    where = ' <a href="#lab-error">See the cell.</a>' if errors else ""
    return f'<p class="lab-failed">{entities.escape(words)}{"" if words.endswith((".", "!", "?")) else "."}{where}</p>\n'


def _colourless(text: str) -> str:
    from nbconvert.filters import strip_ansi

    return str(strip_ansi(text))


@functools.cache
def _exporter(code: bool) -> Any:
    from nbconvert import HTMLExporter

    exporter: Any = HTMLExporter(template_name="basic", embed_images=True)
    exporter.exclude_input, exporter.exclude_output_prompt = not code, True
    exporter.exclude_input_prompt = not code
    exporter.exclude_anchor_links = True
    return exporter


def to_body(notebook: NotebookNode, code: bool) -> str:
    """What a notebook shows as HTML, with its code or without it; no script of a widget, no address that is fetched."""
    notebook = copy.deepcopy(notebook)
    notebook.metadata.pop("widgets", None)
    notebook.cells = [cell for cell in notebook.cells if not {HIDDEN, FAILED} & set(cell.metadata.get("tags", []))]
    for cell in notebook.cells:
        for i, output in enumerate(cell.get("outputs", [])):
            data = output.get("data", {})
            data.pop(WIDGET, None)  # leaves its text
            if "image/svg+xml" in data:  # in the page itself, with its words, in place of an encoded picture without
                data["text/html"] = data.pop("image/svg+xml")
            if output.output_type == "error":
                cell.outputs[i] = _folded(output)
    body, _ = _exporter(code).from_notebook_node(notebook)
    return str(body)


def _folded(error: NotebookNode) -> NotebookNode:
    """An error as its sentence, with the traceback folded below."""
    from nbconvert.filters import ansi2html
    from nbformat.v4 import new_output

    said = entities.escape(f"{error.ename}: {_colourless(error.evalue)}")
    trace = ansi2html("\n".join(error.traceback))
    text = f'<div class="output_error" id="lab-error"><p>{said}</p><details><summary>Traceback</summary><pre>{trace}</pre></details></div>'
    return new_output("display_data", data={"text/html": text})
