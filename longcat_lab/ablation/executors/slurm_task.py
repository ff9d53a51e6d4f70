"""What Slurm starts on a node: one job's process, and what the queue's signals mean to it. Standard library alone.

It travels to the node as it is, so that this process need not import the library, which takes seconds and memory.

SIGUSR1  the driver asks it to stop: the job saves a checkpoint and ends
SIGUSR2  its slot in the queue is nearly over: the same, then it is queued again
SIGTERM  it is preempted, requeued or cancelled: the same; if the queue still calls it running, it is queued again
"""

import os
import re
import signal
import subprocess
import sys
import time

RUNNING = "RUNNING"
TRIES, PATIENCE = 4, 20.0  # to be queued again, and the seconds that the queue has for each answer
SILENT = re.compile("timed out|unable to contact|unable to connect|connection refused", re.IGNORECASE)


class Task:
    """One attempt at a job.

    Args:
        command: starts the job's process.
        environment: what is added to the node's environment.
        log: file for all it says.
        driver: name of the variable in which the job finds the process without which it does not want to live.
        grace: seconds that the job needs to end by itself.
    """

    def __init__(self, command: list, environment: dict, log: str, driver: str, grace: float) -> None:
        self.command, self.environment, self.log, self.driver, self.grace = command, environment, log, driver, grace
        self.asked = set()
        self.process = None

    def __call__(self) -> None:
        again = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
        # Signals of the queue reach every process of a step. What is ignored here stays ignored below; the kernel must not die of them.
        ours = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
        for number in ours[:2]:
            signal.signal(number, signal.SIG_IGN)
        environment = {**os.environ, **self.environment, self.driver: str(os.getpid())}
        with open(self.log, "ab" if again else "wb") as log:
            # A session of its own: the job and its kernel then end by what the job decides.
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        for number in ours:
            signal.signal(number, self.ask)
        above, told = os.getppid(), None
        while (code := self.process.poll()) is None:
            if os.getppid() != above:  # the queue's own process is gone, and nobody would end this one
                self.process.kill()
            if self.asked and told is None:
                self.process.send_signal(signal.SIGTERM)
                told = time.monotonic()
            time.sleep(0.1)
        print(f"the job ended with status {code}; asked by {sorted(self.asked) or 'nobody'}", flush=True)
        if self.asked & {signal.SIGUSR2, signal.SIGTERM} and signal.SIGUSR1 not in self.asked and code == 3:
            self.again()
        sys.exit(code if code >= 0 else 128 - code)  # for the queue's own record

    def ask(self, number: int, frame: object) -> None:
        self.asked.add(signal.Signals(number))

    def again(self) -> None:
        """Queue it once more, unless the queue ends it for a reason of its own (cancelled) or does so by itself (requeued)."""
        job = os.environ["SLURM_JOB_ID"]
        for _ in range(TRIES):  # a queue that has many jobs to end may not answer at once
            done = said("squeue", "--noheader", f"--jobs={job}", "--format=%T")
            if done is not None and (done.returncode != 0 or done.stdout.strip() != RUNNING):
                return
            done = said("scontrol", "requeue", job) if done is not None else None
            if done is not None:
                time.sleep(self.grace + 120 if done.returncode == 0 else 0)  # until the queue ends this process
                sys.exit(1)
            time.sleep(1)


def said(*command: str) -> "subprocess.CompletedProcess | None":
    """What a command of the queue's says; None where the queue does not answer."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    except (OSError, subprocess.TimeoutExpired) as error:
        print(" ".join(command), "failed:", error, flush=True)
        return None
    print(" ".join(command), "said:", done.stdout.strip() or done.stderr.strip() or done.returncode, flush=True)
    return None if done.returncode != 0 and SILENT.search(done.stderr) else done
