"""The tour in a real JupyterLab: a knob is turned, a model is trained, stopped, trained on, found again by a page that was reloaded, and
compared with a second one; a training that fails says why."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Any

import nbformat
import psutil
import pytest
from jupyter_tab import ACTIVE, BLUE, FIRST, IN_THE_CELL, NOTEBOOK, ORANGE, Tab

from longcat_lab.files import read_json
from longcat_lab.training.requests import is_training

pytestmark = pytest.mark.timeout(600)
TOUR = Path(__file__).resolve().parents[2] / "notebooks" / "00_tour.ipynb"
STEPS = 600  # long enough to be stopped in the middle
SMOKE = (
    f'preset = "tiny"\nsteps = {STEPS}\noverrides = ["training.log_every=5", "training.checkpoint_every=1000000"]\nrun_folder = "runs/tour"'
)
WRONG = 'lab.load("tiny", "model.num_layers=0")'
FAILS = 'lab.panel(lab.load("tiny", "training.optimizer.learning_rate=1e30"), "runs/fails")'


@pytest.fixture
def tour(jupyter: tuple[str, Path]) -> Path:
    """A copy at smoke size, with a mistake in one more cell behind the first panel, and a model that cannot be trained in the last."""
    notebook = nbformat.read(TOUR, as_version=4)
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    parameters.source = SMOKE
    panel = next(i for i, cell in enumerate(notebook.cells) if "lab.panel(" in cell.source)
    notebook.cells.insert(panel + 1, nbformat.v4.new_code_cell(WRONG))
    notebook.cells.append(nbformat.v4.new_code_cell(FAILS))
    nbformat.write(notebook, jupyter[1] / TOUR.name)
    return jupyter[1] / TOUR.name


def training_process(folder: Path) -> psutil.Process:
    commands = [(each, each.info["cmdline"] or []) for each in psutil.process_iter(["cmdline"])]
    (found,) = (each for each, command in commands if "train" in command and str(folder) in command)
    return found


def test_the_tour(tour: Path, chromium: Any, jupyter: tuple[str, Path]) -> None:
    cells = [cell.source for cell in nbformat.read(tour, as_version=4).cells]
    tab = Tab(chromium, jupyter[0], tour.name)

    # The cells up to the first panel.
    tab.choose(cells.index(WRONG))
    tab.command("notebook:run-all-above")
    tab.until("the panel", f"{FIRST.status}.includes('Ready: {STEPS:,} steps')")

    # An error in a cell is one sentence; how it came about is folded.
    tab.command("notebook:run-cell")
    output = tab.page.locator(".jp-Cell.jp-mod-active .jp-OutputArea")
    folded = output.locator("details")
    folded.wait_for()
    said = output.inner_text()
    assert [line for line in said.splitlines() if line.strip()] == [
        "'model.num_layers': input should be greater than or equal to 1, got 0.",
        "Traceback",
    ]
    assert not folded.locator("pre").is_visible()
    folded.locator("summary").click()
    assert "validate_node" in folded.locator("pre").inner_text()

    # A knob is turned; budget and picture follow.
    above = tab.page.get_by_placeholder("find a knob by name or meaning").first.locator(
        "xpath=ancestor::*[contains(@class, 'widget-hbox')]"
    )
    assert above.evaluate("(row) => row.clientHeight") > 24  # a long form below it does not squeeze it away
    before = tab.page.evaluate(FIRST.budget)
    assert "parameters" in before and "difference" not in before
    row = tab.page.locator(".widget-hbox").filter(has=tab.page.get_by_text("num_layers", exact=True))
    field = row.locator("input")
    assert field.input_value() == "1"
    field.fill("2")
    field.press("Enter")
    tab.until("the budget of two layers", f"{FIRST.budget}.includes('difference')")
    after = tab.page.evaluate(FIRST.budget)
    now, pinned = (float(re.search(r"parameters\s+([\d.]+) k", text)[1]) for text in (after, before))
    assert now > pinned and f"{pinned:g} k" in after
    tab.until("the picture of two layers", "document.querySelector('.longcat-panel svg').textContent.includes('2 × ')")

    # Train: the curve grows.
    tab.button("Train").click()
    tab.steps_on(5)
    later = tab.grows()
    assert tab.button("Train").is_disabled()

    # Stop: what is done is kept.
    tab.button("Stop").click()
    tab.until("the end", f"{FIRST.status}.includes('Stopped at step')")
    (folder,) = (path.parent for path in tour.parent.glob("runs/tour/plain/*/run.json"))
    record = read_json(folder / "run.json")
    done = record["timings"]["steps_done"]
    assert (record["status"], record["reason"]) == ("interrupted", "stopped as asked") and later <= done < STEPS
    assert record["config"]["model"]["num_layers"] == 2 and not is_training(folder)
    assert [path.name for path in folder.glob("checkpoint-*")] == [f"checkpoint-{done:08}"]
    rows = (folder / "metrics.jsonl").read_text().splitlines()
    assert len(rows) >= done // 5
    tab.until("the static figure", FIRST.figure)

    # Train again goes on. The page is reloaded while the process stands still, so that it cannot end meanwhile.
    tab.button("Train").click()
    assert tab.steps_on(-1) > done
    process = training_process(folder)
    process.send_signal(signal.SIGSTOP)
    stands = tab.page.evaluate(FIRST.step)
    tab.save()
    tab.page.reload()
    tab.ready()
    tab.until("the panel of the reloaded page", f"{FIRST.step} >= {stands}")
    assert tab.button("Stop").is_enabled() and tab.button("Train").is_disabled()
    process.send_signal(signal.SIGCONT)
    stands = tab.steps_on(stands)
    tab.until("the curve of the reloaded page", f"{FIRST.pixels(BLUE)} > 50")
    ended = f"({FIRST.status}.includes('Finished: {STEPS:,} steps') && {STEPS + 1})"
    while stands <= STEPS:  # the deadline is one of the next step, however long all of them take
        stands = tab.until("the next step, or the end", f"{ended} || ({FIRST.step} > {stands} && {FIRST.step})")
    # A reloaded page has no place for the static figure: it says what gives it one.
    tab.until("the sentence", "document.querySelector('.longcat-curves-note')?.offsetHeight > 0")
    tab.choose(cells.index(WRONG))
    tab.page.evaluate(f"{NOTEBOOK}.content.activeCell.model.sharedModel.setSource('panel')")
    tab.command("notebook:run-cell")
    tab.until("the static figure", FIRST.figure)
    record = read_json(folder / "run.json")
    assert record["status"] == "finished" and record["final"]["validation_bpb"] > 0
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]

    compare(tab, cells)
    fail(tab, cells.index(FAILS))

    # Saved and closed, with its kernel gone: the figure is in the file.
    tab.save()
    tab.page.evaluate(f"{NOTEBOOK}.sessionContext.shutdown()")
    assert tab.errors == []
    tab.page.close()
    saved = nbformat.read(tour, as_version=4)
    assert "widgets" not in saved.metadata and tour.stat().st_size < 1_000_000
    in_file = {cell.source: [output.get("data", {}) for output in cell.outputs] for cell in saved.cells if cell.cell_type == "code"}
    for source, shown in in_file.items():
        if "lab.panel(" in source and source != FAILS:
            assert sum("image/svg+xml" in data and "image/png" in data and "text/html" not in data for data in shown) == ("ngram" in source)
    assert [len(data["image/png"]) > 1000 for data in in_file["panel"] if "image/png" in data] == [True]
    tab = Tab(chromium, jupyter[0], tour.name)
    tab.choose(cells.index(WRONG))
    tab.until("the picture in the file", IN_THE_CELL.figure)
    assert f"Finished: {STEPS:,} steps" in tab.page.locator(f"{ACTIVE} [data-panel-figure]").inner_text()
    assert tab.page.locator(".longcat-panel").count() == 0
    tab.page.close()


def compare(tab: Tab, cells: list[str]) -> None:
    """The second half of the tour: a model trained beside the first, all runs as a table, both compared."""
    at = lambda words: next(i for i, source in enumerate(cells) if words in source)  # noqa: E731
    tab.run(at("plain = await"))
    tab.run(at("ngram_panel = lab.panel("))
    beside = tab.page.locator(f"{ACTIVE} .longcat-panel select[multiple]")
    (name,) = beside.locator("option").all_inner_texts()
    assert name.startswith("ngram=none")
    tab.until("the run beside, before anything is trained", f"{IN_THE_CELL.pixels(ORANGE)} > 50")
    assert tab.page.evaluate(IN_THE_CELL.pixels(BLUE)) == 0
    tab.button("Train", ACTIVE).click()
    tab.until("both curves", f"{IN_THE_CELL.step} > 20 && {IN_THE_CELL.pixels(BLUE)} > 50 && {IN_THE_CELL.pixels(ORANGE)} > 50")
    beside.select_option([])
    tab.until("the live curve alone", f"{IN_THE_CELL.pixels(BLUE)} > 50 && {IN_THE_CELL.pixels(ORANGE)} === 0")
    beside.select_option(index=0)
    tab.until("both curves again", f"{IN_THE_CELL.pixels(ORANGE)} > 50")
    tab.until("the end", f"{IN_THE_CELL.status}.includes('Finished: {STEPS:,} steps')")
    tab.until("the static figure", IN_THE_CELL.figure)
    tab.run(at("ngram = await"))

    # The table; a click on a head sorts it, another one the other way round.
    output = tab.run(at("runs = lab.runs("))
    assert "2 runs in runs/tour: 2 finished." in output.inner_text()
    head, order = output.locator("th", has_text="parameters"), output.locator("tbody td:first-child")
    head.click()
    largest = order.all_inner_texts()
    assert head.get_attribute("aria-sort") == "descending" and [name.split("/")[0] for name in largest] == ["ngram", "plain"]
    head.click()
    assert head.get_attribute("aria-sort") == "ascending" and order.all_inner_texts() == largest[::-1]

    output = tab.run(at("runs.compare("))
    tab.until(
        "both figures", f"[...document.querySelectorAll('{ACTIVE} .jp-RenderedSVG img')].filter((img) => img.naturalWidth).length === 2"
    )
    settings, summary = output.locator("table").all()
    assert "model.embedding.ngram" in settings.inner_text() and "num_layers" not in settings.inner_text()
    assert {"validation_bpb", "tokens_per_second"} <= {row.split("\t")[0] for row in summary.inner_text().splitlines()}
    assert re.search(r"validation_bpb +[+-]\d\.\d{4}", tab.run(at("ngram.summary[text]")).inner_text())
    assert "--- ngram" in tab.run(at("run.generate(")).inner_text()


def fail(tab: Tab, cell: int) -> None:
    """A training that fails at once says in one sentence what to change; the log is folded."""
    tab.run(cell)
    tab.button("Train", ACTIVE).click()
    tab.until("the sentence", f"document.querySelector('{ACTIVE} .longcat-panel-wrong')")
    status = tab.page.locator(f"{ACTIVE} .longcat-panel-status")
    said = status.locator(".longcat-panel-wrong").inner_text()
    assert re.fullmatch(r"The loss is nan at step \d+[^\n]*lower training\.optimizer\.learning_rate[^\n]*", said)
    assert not status.locator("pre").is_visible()
    status.locator("summary").click()
    assert "longcat-lab: The loss is nan" in status.locator("pre").inner_text()
    assert tab.button("Train", ACTIVE).is_enabled() and tab.button("Stop", ACTIVE).is_disabled()
