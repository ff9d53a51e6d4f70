"""Jobs in the queue of a Slurm cluster, through submitit. The driver only looks on: jobs outlive it, and the next one follows them.

Each job's folder keeps what the queue knows it by (engine.json): its number, and the name of its script, which no other job anywhere
has: numbers begin anew, and another cluster has its own. What submitit writes lies in FOLDER/slurm.
"""

from __future__ import annotations

import re
import shutil
import sys
import time
import uuid
from pathlib import Path
from typing import Any

from longcat_lab.ablation import ends, store
from longcat_lab.ablation.ends import End
from longcat_lab.ablation.executors import slurm_queue, slurm_task
from longcat_lab.ablation.executors.slurm_queue import GONE, OVER, WAITING, State
from longcat_lab.ablation.jobs import Job
from longcat_lab.ablation.resources import Resources
from longcat_lab.ablation.rooms import Rooms
from longcat_lab.ablation.watch import DRIVER
from longcat_lab.errors import LabError
from longcat_lab.files import read_json, write_json
from longcat_lab.training.environment import THREADS, environment_for

SHOWS = 60.0  # seconds after which a disk that many machines share shows what a job wrote last
ENDS = 600.0  # seconds that a node may take to end a job's processes
NAMED = 5  # jobs that one sentence names
OWN = ("time", "mem", "cpus-per-task", "gres", "job-name", "signal", "requeue", "ntasks", "ntasks-per-node", "output", "error", "array")


def make(resources: Resources, jobs: int | None, folder: Path, rooms: Rooms) -> SlurmExecutor:
    """See `executors`.

    Raises:
        LabError: submitit or Slurm's commands are not here, or the question asks for what a job of a sweep cannot have.
    """
    try:
        import submitit  # noqa: F401
    except ImportError:
        raise LabError("--executor slurm needs the package submitit: pip install longcat-lab[slurm].") from None
    if missing := [name for name in ("sbatch", "squeue", "scancel", "scontrol") if shutil.which(name) is None]:
        raise LabError(f"--executor slurm needs Slurm's commands, and {missing[0]} is not here: run it where you would call sbatch.")
    options = {key.replace("_", "-"): value for key, value in resources.slurm.items()}
    if str(options.get("nodes", 1)) != "1":
        raise LabError("resources.slurm asks for several nodes, but a job of a sweep is one notebook on one node: leave nodes out.")
    if own := [key for key in options if key in OWN]:
        raise LabError(f"resources.slurm sets '{own[0]}', which comes from the other settings of resources: leave it out there.")
    return SlurmExecutor(resources, jobs, folder)


