"""Runs a sweep, or goes on with one: plan, prepare data, jobs side by side, results after each; nothing is lost when anything dies."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longcat_lab.ablation import ends, evaluated, executors, match, settle, spec, store, superseded
from longcat_lab.ablation import jobs as job_plan
from longcat_lab.ablation.hold import counted, held
from longcat_lab.ablation.jobs import Job
from longcat_lab.ablation.outcome import JobsFailed, LabInterrupted, command
from longcat_lab.ablation.rooms import Rooms
from longcat_lab.ablation.table import Cell, Display, short_count
from longcat_lab.errors import LabError
from longcat_lab.files import read_json, write_json

if TYPE_CHECKING:
    from rich.console import Console

LOOK = 0.1  # seconds between looks at the jobs
LEAST, SHARE = 2.0, 20  # the table is written again after so many seconds, and after so many times what writing it took
KEPT = ("status", "reason", "identity", "seconds", "not_engaged")  # of a row, while the sweep runs; a job's numbers stay in its folder


def run(
    ablation_path: str | Path,
    out: str | Path | None = None,
    jobs: int | None = None,
    overrides: Iterable[str] = (),
    *,
    executor: str | executors.Executor = "local",
    rooms: Rooms | None = None,
    console: Console | None = None,
    settled: Callable[[spec.Ablation, Path, Path, executors.Executor], spec.Ablation] | None = None,
) -> Path:
    """Run every job of an ablation that is not finished yet, and return the sweep's folder.

    Args:
        ablation_path: the question file.
        out: the sweep's folder; runs/NAME when left out.
        jobs: how many at a time; when left out, at most 4 and at most one per core here, all of them in a cluster's queue. Fewer run
            where `resources` of the question allows no more.
        overrides: `key=value` for every variant, or `ablation.key=value` for the question.
        executor: where jobs run: a name (`executors`), or an executor.
        settled: question, folder, notebook, executor -> the question with what must be known before it is solved; see `sweep`.

    Raises:
        LabError: the question cannot be run as it is (nothing was written), another process runs it, or the first job to finish has
            no such metric as the question names (it stays finished).
        JobsFailed: all ran, some failed. One whose loss diverged has not failed: that is its result.
        LabInterrupted: stopped by Ctrl-C or SIGTERM; jobs are ended, results written.
    """
    overrides, rooms = list(overrides), rooms or Rooms()
    if jobs is not None and jobs < 1:
        raise LabError(f"--jobs must be at least 1, got {jobs}.")
    ablation = spec.read(ablation_path, overrides)
    notebook = job_plan.find_notebook(ablation, ablation_path)
    folder = Path(out) if out is not None else Path("runs") / ablation.name
    store.check_folder(folder, ablation.name)
    engine = executors.make(executor, ablation.resources, jobs, folder, rooms)
    again = command(ablation_path, out, jobs, overrides, executor)
    try:
        ablation = settled(ablation, folder, notebook, engine) if settled is not None else ablation
    except LabInterrupted as stopped:
        raise LabInterrupted(f"{stopped} Go on with: {again}", folder) from None
    solution = match.solve(ablation, rooms)
    evaluated.check(ablation, solution, rooms)
    job_plan.check_processes(ablation, solution, notebook, rooms)

    with held(folder, ablation.name):
        return _Driver(folder, ablation, solution, notebook, jobs, engine, rooms, console, again).drive()


class _Driver:
    def __init__(
        self,
        folder: Path,
        ablation: spec.Ablation,
        solution: match.Solution,
        notebook: Path,
        jobs: int | None,
        executor: executors.Executor,
        rooms: Rooms,
        console: Console | None,
        again: str,
    ) -> None:
        self.folder, self.ablation, self.solution, self.notebook = folder, ablation, solution, notebook
        self.executor, self.rooms, self.again = executor, rooms, again
        self.slots = getattr(executor, "slots", None) or jobs or 1
        self.configs = job_plan.cells(ablation, solution, rooms)
        self.cells = {cell: Cell(f"{cell[0]}/seed-{cell[1]}") for cell in self.configs}
        self.display = Display(list(self.cells.values()), self.slots, console)
        self.rows: dict[Job, dict[str, Any]] = {}
        self.todo: deque[Job] = deque()
        self.running: dict[Job, executors.Handle] = {}
        self.attempts: dict[Job, int] = {}  # before the one that runs
        self.retries = settle.Retries(ablation.resources)
        self.stops, self.written, self.measured = 0, False, False
        self.stale, self.next_table = False, 0.0  # whether a job has ended since the table was written, and when it may be written again
        self.mistake: str | None = None  # in the question, seen only when a job has finished

    def drive(self) -> Path:
        try:
            with self.display:
                self._prepare()
                self._plan()
                with counted(self._count):
                    self._commit()
                    self._loop()
        except KeyboardInterrupt:
            self.stops += 1
        finally:
            if hasattr(self.executor, "close"):
                self.executor.close()
        if self.written:
            self._write()
        if self.mistake:
            raise LabError(f"{self.mistake} Correct it and run the sweep again: what is finished is kept.")
        statuses = [row["status"] for row in self.rows.values()] or ["planned"] * len(self.cells)
        count = {status: statuses.count(status) for status in ("finished", "diverged", "failed", "interrupted", "planned")}
        of = f"{count['finished']} of {len(self.cells)} jobs finished"
        if self.stops:
            rest = ", ".join(f"{count[s]} {s}" for s in ("diverged", "failed", "interrupted", "planned") if count[s])
            raise LabInterrupted(f"Stopped with {of}{' (' + rest + ')' if rest else ''}; go on with: {self.again}", self.folder)
        self._conclude()
        rest = [(job.name, row["reason"] or row["status"], row["status"]) for job, row in self.rows.items()]
        if diverged := [f"{name} ({reason})" for name, reason, status in rest if status == ends.DIVERGED]:
            self.display.say(f"{len(diverged)} of {len(self.cells)} jobs diverged, which is a result: {'; '.join(diverged)}.")
            of += f", {len(diverged)} diverged"
        if failed := [(name, reason) for name, reason, status in rest if status not in ends.SETTLED]:
            why = "; ".join(f"{name}: {reason}" for name, reason in failed[:5])
            more = f"; and {len(failed) - 5} more" if len(failed) > 5 else ""
            raise JobsFailed(
                f"{of} and {len(failed)} did not ({why}{more}); see job.log and notebook.ipynb in {self.folder / 'jobs'}, "
                f"and run them once more with: {self.again}",
                self.folder,
            )
        return self.folder

    # ---- before the jobs

    def _prepare(self) -> None:
        """Every corpus that a job will need, once, so that jobs only map it into memory."""
        needed = {self.rooms.data_key(config): config for config in self.configs.values()}
        for number, config in enumerate(needed.values(), 1):
            what = f"data {number} of {len(needed)}" if len(needed) > 1 else "data"
            self.display.prepare(f"{what}: preparing")

            def progress(*said: Any, what: str = what) -> None:
                self.display.prepare(f"{what}: {' / '.join(short_count(s) for s in said)}")

            self.rooms.prepare(config, progress)
        self.display.prepare(f"{len(needed)} corpora are ready." if len(needed) > 1 else "The data is ready.")

    def _plan(self) -> None:
        """What is there already, and what is to run; nothing is written yet."""
        for job in job_plan.plan(self.ablation, self.solution, self.folder, self.notebook, self.rooms):
            run = store.read_run(job.folder)
            row = store.result_row(run, job.variant, job.seed, job.identity)
            self.rows[job] = {key: row[key] for key in ("variant", "seed", *KEPT) if key in row}
            if self.rows[job]["status"] not in ends.SETTLED:
                self.todo.append(job)
            self._show(job)
        self.slots = self.display.slots = max(1, min(self.slots, len(self.todo)))
        if hasattr(self.executor, "slots"):  # it shares out its cores among them
            self.executor.slots = self.slots

    def _commit(self) -> None:
        """The question and its table, together, now that nothing of it can fail any more; then what is said of them."""
        store.write_question(self.folder, self.ablation, self.solution)
        self._write()
        self.written, replaced = True, 0
        for job in self.todo:
            run = store.read_run(job.folder)
            if run is None:
                write_json(job.folder / "run.json", job.record())
            replaced += run is not None and run.get("status") in ends.SETTLED
        total = len(self.rows)
        if skipped := total - len(self.todo):
            self.display.say(f"{skipped} of {total} jobs have finished before and are not run again.")
        if changed := sum(row["status"] == "planned" and bool(row["reason"]) for row in self.rows.values()):
            kept = f"; the {replaced} that had finished are kept in {self.folder / superseded.NAME}" if replaced else ""
            self.display.say(f"{changed} of {total} jobs run anew: their configuration, data or code changed since they last ran{kept}.")

    # ---- the jobs

    def _count(self) -> None:
        self.stops += 1

    def _loop(self) -> None:
        try:
            while (self.todo or self.running) and not self.stops and not self.mistake:
                while self.todo and len(self.running) < self.slots:
                    self._start(self.todo.popleft())
                self.stale |= (ended := self._look())
                if self.stale and time.monotonic() > self.next_table:
                    self._write()
                if not ended:  # else the next one can start at once
                    getattr(self.executor, "wait", time.sleep)(LOOK)
        finally:  # also when the disk is full
            self._stop_all()

    def _start(self, job: Job) -> None:
        run = store.read_run(job.folder)
        self.attempts[job] = 0
        if run is not None and run.get("identity") != job.identity:
            if run.get("status") in ends.SETTLED:
                superseded.keep_log(job.folder)
            write_json(job.folder / "planned.json", job.record())  # the job itself clears the folder, once it holds its lock
        else:
            self.attempts[job] = store.attempts(run)
            (job.folder / "planned.json").unlink(missing_ok=True)
        try:
            self.running[job] = self.executor.submit(job)
        except OSError as error:
            self.rows[job] |= {"status": "failed", "reason": f"could not be started: {error.strerror}"}
        else:
            self.rows[job] |= {"status": "running", "reason": "", "seconds": None}
            self.cells[job.variant, job.seed].began = time.monotonic()
            if (before := getattr(self.running[job], "attempts", None)) is not None:
                self.attempts[job] = before
                self.display.say(f"{job.name} was started before and is still there: it is followed, not started again.")
        self._show(job)
        if job in self.running and executors.waits(self.running[job]):
            self.cells[job.variant, job.seed].status = "queued"

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
            self._settle(job, handle, code)
            ended = True
        self.display.update()
        return ended

    def _settle(self, job: Job, handle: executors.Handle, code: int) -> None:
        """Take over how a job ended, and whether it is tried again."""
        stopping = bool(self.stops or self.mistake)
        row, kind = settle.settled(job, handle, code, self.attempts[job], stopping)
        self.rows[job] |= {key: row[key] for key in KEPT if key in row}
        if row["status"] == "finished" and not self.measured:
            self.measured = True
            final = (read_json(job.folder / "run.json") or {}).get("final") or {}
            self.mistake = job_plan.unmeasured(self.ablation, job, {**row, **final})
        if row["status"] not in ends.SETTLED and not stopping and (said := self.retries.again(job, row["reason"], kind)):
            self.display.say(said)
            self.todo.append(job)
        self._show(job)

    def _stop_all(self) -> None:
        """End what still runs: by request, then by force after some seconds or a second Ctrl-C."""
        if not self.running:
            return
        asked = self.stops
        patience = getattr(self.executor, "patience", executors.PATIENCE)
        self.display.say(f"Stopping: {len(self.running)} running jobs have up to {patience:.0f} s to save; Ctrl-C again kills them now.")
        for handle in self.running.values():
            handle.stop()
        deadline = time.monotonic() + patience
        while self.running and time.monotonic() < deadline and self.stops <= max(1, asked):
            self._look()
            time.sleep(LOOK)
        for handle in self.running.values():
            handle.stop(force=True)
        while self.running:
            self._look()
            time.sleep(LOOK)

    # ---- what is said and written

    def _write(self) -> None:
        """The table as it is now. It reads the folders of all jobs that have ended, so it is not done at each end."""
        began = time.monotonic()
        whole = ((job, store.with_numbers(job.folder, row)) for job, row in self.rows.items())
        store.write_results(self.folder, (each for job, row in whole for each in evaluated.rows(row, job.arms)))
        self.stale, self.next_table = False, time.monotonic() + max(LEAST, SHARE * (time.monotonic() - began))

    def _show(self, job: Job) -> None:
        row, cell = self.rows[job], self.cells[job.variant, job.seed]
        cell.status, cell.reason, cell.seconds = row["status"], row["reason"], row["seconds"]
        if job in self.todo:
            cell.status = "planned"  # it will be run (again), whatever happened to it before

    def _conclude(self) -> None:
        from longcat_lab.ablation import statistics

        for line in statistics.summary(store.load_results(self.folder), self.ablation).lines:
            self.display.say(line)
