"""Children of this process by fork: one that runs a function, and one that waits to become a program (a job's kernel)."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable

LARGEST = 1 << 20  # bytes of a message
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)


class Child:
    """A child process of this one by fork; what `subprocess.Popen` is for a process that runs another program."""

    stdin = stdout = stderr = None

    def __init__(self, pid: int) -> None:
        self.pid, self.returncode = pid, None

    def poll(self) -> int | None:
        if self.returncode is None:
            with contextlib.suppress(ChildProcessError):
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                if pid:
                    self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def fork(run: Callable[[], int | None]) -> int:
    """A child that does `run` and ends with the status that it gives; its pid. It has a session of its own."""
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        return pid
    status = 1
    try:
        os.setsid()
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.set_wakeup_fd(-1)
        if numpy := sys.modules.get("numpy"):
            numpy.random.seed()  # Python's own generator is seeded anew by itself
        status = run() or 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


class Spare:
    """A child that waits to become a program. It is made while this process has one thread, and started when it may have many."""

    def __init__(self, become: Callable[[list[str]], int | None]) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

        def wait() -> int | None:
            ours.close()
            told = theirs.recv(LARGEST)
            theirs.close()
            if not told:
                return 0  # it was never needed
            message = json.loads(told)
            os.environ.clear()
            os.environ.update(message["environment"])
            os.chdir(message["folder"])
            return become(message["command"])

        self.pid, self.ours = fork(wait), ours
        theirs.close()

    def start(self, command: list[str], folder: str, environment: dict[str, str]) -> Child:
        """Lets it run; once."""
        with self.ours:
            self.ours.send(json.dumps({"command": command, "folder": folder, "environment": environment}).encode())
        return Child(self.pid)

    def close(self) -> None:
        """Ends it if it was never started."""
        self.ours.close()


def kernel(command: list[str]) -> None:
    """The kernel that `python -m ipykernel_launcher ...` is."""
    from ipykernel import kernelapp

    # What a process takes from its environment when it imports them was taken long ago.
    if "matplotlib" in sys.modules and "MPLBACKEND" not in os.environ:
        sys.modules["matplotlib"].rcParams["backend"] = "module://matplotlib_inline.backend_inline"
    parent = f"--IPKernelApp.parent_handle={os.getppid()}"  # it ends with its job
    sys.argv = ["ipykernel_launcher", *command[command.index("ipykernel_launcher") + 1 :], parent]
    kernelapp.launch_new_instance()
