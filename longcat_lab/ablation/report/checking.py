"""Whether a sweep's page, notebooks and table of results still say the same: every disagreement as one sentence."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from longcat_lab.ablation import begun, store
from longcat_lab.ablation.report import check_jobs, check_notebooks, configured, content, html, whole
from longcat_lab.ablation.report.parts import Lines, Part
from longcat_lab.ablation.statistics import summary
from longcat_lab.errors import LabError

MOST = 8  # disagreements of one part of a page that are told one by one
EQUAL = 1e-9  # relative, of numbers that should be the same
DRAWN = 1e-4  # of points, which have six digits


def check(folder: str | Path) -> list[str]:
    """Compare FOLDER/report.html and report.ipynb with what the folder holds and with each other, and the folder's parts likewise.

    Returns:
        A sentence a disagreement: a number that differs, a notebook that was not executed from top to bottom, a planned job that is
        nowhere, a file that is missing, anything on the page that the folder does not give. Empty where all agree.

    Raises:
        LabError: there is no sweep in the folder, or no page yet.
    """
    folder = Path(folder)
    sweep = store.read_sweep(folder)
    path, notebook = folder / "report.html", folder / "report.ipynb"
    if not path.is_file():
        raise LabError(f"There is no page in {folder} to check: make it with longcat-lab report {folder}.")
    said = summary(sweep.results, sweep.ablation)
    made = content.parts(sweep, said)
    facts = content.facts(sweep, said, made)
    problems = [*check_jobs.planned(sweep), *check_notebooks.jobs(sweep), *configured.uneven(sweep)]
    problems += begun.sentences(store.read_question(folder), begun.begun(folder))
    text = path.read_text(encoding="utf-8")
    page = html.shown(text)
    problems += _page(path.name, page, made, facts)
    for link in dict.fromkeys(page.links):
        if "://" not in link and not link.startswith("#") and not (folder / link).exists():
            problems.append(f"{path.name} links to {link}, which is not there.")
    if notebook.is_file():
        problems += check_notebooks.counts(notebook, whole=True)
        if (read := check_notebooks.read_notebook(notebook)) is not None:
            shown = [o.get("data", {}).get("text/html", "") for cell in read.cells for o in cell.get("outputs", [])]
            problems += _page(notebook.name, html.shown("\n".join(shown)), made, facts)
            problems += [*whole.sources(read), *whole.outputs(read, made, said, facts), *whole.page(text, sweep, read, page)]
    else:
        problems.append(f"{notebook.name}, of which the page was made, is missing.")
    return problems


def _page(name: str, page: html.Shown, made: dict[str, Part], facts: dict[str, Any]) -> list[str]:
    """What a page shows against the parts that the folder gives, and its JSON against their numbers."""
    problems = []
    for part, what in made.items():
        empty = not (what.lines if isinstance(what, Lines) else what.rows)
        texts = page.texts.get(part, [])
        if len(texts) != (0 if empty else 1):
            problems.append(f"{name} shows the part '{part}' {len(texts)} times, the run folder gives it {'no' if empty else 'one'} time.")
        elif isinstance(what, Lines) and not empty and texts[0] != html.squeezed("".join(what.lines)):
            problems.append(_lines(name, part, texts[0], what))
        elif not isinstance(what, Lines) and not empty:
            rows = [list(what.columns), *([cell.text for cell in row] for row in what.rows)]
            problems += _some(_cells(name, part, page.tables.get(part, []), rows), f"cells of table '{part}' in {name}")
    problems += [f"{name} shows a part '{part}', which the run folder does not give." for part in page.texts if part not in made]
    problems += whole.loose(name, page, made)[:MOST]
    return problems + _json(name, page.facts, facts)


def _lines(name: str, part: str, shown: str, what: Lines) -> str:
    meant = html.squeezed("".join(what.lines))
    at = next((i for i, (a, b) in enumerate(zip(shown, meant, strict=False)) if a != b), min(len(shown), len(meant)))
    start = max(0, at - 20)
    return f"{name}: '{part}' shows '…{shown[start : at + 20]}…' where the run folder gives '…{meant[start : at + 20]}…'."


def _cells(name: str, part: str, shown: list[list[str]], meant: list[list[str]]) -> list[str]:
    if [len(row) for row in shown] != [len(row) for row in meant]:
        lost = [row[0] for row in meant if row[0] not in {each[0] for each in shown if each}]
        more = f"; missing: {', '.join(lost[:MOST])}" if lost else ""
        return [f"{name}: table '{part}' has {len(shown) - 1} rows where the run folder gives {len(meant) - 1}{more}."]
    found = []
    for got, wanted in zip(shown, meant, strict=True):
        for column, (a, b) in enumerate(zip(got, wanted, strict=True)):
            if html.squeezed(a) != html.squeezed(b):
                where = f"row '{wanted[0]}', column '{meant[0][column]}'"
                found.append(f"{name}: table '{part}', {where} shows {a.strip() or 'nothing'} where the run folder gives {b or 'nothing'}.")
    return found


def _some(problems: list[str], what: str) -> list[str]:
    return problems if len(problems) <= MOST else [*problems[:MOST], f"{len(problems) - MOST} more {what} disagree."]


def _json(name: str, text: str, facts: dict[str, Any]) -> list[str]:
    """The page's own numbers against those of the folder."""
    try:
        held = json.loads(text)
    except ValueError:
        return [f"{name} holds no numbers that a machine can read (the element {html.FACTS})."]
    wanted = json.loads(json.dumps(facts))
    found: list[str] = []
    _walk(held, wanted, [], found)
    return _some([f"{name}: its JSON {line}" for line in found], f"numbers of the JSON in {name}")


def _walk(held: Any, wanted: Any, at: list[str], found: list[str]) -> None:
    where = " / ".join(at)
    if isinstance(wanted, dict) and isinstance(held, dict):
        found += [f"lacks {where} / {key}." for key in wanted if key not in held]
        found += [f"has {where} / {key}, which the run folder does not give." for key in held if key not in wanted]
        for key in wanted.keys() & held.keys():
            _walk(held[key], wanted[key], [*at, str(key)], found)
    elif isinstance(wanted, list) and isinstance(held, list) and len(wanted) == len(held):
        for i, (a, b) in enumerate(zip(held, wanted, strict=True)):
            _walk(a, b, [*at, str(i)], found)
    elif not _same(held, wanted, DRAWN if at[:1] == ["figures"] else EQUAL):
        found.append(f"has {_brief(held)} at {where}, the run folder gives {_brief(wanted)}.")


def _brief(value: Any) -> str:
    return " ".join(str(value).split())[:60]


def _same(one: Any, other: Any, tolerance: float) -> bool:
    numbers = all(isinstance(each, int | float) and not isinstance(each, bool) for each in (one, other))
    return math.isclose(one, other, rel_tol=tolerance, abs_tol=1e-15) if numbers else one == other
