"""One job in its own process: `python -m longcat_lab.ablation.job FOLDER` executes the notebook that FOLDER/run.json names.

What the job was and how it ended stands in run.json. The executed notebook is kept for reading; papermill's own metadata calls
a dead or interrupted kernel completed, so nothing is concluded from it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from longcat_lab.ablation import begun, executed, plugin_copies, store, superseded
from longcat_lab.errors import LabError
from longcat_lab.files import read_json, write_json

DRIVER = "LONGCAT_LAB_DRIVER"  # environment variable: the pid of the driver, without which the job does not want to live
BUSY = 75  # exit status: another process is still in this folder
WAIT_FOR_FOLDER = 15.0  # seconds; the job of a killed driver needs about two to end


class Watch(threading.Thread):
    """Ends the kernel when this process is asked to stop or its driver is gone; a thread, because the main one waits for the kernel."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.driver = int(os.environ.get(DRIVER, 0))
        self.reason: str | None = None
        self.grace = 10.0  # seconds to finish a step and write a checkpoint
        self.manager: Any = None
        self.lock: store.Lock | None = None
        self.process: Any = None
        self.record: Any = lambda reason: None
        self.ending = threading.Lock()  # held by the thread that writes how the job ended

    def stop(self, number: int, frame: Any) -> None:
        self.reason = self.reason or f"stopped by {signal.Signals(number).name}"

    def run(self) -> None:
        from longcat_lab.ablation.kernel import kernel_process, kill_group

        while self.reason is None:
            if self.driver and os.getppid() != self.driver:
                self.reason, self.grace = "the driver is gone", 0.7
            elif self.process is None and (process := kernel_process(self.manager)):
                self._note(process)
            time.sleep(0.1)
        # First as a person would: an interrupt, so that the notebook can save what it has; then by force.
        deadline, asked = time.monotonic() + self.grace, False
        while time.monotonic() < deadline:
            if not asked and (process := kernel_process(self.manager)):
                self._note(process)
                kill_group(process.pid, signal.SIGINT)
                asked = True
            time.sleep(0.05)
        if process := self.process or kernel_process(self.manager):
            kill_group(process.pid)
        time.sleep(self.grace)  # the main thread normally ends the process before this is over
        with self.ending:
            self.record(self.reason)
            os._exit(3)

    def _note(self, process: Any) -> None:
        import psutil

        self.process = process
        with contextlib.suppress(psutil.Error, OSError):  # already gone, or the disk is full: nothing to note
            self.lock.note(kernel=process.pid, kernel_started=psutil.Process(process.pid).create_time())


def one_line(text: str, length: int = 300) -> str:
    """The first line with something in it, shortened."""
    line = next((line.strip() for line in str(text).splitlines() if line.strip()), "")
    return line if len(line) <= length else line[: length - 1] + "…"


def _begin(folder: Path) -> dict[str, Any]:
    """run.json of the job that starts now. A record in planned.json replaces what another configuration left in the folder.

    What had finished is set aside first; what had not is cleared.
    """
    fresh = read_json(folder / "planned.json")
    if fresh is not None:
        stay, old = (store.LOCK, "planned.json", "job.log"), read_json(folder / "run.json") or {}
        if old.get("status") == "finished" and old.get("identity"):
            superseded.set_aside(folder, old["identity"], stay)
        for entry in folder.iterdir():
            if entry.name in stay:
                continue
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        write_json(folder / "run.json", fresh)
        (folder / "planned.json").unlink()
    run = read_json(folder / "run.json")
    if run is None or "notebook" not in run.get("job", {}):
        raise LabError(f"{folder / 'run.json'} is missing or does not name a notebook.")
    (folder / "progress.json").unlink(missing_ok=True)
    job = run["job"]
    job |= {"attempts": job.get("attempts", 0) + 1, "host": socket.gethostname()}
    job["started"] = datetime.now(UTC).isoformat(timespec="seconds")
    plugin_copies.here(folder.parents[2], run)
    if job["attempts"] == 1 and (folder.parents[2] / "ablation.yaml").is_file():  # later attempts keep what the first one was asked
        run["asked"] = begun.asked(store.read_question(folder.parents[2]))
    run |= {"status": "running", "reason": None}
    write_json(folder / "run.json", run)
    return run


