"""What Slurm's commands say of this user's jobs. None holds up a driver: a controller under load takes a minute, or never answers."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import tempfile
import time
from pathlib import Path
from typing import IO, NamedTuple

from longcat_lab.ablation.executors import Refused
from longcat_lab.errors import LabError

OVER = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT")
HELD = ("REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT")
WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "SUSPENDED", *HELD)
GONE = "GONE"  # the queue has forgotten it
LONGEST = 60.0  # seconds that a command may take, and the most between two questions to a queue that does not answer
FIELDS = {"JobID": 20, "State": 30, "exit_code": 12, "Reason": 80}  # of squeue, with their widths

# Reasons for which a waiting job never starts by itself: somebody holds it, or it asks for what it cannot get where it waits.
HELD_BY = re.compile(r"held|hold", re.IGNORECASE)
_UNMET = re.compile(r"BadConstraints|NeverSatisfied|PartitionConfig|Partition\w*Limit|PerJob|^Invalid")
_RETRIES = "sleeping and retrying"  # sbatch would go on for two minutes
_SILENT = re.compile(r"timed out|unable to contact|unable to connect|connection refused|zero bytes|standby mode|not respond", re.IGNORECASE)
_PASSES = re.compile(rf"submit\w*limit|temporarily unable|temporarily unavailable|{_SILENT.pattern}", re.IGNORECASE)
# Older versions name a limit of jobs as they name one of size; these pass where the queue has taken jobs of the same kind before.
_MAY_PASS = re.compile(r"accounting/QOS policy|partition not available|partition is down|munge|authentication", re.IGNORECASE)


class Unheard(Refused):
    """The queue has not answered, and may have taken the job all the same."""


class State(NamedTuple):
    """What the queue says of a job; its exit status (negative: a signal) where it is over."""

    name: str
    code: int = 1
    reason: str = ""

    @property
    def stays(self) -> str:
        """Why it waits until somebody does something; empty where it does not."""
        if self.name in HELD:
            return self.reason if HELD_BY.search(self.reason) else self.name
        return self.reason if self.name in WAITING and (HELD_BY.search(self.reason) or _UNMET.search(self.reason)) else ""


class Call:
    """A command that runs beside this process, and in a session of its own: Ctrl-C is not meant for it."""

    def __init__(self, *command: str) -> None:
        self.command, self._until, self._late = command, time.monotonic() + LONGEST, False
        self._said = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115 (pipes would have to be emptied)
        out, err = self._said
        try:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True)
        except BaseException:
            self._close()
            raise

    def over(self, wait: float = 0.0) -> bool:
        """Whether it has ended, within so many seconds."""
        try:
            self._process.wait(wait)
        except subprocess.TimeoutExpired:
            if self._late or time.monotonic() < self._until:
                return False
            self.end()
        return True

    def end(self) -> None:
        self._late = self._process.poll() is None
        self._process.kill()
        self._process.wait()

    def result(self) -> tuple[int, str, str]:
        """Exit status, output and errors, once it is over."""
        told = self.out, self.err + ("\nthe command timed out" if self._late else "")
        self._close()
        return self._process.returncode, *told

    @property
    def out(self) -> str:
        return _text(self._said[0])

    @property
    def err(self) -> str:
        return _text(self._said[1])

    def _close(self) -> None:
        for file in self._said:
            file.close()


def _text(file: IO[bytes]) -> str:
    # Read by position: the command writes through the same offset.
    return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode(errors="replace").strip("\n")


def silent(code: int, err: str) -> bool:
    """Whether a command failed because the queue did not answer it."""
    return code != 0 and _SILENT.search(err) is not None


def submit(script: Path, name: str, others: bool) -> str:
    """`sbatch script`, and what it says.

    Args:
        name: of the job, for the sentence.
        others: whether the queue has taken jobs of the same kind.

    Raises:
        Refused: it may take it later; `Unheard` where it may have taken it.
        LabError: it never will.
    """
    call = Call("sbatch", str(script))
    while not call.over(0.05):
        if _RETRIES in call.err:
            call.end()
    code, out, err = call.result()
    if code == 0:
        return out
    said = " ".join(err.split())
    if _PASSES.search(said) or (others and _MAY_PASS.search(said)):
        raise (Unheard if silent(code, err) else Refused)(f"Slurm does not take {name} now: {_reason(said)}.")
    raise LabError(f"Slurm refuses {name}: {_reason(said)} (see `resources` of the question).")


def _reason(said: str) -> str:
    found = re.findall(r"sbatch: error: (.*?)(?= sbatch: |$)", said)
    first = next((text for text in found if not text.startswith("Batch job submission failed")), None)
    text = first or next((text.removeprefix("Batch job submission failed: ") for text in found), said[-200:])
    return text.split(f", {_RETRIES}")[0].rstrip(".")


def mine() -> dict[str, tuple[str, str]]:
    """Script -> number and state, of every job of this user that the queue knows. The name of its script tells a job from any other one.

    Raises:
        Refused: the queue does not answer.
    """
    call = Call("squeue", "--noheader", "--states=all", f"--user={os.getuid()}", "--format=%i|%T|%o")
    while not call.over(0.05):
        pass
    code, out, err = call.result()
    if code != 0:
        raise Refused(f"Slurm does not say which jobs are in its queue: {' '.join(err.split()) or 'squeue failed'}.")
    lines = [line.split("|", 2) for line in out.splitlines()]
    return {Path(line[2]).name: (line[0], line[1]) for line in lines if len(line) == 3}


class Queue:
    """The jobs that are followed: one question for all of them, and one command for all that are to be stopped.

    Attributes:
        states: number -> what the queue last said, of jobs that are followed.
        news: jobs that were found to wait for somebody, with the reason, since it was last emptied.
    """

    def __init__(self, look_every: float) -> None:
        self.look_every, self.states, self.news = look_every, dict[str, State](), list[tuple[str, str]]()
        self._staying: dict[str, str] = {}
        self._stops: dict[tuple[str, ...], set[str]] = {(): set(), ("--state=PENDING",): set(), ("--signal=USR1",): set()}
        self._call: Call | None = None
        self._of, self._options = set[str](), ()  # what the running command is about
        self._next, self._quiet_until, self._pause = 0.0, 0.0, look_every

    def follow(self, number: str, state: str) -> None:
        self.states[number] = State(state)

    def drop(self, number: str) -> None:
        """It is over: nothing is asked of it any more."""
        self.states.pop(number, None)
        self._staying.pop(number, None)
        for numbers in self._stops.values():
            numbers.discard(number)

    def stop(self, number: str, force: bool) -> None:
        """With the next `look`: asked to save and end (taken out, where it waits), or with `force` ended by the queue."""
        for options, numbers in self._stops.items():
            if force == (options == ()):
                numbers.add(number)
        if self._call is not None and self._call.command[0] == "squeue":  # what it says is old already
            self._call.end()
            self._call.result()
            self._call = None
        self._next, self._quiet_until, self._pause = 0.0, 0.0, self.look_every

    def look(self) -> None:
        """Take over what the queue has said, and ask it again when it is time; waits for nothing."""
        if self._call is not None:
            if not self._call.over():
                return
            call, self._call = self._call, None
            self._heard(call)
        now = time.monotonic()
        if now < self._quiet_until:
            return
        try:
            if not self._send() and self.states and now >= self._next:
                wanted = ",".join(f"{field}:{width}" for field, width in FIELDS.items())
                self._of, self._next = set(self.states), now + self.look_every
                self._call = Call("squeue", "--noheader", "--states=all", f"--user={os.getuid()}", f"--Format={wanted}")
        except OSError:  # no process to be had now
            self._quiet_until = now + self.look_every

    def _send(self) -> bool:
        for options, numbers in self._stops.items():
            if numbers:
                self._call = Call("scancel", *options, *sorted(numbers, key=int))
                self._of, self._options = set(numbers), options
                numbers.clear()
                return True
        return False

    def _heard(self, call: Call) -> None:
        code, out, err = call.result()
        stopping = call.command[0] == "scancel"
        if silent(code, err) or (code != 0 and not stopping):
            if stopping:
                self._stops[self._options] |= self._of
            self._quiet_until = time.monotonic() + self._pause
            self._pause = min(2 * self._pause, LONGEST)
            return
        self._pause = self.look_every
        if stopping:
            self._next = 0.0
            return
        found = dict(_line(line) for line in out.splitlines() if line.strip())
        for number in self._of & set(self.states):  # the others came after it was asked
            self.states[number] = found.get(number, State(GONE))
        staying = {number: reason for number, state in self.states.items() if (reason := state.stays)}
        self.news += [(number, reason) for number, reason in staying.items() if self._staying.get(number) != reason]
        self._staying = staying

    def close(self) -> None:
        """Send what is to be sent, and wait some seconds for it."""
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline and (self._call is not None or any(self._stops.values())):
            if self._call is not None and self._call.command[0] == "squeue":
                self._call.end()
            if self._call is None or self._call.over(0.1):
                if self._call is not None:
                    self._call.result()
                self._call = None
                with contextlib.suppress(OSError):
                    self._send()
        if self._call is not None:
            self._call.end()
            self._call.result()
            self._call = None


def _line(line: str) -> tuple[str, State]:
    """Number and state in a line of squeue, whose reasons have words."""
    found, at = [], 0
    for width in FIELDS.values():
        found.append(line[at : at + width].strip())
        at += width
    number, name, status, reason = found
    return number, State(name, os.waitstatus_to_exitcode(int(status)) if status.isdecimal() else 1, reason if reason != "None" else "")


__all__ = ["GONE", "HELD", "HELD_BY", "LONGEST", "OVER", "WAITING", "Call", "Queue", "State", "Unheard", "mine", "silent", "submit"]
