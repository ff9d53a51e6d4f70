"""Every notebook through papermill at smoke size, and the form that all of them keep."""

from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SMOKE = {
    "00_tour": lambda tmp: {"preset": "tiny", "steps": 20, "run_folder": str(tmp / "tour")},
    "10_moe": lambda tmp: {
        "preset": "tiny",
        "steps": 20,
        "overrides": ["model.moe.balance_loss_alpha=0.01"],  # so that R_g is drawn too
        "run_folder": str(tmp / "moe"),
        "progress": False,
    },
    "20_ngram_embedding": lambda tmp: {
        "preset": "tiny",
        "steps": 20,
        "vocab_ratio": 8.0,  # so that there is something to warn of
        "counted_tokens": 6000,
        "run_folder": str(tmp / "ngram"),
        "progress": False,
    },
    "30_sparse_attention": lambda tmp: {
        "preset": "tiny",
        "dense_steps": 8,
        "warmup_steps": 6,
        "sparse_steps": 6,
        "topk": 12,
        "window": 6,
        "sequences": 4,
        "overrides": ["training.schedule.warmup_steps=1", "model.num_layers=1"],
        "run_folder": str(tmp / "attention"),
        "progress": False,
    },
    "40_mtp": lambda tmp: {"preset": "tiny", "steps": 20, "overrides": [], "run_folder": str(tmp / "mtp"), "progress": False},
    "50_scale": lambda tmp: {
        "preset": "longcat-flash-lite",
        "cards": 384,
        "optimizer": "adamw",
        "few": [1, 8],
        "ladder": [96],
        "steps": 20,
        "run_folder": str(tmp / "scale"),
    },
    "run": lambda tmp: {"preset": "tiny"},
    "report": None,  # executed by the sweep's own test, on a real sweep
}


def test_there_are_notebooks_and_each_has_a_smoke_size():
    assert {path.stem for path in NOTEBOOKS} == set(SMOKE)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_form(path):
    """A question in the first paragraph, one cell of annotated parameters, no outputs in git, code that parses."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    first = notebook.cells[0]
    assert first.cell_type == "markdown" and first.source.startswith("# ") and "?" in first.source
    parameters = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(parameters) == 1
    assert all("#" in line for line in parameters[0].source.splitlines() if line.strip())
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    assert "papermill" not in notebook.metadata and "widgets" not in notebook.metadata


@pytest.mark.parametrize("path", [path for path in NOTEBOOKS if SMOKE[path.stem]], ids=lambda path: path.stem)
def test_runs_top_to_bottom(path, tmp_path, monkeypatch):
    from longcat_lab.ablation.kernel import execute

    monkeypatch.chdir(tmp_path)
    out = tmp_path / "executed.ipynb"
    execute(path, out, SMOKE[path.stem](tmp_path))
    executed = nbformat.read(out, as_version=4)
    pictures = [o for cell in executed.cells for o in cell.get("outputs", []) if {"image/svg+xml", "image/png"} <= set(o.get("data", {}))]
    assert pictures, "a notebook shows at least one static picture"
    errors = [o for cell in executed.cells for o in cell.get("outputs", []) if o.output_type == "error" or o.get("name") == "stderr"]
    assert not errors, errors
