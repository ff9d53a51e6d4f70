"""A kernel of this interpreter, and a client that loses no time with it: a short job is mostly waiting otherwise."""

from __future__ import annotations

import contextlib
import os
import time
from queue import Empty
from typing import Any

from ipykernel.kernelspec import get_kernel_dict
from jupyter_client import AsyncKernelManager
from jupyter_client.asynchronous import AsyncKernelClient
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.provisioning import LocalProvisioner

HEARD = 0.2  # seconds in which a kernel that has answered on one channel is heard on the other, where that is connected already


class SameInterpreter(AsyncKernelManager):
    """A kernel spec named python3 in somebody's home folder may point to any other environment; this one cannot."""

    kernel_spec = property(lambda self: KernelSpec(**get_kernel_dict()))

    async def _async_finish_shutdown(self, waittime: float | None = None, pollinterval: float = 0.01, restart: bool = False) -> None:
        await super()._async_finish_shutdown(waittime, pollinterval, restart)


class Forked(LocalProvisioner):
    """Starts a kernel that waits as a fork already, in place of a program."""

    def __init__(self, spare: Any, **settings: Any) -> None:
        super().__init__(**settings)
        self._spare = spare

    async def launch_kernel(self, cmd: list[str], **settings: Any) -> Any:
        self.process = self._spare.start(cmd, settings.get("cwd") or os.getcwd(), settings.get("env") or dict(os.environ))
        self.pid = self.pgid = self.process.pid
        return self.connection_info


class Client(AsyncKernelClient):
    """Knows that a kernel is ready by what it says; the client it comes from then waits until nothing is said for a fifth of a second."""

    async def wait_for_ready(self, timeout: float | None = None) -> None:
        """Until the kernel has answered on its shell channel, and has said there that it is idle where outputs come.

        Raises:
            RuntimeError: it died, or did not answer within `timeout` seconds.
        """
        deadline, asked = None if timeout is None else time.monotonic() + timeout, set()
        while True:
            asked.add(self.kernel_info())
            with contextlib.suppress(Empty):
                reply = await self.get_shell_msg(timeout=1)
                while reply["parent_header"].get("msg_id") not in asked:
                    reply = await self.get_shell_msg(timeout=1)
                if await self._idle(reply["parent_header"]["msg_id"]):
                    return
            if not await self._async_is_alive():
                raise RuntimeError("Kernel died before replying to kernel_info")
            if deadline is not None and time.monotonic() > deadline:
                raise RuntimeError(f"Kernel didn't respond in {timeout:g} seconds")

    async def _idle(self, request: str) -> bool:
        """Whether it is heard that `request` is done; not where this channel was connected too late."""
        with contextlib.suppress(Empty):
            while True:
                said = await self.get_iopub_msg(timeout=HEARD)
                if said["parent_header"].get("msg_id") == request and said["content"].get("execution_state") == "idle":
                    return True
        return False
