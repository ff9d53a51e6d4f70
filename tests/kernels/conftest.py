"""Makes `longcat_kernels` importable where this project is on the path but not installed."""

import importlib.util
import sys
from pathlib import Path

KERNELS = Path(__file__).resolve().parents[2] / "kernels"

if importlib.util.find_spec("longcat_kernels") is None:
    sys.path.insert(0, str(KERNELS))
