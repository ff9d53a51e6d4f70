"""One notebook executed by papermill in a kernel of its own, which is gone afterwards."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from longcat_lab.ablation import store

spare: Any = None  # a fork of this process that waits to become its kernel, where there is one; see `forked.Spare`
TRACKER = "wandb_process.py"  # of a run; it finishes what it has to send in its own time


def execute(notebook: Path, output: Path, parameters: dict[str, Any], started: Callable[[Any], None] = lambda manager: None) -> None:
    """Execute `notebook` into `output` (also when it fails). The kernel runs in the interpreter of this process.

    Args:
        started: called with the kernel manager before its kernel starts; `kernel_process` tells later whether there is one.

    Raises:
        papermill.PapermillExecutionError: a cell raised.
        nbclient.exceptions.DeadKernelError: the kernel died.
    """
    import papermill

    from longcat_lab.ablation.quick_kernel import Client, Forked, SameInterpreter

    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")  # else every kernel of Python 3.11 warns about frozen modules
    connection = output.with_name(store.CONNECTION)
    connection.unlink(missing_ok=True)  # of an attempt that was killed
    settings = {"connection_file": str(connection), "transport_encryption": "auto"}
    if sys.platform == "linux":  # sockets without files and without ports: kernels that start at once never ask for the same one
        settings |= {"transport": "ipc", "ip": f"@longcat_lab-{uuid.uuid4()}"}
    manager = SameInterpreter(kernel_name="python3", client_factory=Client, **settings)
    if spare is not None:
        manager.provisioner = Forked(spare, kernel_id=manager.kernel_id, kernel_spec=manager.kernel_spec, parent=manager)
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
        connection.unlink(missing_ok=True)


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


def adopt_orphans() -> None:
    """What a dead kernel has started becomes this process's own, so that it is weighed and ended with it (Linux)."""
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def below() -> list[Any]:
    """Every process that this one has started, directly or through others, as psutil knows them; without trackers, which outlive a run."""
    import psutil

    found, spared = [], set()
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process().children(recursive=True):  # parents come before their children
            with contextlib.suppress(psutil.Error):
                if process.ppid() in spared or any(part.endswith(TRACKER) for part in process.cmdline()):
                    spared.add(process.pid)
                else:
                    found.append(process)
    return found


def end_below() -> None:
    """Kill all of them."""
    import psutil

    for process in below():
        with contextlib.suppress(psutil.Error):
            process.kill()