def _record(folder: Path, stopped: str | None, error: str | None, began: float) -> int:
    """Write how it ended; a finished run stays finished. Returns the exit status."""
    run = read_json(folder / "run.json") or {}
    job = run.setdefault("job", {})
    job["seconds"] = round(job.get("seconds", 0.0) + time.monotonic() - began, 3)
    if error:
        job["notebook_error"] = error  # also when a cell after the finished run failed
    else:
        job.pop("notebook_error", None)
    job.pop("notebook_sha256", None)
    with contextlib.suppress(OSError):  # it left none
        job["notebook_sha256"] = executed.digest(folder / "notebook.ipynb")
    said = run.get("reason") if run.get("status") in ("failed", "interrupted") else None
    if run.get("status") == "finished":
        pass
    elif stopped:
        run |= {"status": "interrupted", "reason": stopped}
    elif run.get("status") not in ("failed", "interrupted") or error:
        run |= {"status": "failed", "reason": said or error or "the notebook ended without finishing its run"}
    write_json(folder / "run.json", run)
    return {"finished": 0, "interrupted": 3}.get(run["status"], 1)


def _death(watch: Watch) -> str:
    code = watch.process.poll() if watch.process is not None else None
    if code is None:
        return "the kernel died"
    if code < 0:
        hint = ", often for lack of memory" if code == -signal.SIGKILL else ""
        return f"the kernel was killed by {signal.Signals(-code).name}{hint}"
    return f"the kernel died with exit status {code}"


def main(folder: Path) -> int:
    """Run the job in `folder` to its end. Returns 0 finished, 1 failed, 3 interrupted, 75 the folder is in use."""
    watch = Watch()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, watch.stop)
    watch.start()
    lock = store.Lock.take(folder, wait=WAIT_FOR_FOLDER)
    if lock is None:
        print(f"{folder} is in use by another process: {store.holder(folder)}", flush=True)
        return BUSY
    watch.lock = lock
    from longcat_lab.ablation.kernel import end_left_kernel, execute
    from longcat_lab.training.trackers import settle

    end_left_kernel(lock.before)
    began, error = time.monotonic(), None
    run = _begin(folder)
    watch.record = lambda reason: _record(folder, reason, None, began)
    try:
        if watch.reason is None:
            notebook = Path(run["job"]["notebook"])
            try:
                execute(
                    notebook, folder / "notebook.ipynb", {"job_folder": str(folder)}, lambda manager: setattr(watch, "manager", manager)
                )
            finally:
                executed.hold(folder / "notebook.ipynb")
    except Exception as problem:  # anything at all must end as one line in run.json
        error = _said(problem, watch)
        print(error, flush=True)
    watch.ending.acquire()  # for good: the process ends now
    status = _record(folder, watch.reason, error, began)
    if watch.reason is None:
        settle(folder)
        _unlink(folder / "wandb")
    return status


def _unlink(tracked: Path) -> None:
    """Removes what a tracker's client links to in its own folder by absolute paths: a copy of the sweep elsewhere could not follow."""
    if (read_json(tracked / "state.json") or {}).get("state") in ("starting", "logging"):
        return  # it still writes there
    for path in tracked.rglob("*"):
        if path.is_symlink():
            with contextlib.suppress(OSError):
                path.unlink()


def _said(problem: Exception, watch: Watch) -> str:
    from nbclient.exceptions import DeadKernelError
    from papermill import PapermillExecutionError

    if isinstance(problem, PapermillExecutionError):
        return one_line(f"{problem.ename}: {problem.evalue}")
    if isinstance(problem, DeadKernelError):
        return _death(watch)
    return one_line(f"{type(problem).__name__}: {problem}")


if __name__ == "__main__":
    status = main(Path(sys.argv[1]).resolve())
    sys.stdout.flush()
    os._exit(status)  # threads of the messaging library must not keep a finished job alive
