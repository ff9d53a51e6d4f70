"""Backends and makers of devices are named where the choice is made, and nowhere else."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Devices and backends by name, and anything that would load torch_npu.
NAMED = re.compile(
    r"""torch\.(cuda|npu|xpu)\b|\.is_(cuda|npu)\b|\.(cuda|npu)\(\)|\bnccl\b|\bhccl\b|import\s+torch_npu|from\s+torch_npu""", re.IGNORECASE
)
CHOOSES = {
    "longcat_lab/training/device.py": "the choice itself",
    "longcat_lab/cli/doctor.py": "says what was never tried",
    "longcat_lab/parallel/faults.py": "reads what backends say when a connection is lost",
}


def test_no_file_but_those_that_choose_names_a_backend():
    files = [*(ROOT / "longcat_lab").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    assert len(files) > 100
    found = {str(path.relative_to(ROOT)) for path in files if NAMED.search(path.read_text(encoding="utf-8"))}
    assert found <= CHOOSES.keys(), found - CHOOSES.keys()


def test_torch_npu_is_loaded_by_nobody():
    """torch loads it itself where it is installed; a line that imports it would be one to guard."""
    for folder in ("longcat_lab", "kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not re.search(r"^\s*(import|from)\s+torch_npu", path.read_text(encoding="utf-8"), re.MULTILINE), path
