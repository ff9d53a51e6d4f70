"""An error in a cell: one sentence, the traceback folded below, and the cell has failed for whoever runs it. Real kernels."""

import contextlib
import os
import subprocess
import sys
import traceback
from pathlib import Path

import nbformat
import pytest

import longcat_lab as lab

ROOT = Path(__file__).resolve().parents[2]
OUT_OF_RANGE = 'lab.load("tiny", "model.num_layers=0")'


@pytest.fixture(scope="module")
def run_cell():
    """Runs code in one real kernel; gives the reply and the outputs as the frontend gets them."""
    from ipykernel.kernelspec import get_kernel_dict
    from jupyter_client import KernelManager
    from jupyter_client.kernelspec import KernelSpec

    class SameInterpreter(KernelManager):
        kernel_spec = property(lambda self: KernelSpec(**get_kernel_dict()))

    manager = SameInterpreter(transport_encryption="auto")
    manager.start_kernel(env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])})
    client = manager.client()
    client.start_channels()

    def run(code):
        outputs = []

        def hook(message):
            if message["msg_type"] in ("error", "display_data", "stream", "execute_result"):
                outputs.append((message["msg_type"], message["content"]))

        return client.execute_interactive(code, timeout=120, output_hook=hook)["content"], outputs

    try:
        client.wait_for_ready(timeout=120)
        assert run("import longcat_lab as lab")[0]["status"] == "ok"
        yield run
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def only(outputs, kind):
    [found] = [content for each, content in outputs if each == kind]
    return found


def test_a_knob_out_of_range_is_one_sentence_with_its_traceback_folded_below(run_cell):
    reply, outputs = run_cell(OUT_OF_RANGE)
    assert [kind for kind, _ in outputs] == ["error", "display_data"]
    error = only(outputs, "error")
    sentence = "'model.num_layers': input should be greater than or equal to 1, got 0."
    assert error == {"ename": "ConfigError", "evalue": sentence, "traceback": [sentence]}
    assert (reply["status"], reply["ename"], reply["evalue"]) == ("error", "ConfigError", sentence)
    shown = only(outputs, "display_data")["data"]
    assert shown["text/html"].startswith("<details><summary>Traceback</summary>") and "open" not in shown["text/html"][:20]
    assert "validate_node" in shown["text/html"] and "Traceback" not in shown["text/plain"]


def test_the_next_cell_shows_nothing_of_it(run_cell):
    run_cell(OUT_OF_RANGE)
    assert run_cell("print(1)")[1] == [("stream", {"name": "stdout", "text": "1\n"})]


def test_an_error_that_was_caught_shows_nothing(run_cell):
    reply, outputs = run_cell(f"try:\n    {OUT_OF_RANGE}\nexcept lab.LabError: pass")
    assert reply["status"] == "ok" and outputs == []


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("import torch; torch.empty(2**60)", "RuntimeError"),
        ("[0] * 2**60", "MemoryError"),
        ("raise torch.OutOfMemoryError('x: out of memory')", None),
    ],
)
def test_memory_that_runs_out_in_a_cell_is_one_sentence(run_cell, code, name):
    reply, outputs = run_cell(code)
    error = only(outputs, "error")
    assert reply["status"] == "error" and error["ename"] == (name or "OutOfMemoryError") == reply["ename"]
    assert len(error["traceback"]) == 1 and error["traceback"][0].startswith("Out of memory: free what this kernel holds")
    assert error["evalue"] == reply["evalue"] and "<details>" in only(outputs, "display_data")["data"]["text/html"]


@pytest.mark.parametrize("code", ["raise RuntimeError('shape')", "1 / 0"])
def test_other_errors_look_as_ever(run_cell, code):
    reply, outputs = run_cell(code)
    assert reply["status"] == "error" and [kind for kind, _ in outputs] == ["error"]
    assert "Traceback" in "\n".join(only(outputs, "error")["traceback"])


def test_a_handler_of_ones_own_is_left_alone(run_cell):
    own = "def own(shell, kind, error, frames, tb_offset=None): print('mine')\nget_ipython().set_custom_exc((MemoryError,), own)"
    again = "import longcat_lab.errors; longcat_lab.errors.tell_out_of_memory()"
    try:
        run_cell(own)
        run_cell(again)
        assert ("stream", {"name": "stdout", "text": "mine\n"}) in run_cell("raise MemoryError")[1]
    finally:
        run_cell("get_ipython().set_custom_exc((), None)")
        run_cell(again)


def test_papermill_and_the_page_made_of_its_notebook(tmp_path):
    from nbconvert import HTMLExporter
    from papermill import PapermillExecutionError

    from longcat_lab.ablation.kernel import execute

    cells = [
        nbformat.v4.new_code_cell("import longcat_lab as lab"),
        nbformat.v4.new_code_cell(OUT_OF_RANGE),
        nbformat.v4.new_code_cell("1"),
    ]
    nbformat.write(
        nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "x"}}), tmp_path / "a.ipynb"
    )
    with pytest.raises(PapermillExecutionError) as caught:
        execute(tmp_path / "a.ipynb", tmp_path / "b.ipynb", {})
    assert caught.value.ename == "ConfigError" and caught.value.evalue.startswith("'model.num_layers': ")
    done = nbformat.read(tmp_path / "b.ipynb", 4)
    assert done.metadata.papermill.exception is True and done.cells[-1].execution_count is None
    body, _ = HTMLExporter().from_notebook_node(done)
    assert body.count("<details><summary>Traceback</summary>") == 1
    outside = body[: body.index("<details>")] + body[body.index("</details>") :]
    assert "validate_node" not in outside


def test_without_a_notebook_it_is_an_ordinary_exception():
    code = f"import longcat_lab as lab; {OUT_OF_RANGE}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 1 and done.stderr.startswith("Traceback (most recent call last):") and "validate_node" in done.stderr
    with contextlib.suppress(lab.LabError):
        lab.load("tiny", "model.num_layers=0")
    with pytest.raises(lab.LabError) as caught:
        lab.load("tiny", "model.num_layers=0")
    assert caught.value._render_traceback_() == traceback.format_exception(caught.value)
    code = f"from IPython.core.interactiveshell import InteractiveShell; s = InteractiveShell.instance(); s.run_cell({code!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert "validate_node" in done.stdout and "details" not in done.stdout
