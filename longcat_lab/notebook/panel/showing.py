"""What a panel shows: the line of status, the curves, how a training ended, other runs beside it. `panel.Panel` decides of what."""

from __future__ import annotations

import contextlib
import html
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from longcat_lab.ablation.job import one_line
from longcat_lab.config import RunConfig
from longcat_lab.notebook.panel import words
from longcat_lab.notebook.panel.earlier import config_of, named, runs_in, same
from longcat_lab.notebook.panel.ending import AGAIN, ending
from longcat_lab.notebook.panel.follow import Follower, read_all
from longcat_lab.notebook.panel.frontend import NOTHING, Place
from longcat_lab.notebook.panel.trainer import Training

if TYPE_CHECKING:
    from longcat_lab.notebook.panel.view import View

REFRESH, SELDOM = 0.5, 5.0  # seconds between two updates of the widgets: at least, at most
SHARE = 0.05  # of the time that updates may take


def pause(spent: float) -> float:
    """Seconds until the next update of the widgets, when the last one has taken `spent`."""
    return min(SELDOM, max(REFRESH, spent / SHARE))


def share(run: Follower) -> float | None:
    """How much of the run is done, 0 to 1; None before its first step in this sitting."""
    told = run.progress
    return told["step"] / max(1, told["steps"]) if told else None


class Showing:
    """The half of a panel that shows. Without widgets (`_view` is None) only the static picture is left of it."""

    path: Path

    def __init__(self, config: RunConfig, compare: list[Path], nproc: int) -> None:
        self._config, self._compare, self._nproc = config, compare, nproc
        self._view: View | None = None
        self._training: Training | None = None
        self._guest: Training | None = None  # a training of another configuration, which is shown because it goes on here
        self._follower: Follower | None = None
        self._closed: Training | None = None  # the training whose end has been shown
        self._places: list[Place] = []
        self._lock = threading.RLock()
        self._figure = self._ending = self._said = ""  # the picture's key, its summary as HTML, a sentence that stands for that
        self._picture = NOTHING
        self._undrawn = ""  # why there is no picture
        self._listed: Path | None = None  # the run beside which others are offered

    @property
    def config(self) -> RunConfig:
        return self._view.form.config if self._view else self._config

    @property
    def nproc(self) -> int:
        return self._view.processes.value if self._view else self._nproc

    @property
    def _trains(self) -> bool:
        return self._training is not None and not self._training.ended

    @property
    def _is_guest(self) -> bool:
        return self._guest is not None and self._training is self._guest

    def _follower_now(self) -> Follower | None:
        folder = self._training.folder if self._training else None
        if folder is not None and (self._follower is None or self._follower.folder != folder):
            self._follower = Follower(folder)
        return self._follower

    def _refresh(self) -> None:
        """Shows what is new. Any thread."""
        with self._lock:
            training = self._training
            if self._view is None or training is None or training.ended:
                return
            run = self._follower_now()
            state = {"trains": True, "stopping": training.stopping, "guest": self._is_guest}
            if run is None:
                self._view.say(words.progress(training, None), None, **state)
                return
            if run.folder != self._listed:  # its name is known now
                self._listed, before = run.folder, self._listed
                self._offer([*self._view.chosen.values(), *([before] if before else [])])
            news = run.refresh()
            remark = f" · {words.GUEST}" if self._is_guest else ""
            self._view.say(words.progress(training, run) + remark, share(run) if training.phase == "training" else None, **state)
            if news:
                self._view.curves.show(run, self._name(training.config))

    def _close(self, training: Training) -> None:
        """Shows how it ended: the last point, the sentence, the static picture. Once for each training, in the main thread."""
        with self._lock:
            if self._closed is training or self._training is not training:
                return
            self._closed = training
            failed = training.phase == "failed"
            with self._at_no_cost():
                self._follower_now()
                if self._follower:
                    self._follower.refresh()
                if self._view:
                    self._say_end(words.failed(training.said, training.log_tail()) if failed else "", training.said)
                    self._offer(self._view.chosen.values())
                self._draw(training.said if failed else "")

    @contextlib.contextmanager
    def _at_no_cost(self) -> Iterator[None]:
        """For what is only shown: a failure there becomes a sentence in the line of status, the run is given back all the same."""
        self._undrawn = ""
        try:
            yield
        except Exception as error:  # names and numbers come from files of anybody's
            self._undrawn = one_line(f"The picture of the run could not be drawn: {type(error).__name__}: {error}")
            if self._view:
                said = f"{self._view.status.value} {words.failed(self._undrawn, '')}"
                self._view.say(said, None, trains=self._trains, guest=self._is_guest, as_html=True)

    def _say_end(self, as_html: str, said: str) -> None:
        go_on = "training it again" if self._is_guest else "Train"
        sentence = as_html or (words.summary(self._follower, go_on) if self._follower else "") or said
        sentence += f" {words.GUEST_ENDED}" if self._is_guest else ""
        done = self._follower is not None and self._follower.record.get("status") == "finished" and not as_html
        self._view.say(sentence, 1.0 if done else None, trains=False, as_html=bool(as_html))

    def _show_before(self, folder: Path) -> None:
        self._follower = Follower(folder)
        self._follower.refresh()
        if self._view:
            self._listed = folder
            self._offer(self._view.chosen.values())
            self._say_end("", "")
        self._draw()

    def _draw(self, said: str = "") -> None:
        """The static picture, in each place where the panel stands; the canvas hides where it is shown."""
        run = self._follower if self._follower and self._follower.record else None
        self._said, self._ending, self._figure, self._picture = said, "", "", NOTHING
        if run and self._places:
            self._ending, self._figure, self._picture = ending(run.folder, self._beside(), said)
        elif said:
            self._ending = f"<p>{html.escape(said)}</p>"
        self._fill()
        if self._view and run:
            self._view.curves.show(run, self._name(config_of(run.folder)), self._figure)

    def _fill(self) -> None:
        """Puts what stands in the notebook's file, below the widgets or the overview, into each place."""
        for place in self._places:
            place.show((AGAIN if self._view else "") + (self._ending or '<div class="longcat-panel-ending"></div>'), self._picture)

    # --- other runs ---------------------------------------------------------------------------------------------------------------

    def _offer(self, chosen: Iterable[Path]) -> None:
        """Lists the other runs, and draws `chosen` of them beside the live one from its next point on."""
        own = self._follower.folder if self._follower else None
        folders = [folder for folder in dict.fromkeys([*self._compare, *runs_in(self.path)]) if folder != own]
        self._view.offer(named(folders, self.config), chosen)
        self._view.curves.set_earlier(read_all(self._view.chosen))

    def _beside(self) -> dict[str, Path]:
        return self._view.chosen if self._view else named(self._compare, self._config)

    def _chosen(self) -> None:
        with self._lock:
            self._view.curves.set_earlier(read_all(self._view.chosen))
            if self._trains or not self._follower:
                self._view.curves.show(self._follower, self._name(self._training.config if self._training else None))
            else:
                with self._at_no_cost():
                    self._draw(self._said)

    def _name(self, config: RunConfig | None) -> str:
        return "this run" if config is None or same(config, self.config) else "another run (the knobs are for the next one)"
