"""The panel in real kernels: with a page at the other end (its messages sent by hand), killed in the middle, and under papermill."""

import asyncio
import itertools
import os
import queue
import signal
import threading
import time

import ipykernel
import nbformat
import psutil
import pytest
from packaging.version import Version

import longcat_lab as lab
from longcat_lab.ablation.kernel import execute
from longcat_lab.files import read_json
from longcat_lab.notebook.panel import Panel
from longcat_lab.notebook.panel.form import Form
from longcat_lab.notebook.panel.words import GUEST
from longcat_lab.training.requests import is_training

LONG = '"training.steps=1000000", "training.checkpoint_every=1000000", "training.log_every=2"'  # trains until somebody ends it
WIDGET = "application/vnd.jupyter.widget-view+json"


def until(condition, seconds=120):
    """Polls `condition` until it is true."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)
    return found


class Page:
    """A kernel and what a page would do with it: send cells, press buttons, listen."""

    def __init__(self):
        from ipykernel.kernelspec import get_kernel_dict
        from jupyter_client.kernelspec import KernelSpec
        from jupyter_client.manager import KernelManager

        class SameInterpreter(KernelManager):
            kernel_spec = property(lambda self: KernelSpec(**get_kernel_dict()))

        self.manager = SameInterpreter(kernel_name="python3", transport_encryption="auto")
        self.manager.start_kernel()
        self.client = self.manager.blocking_client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=120)
        self.heard = []

    def send(self, code, cell="a-cell"):
        """A cell, as JupyterLab sends it: with its id (None: as papermill sends it). Returns the message's id."""
        session, content = self.client.session, {"code": code, "silent": False, "store_history": True, "allow_stdin": False}
        message = session.msg("execute_request", content, metadata={"cellId": cell} if cell else {})
        self.client.shell_channel.send(message)
        return message["header"]["msg_id"]

    def beside(self):
        """A new thread of the kernel beside the main one; JupyterLab from 4.4.4 on sends the messages of widgets to such a one."""
        self.client.control_channel.send(self.client.session.msg("create_subshell_request"))
        return self.client.get_control_msg(timeout=60)["content"]["subshell_id"]

    def press(self, button, thread=None):
        """A click on the button with this description; `thread` of the kernel takes it, None: the main one, as other pages send it."""
        opened = [m["content"] for m in self.listen() if m["msg_type"] == "comm_open"]
        ids = [each["comm_id"] for each in opened if each["data"].get("state", {}).get("description") == button]
        message = self.client.session.msg("comm_msg", {"comm_id": ids[-1], "data": {"method": "custom", "content": {"event": "click"}}})
        message["header"]["subshell_id"] = thread
        self.client.shell_channel.send(message)

    def listen(self):
        """All that has been said on iopub until now."""
        try:
            while True:
                self.heard.append(self.client.get_iopub_msg(timeout=0.05))
        except queue.Empty:
            return self.heard

    def done(self, message, seconds=120):
        """Waits for the end of a cell; what it printed."""
        of_it = lambda m: m["parent_header"].get("msg_id") == message  # noqa: E731
        ended = lambda: [m for m in self.listen() if of_it(m) and m["content"].get("execution_state") == "idle"]  # noqa: E731
        until(ended, seconds)
        wrong = [m["content"]["traceback"] for m in self.heard if of_it(m) and m["msg_type"] == "error"]
        assert not wrong, "\n".join(wrong[0])
        return "".join(m["content"]["text"] for m in self.heard if of_it(m) and m["msg_type"] == "stream")

    def figures(self):
        """The words and the static pictures below them that were put into the cell's output until now."""
        shown = [m["content"]["data"] for m in self.listen() if m["msg_type"] == "update_display_data"]
        return [pair for pair in itertools.pairwise(shown) if "data-panel-figure" in pair[0].get("text/html", "")]

    def end(self):
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


@pytest.fixture
def page():
    page = Page()
    yield page
    page.end()


def steps(folder):
    return (read_json(folder / "progress.json") or {}).get("step", 0)


