"""Several processes that train for a notebook: started by the panel and by `lab.fit(..., nproc=2)` in a cell, seen live, stopped."""

import asyncio

import ipywidgets
import pytest

import longcat_lab as lab
from longcat_lab.errors import LabError
from longcat_lab.files import read_json
from longcat_lab.notebook.panel import Panel
from longcat_lab.notebook.panel.earlier import run_of, same
from longcat_lab.notebook.panel.follow import Follower
from longcat_lab.notebook.panel.form import Form
from longcat_lab.notebook.panel.knobs import SECTIONS
from longcat_lab.notebook.panel.words import progress, summary
from longcat_lab.training.requests import is_training
from tests.notebooks.test_panel_live import WIDGET, Page
from tests.parallel.launched import checkpoints, config_of, everybody, rows, until


def points(curves):
    """Of the loss of the run that is drawn bold, in what a page was sent."""
    return sum(run["series"].get("loss", [0, 0])[1] for run in curves.get("runs", []) if run["from"] == "live")


@pytest.mark.slow
def test_the_panel_trains_with_two_processes_stops_them_and_goes_on_with_one(tmp_path):
    config = config_of(200, "training.checkpoint_every=1000")
    panel = Panel(config, tmp_path, interactive=True, nproc=2)
    view = panel._view
    assert "2 processes: data_shard 2" in view.laid_out.value and view.processes.value == panel.nproc == 2
    view.train.click()
    folder = until(lambda: panel._training.folder)
    until(lambda: len(rows(folder)) >= 3)
    assert len(everybody(folder)) == 4 and is_training(folder)  # two that train, torchrun, and the one that started it
    view.stop.click()
    until(lambda: "Stopped at step" in view.status.value)
    record = read_json(folder / "run.json")
    done = record["timings"]["steps_done"]
    assert (record["status"], record["reason"], record["layout"]) == ("interrupted", "stopped as asked", "2 processes: data_shard 2")
    assert 3 <= done < 200 and checkpoints(folder) == [f"checkpoint-{done:08d}"]
    assert f"Stopped at step {done} of 200" in view.status.value and "(2 processes: data_shard 2)" in view.status.value
    until(lambda: points(view.curves.head) == done)
    until(lambda: not everybody(folder))

    view.processes.value = 1
    assert view.laid_out.value == "" and not view.train.disabled
    run = asyncio.run(panel.train())
    assert run.path == folder and run.record["status"] == "finished" and run.record["layout"] == "1 process"
    assert run.metrics["step"].tolist() == list(range(1, 201))
    until(lambda: not everybody(folder))


def test_what_does_not_fit_is_one_sentence_before_anything_starts(tmp_path, fresh_registry):
    root = tmp_path / "runs"
    panel = Panel("tiny", root, interactive=True, nproc=3)
    view, sentence = panel._view, r"data_replicate x data_shard 3 does not divide data.batch_size"
    assert "does not divide data.batch_size" in view.laid_out.value
    view.train.click()
    assert "does not divide data.batch_size" in view.status.value and panel._training is None
    with pytest.raises(LabError, match=sentence):
        asyncio.run(panel.train())
    for wrong in (0, -2):
        view.processes.value = wrong
        view.train.click()
        assert f"nproc {wrong} is no number of processes" in view.status.value
    with pytest.raises(LabError, match="no number of processes"):
        Panel("tiny", root, nproc=1.5)

    # The degrees are knobs, which may be turned before the number fits.
    view.processes.value = 1
    budget, picture = view.budget.value, view.drawing.value
    view.form.turn("parallel.tensor", 2)
    assert "does not divide the 1 processes" in view.laid_out.value
    with pytest.raises(LabError, match="does not divide the 1 processes"):
        asyncio.run(panel.train())
    view.processes.value = 4
    assert "4 processes: data_shard 2, tensor 2" in view.laid_out.value
    assert (view.budget.value, view.drawing.value) == (budget, picture)
    panel.close()
    assert panel.nproc == 4 and panel.config.parallel.tensor == 2

    @lab.register("selection")
    class Mine(lab.Selection):
        kind: str = "mine_alone"

    config = lab.load("tiny", "model.attention.kind=dsa", "model.attention.selection.kind=mine_alone")
    with pytest.raises(LabError, match=r"is only known in .* put it into a Python file"):
        asyncio.run(Panel(config, root, interactive=False, nproc=2).train())
    assert not root.exists()


