"""Whether a page, and the executed notebook that it was made of, hold what the folder gives and nothing else: no element, link or
word more, none hidden, none moved. The parts, compared one by one elsewhere, say what is wrong in a number; this says that nothing else is.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longcat_lab.ablation.report import content, drawn, html
from longcat_lab.ablation.report.parts import Lines, Part
from longcat_lab.ablation.report.rendering import (
    HIDDEN,
    LARGEST,
    MADE,
    NOTEBOOK,
    NOTEBOOK_OF_THE_PAGE,
    PAGE,
    job_shell,
    job_text,
    makers,
    page_shell,
    page_text,
    to_body,
)
from longcat_lab.ablation.statistics import Summary
from longcat_lab.ablation.store import Sweep

if TYPE_CHECKING:
    from nbformat import NotebookNode

INJECTED = "injected-parameters"  # tag of papermill's own cell
SVG = re.compile(r"<svg\b.*?</svg>", re.DOTALL)
FACTS = re.compile(rf'<script type="application/json" id="{html.FACTS}">[^<]*</script>')
AROUND = 20  # characters before a difference that a sentence shows


def sources(notebook: NotebookNode) -> list[str]:
    """The cells of report.ipynb against the notebook that this package makes pages with."""
    import nbformat

    if not NOTEBOOK_OF_THE_PAGE.is_file():
        return []
    meant = _cells(nbformat.read(NOTEBOOK_OF_THE_PAGE, as_version=4))
    found = _cells(notebook)
    if len(found) != len(meant):
        return [f"report.ipynb has {len(found)} cells of its own, the notebook that pages are made with has {len(meant)}."]
    odd = [i for i, (a, b) in enumerate(zip(found, meant, strict=True), 1) if a != b]
    return [f"Cell {i} of report.ipynb is not that of the notebook that pages are made with." for i in odd]


def _cells(notebook: NotebookNode) -> list[tuple[str, str, bool]]:
    return [
        (cell.cell_type, cell.source.strip(), HIDDEN in cell.metadata.get("tags", []))
        for cell in notebook.cells
        if INJECTED not in cell.metadata.get("tags", [])
    ]


def outputs(notebook: NotebookNode, made: dict[str, Part], said: Summary, facts: dict[str, Any]) -> list[str]:
    """The outputs of report.ipynb: each part as it is written, each figure with its points, and nothing that is neither."""
    name, problems, pieces = "report.ipynb", [], []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if output.output_type != "display_data" or set(data) - {"text/html", "text/plain"}:
                shown = output.get("text") or output.get("ename") or ", ".join(data)
                problems.append(f"{name} shows something that is no part of the page: {_cut(str(shown))}")
            pieces.append(data.get("text/html", ""))
    text, classes = "\n".join(pieces), content.classes(said)
    for part, what in made.items():
        if written := html.of_part(part, what, classes.get(part, ())):
            text = text.replace(written, "", 1)
    pictures = SVG.findall(text)
    text = FACTS.sub("", SVG.sub("", text), count=1)
    for loose in (*content.TITLES.values(), *content.SENTENCES.values(), "".join(content.ANSWER)):
        text = text.replace(loose, "", 1)
    if left := " ".join(text.split()):
        problems.append(f"{name} holds '{_cut(left)}' where the run folder gives nothing, or something else.")
    return problems + drawn.check(name, pictures, facts["figures"])


def page(text: str, sweep: Sweep, notebook: NotebookNode, shown: html.Shown) -> list[str]:
    """report.html against what report.ipynb becomes."""
    if shown.meta.get(MADE) == makers():
        return difference("report.html", text, page_text(sweep, notebook), "report.ipynb")
    problems = _shell("report.html", text, page_shell(sweep))
    body = html.tokens(text)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if html.tokens(output.get("data", {}).get("text/html", "")) not in body:
                first = html.shown(output.data["text/html"])
                problems.append(f"report.html does not hold an output of report.ipynb as it is there: {_cut(first.all_text)}")
    if shown.authored != html.shown(to_body(notebook, code=False)).authored:
        problems.append("report.html has other words between its parts than report.ipynb.")
    return problems


def loose(name: str, shown: html.Shown, made: dict[str, Part]) -> list[str]:
    """Text outside the parts that the page's own code does not write."""
    known = {html.squeezed(re.sub(r"<[^>]*>", "", each)) for each in (*content.TITLES.values(), *content.SENTENCES.values())}
    known |= {html.squeezed(what.title) for what in made.values() if isinstance(what, Lines) and what.title}
    odd = [" ".join(text.split()) for text in shown.rest if html.squeezed(text) not in known]
    return [f"{name} shows '{text[:80]}', which stands in no part that can be checked." for text in odd]


def job_page(job: str, folder: Path, title: str, shown: html.Shown, text: str, notebook: NotebookNode) -> list[str]:
    """A job's notebook.html against what its notebook.ipynb becomes."""
    if shown.meta.get(MADE) == makers():
        return difference(f"{job}/{PAGE}", text, job_text(folder, title), NOTEBOOK)
    problems = _shell(f"{job}/{PAGE}", text, job_shell(folder, title))
    body = html.tokens(text)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            written = output.get("data", {}).get("text/html", "")
            if len(written) < LARGEST / 4 and html.tokens(written) not in body:
                return [*problems, f"{job}/{PAGE} does not show what {NOTEBOOK} says: an output differs."]
    return problems


def _shell(name: str, text: str, shell: tuple[str, str]) -> list[str]:
    """The head, the style and the script of a page of another version of what makes pages: all but the note of that version."""
    note = re.compile(rf'<meta name="{MADE}" content="[^"]*">')
    before, after = (note.sub("", each) for each in shell)
    text = note.sub("", text, count=1)
    if text.startswith(before) and text.endswith(after):
        return []
    return [f"{name} has another head, style or script than this version of the package gives it: render the report again."]


def difference(name: str, text: str, meant: str, source: str) -> list[str]:
    """Where two texts begin to differ, in a sentence; none where they are the same."""
    if text == meant:
        return []
    at = next((i for i, (a, b) in enumerate(zip(text, meant, strict=False)) if a != b), min(len(text), len(meant)))
    start = max(0, at - AROUND)
    return [f"{name} is not what {source} becomes: it has '{_cut(text[start:], 60)}' where that gives '{_cut(meant[start:], 60)}'."]


def _cut(text: str, length: int = 80) -> str:
    text = " ".join(text[: 4 * length].split())
    return text if len(text) <= length else text[: length - 1] + "…"
