"""Jobs on their way: given to an executor, looked at until they end, tried again or stopped. What became of each stands in its row."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from longcat_lab.ablation import ends, executors, settle, store, superseded
from longcat_lab.ablation import jobs as job_plan
from longcat_lab.ablation.jobs import Job
from longcat_lab.ablation.spec import Ablation
from longcat_lab.ablation.table import Cell, Display
from longcat_lab.errors import LabError
from longcat_lab.files import read_json, write_json

LOOK = 0.2  # seconds between looks at the jobs; at their progress every fifth time
SUBMITTING = 1.0  # seconds of submissions between two looks: a queue takes its time, and there may be hundreds
REFUSALS = (5.0, 10.0, 20.0, 40.0, 60.0)  # seconds to wait after an engine has refused a job, one refusal after another
FORGOTTEN = 300.0  # seconds after the last refusal, when as many jobs as were asked for are offered again
KEPT = ("status", "reason", "identity", "seconds", "not_engaged")  # of a row, while the sweep runs; a job's numbers stay in its folder


class Driving:
    """The jobs of one sweep, from the first submission to the last end.

    Args:
        source: what tells one state of the jobs' notebook from another.

    Attributes:
        rows: job -> variant, seed and KEPT.
        stops: how often it was asked to stop.
        mistake: a sentence about the question, seen only when a job has finished.
    """

    def __init__(
        self,
        ablation: Ablation,
        executor: executors.Executor,
        slots: int,
        source: str,
        cells: dict[tuple[str, int], Cell],
        display: Display,
    ) -> None:
        self.ablation, self.executor, self.slots, self.source, self.cells, self.display = ablation, executor, slots, source, cells, display
        self.rows: dict[Job, dict[str, Any]] = {}
        self.todo: deque[Job] = deque()
        self.running: dict[Job, executors.Handle] = {}
        self.attempts: dict[Job, int] = {}  # before the one that runs
        self.retries = settle.Retries(ablation.resources)
        self.completed: set[Job] = set()  # whose notebooks are executed once more, for a run that has ended
        self.mistake: str | None = None
        self.stops, self.measured, self.stopping, self.stale = 0, False, False, False
        self.most, self.refusals, self.wait_until = slots, 0, 0.0  # refusals: one after another, while nothing ran

    def count_stop(self) -> None:
        self.stops += 1

    def ended(self) -> None:
        """Called while jobs have ended since it last did something about it."""

    def loop(self) -> None:
        """Until every job has ended, or a reason to stop."""
        try:
            while (self.todo or self.running) and not self.stops and not self.mistake:
                until = time.monotonic() + SUBMITTING
                while self.todo and len(self.running) < self.slots and not self.stops and self.wait_until < time.monotonic() < until:
                    self._start(self.todo.popleft())
                self.stale |= (ended := self._look())
                if self.stale:
                    self.ended()
                if not ended:  # else the next one can start at once
                    getattr(self.executor, "wait", time.sleep)(LOOK)
        finally:  # also when the disk is full
            self._stop_all()

    # ---- one job

    def record(self, job: Job) -> dict[str, Any]:
        """run.json of a job that has not begun."""
        record = job.record()
        return record | {"job": {**record["job"], "source": self.source}}

    def anew(self, run: dict[str, Any] | None, job: Job) -> bool:
        """Whether what is in the job's folder is of something else: another identity, or a result of another state of its notebook."""
        if run is None or run.get("identity") != job.identity:
            return run is not None
        return run.get("status") in ends.SETTLED and (run.get("job") or {}).get("source", self.source) != self.source

    def _start(self, job: Job) -> None:
        run = store.read_run(job.folder)
        self.attempts[job] = 0
        if self.anew(run, job):
            if run.get("status") in ends.SETTLED:
                superseded.keep_log(job.folder)
            write_json(job.folder / "planned.json", self.record(job))  # the job itself clears the folder, once it holds its lock
        else:
            (job.folder / "planned.json").unlink(missing_ok=True)
            settled = run is not None and run.get("status") in ends.SETTLED
            if settled and store.is_whole(job.folder, run):  # an earlier driver's, which ended after this one had looked
                self._take(job, store.result_row(run, job.variant, job.seed, job.identity))
                return
            self.attempts[job] = store.attempts(run)
            self._renew(job)
        try:
            self.running[job] = self.executor.submit(job)
        except executors.Refused as refusal:
            self._refused(job, refusal)
        except OSError as error:
            self._take(job, {"status": "failed", "reason": f"could not be started: {error.strerror}"}, ends.START)
        else:
            self.refusals = 0
            if self.wait_until and time.monotonic() > self.wait_until + FORGOTTEN:
                self.slots = self.most
            self.rows[job] |= {"status": "running", "reason": "", "seconds": None}
            self.cells[job.variant, job.seed].began = time.monotonic()
            if (before := getattr(self.running[job], "attempts", None)) is not None:
                self.attempts[job] = before
                self.display.say(f"{job.name} was started before and is still there: it is followed, not started again.")
            self.show(job)
            if executors.waits(self.running[job]):
                self.cells[job.variant, job.seed].status = "queued"

    def _renew(self, job: Job) -> None:
        """A job that goes on does so with the notebook as it is now."""
        asked = self.record(job)["job"]
        if (lock := store.Lock.take(job.folder, note=False)) is not None:  # else it is at it already
            try:
                run = read_json(job.folder / "run.json")
                if run is not None and {**run.get("job", {}), **asked} != run.get("job"):
                    write_json(job.folder / "run.json", run | {"job": {**run.get("job", {}), **asked}})
            finally:
                lock.release()

    def _refused(self, job: Job, refusal: LabError) -> None:
        """The engine takes no more now: what it has taken goes on, and the rest waits."""
        self.todo.appendleft(job)
        self.refusals = 0 if self.running else self.refusals + 1
        if self.refusals > len(REFUSALS):
            raise LabError(f"{refusal} It was asked {self.refusals} times, and none of these jobs is there that others could wait for.")
        pause = REFUSALS[max(0, self.refusals - 1)]
        if not self.wait_until or self.refusals == 1:
            self.display.say(f"{refusal} {len(self.running)} jobs are there, {len(self.todo)} wait; it is asked again in {pause:.0f} s.")
        self.wait_until, self.slots = time.monotonic() + pause, max(1, len(self.running))

    def _look(self) -> bool:
        """Take over progress and ends; whether a job has ended."""
        ended = False
        for job, handle in list(self.running.items()):
            code = handle.poll()
            if code is None:
                if int(time.monotonic() / LOOK) % 5 == 0:
                    cell = self.cells[job.variant, job.seed]
                    cell.status = "queued" if executors.waits(handle) else "running"
                    cell.progress(read_json(job.folder / "progress.json") if cell.status == "running" else None)
                continue
            del self.running[job]
            row, kind = settle.settled(job, handle, code, self.attempts[job], self._is_stopping)
            self._take(job, row, kind)
            ended = True
        for line in executors.told(self.executor):
            self.display.say(line)
        self.display.update()
        return ended

    @property
    def _is_stopping(self) -> bool:
        return bool(self.stops or self.mistake or self.stopping)

    def _take(self, job: Job, row: dict[str, Any], kind: str = "") -> None:
        """What became of a job, and whether it is tried again."""
        if row["status"] in ends.SETTLED and store.is_free(job.folder):
            store.clear_settled(job.folder)
            if not self._is_stopping and job not in self.completed and not store.is_whole(job.folder, read_json(job.folder / "run.json")):
                self.completed.add(job)
                self.display.say(f"{job.name}: its run has ended, its notebook was not written to the end; that is executed once more.")
                self.todo.append(job)
        self.rows[job] |= {key: row[key] for key in KEPT if key in row}
        if row["status"] == "finished" and not self.measured:
            self.measured = True
            final = (read_json(job.folder / "run.json") or {}).get("final") or {}
            self.mistake = job_plan.unmeasured(self.ablation, job, {**row, **final})
        if row["status"] not in ends.SETTLED and not self._is_stopping and (said := self.retries.again(job, row["reason"], kind)):
            self.display.say(said)
            self.todo.append(job)
        self.show(job)

    def show(self, job: Job) -> None:
        row, cell = self.rows[job], self.cells[job.variant, job.seed]
        cell.status, cell.reason, cell.seconds = row["status"], row["reason"], row["seconds"]
        if job in self.todo:
            cell.status = "planned"  # it will be run (again), whatever happened to it before

    # ---- the end of all

    def _stop_all(self) -> None:
        """End what still runs: by request, then by force after some seconds or a second Ctrl-C; a third one waits for nothing more."""
        if not self.running:
            return
        asked, self.stopping = self.stops, True
        patience = getattr(self.executor, "patience", executors.PATIENCE)
        self.display.say(f"Stopping: {len(self.running)} running jobs have up to {patience:.0f} s to save; Ctrl-C again kills them now.")
        self._end(False, patience, max(1, asked))
        self._end(True, patience, max(2, self.stops))
        for job in list(self.running):
            del self.running[job]
            self._take(job, {"status": "interrupted", "reason": "it was told to end and may still be there", "seconds": None}, ends.STOPPED)

    def _end(self, force: bool, patience: float, stops: int) -> None:
        for handle in self.running.values():
            handle.stop(force)
        deadline = time.monotonic() + patience
        while self.running and time.monotonic() < deadline and self.stops <= stops:
            self._look()
            time.sleep(LOOK)