def test_stop_interrupt_and_train_reach_a_kernel_that_waits_and_the_run_outlives_it(tmp_path, page):
    root = tmp_path / "runs"
    shown = page.done(
        page.send(
            "import longcat_lab as lab\n"
            "from longcat_lab.notebook.panel import Panel\n"
            f"panel = Panel(lab.load('tiny', {LONG}), {str(root)!r})\n"
            "print(panel.interactive)\n"
            "panel"
        )
    )
    assert shown == "True\n"  # a page had sent the cell
    displayed = [m["content"]["data"] for m in page.heard if m["msg_type"] == "display_data"]
    assert WIDGET in displayed[0] and "Run this cell again" in displayed[0]["text/plain"]

    # Stop, while a cell waits for the end. Before 7.4 such a cell holds back what comes to the kernel's main thread.
    before = 2
    for thread in [page.beside(), *([None] if Version(ipykernel.__version__) >= Version("7.4") else [])]:
        cell = page.send("run = await panel.train()\nprint(run.record['status'], run.record['reason'])")
        folder = until(lambda: next(iter(root.glob("*/metrics.jsonl")), None)).parent
        until(lambda: steps(folder) > before)  # noqa: B023
        page.press("Stop", thread)
        assert page.done(cell) == "interrupted stopped as asked\n"
        assert not is_training(folder)
        before = steps(folder)
    words, picture = until(page.figures)[-1]
    assert "Stopped at step" in words["text/html"] and "Stopped at step" in words["text/plain"] and "<" not in words["text/plain"]
    assert "<svg" in picture["image/svg+xml"] and picture["image/png"] and "text/html" not in picture

    # The kernel's interrupt, in the same cell, which goes on.
    before = steps(folder)
    cell = page.send("run = await panel.train()\nprint(run.record['status'], run.record['timings']['steps_done'])")
    until(lambda: steps(folder) > before)
    page.manager.interrupt_kernel()
    status, done = page.done(cell).split()
    assert status == "interrupted" and int(done) > before

    # Train, without any cell; the curves come by themselves.
    page.listen()
    count, before = len(page.heard), steps(folder)
    page.press("Train")
    until(lambda: steps(folder) > before)
    said = lambda: [m["content"]["data"].get("state", {}) for m in page.listen()[count:] if m["msg_type"] == "comm_msg"]  # noqa: E731
    until(lambda: any("head" in state and state["head"].get("curves") for state in said()))
    assert any(state.get("disabled") is True for state in said())
    until(lambda: any("tokens/s" in str(state.get("value")) for state in said()))

    # The kernel dies; the training does not.
    os.kill(page.manager.provisioner.process.pid, signal.SIGKILL)
    before = steps(folder)
    until(lambda: steps(folder) > before)

    # A panel of another configuration shows it, keeps its own knobs, and trains its own run. Without widgets it has nothing to do with it.
    short = lab.load("tiny", "training.steps=20")
    silent = Panel(short, root, interactive=False)
    assert silent.run is None and silent._training is None
    guest = Panel(short, root, interactive=True)
    until(lambda: "tokens/s" in guest._view.status.value and GUEST in guest._view.status.value)
    assert guest.config == short and guest.run is None
    assert not guest._view.train.disabled and not guest._view.stop.disabled
    run = asyncio.run(guest.train())
    assert run.record["status"] == "finished" and run.config == short and run.path != folder.resolve()
    assert guest.run.path == run.path and is_training(folder)

    # A panel of its configuration shows it and stops it; the former one is closed.
    other = Panel(lab.load("tiny", *eval(f"[{LONG}]")), root, interactive=True)
    assert guest._view is None and guest.config == short and guest.run.path == run.path
    assert other.config == other.run.config and other.config.training.steps == 1000000
    until(lambda: [thread.name for thread in threading.enumerate()].count("longcat_lab panel") == 1)
    until(lambda: "tokens/s" in other._view.status.value and GUEST not in other._view.status.value)
    other.stop()
    until(lambda: "Stopped at step" in other._view.status.value)
    assert other.run.record["status"] == "interrupted" and not is_training(folder)

    # And one that is made afterwards shows the run as it lies there.
    later = Panel(other.config, root, interactive=True)
    assert later.run.path == other.run.path and "Stopped at step" in later._view.status.value
    assert later._view.curves.head["runs"][0]["series"]["loss"][1] > 0 and len(later._view.curves.live) > 0


