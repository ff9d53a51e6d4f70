"""A process that has imported what every job needs, and forks one job after another: each starts at once and has a process of its own.

Most of a short job is imports, twice: of the process that executes the notebook, and of its kernel. Here both are forks of one process in
which nothing but imports has happened. State of one job never reaches another, as it would in a kernel that is used again; a job that
dies takes nothing with it. The process ends with the one that started it.

It holds the library as it was imported: once a file of the library is edited, `Warm.fits` is false and another one is needed.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from longcat_lab.ablation.forked import LARGEST, Spare, fork, kernel

# What a job and its kernel import before they do anything of their own, and what a notebook of ours does.
IMPORTED = (
    *("psutil", "nbclient", "jupyter_client", "papermill", "ipykernel.kernelapp", "ipykernel.ipkernel", "ipykernel.zmqshell"),
    *("ipykernel.debugger", "ipykernel.kernelspec", "IPython.core.completerlib", "IPython.core.oinspect", "IPython.extensions.storemagic"),
    *("longcat_lab.ablation.job", "longcat_lab.ablation.kernel", "longcat_lab.ablation.quick_kernel", "longcat_lab.training.trackers"),
)
OURS = (
    *("matplotlib.figure", "pandas", "pyarrow.parquet", "torch", "torch._dynamo", "tqdm.auto"),
    *("longcat_lab.workbench", "longcat_lab.budget", "longcat_lab.training.session", "longcat_lab.notebook.figures"),
)
IMPORTS = 900.0  # seconds in which everything must have been imported: network disks can be slow
NEVER = "the process of which jobs are forks came to no end of its imports (resources.warm=false does without it)"
PATIENCE = 60.0  # seconds until a process that was asked for a job has forked it, on a loaded machine


# ---- the process that forks


def serve(connection: socket.socket) -> None:
    """Forks a job for each message, and tells its pid and how it ended, until the other end is closed."""
    numbers: dict[int, int] = {}  # by pid
    woken, wake = socket.socketpair()
    for end in (woken, wake):
        end.setblocking(False)
    signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    look = selectors.DefaultSelector()
    for end in (connection, woken):
        look.register(end, selectors.EVENT_READ)
    _say(connection, ready=True)
    while True:
        for key, _ in look.select():
            if key.fileobj is woken:
                with contextlib.suppress(BlockingIOError):
                    woken.recv(4096)
            elif told := connection.recv(LARGEST):
                job = json.loads(told)
                try:
                    pid = fork(lambda job=job: _job(job, (connection, woken, wake)))
                except OSError as error:
                    _say(connection, number=job["number"], error=error.strerror)
                else:
                    numbers[pid] = job["number"]
                    _say(connection, number=job["number"], pid=pid)
            else:
                return
        while numbers:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            _say(connection, number=numbers.pop(pid), status=os.waitstatus_to_exitcode(status))


def _say(connection: socket.socket, **told: Any) -> None:
    with contextlib.suppress(OSError):  # nobody listens any more
        connection.send(json.dumps(told).encode())


def _job(job: dict[str, Any], inherited: tuple[socket.socket, ...]) -> int:
    """What `python -m longcat_lab.ablation.job FOLDER` is."""
    from longcat_lab.ablation import job as room
    from longcat_lab.ablation import kernel as kernels

    for end in inherited:
        end.close()
    os.environ.clear()
    os.environ.update(job["environment"])
    os.environ[room.DRIVER] = str(os.getppid())
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for ours, theirs in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(ours, theirs)
    os.close(log)
    os.close(nothing)
    kernels.spare = Spare(kernel)
    return room.main(Path(job["folder"]))


# ---- who asks for jobs


class Warm:
    """The process that forks, from outside. Its jobs are not children of this process: what becomes of them is told.

    Args:
        environment: of the process; numerical libraries take their threads from it once, so it must be what jobs get.
        ours: whether it imports torch and the library as well.
    """

    def __init__(self, environment: dict[str, str], ours: bool = True) -> None:
        self.sources, self.count, self.ready, self.started = sources(), 0, False, time.monotonic()
        self.waiting: dict[int, dict[str, Any]] = {}  # until it has imported everything
        self.told: dict[int, dict[str, Any]] = {}
        self.ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, "-m", "longcat_lab.ablation.warm", str(theirs.fileno()), *(["ours"] if ours else [])]
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, env=environment, pass_fds=[theirs.fileno()], start_new_session=True
            )

    @property
    def fits(self) -> bool:
        """Whether it lives, and its library is the one on the disk."""
        self.listen()
        return self.process.poll() is None and self.ours.fileno() >= 0 and self.sources == sources()

    def submit(self, folder: Path, log: Path, environment: dict[str, str]) -> Forked:
        self.count += 1
        self.waiting[self.count] = {"number": self.count, "folder": str(folder), "log": str(log), "environment": environment}
        self.told[self.count] = {}
        self._send()
        return Forked(self, self.count)

    def cancel(self, number: int) -> bool:
        """Whether a job had not been asked for yet; it never will be."""
        self.listen()
        if self.waiting.pop(number, None) is None:
            return False
        self.told[number]["status"] = -signal.SIGTERM
        return True

    def _send(self) -> None:
        with contextlib.suppress(OSError):  # it is gone, which `ask` sees
            while self.ready and self.waiting:
                self.ours.send(json.dumps(self.waiting.pop(next(iter(self.waiting)))).encode())

    def close(self) -> None:
        """Ends it; jobs that run see it and end."""
        self.ours.close()
        if not self.ready:  # it does not listen yet
            self.process.kill()
        self.process.wait()

    def ask(self, number: int) -> dict[str, Any]:
        """What is known of a job: `pid`, then `status` or `error`."""
        self.listen()
        told = self.told[number]
        if not self.ready and self.ours.fileno() >= 0 and time.monotonic() > self.started + IMPORTS:
            self.close()
        if self.ours.fileno() >= 0 or "status" in told or "error" in told:
            return told
        if "pid" not in told:
            told |= {"error": "the process that was to fork it was killed", "lost": True} if self.ready else {"error": NEVER}
        elif not _lives(told["pid"]):
            told["status"] = -signal.SIGKILL  # nobody is left who could say how it ended
        return told

    def forget(self, number: int) -> None:
        """Nobody will ask for this job any more."""
        self.told.pop(number, None)

    def listen(self) -> None:
        """Take over what it has told."""
        with contextlib.suppress(BlockingIOError):
            while self.ours.fileno() >= 0:
                try:
                    said = self.ours.recv(LARGEST, socket.MSG_DONTWAIT)
                except ConnectionError:
                    said = b""
                if not said:
                    self.ours.close()
                    return
                message = json.loads(said)
                if "number" in message:
                    self.told[message.pop("number")].update(message)
                else:
                    self.ready = True
                    self._send()


class Forked:
    """One job of a `Warm`; what `subprocess.Popen` is for a process of one's own."""

    def __init__(self, warm: Warm, number: int) -> None:
        self.warm, self.number = warm, number
        self.status: int | None = None
        self.error: str | None = None  # why it could not be started
        self.lost = False  # because the process that was to fork it died
        self._pid: int | None = None

    @property
    def pid(self) -> int | None:
        """It is waited for, which takes no time once `Warm` is ready; None where it came to none."""
        deadline = time.monotonic() + PATIENCE
        while self._pid is None and self.poll() is None and not self.warm.cancel(self.number) and time.monotonic() < deadline:
            time.sleep(0.01)
        return self._pid

    def poll(self) -> int | None:
        if self.status is None:
            told = self.warm.ask(self.number)
            self._pid, self.error, self.lost = told.get("pid"), told.get("error"), "lost" in told
            self.status = 1 if self.error else told.get("status")
        if self.status is not None:
            self.warm.forget(self.number)
        return self.status

    def wait(self) -> int:
        deadline = time.monotonic() + PATIENCE
        while self.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        return 1 if self.status is None else self.status


def sources() -> tuple[tuple[str, int, int], ...]:
    """What tells one state of the library's files from another, without reading them."""
    package = Path(__file__).parents[1]
    found = ((path, path.stat()) for path in sorted(package.rglob("*.py")))
    return tuple((str(path), stat.st_mtime_ns, stat.st_size) for path, stat in found)


def _lives(pid: int) -> bool:
    """Not one that is dead and was never waited for, as where the first process of a container waits for nobody."""
    import psutil

    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


if __name__ == "__main__":
    del sys.path[0]  # the working folder, which is for those to add who want it
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")  # as `kernel.execute` does
    for name in IMPORTED + (OURS if "ours" in sys.argv else ()):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    with contextlib.suppress(ImportError):
        from nbformat.validator import get_validator

        for minor in (4, 5):  # of the formats of notebooks: a validator is compiled once, which takes as long as a job's start
            get_validator(4, minor)
    with contextlib.suppress(KeyboardInterrupt):
        serve(socket.socket(fileno=int(sys.argv[1])))
    os._exit(0)
