"""What stands on the other side of the cell: a page with widgets, a runner such as papermill, a terminal."""

from __future__ import annotations

import asyncio
import re
import sys
import time
from html import unescape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longcat_lab.notebook.style import Bundle

SAY_EVERY = 3.0  # seconds between two versions of a line of text
NOTHING: Bundle = ({"text/html": "", "text/plain": ""}, {})  # holds the place of an output that comes later
FROM_A_PAGE = ("cellId", "colab")  # in the metadata of a request to execute: JupyterLab, Notebook 7, VS Code; Colab


def shell() -> Any | None:
    """The kernel's shell; None in a script and in a terminal."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return shell if shell is not None and getattr(shell, "kernel", None) is not None else None


def has_widgets() -> bool:
    """Whether the cell that runs now was sent by a page. Pages name the cell they send; papermill, nbclient and nbconvert do not."""
    found = shell()
    if found is None:
        return False
    request = found.kernel.get_parent("shell") or {}
    return any(key in (request.get("metadata") or {}) for key in FROM_A_PAGE)


def cell() -> tuple[str | None, str | None]:
    """The id of the cell that runs now, and of this run of it; None where that is not known."""
    found = shell()
    request = (found.kernel.get_parent("shell") or {}) if found else {}
    return (request.get("metadata") or {}).get("cellId"), (request.get("header") or {}).get("msg_id")


def running_loop() -> asyncio.AbstractEventLoop | None:
    """The loop that the kernel's main thread runs; None in a script."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


class Place:
    """Words and below them a picture in a notebook, which can be replaced later, also when their cell has ended.

    Two outputs, since a viewer that strips pictures in HTML shows one that stands by itself.
    """

    def __init__(self) -> None:
        self._handles: list[Any] = []

    def show(self, words: str | dict[str, Any], picture: Bundle = NOTHING) -> None:
        """`words`: as HTML; or in their place, by mime type, what is shown until there are words: a widget."""
        from IPython.display import display

        said = {"text/html": words, "text/plain": plain(words)} if isinstance(words, str) else words
        outputs = [(said, {}), picture]
        if not self._handles:
            self._handles = [display(data, metadata=metadata, raw=True, display_id=True) for data, metadata in outputs]
        else:
            for handle, (data, metadata) in zip(self._handles, outputs, strict=True):
                handle.update(data, metadata=metadata, raw=True)


def plain(html: str) -> str:
    """The words of a piece of HTML, a line a paragraph."""
    text = re.sub(r"<style>.*?</style>", "", html, flags=re.DOTALL)
    return unescape(re.sub(r"<[^>]*>", "", text.replace("</p>", "\n"))).strip()


class Line:
    """A line of text that is rewritten every few seconds: in a notebook one output, on a terminal one line, in a file its versions."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._said, self._when = "", -SAY_EVERY

    def say(self, text: str, last: bool = False) -> None:
        if text == self._said or (not last and time.monotonic() - self._when < SAY_EVERY):
            return
        kernel, width = shell(), len(self._said)
        self._said, self._when = text, time.monotonic()
        if kernel is None:
            end = "" if sys.stdout.isatty() and not last else "\n"
            print(f"\r{text:{width}}" if sys.stdout.isatty() else text, end=end, flush=True)
            return
        from IPython.display import display

        data = {"text/plain": text}
        if self._handle is None:
            self._handle = display(data, raw=True, display_id=True)
        else:
            self._handle.update(data, raw=True)
