"""How a job ended: by its own word, its engine's, or its exit status."""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import Any

from longcat_lab.ablation import ends, executors, store
from longcat_lab.ablation.jobs import Job
from longcat_lab.ablation.resources import Resources
from longcat_lab.errors import LabError
from longcat_lab.files import read_json, write_json

LOST = (ends.DRIVER, ends.NODE, ends.PREEMPTED)  # what takes a job's place away, through no fault of its own: it always goes on
MOST = 100  # times that a job goes on elsewhere


class Retries:
    """How often each job was started again, and whether it is once more."""

    def __init__(self, asked: Resources) -> None:
        self._asked, self._count = asked, Counter[tuple[Job, bool]]()

    def again(self, job: Job, reason: str, kind: str) -> str | None:
        """What is said of a job that has ended as `kind` and is tried again; None where it is not.

        A job that finds its parent gone while the driver asks was a fork of a process that was killed.
        """
        lost = kind in LOST
        if not lost and kind not in self._asked.retry:
            return None
        most = MOST if lost else self._asked.retries
        if self._count[job, lost] >= most:
            return None
        self._count[job, lost] += 1
        if kind == ends.DRIVER:
            return f"{job.name}: the process that had started it is gone; it goes on in another one."
        if lost:
            return f"{job.name}: {reason}; it is queued again and goes on from its checkpoint."
        return f"{job.name}: {reason}; it is tried again ({self._count[job, lost]} of {most})."


def settled(job: Job, handle: executors.Handle, code: int, attempts: int, stopping: bool) -> tuple[dict[str, Any], str]:
    """What changes in the job's row, and the kind of its end. What the job could not say itself is written into its run.json.

    Args:
        code: its exit status.
        attempts: that had begun before this one.
        stopping: whether its driver has asked it to end.
    """
    run, told = read_json(job.folder / "run.json"), executors.why(handle)
    if code == executors.BUSY:
        return {"status": "failed", "reason": f"another process ({store.said_holder(job.folder)}) still uses its folder"}, ends.START
    if _by_itself(job, run, attempts):
        if told is not None and told.kind != ends.KILLED and run["status"] == "interrupted" and not stopping:
            # The job knows a signal alone; its engine knows why.
            run |= {"status": told.status, "reason": told.reason}
            run["job"]["end"] = told.kind
            _write(job, run)
        return _said(job, run)
    handle.stop(force=True)
    end = told or ends.of_exit(code)
    lock = store.Lock.take(job.folder, note=False)  # None: another process is at this job, and says itself how it ends
    try:
        run = read_json(job.folder / "run.json")
        if _by_itself(job, run, attempts):  # a disk that others write shows it late
            return _said(job, run)
        began = store.attempts(run) > attempts
        kind = ends.START if end.kind == ends.ERROR and not began else end.kind
        row = {"status": "interrupted" if stopping else end.status, "reason": end.reason}
        if lock is not None and run is not None and run.get("identity") == job.identity and run.get("status") not in ends.SETTLED:
            # Else the folder still holds what ran before, untouched.
            run |= row
            run["job"] = {**(run.get("job") or {}), "end": ends.STOPPED if stopping else kind}
            _write(job, run)
    finally:
        if lock is not None:
            lock.release()
    return row, kind


def _said(job: Job, run: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """What the job itself says. If code was edited meanwhile, the run has another identity than was planned; the row says which."""
    return store.result_row(run, job.variant, job.seed, run.get("identity", job.identity)), str(run["job"].get("end") or run["status"])


def _by_itself(job: Job, run: dict[str, Any] | None, attempts: int) -> bool:
    """Whether run.json is by the process that has just ended, and says how; not by an earlier attempt or another configuration."""
    done = run is not None and run.get("status") in store.DONE and store.attempts(run) > attempts
    return done and not (job.folder / "planned.json").exists()


def _write(job: Job, run: dict[str, Any]) -> None:
    with contextlib.suppress(LabError):  # no room on the disk: the table has it
        write_json(job.folder / "run.json", run)
