"""The environment of a process that trains: thread counts, and the same library."""

from __future__ import annotations

import os
from pathlib import Path

import longcat_lab

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def environment_for(threads: int, keep: bool = True) -> dict[str, str]:
    """This process's environment, the same library first on the path, and so many threads.

    Args:
        keep: thread counts that are set here already stay.
    """
    # Thread counts must be there before the process starts: numerical libraries read them once.
    counts = dict.fromkeys(THREADS, str(threads))
    library = str(Path(longcat_lab.__file__).resolve().parents[1])
    path = [library, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = counts | dict(os.environ) if keep else dict(os.environ) | counts
    return environment | {"PYTHONPATH": os.pathsep.join(dict.fromkeys(filter(None, path)))}
