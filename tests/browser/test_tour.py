"""The tour in a real JupyterLab: a knob is turned, a model is trained, stopped, trained on, found again by a page that was reloaded."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Any

import nbformat
import psutil
import pytest

from longcat_lab.files import read_json
from longcat_lab.training.requests import is_training

pytestmark = pytest.mark.timeout(600)
TOUR = Path(__file__).resolve().parents[2] / "notebooks" / "00_tour.ipynb"
SECONDS = 120
STEPS = 600  # long enough to be stopped in the middle
SMOKE = (
    f'preset = "tiny"\nsteps = {STEPS}\noverrides = ["training.log_every=5", "training.checkpoint_every=1000000"]\nrun_folder = "runs/tour"'
)
WRONG = 'lab.load("tiny", "model.num_layers=0")'

NOTEBOOK = "window.jupyterapp.shell.currentWidget"
STATUS = "(document.querySelector('.longcat-panel-status')?.innerText ?? '')"
STEP = f"Number((/Step ([\\d,]+) of/.exec({STATUS})?.[1] ?? '-1').replaceAll(',', ''))"
BUDGET = "(document.querySelector('.longcat-panel .lab-budget')?.innerText ?? '')"
FIGURE = "document.querySelector('[data-panel-figure] svg')"
# What is drawn in the colour of the live run, of the canvas that is shown: how many pixels.
BLUE = """(() => {
  const canvas = document.querySelector('.longcat-curves canvas');
  if (!canvas?.clientWidth || !canvas.width) return 0;
  const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
  let found = 0;
  for (let i = 0; i < data.length; i += 4) found += data[i] === 0 && data[i + 1] === 0x72 && data[i + 2] === 0xb2 && data[i + 3] === 255;
  return found;
})()"""
PICTURE = "document.querySelector('.longcat-curves canvas').toDataURL()"


class Tab:
    """A page of JupyterLab with one notebook, whose kernel is ready."""

    def __init__(self, browser: Any, address: str, name: str) -> None:
        self.page, self.errors = browser.new_page(viewport={"width": 1400, "height": 1500}), []
        self.page.set_default_timeout(SECONDS * 1000)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("dialog", lambda dialog: dialog.accept())
        self.page.goto(f"{address}/lab/tree/{name}")
        self.ready()

    def ready(self) -> None:
        self.until(
            "the notebook",
            f"window.jupyterapp && {NOTEBOOK}?.content?.widgets?.length && document.querySelector('.jp-Notebook .jp-CodeCell')",
        )
        self.until("the kernel", f"{NOTEBOOK}.sessionContext?.session?.kernel?.status === 'idle'")

    def until(self, what: str, condition: str) -> Any:
        """Waits until the condition, a JavaScript expression, holds; its value."""
        from playwright.sync_api import TimeoutError

        try:
            return self.page.wait_for_function(condition, timeout=SECONDS * 1000, polling=100).json_value()
        except TimeoutError:
            said = [self.page.evaluate(STATUS), *self.errors, self.page.evaluate("document.body.innerText")[-1500:]]
            raise AssertionError(f"{what} did not come. The page says: " + "\n".join(said)) from None

    def command(self, name: str) -> None:
        """Starts one of JupyterLab's commands; what is awaited is what it brings about."""
        self.page.evaluate("(name) => { window.jupyterapp.commands.execute(name); }", name)

    def choose(self, cell: int) -> None:
        """Makes a cell the active one."""
        self.page.evaluate(f"(cell) => {{ {NOTEBOOK}.content.activeCellIndex = cell; }}", cell)

    def save(self) -> None:
        self.command("docmanager:save")
        self.until("the saved file", f"{NOTEBOOK}.context.model.dirty === false")

    def button(self, name: str) -> Any:
        return self.page.locator(".longcat-panel").first.get_by_role("button", name=name)

    def steps_on(self, last: int) -> int:
        """Waits for a later step than this; which it is."""
        return self.until("the next step", f"{STEP} > {last} && {STEP}")


