"""Closing the browser loses nothing: a training is live again on a page that was reloaded, in another browser, in another kernel."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_tab import FIRST, NOTEBOOK, SECONDS, Tab

from longcat_lab.files import read_json
from longcat_lab.training.requests import is_training

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
PANEL = """import longcat_lab as lab
config = lab.load("tiny", "training.steps=1000000", "training.log_every=5", "training.checkpoint_every=1000000")
panel = lab.panel(config, "runs/reopened")
panel"""
WAITS = "run = await panel.train()"
KERNEL = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
INSTEAD = "getComputedStyle([...document.querySelectorAll('.jp-OutputArea-output')][0], '::after').content"


def later_step(folder: Path, last: int) -> int:
    """Waits until the process has told of a later step than this; which it is."""
    end = time.monotonic() + SECONDS
    while (step := (read_json(folder / "progress.json") or {}).get("step", 0)) <= last:
        assert time.monotonic() < end, "the training does not go on"
        time.sleep(0.05)
    return step


def test_a_training_is_live_again_wherever_its_notebook_is_opened(chromium: Any, jupyter: tuple[str, Path]) -> None:
    cells = [nbformat.v4.new_code_cell(source) for source in (PANEL, WAITS)]
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": KERNEL})
    nbformat.write(notebook, jupyter[1] / "reopened.ipynb")
    tab = Tab(chromium, jupyter[0], "reopened.ipynb")
    tab.command("notebook:run-all-cells")
    step = tab.grows()
    (folder,) = (path.parent for path in jupyter[1].glob("runs/reopened/*/run.json"))

    # Reloaded while a cell waits for the end: no cell is run again.
    tab.save()
    tab.page.reload()
    tab.ready(busy=True)
    step = tab.steps_on(step)
    assert tab.grows() > step and tab.button("Stop").is_enabled() and tab.button("Train").is_disabled()
    assert tab.errors == []
    tab.page.close()

    # The browser is closed, and another one, which shares nothing with it, opens the notebook.
    step = later_step(folder, step)
    tab = Tab(chromium, jupyter[0], "reopened.ipynb", busy=True)
    assert tab.steps_on(step) > step
    step = tab.grows()
    assert tab.errors == []

    # The kernel goes too, and with it the widgets. What stands in their place says what to do.
    tab.page.evaluate(f"{NOTEBOOK}.sessionContext.shutdown()")
    tab.page.close()
    step = later_step(folder, step)
    tab = Tab(chromium, jupyter[0], "reopened.ipynb")
    tab.until("a sentence in place of the widgets", f"{INSTEAD}.includes('Run this cell again')")
    tab.run(0)
    assert tab.steps_on(step) > step
    tab.grows()
    tab.button("Stop").click()
    tab.until("the end", f"{FIRST.status}.includes('Stopped at step')")
    tab.until("the static figure", FIRST.figure)
    record = read_json(folder / "run.json")
    assert (record["status"], record["reason"]) == ("interrupted", "stopped as asked") and not is_training(folder)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name] and len(list(folder.glob("checkpoint-*"))) == 1
    assert tab.errors == []
    tab.page.close()
