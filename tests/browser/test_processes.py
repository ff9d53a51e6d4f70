"""Several processes in a real JupyterLab: from the panel, and from a cell with `lab.fit(..., nproc=2)`; seen live, stopped, all gone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_tab import ACTIVE, FIRST, IN_THE_CELL, NOTEBOOK, Tab

from longcat_lab.files import read_json
from longcat_lab.training.requests import is_training
from tests.parallel.launched import checkpoints, everybody, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
CONFIG = """import longcat_lab as lab
config = lab.load("tiny", "training.steps=1000000", "training.log_every=5", "training.checkpoint_every=1000000")
"""
PANEL = CONFIG + 'lab.panel(config, "runs/two")'
FIT = CONFIG + 'lab.fit(config, "runs/cell", nproc=2)'
KERNEL = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
LAYOUT = "2 processes: data_shard 2"


@pytest.fixture
def tab(chromium: Any, jupyter: tuple[str, Path]) -> Tab:
    cells = [nbformat.v4.new_code_cell(source) for source in (PANEL, FIT)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": KERNEL}), jupyter[1] / "processes.ipynb")
    return Tab(chromium, jupyter[0], "processes.ipynb")


def test_two_processes_from_the_panel_and_from_a_cell(tab: Tab, jupyter: tuple[str, Path]) -> None:
    tab.run(0)
    field = tab.page.locator(".longcat-panel .widget-inline-hbox", has_text="processes").locator("input")
    assert field.input_value() == "1"
    layout = "(document.querySelector('.longcat-panel-layout')?.innerText ?? '')"
    field.fill("3")
    field.press("Enter")
    tab.until("why three cannot", "document.querySelector('.longcat-panel-wrong')?.innerText.includes('does not divide')")
    tab.button("Train").click()
    tab.until("the same where Train says it", f"{FIRST.status}.includes('data_shard 3 does not divide data.batch_size')")
    field.fill("2")
    field.press("Enter")
    tab.until("the layout", f"{layout} === 'Train starts {LAYOUT}.'")
    tab.button("Train").click()
    tab.grows()
    assert LAYOUT in tab.page.evaluate(FIRST.status)
    (folder,) = (path.parent for path in jupyter[1].glob("runs/two/*/run.json"))
    assert len(everybody(folder)) == 4
    tab.button("Stop").click()
    tab.until("the end", f"{FIRST.status}.includes('Stopped at step')")
    tab.until("the static figure", FIRST.figure)
    interrupted(folder)

    # A cell that keeps the kernel busy, until its interrupt.
    tab.choose(1)
    tab.command("notebook:run-cell")
    folder = jupyter[1] / "runs" / "cell"
    tab.grows(IN_THE_CELL)
    assert tab.page.evaluate(f"{NOTEBOOK}.sessionContext.session.kernel.status") == "busy"
    assert LAYOUT in tab.page.evaluate(IN_THE_CELL.status) and len(everybody(folder)) == 3
    tab.command("notebook:interrupt-kernel")
    tab.until("the end", f"document.querySelector('{ACTIVE} .jp-OutputArea').innerText.includes('KeyboardInterrupt')")
    tab.until("the static figure", IN_THE_CELL.figure)
    assert tab.page.locator(f"{ACTIVE} .longcat-panel").count() == 0
    interrupted(folder)
    tab.save()
    assert tab.errors == []
    tab.page.close()
    saved = nbformat.read(jupyter[1] / "processes.ipynb", as_version=4)
    shown = [set(output.get("data", {})) for output in saved.cells[1].outputs if "data" in output]
    assert shown == [{"text/html", "text/plain"}, {"image/svg+xml", "image/png", "text/plain"}]  # nothing that needs a kernel


def interrupted(folder: Path) -> None:
    record = read_json(folder / "run.json")
    assert (record["status"], record["reason"], record["layout"]) == ("interrupted", "stopped as asked", LAYOUT)
    assert not is_training(folder) and len(checkpoints(folder)) == 1
    until(lambda: not everybody(folder))