@pytest.fixture
def tour(jupyter: tuple[str, Path]) -> Path:
    """A copy at smoke size, with a mistake in one more cell behind the first panel."""
    notebook = nbformat.read(TOUR, as_version=4)
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    parameters.source = SMOKE
    panel = next(i for i, cell in enumerate(notebook.cells) if "lab.panel(" in cell.source)
    notebook.cells.insert(panel + 1, nbformat.v4.new_code_cell(WRONG))
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
    tab.until("the panel", f"{STATUS}.includes('Ready: {STEPS:,} steps')")

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
    before = tab.page.evaluate(BUDGET)
    assert "parameters" in before and "difference" not in before
    row = tab.page.locator(".widget-hbox").filter(has=tab.page.get_by_text("num_layers", exact=True))
    field = row.locator("input")
    assert field.input_value() == "1"
    field.fill("2")
    field.press("Enter")
    tab.until("the budget of two layers", f"{BUDGET}.includes('difference')")
    after = tab.page.evaluate(BUDGET)
    now, pinned = (float(re.search(r"parameters\s+([\d.]+) k", text)[1]) for text in (after, before))
    assert now > pinned and f"{pinned:g} k" in after
    tab.until("the picture of two layers", "document.querySelector('.longcat-panel svg').textContent.includes('2 × ')")

    # Train: the curve grows.
    tab.button("Train").click()
    first = tab.steps_on(5)
    tab.until("a drawn curve", f"{BLUE} > 50")
    drawn = tab.page.evaluate(PICTURE)
    later = tab.steps_on(first)
    tab.until("a longer curve", f"{PICTURE} !== {drawn!r}")
    assert tab.button("Train").is_disabled()

    # Stop: what is done is kept.
    tab.button("Stop").click()
    tab.until("the end", f"{STATUS}.includes('Stopped at step')")
    (folder,) = (path.parent for path in tour.parent.glob("runs/tour/plain/*/run.json"))
    record = read_json(folder / "run.json")
    done = record["timings"]["steps_done"]
    assert (record["status"], record["reason"]) == ("interrupted", "stopped as asked") and later <= done < STEPS
    assert record["config"]["model"]["num_layers"] == 2 and not is_training(folder)
    assert [path.name for path in folder.glob("checkpoint-*")] == [f"checkpoint-{done:08}"]
    rows = (folder / "metrics.jsonl").read_text().splitlines()
    assert len(rows) >= done // 5
    tab.until("the static figure", FIGURE)

    # Train again goes on. The page is reloaded while the process stands still, so that it cannot end meanwhile.
    tab.button("Train").click()
    assert tab.steps_on(-1) > done
    process = training_process(folder)
    process.send_signal(signal.SIGSTOP)
    stands = tab.page.evaluate(STEP)
    tab.save()
    tab.page.reload()
    tab.ready()
    tab.until("the panel of the reloaded page", f"{STEP} >= {stands}")
    assert tab.button("Stop").is_enabled() and tab.button("Train").is_disabled()
    process.send_signal(signal.SIGCONT)
    stands = tab.steps_on(stands)
    tab.until("the curve of the reloaded page", f"{BLUE} > 50")
    ended = f"({STATUS}.includes('Finished: {STEPS:,} steps') && {STEPS + 1})"
    while stands <= STEPS:  # the deadline is one of the next step, however long all of them take
        stands = tab.until("the next step, or the end", f"{ended} || ({STEP} > {stands} && {STEP})")
    # A reloaded page has no place for the static figure: it says what gives it one.
    tab.until("the sentence", "document.querySelector('.longcat-curves-note')?.offsetHeight > 0")
    tab.choose(cells.index(WRONG))
    tab.page.evaluate(f"{NOTEBOOK}.content.activeCell.model.sharedModel.setSource('panel')")
    tab.command("notebook:run-cell")
    tab.until("the static figure", FIGURE)
    record = read_json(folder / "run.json")
    assert record["status"] == "finished" and record["final"]["validation_bpb"] > 0
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]

    # Saved and closed, with its kernel gone: the figure is in the file.
    tab.save()
    tab.page.evaluate(f"{NOTEBOOK}.sessionContext.shutdown()")
    assert tab.errors == []
    tab.page.close()
    saved = nbformat.read(tour, as_version=4)
    shown = [output.get("data", {}).get("text/html", "") for cell in saved.cells for output in cell.get("outputs", [])]
    assert sum("data-panel-figure" in text and "<svg" in text for text in shown) == 1 and "widgets" not in saved.metadata
    tab = Tab(chromium, jupyter[0], tour.name)
    figure = tab.page.locator("[data-panel-figure]")
    figure.locator("svg").first.wait_for()
    assert f"Finished: {STEPS:,} steps" in figure.inner_text() and tab.page.locator(".longcat-panel").count() == 0
    tab.page.close()
