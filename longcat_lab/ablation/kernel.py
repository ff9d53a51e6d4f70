"""One notebook executed by papermill in a kernel of its own, which is gone afterwards."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any


def execute(notebook: Path, output: Path, parameters: dict[str, Any], started: Callable[[Any], None] = lambda manager: None) -> None:
    """Execute `notebook` into `output` (also when it fails). The kernel runs in the interpreter of this process.

    Args:
        started: called with the kernel manager before its kernel starts; `kernel_process` tells later whether there is one.

    Raises:
        papermill.PapermillExecutionError: a cell raised.
        nbclient.exceptions.DeadKernelError: the kernel died.
    """
    import papermill
    from ipykernel.kernelspec import get_kernel_dict
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpec

    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")  # else every kernel of Python 3.11 warns about frozen modules

    class SameInterpreter(AsyncKernelManager):
        # A kernel spec named python3 in somebody's home folder may point to any other environment.
        kernel_spec = property(lambda self: KernelSpec(**get_kernel_dict()))

    manager = SameInterpreter(kernel_name="python3", transport_encryption="auto")
    started(manager)
    try:
        papermill.execute_notebook(
            _literal(notebook),
            _literal(output),
            parameters=parameters,
            kernel_name="python3",
            language="python",
            km=manager,
            progress_bar=False,
            store_widget_state=False,
            autosave_cell_every=5,
            start_timeout=300,  # imports from a network disk, on a loaded machine
            iopub_timeout=120,  # papermill makes a late message an error
        )
    finally:
        _end(manager)


def _literal(path: Path) -> str:
    """papermill formats paths as templates."""
    return str(path).replace("{", "{{").replace("}", "}}")


def kernel_process(manager: Any) -> Any | None:
    """The kernel's `subprocess.Popen`, or None while there is none."""
    return getattr(getattr(manager, "provisioner", None), "process", None)


def _end(manager: Any) -> None:
    from jupyter_core.utils import run_sync

    process = kernel_process(manager)
    with contextlib.suppress(Exception):  # a dead kernel has many ways to complain; what counts is that it is gone
        run_sync(manager.shutdown_kernel)()
    if process is not None and process.poll() is None:
        kill_group(process.pid)


def kill_group(pid: int, number: int = signal.SIGKILL) -> None:
    """Signal a process group; it may be gone already."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def end_left_kernel(note: dict[str, Any]) -> None:
    """Kill the kernel that a dead job left behind, if it is still that process (pids are used again).

    Args:
        note: what the job noted in its lock, see `store.holder`.
    """
    import socket

    import psutil

    if "kernel" not in note or note.get("host") != socket.gethostname():
        return
    with contextlib.suppress(psutil.Error):
        if abs(psutil.Process(note["kernel"]).create_time() - note["kernel_started"]) < 1:
            kill_group(note["kernel"])