class SlurmExecutor:
    """One queue, and this sweep's jobs in it.

    Attributes:
        slots: jobs in the queue at a time.
        look_every: seconds between questions to the queue, for all jobs at once.
        cpus: of a job.
    """

    def __init__(self, resources: Resources, jobs: int | None, folder: Path, look_every: float = 5.0) -> None:
        self.resources, self.slots, self.folder = resources, jobs or 1000, folder.absolute() / "slurm"
        self.patience = 2 * resources.grace_seconds + 3 * look_every + 20
        self.cpus = resources.cores or resources.together
        self.queue = slurm_queue.Queue(look_every)
        self.names: dict[str, str] = {}  # number -> job, of those that are followed
        self.before: dict[str, tuple[str, str]] | None = None  # script -> number and state, of jobs that an earlier driver has left

    def reserve(self, threads: int) -> None:
        """Each job computes with so many threads, all its processes together."""
        self.cpus = self.resources.cores or max(threads, self.resources.together)

    def submit(self, job: Job) -> SlurmHandle:
        """Start a job, or follow it where it is in the queue already.

        Raises:
            Refused: the queue takes no more jobs now, or does not answer.
            OSError, LabError: it refuses this one.
        """
        note = read_json(job.folder / store.ENGINE) or {}
        after = note.get("after")  # the number of a job that has to end first
        if note.get("script"):
            number, state = self._left(note)
            if state not in (*OVER, GONE):
                if note.get("slurm") == number and note.get("identity") == job.identity:
                    return self._follow(job, note, state, note.get("attempts", 0))
                # It is of another configuration, or its driver was killed before it had handed over all that it needs.
                self.queue.stop(number, force=True)
                after = number
        run = read_json(job.folder / "run.json") or {}
        attempts = store.attempts(run) if run.get("identity") == job.identity else 0  # another identity begins anew
        first = {"after": after} if after is not None else {}
        note = {"script": f".submission_file_{uuid.uuid4().hex}.sh", "identity": job.identity, "attempts": attempts, **first}
        write_json(job.folder / store.ENGINE, note)  # before the queue has it: else two would be there if this process were killed now
        try:
            note["slurm"] = self._submit(job, note["script"], after)
        except LabError as error:
            if not isinstance(error, slurm_queue.Unheard):
                write_json(job.folder / store.ENGINE, first)
            raise
        note.pop("after", None)
        write_json(job.folder / store.ENGINE, note)
        return self._follow(job, note, "PENDING")

    def _left(self, note: dict[str, Any]) -> tuple[str, str]:
        """Number and state of a job that was left in the queue; all are asked for at once."""
        if self.before is None or (note.get("slurm") is None and note["script"] not in self.before):
            self.before = slurm_queue.mine()
        return self.before.pop(note["script"], ("", GONE))

    def _follow(self, job: Job, note: dict[str, Any], state: str, attempts: int | None = None) -> SlurmHandle:
        self.queue.follow(note["slurm"], state)
        self.names[note["slurm"]] = job.name
        return SlurmHandle(self, job, note["slurm"], note["script"], attempts)

    def forget(self, handle: SlurmHandle) -> None:
        """It is over."""
        self.queue.drop(handle.number)
        self.names.pop(handle.number, None)
        if self.before is not None:
            self.before.pop(handle.script, None)

    def _submit(self, job: Job, script: str, after: str | None) -> str:
        import cloudpickle

        asked = self.resources
        environment = environment_for(asked.cores or 1, keep=False)
        task = slurm_task.Task(
            [sys.executable, "-m", "longcat_lab.ablation.job", str(job.folder.resolve())],
            {key: environment[key] for key in (*THREADS, "PYTHONPATH")},
            str((job.folder / "job.log").resolve()),
            DRIVER,
            asked.grace_seconds,
        )
        # Slurm counts whole minutes; the job keeps its own clock, and ends before.
        minutes = int((asked.seconds + 2 * asked.grace_seconds) // 60) + 2 if asked.seconds else None
        more = {key.replace("_", "-"): value for key, value in asked.slurm.items()}
        if after is not None:
            more["dependency"] = ",".join([f"afterany:{after}", *([str(more["dependency"])] if "dependency" in more else [])])
        self.folder.mkdir(parents=True, exist_ok=True)
        queue = _submitting(self.folder, script, job.name, bool(self.names))
        queue.update_parameters(
            job_name=f"{job.sweep}/{job.name}"[:120],
            time=minutes,
            cpus_per_task=self.cpus,
            mem=f"{asked.bytes // 2**20}M" if asked.bytes else None,
            gres=f"{asked.card}:{asked.cards}" if asked.cards else None,
            signal_delay_s=int(asked.grace_seconds) + 60,  # Slurm may be a minute early
            stderr_to_stdout=True,
            additional_parameters={"requeue": True, **more},
        )
        cloudpickle.register_pickle_by_value(slurm_task)
        try:
            return str(queue.submit(task).job_id)
        except BaseException:
            for left in self.folder.glob("*.pkl"):  # what only a job with a number reads
                if re.fullmatch("[0-9a-f]{32}", left.stem):
                    left.unlink(missing_ok=True)
            raise
        finally:
            (self.folder / script).unlink(missing_ok=True)  # submitit keeps a copy under the job's number
            cloudpickle.unregister_pickle_by_value(slurm_task)

    def told(self) -> list[str]:
        """A sentence for each reason for which jobs were found to wait until somebody does something."""
        found: dict[str, list[str]] = {}
        for number, reason in self.queue.news:
            if number in self.names:
                found.setdefault(reason, []).append(number)
        self.queue.news.clear()
        said = []
        for reason, numbers in found.items():
            names = ", ".join(self.names[number] for number in numbers[:NAMED])
            more = f" and {len(numbers) - NAMED} more" if len(numbers) > NAMED else ""
            if reason in slurm_queue.HELD or slurm_queue.HELD_BY.search(reason):
                those = ",".join(numbers) if len(numbers) <= 4 * NAMED else "NUMBER"
                what = f"held in the queue ({reason}). `scontrol release {those}` lets them go on, scancel ends them."
            else:
                what = f"not started by the queue as they are ({reason}). Stop the sweep and correct `resources` of the question."
            said.append(f"{names}{more}: {what}")
        return said

    def close(self) -> None:
        """No job is followed any more."""
        self.queue.close()


def _submitting(folder: Path, script: str, name: str, others: bool) -> Any:
    """submitit's executor for one job, whose script has that name; it waits no longer for sbatch than others do here."""
    from submitit.slurm.slurm import SlurmExecutor as Engine

    class Submitting(Engine):
        def _submit_command(self, command: str) -> Any:
            (folder / script).write_text(self._make_submission_file_text(command, script))
            number = self._get_job_id_from_submission_command(slurm_queue.submit(folder / script, name, others))
            job = self.job_class(folder=self.folder, job_id=number, tasks=[0])
            job.paths.move_temporary_file(folder / script, "submission_file", keep_as_symlink=True)
            return job

    return Submitting(folder)


class SlurmHandle:
    """One job in the queue.

    Attributes:
        attempts: that had begun before it was put there, where an earlier driver did so; None where this one did.
    """

    def __init__(self, executor: SlurmExecutor, job: Job, number: str, script: str, attempts: int | None = None) -> None:
        self.executor, self.job, self.number, self.script, self.attempts = executor, job, number, script, attempts
        self._over: State | None = None
        self._forced = False
        self._since, self._read_at = ("", 0.0), 0.0  # the state that it is in, and when that was first seen

    @property
    def state(self) -> State:
        return self._over or self.executor.queue.states.get(self.number, State(GONE))

    def poll(self) -> int | None:
        if self._over is None:
            self.executor.queue.look()
            if (state := self.state).name != self._since[0]:
                self._since, self._read_at = (state.name, time.monotonic()), 0.0
            if not self._has_ended(state):
                return None
            self._over = state
            self.executor.forget(self)
        return self._over.code

    def _has_ended(self, state: State) -> bool:
        """A job that is put into the queue again is COMPLETING too, and the record of one that has COMPLETED may not be seen yet."""
        lasted = time.monotonic() - self._since[1]
        if state.name == "COMPLETING":
            return self._forced or lasted > ENDS or self._has_result()
        if state.name == "COMPLETED":
            return lasted > SHOWS or self._has_result()
        return state.name in (*OVER, GONE)

    def _has_result(self) -> bool:
        if time.monotonic() < self._read_at:
            return False
        self._read_at = time.monotonic() + 0.5
        run = read_json(self.job.folder / "run.json") or {}
        ours = run.get("status") in ends.SETTLED and run.get("identity") == self.job.identity
        return ours and not (self.job.folder / "planned.json").exists()

    def waits(self) -> bool:
        return self.state.name in WAITING

    def stop(self, force: bool = False) -> None:
        if self._over is None:
            self._forced |= force
            self.executor.queue.stop(self.number, force)

    def why(self) -> End | None:
        where = f"Slurm's job {self.number}"
        cancelled = (ends.CANCELLED, f"{where} was cancelled")
        said = {
            "CANCELLED": cancelled,
            "COMPLETING": cancelled if self._forced else (ends.NODE, f"the node of {where} does not let it end"),
            "TIMEOUT": (ends.TIME, f"time-out: {where} reached its time limit"),
            "DEADLINE": (ends.TIME, f"time-out: {where} reached its deadline"),
            "OUT_OF_MEMORY": (ends.MEMORY, f"out of memory: {where} took more than it had asked for"),
            "NODE_FAIL": (ends.NODE, f"the node of {where} was lost"),
            "BOOT_FAIL": (ends.NODE, f"the node of {where} did not start"),
            "PREEMPTED": (ends.PREEMPTED, f"{where} was preempted"),
            "REVOKED": (ends.CANCELLED, f"{where} was revoked"),
            "FAILED": (ends.KILLED, f"{where} failed; see job.log, and {self.executor.folder / self.number}_0_log.out"),
            GONE: (ends.KILLED, f"{where} is gone from the queue without a word"),
        }
        return End(*said[self.state.name]) if self.state.name in said else None


__all__ = ["SlurmExecutor", "SlurmHandle", "make"]
