"""Jobs in the queue of a Slurm cluster, through submitit. The driver only looks on: jobs outlive it, and the next one follows them.

Each job's folder keeps the number that the queue knows it by (engine.json); what submitit writes lies in FOLDER/slurm.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from longcat_lab.ablation import ends, store
from longcat_lab.ablation.ends import End
from longcat_lab.ablation.executors import slurm_task
from longcat_lab.ablation.jobs import Job
from longcat_lab.ablation.resources import Resources
from longcat_lab.ablation.rooms import Rooms
from longcat_lab.ablation.watch import DRIVER
from longcat_lab.errors import LabError
from longcat_lab.files import read_json, write_json
from longcat_lab.training.environment import THREADS, environment_for

OVER = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT")
WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT", "SUSPENDED")
GONE = "GONE"  # the queue has forgotten it
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
    """One queue, and what it last said of this sweep's jobs.

    Attributes:
        slots: jobs in the queue at a time.
        look_every: seconds between questions to the queue, for all jobs at once.
    """

    def __init__(self, resources: Resources, jobs: int | None, folder: Path, look_every: float = 5.0) -> None:
        self.resources, self.slots, self.folder, self.look_every = resources, jobs or 1000, folder.absolute() / "slurm", look_every
        self.patience = 2 * resources.grace_seconds + 3 * look_every + 20
        self.states: dict[str, str] = {}  # number -> state, of jobs that are followed
        self.codes: dict[str, int] = {}  # number -> exit status, of those that are over
        self._looked = 0.0

    def submit(self, job: Job) -> SlurmHandle:
        """Start a job, or follow it where it is in the queue already.

        Raises:
            OSError, LabError: the queue refuses it.
        """
        note = read_json(job.folder / store.ENGINE) or {}
        if (number := note.get("slurm")) and (state := self.ask([number])[number]) not in (*OVER, GONE):
            if note.get("identity") == job.identity:
                self.states[number] = state
                return SlurmHandle(self, job, number, attempts=note.get("attempts", 0))
            _call("scancel", number)  # it is of another configuration
            deadline = time.monotonic() + 60
            while self.ask([number])[number] not in (*OVER, GONE) and time.monotonic() < deadline:
                time.sleep(1)
        number, run = self._submit(job), read_json(job.folder / "run.json") or {}
        attempts = store.attempts(run) if run.get("identity") == job.identity else 0  # another identity begins anew
        write_json(job.folder / store.ENGINE, {"slurm": number, "identity": job.identity, "attempts": attempts})
        self.states[number] = "PENDING"
        return SlurmHandle(self, job, number)

    def _submit(self, job: Job) -> str:
        import cloudpickle
        from submitit.slurm.slurm import SlurmExecutor as Queue

        asked = self.resources
        environment = environment_for(asked.cores or 1, keep=False)
        task = slurm_task.Task(
            [sys.executable, "-m", "longcat_lab.ablation.job", str(job.folder.resolve())],
            {key: environment[key] for key in (*THREADS, "PYTHONPATH")},
            str((job.folder / "job.log").resolve()),
            DRIVER,
            asked.grace_seconds,
        )
        job.folder.mkdir(parents=True, exist_ok=True)
        queue = Queue(self.folder)
        # Slurm counts whole minutes; the job keeps its own clock, and ends before.
        minutes = int((asked.seconds + 2 * asked.grace_seconds) // 60) + 2 if asked.seconds else None
        queue.update_parameters(
            job_name=f"{job.sweep}/{job.name}"[:120],
            time=minutes,
            cpus_per_task=asked.cores or 1,
            mem=f"{asked.bytes // 2**20}M" if asked.bytes else None,
            gres=f"{asked.card}:{asked.cards}" if asked.cards else None,
            signal_delay_s=int(asked.grace_seconds) + 60,  # Slurm may be a minute early
            stderr_to_stdout=True,
            additional_parameters={"requeue": True, **{key.replace("_", "-"): value for key, value in asked.slurm.items()}},
        )
        cloudpickle.register_pickle_by_value(slurm_task)
        try:
            return str(queue.submit(task).job_id)
        except (subprocess.CalledProcessError, RuntimeError) as error:
            said = " ".join(str(getattr(error, "stderr", "") or error).split())
            raise LabError(f"Slurm refuses {job.name}: {_reason(said)}") from None
        finally:
            for left in self.folder.glob(".submission_file_*.sh"):  # submitit keeps a copy under the job's number
                left.unlink(missing_ok=True)
            cloudpickle.unregister_pickle_by_value(slurm_task)

    def look(self) -> None:
        """Ask the queue, if it has not just been asked."""
        if self.states and time.monotonic() - self._looked > self.look_every:
            self.states |= self.ask(list(self.states))
            self._looked = time.monotonic()

    def ask(self, numbers: list[str]) -> dict[str, str]:
        """What the queue says of those jobs; what it said before where it does not answer."""
        wanted = f"--jobs={','.join(numbers)}"
        done = _call("squeue", "--noheader", "--states=all", wanted, "--Format=JobID:30,State:30,exit_code:30")
        if done.returncode != 0 and "Invalid job id" not in done.stderr:
            return {number: self.states.get(number, "UNKNOWN") for number in numbers}
        lines = [line.split() for line in done.stdout.splitlines() if len(line.split()) == 3]
        self.codes |= {number: os.waitstatus_to_exitcode(int(status)) for number, _, status in lines if status.isdecimal()}
        found = {number: state for number, state, _ in lines}
        return {number: found.get(number, GONE) for number in numbers}


class SlurmHandle:
    """One job in the queue.

    Attributes:
        attempts: that had begun before it was put there, where an earlier driver did so; None where this one did.
    """

    def __init__(self, executor: SlurmExecutor, job: Job, number: str, attempts: int | None = None) -> None:
        self.executor, self.job, self.number, self.attempts = executor, job, number, attempts

    @property
    def state(self) -> str:
        return self.executor.states.get(self.number, GONE)

    def poll(self) -> int | None:
        self.executor.look()
        if self.state not in (*OVER, GONE):
            return None
        return self.executor.codes.get(self.number, 1)

    def waits(self) -> bool:
        return self.state in WAITING

    def stop(self, force: bool = False) -> None:
        if self.state in (*OVER, GONE):
            return
        if force:
            _call("scancel", self.number)
            return
        _call("scancel", "--state=PENDING", self.number)
        _call("scancel", "--signal=USR1", self.number)

    def why(self) -> End | None:
        where = f"Slurm's job {self.number}"
        said = {
            "CANCELLED": (ends.CANCELLED, f"{where} was cancelled"),
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
        return End(*said[self.state]) if self.state in said else None


def _call(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))


def _reason(said: str) -> str:
    found: Any = re.search(r"sbatch: error: (?!Batch job submission failed)(.*?)(?= sbatch: |$)", said) or re.search(
        r"Batch job submission failed: (.*?)(?= sbatch: |$)", said
    )
    text = found[1] if found else said[-200:]
    return f"{text.rstrip('.')} (see `resources` of the question)."


__all__ = ["SlurmExecutor", "SlurmHandle", "make"]
