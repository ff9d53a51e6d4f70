"""The environment of a process that trains: thread counts, and the same library."""

from __future__ import annotations

import math
import os
from pathlib import Path

import longcat_lab

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def environment_for(threads: int, keep: bool = True) -> dict[str, str]:
    """This process's environment, the same library first on the path, and so many threads.

    Args:
        keep: thread counts that are set here already stay where they are smaller.
    """
    # Thread counts must be there before the process starts: numerical libraries read them once.
    counts = dict.fromkeys(THREADS, str(threads))
    library = str(Path(longcat_lab.__file__).resolve().parents[1])
    path = [library, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    if keep:
        counts = {name: min(os.environ.get(name, count), count, key=_number) for name, count in counts.items()}
    return dict(os.environ) | counts | {"PYTHONPATH": os.pathsep.join(dict.fromkeys(filter(None, path)))}


def _number(count: str) -> float:
    """Of a thread count in an environment, which may be anything (`4,2` for nested regions)."""
    first = count.partition(",")[0].strip()
    return float(first) if first.isdecimal() and int(first) > 0 else math.inf
