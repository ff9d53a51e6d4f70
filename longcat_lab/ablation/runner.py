"""Runs a sweep, or goes on with one: plan, prepare data, jobs side by side, results as they come; nothing is lost when anything dies."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longcat_lab.ablation import cores, ends, evaluated, executed, executors, match, spec, store, superseded
from longcat_lab.ablation import jobs as job_plan
from longcat_lab.ablation.driving import KEPT, Driving
from longcat_lab.ablation.hold import counted, held
from longcat_lab.ablation.outcome import JobsFailed, LabInterrupted, command
from longcat_lab.ablation.rooms import Rooms
from longcat_lab.ablation.table import Cell, Display, short_count
from longcat_lab.errors import LabError
from longcat_lab.files import write_json

if TYPE_CHECKING:
    from rich.console import Console

LEAST, SHARE = 2.0, 100  # the table is written again after so many seconds, and after so many times what writing it took


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
    cores.reserve(engine, ablation, solution)

    with held(folder, ablation.name):
        return _Driver(folder, ablation, solution, notebook, jobs, engine, rooms, console, again).drive()


class _Driver(Driving):
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
        self.rooms, self.again = rooms, again
        self.configs = job_plan.cells(ablation, solution, rooms)
        cells = {cell: Cell(f"{cell[0]}/seed-{cell[1]}") for cell in self.configs}
        slots = getattr(executor, "slots", None) or jobs or 1
        super().__init__(ablation, executor, slots, executed.source(notebook), cells, Display(list(cells.values()), slots, console))
        self.written, self.next_table = False, 0.0  # whether there is a table, and when it may be written again

    def drive(self) -> Path:
        try:
            with self.display:
                self._prepare()
                self._plan()
                with counted(self.count_stop):
                    self._commit()
                    self.loop()
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
            if row["status"] in ends.SETTLED and self.anew(run, job):
                row |= {"status": "planned", "reason": "its notebook changed since it last ran", "seconds": None}
            self.rows[job] = {key: row[key] for key in ("variant", "seed", *KEPT) if key in row}
            if self.rows[job]["status"] not in ends.SETTLED or not store.is_whole(job.folder, run):
                self.todo.append(job)
            elif store.is_free(job.folder):
                store.clear_settled(job.folder)
            self.show(job)
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
                write_json(job.folder / "run.json", self.record(job))
            replaced += self.anew(run, job) and run.get("status") in ends.SETTLED
        total = len(self.rows)
        if skipped := total - len(self.todo):
            self.display.say(f"{skipped} of {total} jobs have finished before and are not run again.")
        if changed := sum(row["status"] == "planned" and bool(row["reason"]) for row in self.rows.values()):
            kept = f"; the {replaced} that had finished are kept in {self.folder / superseded.NAME}" if replaced else ""
            self.display.say(
                f"{changed} of {total} jobs run anew: their configuration, data, notebook or code changed since they last ran{kept}."
            )

    # ---- what is said and written

    def ended(self) -> None:
        if time.monotonic() > self.next_table:
            self._write()

    def _write(self) -> None:
        """The table as it is now. It reads the folders of all jobs that have ended, so it is not done at each end."""
        began = time.monotonic()
        whole = ((job, store.with_numbers(job.folder, row)) for job, row in self.rows.items())
        store.write_results(self.folder, (each for job, row in whole for each in evaluated.rows(row, job.arms)))
        self.stale, self.next_table = False, time.monotonic() + max(LEAST, SHARE * (time.monotonic() - began))

    def _conclude(self) -> None:
        from longcat_lab.ablation import statistics

        for line in statistics.summary(store.load_results(self.folder), self.ablation).lines:
            self.display.say(line)
