"""Makes `longcat_kernels` importable where this project is on the path but not installed; one thread unless a test says otherwise."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

KERNELS = Path(__file__).resolve().parents[2] / "kernels"

if importlib.util.find_spec("longcat_kernels") is None:
    sys.path.insert(0, str(KERNELS))


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