def test_a_number_out_of_bounds_is_told_as_it_was_written():
    form = Form(lab.load("tiny"))
    form.search.value = "batch_size"
    form._rows["data.batch_size"].control.value = -5
    assert "-5" in form.waiting["data.batch_size"] and form.config == lab.load("tiny")


def test_a_picture_that_cannot_be_drawn_costs_no_run(tmp_path):
    panel = Panel("tiny", tmp_path, interactive=True)
    panel._places.append(None)  # no place at all: showing anything there fails
    run = asyncio.run(panel.train())
    assert run.record["status"] == "finished" and "could not be drawn" in panel._view.status.value


OWN_BLOCK = """
from typing import Literal
from longcat_lab.blocks.swiglu.module import SwiGLU

@lab.register("ffn")
class Mine(lab.BlockConfig):
    kind: Literal["mine"] = "mine"

    def budget(self, shape):
        return lab.Budget.of_weights(3 * shape.hidden_size * 16)

    def build(self, shape):
        return SwiGLU(shape.hidden_size, 16)
"""


def test_under_papermill_nothing_waits_for_a_click_and_the_pictures_are_in_the_file(tmp_path):
    runs = str(tmp_path / "runs")
    cells = [
        "import psutil\nimport longcat_lab as lab\nfrom longcat_lab.notebook.panel import Panel\n"
        f"panel = Panel(lab.load('tiny', 'model.moe.moe_topk=1', 'model.moe.expected_real_experts=0.75'), {runs!r})\npanel",
        "run = await panel.train()\nprint(panel.interactive, run.summary['status'], panel.run.path == run.path)",
        OWN_BLOCK,
        f"own = Panel(lab.load('tiny', 'model.ffn={{kind: mine}}'), {runs!r}, compare=[run])\nown",
        "second = await own.train()\nprint(second.summary['status'], (second.path / 'config.yaml').exists())",
        f"wrong = Panel(lab.load('tiny', 'training.optimizer.learning_rate=1e30'), {runs!r})\n"
        "try:\n    await wrong.train()\nexcept lab.LabError as error:\n    print(error)",
    ]
    source = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbformat.write(source, tmp_path / "in.ipynb")
    execute(tmp_path / "in.ipynb", tmp_path / "out.ipynb", {})

    text = (tmp_path / "out.ipynb").read_text()
    made = nbformat.reads(text, as_version=4)
    assert "widgets" not in made.metadata and WIDGET not in text
    outputs = [cell.outputs for cell in made.cells if cell.cell_type == "code"]
    printed = ["".join(each.text for each in cell if each.output_type == "stream") for cell in outputs]
    assert printed[1] == "False finished True\n"
    assert printed[4] == "finished False\n"  # trained in the kernel: no process was given a configuration
    assert printed[5].startswith("The loss is nan at step") and printed[5].count("\n") == 1
    first, second = ("".join(each.data.get("text/html", "") for each in outputs[cell] if "data" in each) for cell in (0, 3))
    for cell, html in ((0, first), (3, second)):
        pictures = [each.data for each in outputs[cell] if "image/svg+xml" in each.get("data", {})]
        assert ["image/png" in each for each in pictures] == [False, True]  # the architecture and the curves
        assert html.count("data-panel-figure") == 1 and "<svg" not in html and all("text/html" not in each for each in pictures)
        assert "Finished: 20 steps" in html and "bits per byte" in html
    assert "model.moe.moe_topk" in first and "Preset <b>tiny</b>" in first
    lines = [each.data["text/plain"] for each in outputs[1] if "data" in each]
    assert len(lines) == 1 and lines[0].startswith("Finished: 20 steps")  # one line, rewritten
    assert len(text) < 1_000_000
    left = lambda: [p for p in psutil.process_iter(["cmdline"]) if any(runs in part for part in p.info["cmdline"] or [])]  # noqa: E731
    until(lambda: not left())
