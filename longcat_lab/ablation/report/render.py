"""The page for a reviewer: the report notebook executed on a sweep's folder, and every job's notebook rendered, offline files all."""

from __future__ import annotations

import copy
import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longcat_lab.ablation import store
from longcat_lab.ablation.job import one_line
from longcat_lab.ablation.report import html
from longcat_lab.ablation.report.record import NOTEBOOK, PAGE
from longcat_lab.errors import LabError
from longcat_lab.files import write_whole

if TYPE_CHECKING:
    from nbformat import NotebookNode

WIDGET = "application/vnd.jupyter.widget-view+json"
HIDDEN = "not-on-the-page"  # tag of cells that say to a notebook's reader what the page says by itself
SOURCE = "lab-source"  # name of the meta element that says of which notebook a page was made
LARGEST = 1_000_000  # bytes of a job's page


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
    source = Path(notebook) if notebook is not None else Path(__file__).resolve().parents[3] / "notebooks" / "report.ipynb"
    if not source.is_file():
        raise LabError(f"The report notebook {source} is not there.")

    import nbformat
    from nbclient.exceptions import DeadKernelError
    from papermill import PapermillExecutionError

    from longcat_lab.ablation.kernel import execute

    for (variant, seed), run in sweep.runs.items():
        if run.get("status") in store.DONE:
            job_page(store.job_folder(folder, variant, seed), f"{sweep.ablation.name}: {variant}, seed {seed}")
    part, executed = folder / f".report-{os.getpid()}.ipynb", folder / "report.ipynb"
    try:
        execute(source, part, {"sweep_folder": str(folder)})
    except (PapermillExecutionError, DeadKernelError, OSError) as problem:
        said = f"{problem.ename}: {problem.evalue}" if isinstance(problem, PapermillExecutionError) else str(problem)
        raise LabError(f"The report of {folder} failed ({one_line(said)}); see {executed}.") from None
    finally:
        if part.is_file():
            os.replace(part, executed)
    body = to_body(nbformat.read(executed, as_version=4), code=False)
    page = html.page(f"{sweep.ablation.name}: {sweep.ablation.question}", body, script=True)
    write_whole(folder / "report.html", lambda part: part.write_text(page, encoding="utf-8"))
    return folder / "report.html"


def job_page(folder: Path, title: str) -> Path | None:
    """A job's executed notebook as FOLDER/notebook.html, its code included, at most 1 MB; as it is if it is of this notebook already.

    None where the job has left no notebook that can be read.
    """
    path, page = folder / NOTEBOOK, folder / PAGE
    try:
        mark = digest(path)
        if page.is_file() and f'name="{SOURCE}" content="{mark}"' in page.read_text(encoding="utf-8")[:2000]:
            return page
        import nbformat

        notebook = nbformat.read(path, as_version=4)
    except Exception:  # a half-written file has many ways to be none; the job's fate is told elsewhere
        return None
    from pygments.formatters import HtmlFormatter

    dark = HtmlFormatter(style="github-dark").get_style_defs(".highlight")
    light = HtmlFormatter(style="default").get_style_defs(".highlight")
    style = f"{light}\n@media (prefers-color-scheme: dark) {{ {dark} }}\n@media print {{ {light} }}\n.highlight {{ background: none; }}"
    up = '<p class="lab-up"><a href="../../../report.html">Back to the page of the sweep</a> · <a href="notebook.ipynb">ipynb</a></p>'

    def whole() -> str:
        return html.page(title, up + to_body(notebook, code=True), style=style, meta={SOURCE: mark})

    text = whole()
    while len(text.encode()) > LARGEST and _cut_largest(notebook):
        text = whole()
    write_whole(page, lambda part: part.write_text(text, encoding="utf-8"))
    return page


def digest(path: Path) -> str:
    """What tells one state of a notebook from another, wherever the folder is copied to."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _cut_largest(notebook: NotebookNode) -> bool:
    """Replace the largest output by a sentence; False where none is large."""
    outputs = [(len(str(output)), cell, i) for cell in notebook.cells for i, output in enumerate(cell.get("outputs", []))]
    size, cell, i = max(outputs, key=lambda each: each[0], default=(0, None, 0))
    if cell is None or size < 2000:
        return False
    from nbformat.v4 import new_output

    text = f"An output of {size:,} characters is left out of this page; the notebook beside it has it.\n"
    cell.outputs[i] = new_output("stream", name="stdout", text=text)
    return True


def to_body(notebook: NotebookNode, code: bool) -> str:
    """What a notebook shows as HTML, with its code or without it; no script of a widget, no address that is fetched."""
    from nbconvert import HTMLExporter

    notebook = copy.deepcopy(notebook)
    notebook.metadata.pop("widgets", None)
    notebook.cells = [cell for cell in notebook.cells if HIDDEN not in cell.metadata.get("tags", [])]
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            output.get("data", {}).pop(WIDGET, None)  # leaves its text
    exporter: Any = HTMLExporter(template_name="basic", embed_images=True)
    exporter.exclude_input, exporter.exclude_output_prompt = not code, True
    exporter.exclude_input_prompt = not code
    exporter.exclude_anchor_links = True
    body, _ = exporter.from_notebook_node(notebook)
    return body
