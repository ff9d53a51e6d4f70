"""The shape of the house: rooms import only from rooms above them, files stay small, backends are named in one place."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "longcat_lab"
ROOMS = [
    "started",
    "errors",
    "files",
    "node",
    "blocks",
    "config",
    "model",
    "budget",
    "data",
    "parallel",
    "training",
    "ablation",
    "notebook",
    "workbench",
    "cli",
]
FILES = sorted(LIBRARY.rglob("*.py"))


def room(path):
    return path.relative_to(LIBRARY).parts[0].removesuffix(".py")


def imported_rooms(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = (
            [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else [a.name for a in node.names]
            if isinstance(node, ast.Import)
            else []
        )
        for name in names:
            parts = name.split(".")
            if parts[0] == "longcat_lab" and len(parts) > 1:
                yield parts[1]


@pytest.mark.parametrize("path", [p for p in FILES if room(p) not in ("__init__", "__main__")], ids=lambda p: str(p.relative_to(LIBRARY)))
def test_imports_go_up_only(path):
    own = ROOMS.index(room(path))
    below = [name for name in imported_rooms(path) if ROOMS.index(name) > own]
    assert not below


def test_files_stay_small():
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in [*FILES, *ROOT.glob("tests/**/*.py")]
    }
    assert {name: n for name, n in lengths.items() if n > 600} == {}
    assert {name: n for name, n in lengths.items() if n > 300 and name.startswith("longcat_lab")} == {}


def test_backends_are_named_in_one_module():
    named = re.compile(r"""torch\.(cuda|npu)\b|["'](cuda|npu|nccl|hccl)["']|\.is_cuda\b""")
    found = [str(p.relative_to(LIBRARY)) for p in FILES if named.search(p.read_text(encoding="utf-8"))]
    assert set(found) <= {"training/device.py", "cli/doctor.py"}, found


def test_each_block_folder_holds_config_and_module():
    for folder in (LIBRARY / "blocks").iterdir():
        if folder.is_dir() and folder.name != "__pycache__":
            assert {"config.py", "module.py"} <= {path.name for path in folder.iterdir()}, folder


def test_nothing_large_and_no_weights_in_git():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]
    assert [str(f) for f in files if f.stat().st_size > 2**20 or f.suffix in (".safetensors", ".pt", ".parquet")] == []
