"""What stands below a cell in which `lab.fit(..., nproc=4)` trains: the panel's line of status and live curves, and in the end its
static picture.

The cell keeps the kernel busy, which can send all the same; nothing here waits for the page.
"""

from __future__ import annotations

import html
import time
from pathlib import Path

from longcat_lab.ablation.job import one_line
from longcat_lab.notebook.panel import words
from longcat_lab.notebook.panel.ending import ending
from longcat_lab.notebook.panel.follow import Follower, state_of
from longcat_lab.notebook.panel.frontend import SAY_EVERY, Place, has_widgets, shell
from longcat_lab.notebook.panel.showing import pause, share
from longcat_lab.training.requests import stop_asked

GO_ON = "running the cell again"


def below(folder: Path, nproc: int) -> Below | None:
    """See `training.launch.view_of`; None outside a kernel."""
    return None if shell() is None else Below(folder, nproc)


class Below:
    """The run in `folder` while `nproc` processes train it for the cell that runs now. Without a page (papermill) it is a line of text."""

    def __init__(self, folder: Path, nproc: int) -> None:
        self.folder, self.nproc, self.said = folder, nproc, ""
        self._run, self._before, self._next = Follower(folder), state_of(folder / "run.json"), 0.0
        self._place, self._live = Place(), None
        if has_widgets():
            from longcat_lab.notebook.panel.view import Frame, Live

            self._live = live = Live()
            self._frame = Frame([live.look, live.status, live.bar, live.curves], "Run this cell again to see its training live.")

    @property
    def phase(self) -> str:
        return "starting" if state_of(self.folder / "run.json") == self._before else "training"

    @property
    def stopping(self) -> bool:
        return stop_asked(self.folder)

    def look(self) -> None:
        began = time.monotonic()
        if began < self._next:
            return
        news, said = self._run.refresh(), words.progress(self, self._run)
        if self._live is None:
            self._place.show({"text/plain": said})
            self._next = began + SAY_EVERY
            return
        if not self._next:
            self._place.show(self._frame._repr_mimebundle_())
        self._live.say(said, share(self._run) if self.phase == "training" else None)
        if news:
            self._live.curves.show(self._run, "this run")
        self._next = time.monotonic() + pause(time.monotonic() - began)

    def end(self, said: str) -> None:
        """The widgets give their place to the static picture; in a page that was reloaded meanwhile nobody can write, and they stay."""
        run = self._run
        run.refresh()
        if not run.record:  # it has never begun, and the call says why
            self._place.show(f"<p>{html.escape(said)}</p>")
            return
        said = said or words.summary(run, GO_ON)
        try:
            summary, key, picture = ending(self.folder, {}, said)
            self._place.show(summary, picture)
        except Exception as error:  # names and numbers come from files of anybody's
            key, said = "", f"{said} {one_line(f'The picture of the run could not be drawn: {type(error).__name__}: {error}')}"
            self._place.show(f"<p>{html.escape(said)}</p>")
        if self._live is not None:
            self._live.say(said, None)
            self._live.curves.show(run, "this run", key)