def test_the_degrees_have_a_section_and_are_no_part_of_what_a_run_is(tmp_path):
    plain, laid_out = lab.load("tiny"), lab.load("tiny", "parallel.tensor=2", "parallel.pipeline=2")
    form = Form(laid_out)
    form.accordion.selected_index = list(SECTIONS).index("parallel")
    rows = {path: row for path, row in form._rows.items() if row.knob.section == "parallel"}
    assert {path.removeprefix("parallel.") for path in rows} == set(type(plain.parallel).model_fields)
    assert isinstance(rows["parallel.tensor"].control, ipywidgets.IntText) and rows["parallel.tensor"].control.value == 2
    form.turn("parallel.tensor", 0)
    assert "parallel.tensor" in form.waiting
    run = lab.fit(plain, tmp_path / "run", progress=False)
    assert same(plain, laid_out) and run_of(laid_out, tmp_path) == run.path.resolve()


class Sitting:
    phase, said, nproc, stopping = "starting", "", 4, False


def test_words_on_several_processes(tmp_path):
    follower = Follower(tmp_path)
    assert progress(Sitting(), follower) == "Starting 4 training processes …"
    Sitting.phase = "training"
    follower.record = {"status": "finished", "layout": "4 processes: tensor 4", "config": {"training": {"steps": 20}}}
    follower.record |= {"final": {"tokens": 2000, "train_loss": 1.5}, "timings": {"training_seconds": 5, "tokens_per_second": 400}}
    assert summary(follower) == ("Finished: 20 steps, 2 k tokens in 0:05 (400 tokens/s) on 4 processes: tensor 4; training loss 1.5000.")
    follower.progress = {"step": 3, "steps": 20, "tokens_per_second": 400, "seconds_left": 5, "loss": 2.5}
    assert progress(Sitting(), follower).endswith("loss 2.500 · 4 processes: tensor 4")
    for layout in ("1 process", None, 3):
        follower.record["layout"] = layout
        assert "process" not in summary(follower) and "process" not in progress(Sitting(), follower)


@pytest.fixture
def page():
    page = Page()
    yield page
    page.end()


def test_a_cell_that_fits_shows_live_curves_and_its_interrupt_ends_all_processes(tmp_path, page):
    folder = tmp_path / "cell"
    settings = "'training.log_every=1', 'training.checkpoint_every=1000', 'training.steps={}'"
    start = f"import longcat_lab as lab\nconfig = lab.load('tiny', {settings})\n"
    cell = page.send(start.format(1000000) + f"lab.fit(config, {str(folder)!r}, nproc=2)")
    of_it = lambda kind: [m["content"] for m in page.listen() if m["parent_header"].get("msg_id") == cell and m["msg_type"] == kind]  # noqa: E731
    heads = lambda: [m["data"].get("state", {}).get("head") or {} for m in of_it("comm_msg")]  # noqa: E731
    idle = lambda: [each for each in of_it("status") if each["execution_state"] == "idle"]  # noqa: E731
    most = lambda: max(map(points, heads()), default=0)  # noqa: E731
    drawn = until(lambda: idle() or most())
    until(lambda: idle() or most() > drawn)  # and on it goes, while the cell keeps the kernel busy
    assert not idle(), of_it("error")
    assert WIDGET in of_it("display_data")[0]["data"] and page.figures() == []
    assert any("2 processes: data_shard 2" in str(m["data"].get("state", {}).get("value")) for m in of_it("comm_msg"))

    page.manager.interrupt_kernel()
    until(idle)
    assert [each["ename"] for each in of_it("error")] == ["KeyboardInterrupt"]
    assert not everybody(folder) and not is_training(folder)
    record = read_json(folder / "run.json")
    done = record["timings"]["steps_done"]
    assert record["status"] == "interrupted" and checkpoints(folder) == [f"checkpoint-{done:08d}"]
    [(words, picture)] = page.figures()  # in the place of the widgets
    assert f"Stopped at step {done:,} of" in words["text/html"] and "running the cell again goes on from there" in words["text/html"]
    assert WIDGET not in words and "<svg" in picture["image/svg+xml"] and picture["image/png"]

    # As papermill sends cells. The run is finished already: there is no process to start, and its picture is shown.
    again = start.format(20) + f"lab.fit(config, {str(tmp_path / 'short')!r}, progress=False)\n"
    page.done(page.send(again + f"lab.fit(config, {str(tmp_path / 'short')!r}, nproc=2, progress=False);", None))
    before = len(page.listen())
    page.done(page.send(f"lab.fit(config, {str(tmp_path / 'short')!r}, nproc=2);", None))
    shown = [m["content"]["data"] for m in page.heard if m["msg_type"] == "display_data"]
    assert len(shown) == 4 and all(m["msg_type"] != "comm_open" for m in page.heard[before:])  # none of the call without progress
    assert "Finished: 20 steps" in shown[2]["text/html"] and "<svg" in shown[3]["image/svg+xml"]
