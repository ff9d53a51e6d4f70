"""What is kept in the repository is small, and notebooks are kept without outputs."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LARGEST = 2**20
GENERATED = {".git", ".venv", ".cache", "runs", "build", "dist", "wandb", "__pycache__", ".ipynb_checkpoints"}
GENERATED |= {".pytest_cache", ".ruff_cache", ".hypothesis"}


def repository_files() -> list[Path]:
    """Files that git keeps or would keep; without git, every file outside the generated folders."""
    try:
        out = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        if out.returncode == 0 and out.stdout:
            return [p for p in (ROOT / name for name in out.stdout.split("\0") if name) if p.is_file()]
    except OSError:
        pass
    every = (p for p in ROOT.rglob("*") if not GENERATED.intersection(p.relative_to(ROOT).parts))
    return [p for p in every if p.is_file() and not any(part.endswith(".egg-info") for part in p.parts)]


def notebooks() -> list[Path]:
    return sorted(p for p in repository_files() if p.suffix == ".ipynb")


def test_no_file_is_larger_than_a_mebibyte():
    large = {str(p.relative_to(ROOT)): p.stat().st_size for p in repository_files() if p.stat().st_size > LARGEST}
    assert not large, f"larger than {LARGEST} bytes: {large}"


@pytest.mark.parametrize("path", notebooks(), ids=lambda p: str(p.relative_to(ROOT)))
def test_notebooks_are_kept_without_outputs(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    full = [i for i, cell in enumerate(notebook["cells"]) if cell.get("outputs") or cell.get("execution_count") is not None]
    assert not full, f"cells {full} hold outputs or counts: make notebooks-strip"
    assert not {"widgets", "papermill"} & set(notebook["metadata"]), "run metadata is kept: make notebooks-strip"


def test_generated_folders_are_ignored_by_git():
    ignored = (ROOT / ".gitignore").read_text().split()
    assert {".venv/", ".cache/", "runs/", "build/"} <= set(ignored)


def test_ci_script_can_be_run():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111, "chmod +x .ci/run"
    assert "make test" in script.read_text()
