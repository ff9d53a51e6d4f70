"""The page for a reviewer: the report notebook executed on a sweep's folder, as one HTML file that opens offline."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from longcat_lab.ablation import store
from longcat_lab.ablation.job import one_line
from longcat_lab.errors import LabError
from longcat_lab.files import write_whole

if TYPE_CHECKING:
    from nbformat import NotebookNode

WIDGET = "application/vnd.jupyter.widget-view+json"
HIDDEN = "not-on-the-page"  # tag of cells that say to a notebook's reader what the page says by itself
# What the template still writes for libraries that it would fetch: empty addresses, and settings for MathJax and mermaid.
REMAINS = re.compile(
    r"""<script src="">\s*</script>|<script type="(?:text/x-mathjax-config|module)">(?:(?!</script>).)*</script>""", re.DOTALL
)


def render(folder: str | Path, notebook: str | Path | None = None) -> Path:
    """Make FOLDER/report.html (and the executed FOLDER/report.ipynb) from whatever is in the folder, half a sweep included.

    Args:
        notebook: the report notebook, with a parameter `sweep_folder`; the repository's notebooks/report.ipynb when left out.

    Raises:
        LabError: there is no sweep in the folder, or the notebook fails on it; an earlier page is then still there.
    """
    folder = Path(folder).resolve()
    store.read_sweep(folder)
    source = Path(notebook) if notebook is not None else Path(__file__).resolve().parents[2] / "notebooks" / "report.ipynb"
    if not source.is_file():
        raise LabError(f"The report notebook {source} is not there.")

    import nbformat
    from nbclient.exceptions import DeadKernelError
    from papermill import PapermillExecutionError

    from longcat_lab.ablation.kernel import execute

    part, executed = folder / f".report-{os.getpid()}.ipynb", folder / "report.ipynb"
    try:
        execute(source, part, {"sweep_folder": str(folder)})
    except (PapermillExecutionError, DeadKernelError, OSError) as problem:
        said = f"{problem.ename}: {problem.evalue}" if isinstance(problem, PapermillExecutionError) else str(problem)
        raise LabError(f"The report of {folder} failed ({one_line(said)}); see {executed}.") from None
    finally:
        if part.is_file():
            os.replace(part, executed)
    page = to_html(nbformat.read(executed, as_version=4))
    write_whole(folder / "report.html", lambda part: part.write_text(page, encoding="utf-8"))
    return folder / "report.html"


def to_html(notebook: NotebookNode) -> str:
    """A notebook without its code as one page that asks nothing of the network."""
    from nbconvert import HTMLExporter

    notebook.metadata.pop("widgets", None)
    notebook.cells = [cell for cell in notebook.cells if HIDDEN not in cell.metadata.get("tags", [])]
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            output.get("data", {}).pop(WIDGET, None)  # leaves its text
    exporter = HTMLExporter(template_name="lab", embed_images=True)
    exporter.exclude_input = exporter.exclude_input_prompt = exporter.exclude_output_prompt = True
    exporter.require_js_url = exporter.mathjax_url = exporter.jquery_url = exporter.mermaid_js_url = ""
    exporter.widget_renderer_url = exporter.jupyter_widgets_base_url = ""
    page, _ = exporter.from_notebook_node(notebook)
    return REMAINS.sub("", page)
