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
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from longcat_lab.ablation import begun, ends, executed, plugin_copies, store, superseded
from longcat_lab.ablation.ends import End
from longcat_lab.ablation.resources import Resources
from longcat_lab.ablation.watch import DRIVER, Watch
from longcat_lab.errors import LabError
from longcat_lab.files import read_json, remove_temporary, write_json
from longcat_lab.node import validate_node

__all__ = ["BUSY", "DRIVER", "main", "one_line"]
BUSY = 75  # exit status: another process is still in this folder
WAIT_FOR_FOLDER = 15.0  # seconds; the job of a killed driver needs about two to end


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
        stay, old = (store.LOCK, store.ENGINE, "planned.json", "job.log"), read_json(folder / "run.json") or {}
        if old.get("status") in ends.SETTLED and old.get("identity"):
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
    job = run["job"]
    job |= {"attempts": job.get("attempts", 0) + 1, "host": socket.gethostname()}
    job.pop("end", None)
    job["started"] = datetime.now(UTC).isoformat(timespec="seconds")
    plugin_copies.here(folder.parents[2], run)
    if job["attempts"] == 1 and (folder.parents[2] / "ablation.yaml").is_file():  # later attempts keep what the first one was asked
        run["asked"] = begun.asked(store.read_question(folder.parents[2]))
    if run.get("status") not in ends.SETTLED:  # else its notebook alone was not written to its end
        (folder / "progress.json").unlink(missing_ok=True)
        run |= {"status": "running", "reason": None}
    write_json(folder / "run.json", run)
    return run


def _resources(folder: Path) -> Resources:
    """What the sweep's question asks for its jobs; nothing where there is none."""
    if not (folder.parents[2] / "ablation.yaml").is_file():
        return Resources()
    return validate_node(Resources, store.read_question(folder.parents[2]).get("resources") or {}, "resources")


def _record(folder: Path, stopped: End | None, error: End | None, began: float) -> int:
    """Write how it ended; a result stays one. Returns the exit status."""
    run = read_json(folder / "run.json") or {}
    job = run.setdefault("job", {})
    job["seconds"] = round(job.get("seconds", 0.0) + time.monotonic() - began, 3)
    if error:
        job["notebook_error"] = error.reason  # also when a cell after the finished run failed
    else:
        job.pop("notebook_error", None)
    job.pop("notebook_sha256", None)
    with contextlib.suppress(OSError):  # it left none
        job["notebook_sha256"] = executed.digest(folder / "notebook.ipynb")
    if run.get("status") in ends.SETTLED:
        job["end"] = run["status"]
    elif stopped:
        run |= {"status": stopped.status, "reason": stopped.reason}
        job["end"] = stopped.kind
    else:
        said = run.get("reason") if run.get("status") in ("failed", "interrupted") else None
        job["end"] = error.kind if error else ends.STOPPED if run.get("status") == "interrupted" else ends.ERROR
        if run.get("status") not in ("failed", "interrupted") or error:
            run |= {"status": "failed", "reason": said or (error and error.reason) or "the notebook ended without finishing its run"}
    write_json(folder / "run.json", run)
    return {"finished": 0, "diverged": 0, "interrupted": 3}.get(run["status"], 1)


def _death(watch: Watch, kills: ends.OutOfMemoryKills) -> End:
    code = watch.process.poll() if watch.process is not None else None
    if code is None:
        return End(ends.KERNEL, "the kernel died")
    if code < 0:
        name = signal.Signals(-code).name
        if code == -signal.SIGKILL and kills.risen():
            return End(ends.MEMORY, f"out of memory: the system killed the kernel ({name})")
        return End(ends.KERNEL, f"the kernel was killed by {name}")
    return End(ends.KERNEL, f"the kernel died with exit status {code}")


def main(folder: Path) -> int:
    """Run the job in `folder` to its end. Returns 0 finished or diverged, 1 failed, 3 interrupted, 74 no room for the record, 75 in use."""
    watch = Watch()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, watch.stop)
    watch.start()
    lock = store.Lock.take(folder, wait=WAIT_FOR_FOLDER)
    if lock is None:
        _say(f"{folder} is in use by another process: {store.holder(folder)}")
        return BUSY
    watch.lock = lock
    if _is_settled(folder):
        store.clear_settled(folder)
        _say("It has finished already, for another process that was quicker.")
        return 0
    try:
        return _execute(folder, watch, lock)
    except (LabError, OSError) as problem:  # from reading or writing what the job's folder says; errors of cells do not come here
        _say(str(problem))
        return ends.NO_ROOM if ends.of_exception(problem) == ends.DISK else 1


def _is_settled(folder: Path) -> bool:
    """Whether there is a result here that nothing is to replace: a job is never run twice, however often it was started."""
    run = read_json(folder / "run.json") or {}
    return not (folder / "planned.json").exists() and run.get("status") in ends.SETTLED and store.is_whole(folder, run)


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # job.log may lie on a full disk
        print(line, flush=True)


def _execute(folder: Path, watch: Watch, lock: store.Lock) -> int:
    from longcat_lab.ablation.kernel import adopt_orphans, end_below, end_left_kernel, execute
    from longcat_lab.training.trackers import settle

    adopt_orphans()
    end_left_kernel(lock.before)
    remove_temporary(folder)
    began, error, kills = time.monotonic(), None, ends.OutOfMemoryKills()
    run, asked = _begin(folder), _resources(folder)
    watch.record = lambda end: _record(folder, end, None, began)
    watch.hold_to(asked)
    parameters = {"job_folder": str(folder), **({"processes": asked.together} if asked.together > 1 else {})}
    try:
        if watch.end is None:
            notebook = Path(run["job"]["notebook"])
            try:
                execute(notebook, folder / "notebook.ipynb", parameters, lambda manager: setattr(watch, "manager", manager))
            finally:
                executed.hold(folder / "notebook.ipynb")
    except Exception as problem:  # anything at all must end as one line in run.json
        error = _said(problem, watch, kills)
        _say(error.reason)
    watch.ending.acquire()  # for good: the process ends now
    end_below()
    status = _record(folder, watch.end, error, began)
    if status == 0:
        store.clear_settled(folder)
    if watch.end is None:
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


def _said(problem: Exception, watch: Watch, kills: ends.OutOfMemoryKills) -> End:
    from nbclient.exceptions import DeadKernelError
    from papermill import PapermillExecutionError

    if isinstance(problem, PapermillExecutionError):
        return End(ends.of_cell(str(problem.ename), str(problem.evalue)), one_line(f"{problem.ename}: {problem.evalue}"))
    if isinstance(problem, DeadKernelError):
        return _death(watch, kills)
    return End(ends.of_exception(problem), one_line(f"{type(problem).__name__}: {problem}"))


if __name__ == "__main__":
    status = main(Path(sys.argv[1]).resolve())
    _say("")
    os._exit(status)  # threads of the messaging library must not keep a finished job alive
