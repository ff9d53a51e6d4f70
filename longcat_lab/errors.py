"""The one error type that a person is meant to read, and how a notebook's cell shows it."""

from __future__ import annotations

import errno
import html
import re
import sys
import traceback
from typing import Any

REFUSED = re.compile(r"can't allocate memory|not enough memory|out of memory|std::bad_alloc", re.IGNORECASE)

_waiting: dict[str, BaseException] = {}  # the error of the cell that runs, once it is known


class LabError(Exception):
    """A mistake in what was asked for, said in one sentence: what is wrong, where, what to change.

    The command line prints the sentence and exits with 2, without a traceback; the cell of a notebook shows the sentence too and
    folds the traceback below it. For Python it is an ordinary exception.
    """

    def _render_traceback_(self) -> list[str]:
        """The lines that IPython shows."""
        shell = _shell()
        if hasattr(shell, "kernel"):
            _fold_below(shell, self)
            return [str(self)]
        if shell is not None:  # in a terminal nothing can be folded
            return shell.InteractiveTB.structured_traceback(type(self), self, self.__traceback__)
        return traceback.format_exception(self)


class Diverged(LabError):
    """The loss of a run is no number any more, or has stayed far above where it began. That is a result: the run is over."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, an accelerator, torch on the CPU or the operating system had no memory to give."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, RuntimeError):  # torch has a class of its own for accelerators, which is known by its name without torch
        return type(error).__name__ == "OutOfMemoryError" or REFUSED.search(str(error)) is not None
    return isinstance(error, MemoryError)


def tell_out_of_memory() -> None:
    """In a kernel, from now on: memory that runs out anywhere in a cell is one sentence too. A handler of one's own is left alone."""
    shell = _shell()
    if hasattr(shell, "kernel") and not shell.custom_exceptions:
        shell.set_custom_exc((MemoryError, RuntimeError), _tell)


def _tell(shell: Any, kind: type[BaseException], error: BaseException, frames: Any, tb_offset: int | None = None) -> list[str]:
    if not is_out_of_memory(error):
        shell.showtraceback((kind, error, frames), running_compiled_code=True)
        return []
    _fold_below(shell, error)
    sentence = (
        "Out of memory: free what this kernel holds (restart it, or delete what is large), or make data.batch_size, data.sequence_length "
        "or the model smaller."
    )
    shell._showtraceback(kind, error, [sentence])
    return [sentence]


def _fold_below(shell: Any, error: BaseException) -> None:
    """Shows the whole traceback, folded, when the cell has ended, so that it stands below the sentence."""
    if _waiting.get("error") is error:  # IPython may ask for the lines of one error more than once
        return
    _waiting["error"] = error
    text = html.escape("".join(traceback.format_exception(error)))
    folded = f'<details><summary>Traceback</summary><pre style="white-space:pre-wrap">{text}</pre></details>'

    def show(*_: object) -> None:
        from IPython.display import display

        shell.events.unregister("post_run_cell", show)
        _waiting.clear()
        display({"text/html": folded, "text/plain": "(the traceback is folded)"}, raw=True)

    shell.events.register("post_run_cell", show)


def _shell() -> Any:
    """The running IPython, without importing it."""
    ipython = sys.modules.get("IPython")
    return ipython.get_ipython() if hasattr(ipython, "get_ipython") else None


tell_out_of_memory()
