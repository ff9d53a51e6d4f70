"""The reviewer's page: whole, offline, and from whatever is there."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from fake_rooms import FAKE, write_notebook, write_question
from rich.console import Console
from test_ablation_store import Pretend, finish

from longcat_lab.ablation import render, run
from longcat_lab.errors import LabError

CODE = """
from pathlib import Path
from IPython.display import HTML, display
assert (Path(sweep_folder) / "ablation.yaml").is_file()
secret_source = 1
display(HTML("<b>the claim holds</b>"))
display({"application/vnd.jupyter.widget-view+json": {"model_id": "x"}, "text/plain": "the widget's text"}, raw=True)
"""


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    console = Console(file=io.StringIO())
    return run(write_question(folder, {"a": {}}), folder / "out", rooms=FAKE, executor=Pretend(finish), console=console)


def test_page_is_one_file_that_asks_nothing_of_the_network(sweep: Path, tmp_path: Path) -> None:
    page = render(sweep, write_notebook(tmp_path / "report.ipynb", 'sweep_folder = ""', CODE))
    text = page.read_text()
    assert page == sweep / "report.html" and (sweep / "report.ipynb").is_file()
    assert "<b>the claim holds</b>" in text and "secret_source" not in text
    assert "the widget's text" in text and "widget-view" not in text
    assert re.findall(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=[\"']?(?!data:)[^\s>]+", text) == []
    assert "cdnjs" not in text and "<script src=" not in text
    # A report that fails says why and leaves the page that was there.
    with pytest.raises(LabError, match=r"The report of .* failed \(KeyError: 'validation_bpb'\)"):
        render(sweep, write_notebook(tmp_path / "bad.ipynb", 'sweep_folder = ""', "{}['validation_bpb']"))
    assert page.read_text() == text
    assert not [path.name for path in sweep.iterdir() if path.name.startswith(".report")]


def test_without_a_sweep(tmp_path: Path) -> None:
    with pytest.raises(LabError, match="There is no sweep in"):
        render(tmp_path)
    assert list(tmp_path.iterdir()) == []
