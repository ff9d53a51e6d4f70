"""`lab.panel(config)`: knobs, what they cost, training beside the kernel, live curves; and the same without a browser."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from longcat_lab.config import RunConfig, load
from longcat_lab.errors import LabError
from longcat_lab.notebook.panel import words
from longcat_lab.notebook.panel.earlier import compared, config_of, is_of, run_of, runs_in, same
from longcat_lab.notebook.panel.ending import overview
from longcat_lab.notebook.panel.frontend import NOTHING, Line, Place, cell, has_widgets, plain, running_loop
from longcat_lab.notebook.panel.showing import Showing, pause
from longcat_lab.notebook.panel.trainer import Training, trains_in
from longcat_lab.training import Run, launch

POLL = 0.1  # seconds; short, so that the kernel's interrupt is prompt too
BESIDE = 2  # earlier runs that are drawn without being asked for
_SHOWN: list[Panel] = []  # those with widgets; a cell that runs again closes the one that it had made


class Panel(Showing):
    """The panel of one configuration. The last line of a cell shows it; `run = await panel.train()` presses Train and waits.

    What it trains lies in `path`/IDENTITY and goes on without the page, without the cell and without the kernel (blocks that are defined
    in the notebook itself are trained in the kernel). A panel that is made while its configuration trains in `path` shows that run and
    waits for it; while only others train there, its widgets show one of them until Train is pressed. A cell that runs again closes the
    panel that it had made before.

    Args:
        config: a configuration, or a preset's name.
        path: folder of the runs.
        compare: runs, their folders or folders with runs, to draw beside the live one.
        interactive: widgets or static pictures; None: widgets where the cell was sent by a page that can show them. papermill,
            nbconvert and scripts have none.
        nproc: processes that Train takes, laid out as `parallel` says; None: one.

    Attributes:
        config: as the knobs stand. nproc: as the field beside Train stands.
        run: the run of the last training, or None; never one that another configuration trains.
    """

    def __init__(
        self,
        config: RunConfig | str,
        path: str | Path = "runs/panel",
        compare: Iterable[Any] = (),
        interactive: bool | None = None,
        nproc: int | None = None,
    ) -> None:
        config = config if isinstance(config, RunConfig) else load(config)
        launch.check_number(1 if nproc is None else nproc)
        super().__init__(config, compared(compare), nproc or 1)
        self.path, self._shut = Path(path), False
        self._loop = running_loop()
        self.interactive = has_widgets() if interactive is None else interactive
        alive = [folder.resolve() for folder in trains_in(self.path)]
        own = next((folder for folder in alive if is_of(folder, config)), None)
        live = own or (alive[0] if alive and self.interactive else None)
        before = None if live else run_of(config, self.path)
        self._cell = cell()
        if self.interactive:
            self._take_the_place()
            from longcat_lab.notebook.panel.view import View

            about = f"Run this cell again to see the panel of {self.path} live."
            self._view = View(config, self._nproc, about, self._press_train, self.stop, self._chosen)
            self._view.say(words.idle(config), None, trains=False)
            others = [folder for folder in runs_in(self.path) if folder not in (live, before)]
            self._offer([*self._compare, *others[: max(0, BESIDE - len(self._compare))]])
        if live is not None:
            training = Training.attach(live, config if own else config_of(live))
            self._guest = None if own else training
            self._begin(training)
        elif before is not None:
            with self._at_no_cost():
                self._show_before(before)
        elif self._view:
            with self._at_no_cost():
                self._view.curves.show(None)  # what will be drawn beside it can be looked at before

    @property
    def run(self) -> Run | None:
        if self._guest is not None:
            return None
        if self._training is not None:
            return self._training.run
        return Run(self._follower.folder) if self._follower else None

    def stop(self) -> None:
        """Asks the run that is shown to end after this step, with a checkpoint; returns at once. Training it again goes on."""
        if self._trains:
            self._training.stop()
            self._refresh()

    def close(self) -> None:
        """Takes the widgets away and follows nothing any more; what trains goes on."""
        with self._lock:
            if self in _SHOWN:
                _SHOWN.remove(self)
            self._shut = True
            if self._training is not None:
                self._training.leave()
            if self._view is not None:
                self._config, self._nproc, view, self._view = self.config, self.nproc, self._view, None
                self.interactive, self._places = False, []
                view.close()

    def _take_the_place(self) -> None:
        """Closes the panels that an earlier run of this cell has made (where cells are not known: any other one) for the same folder."""
        place, now = self._cell
        for other in list(_SHOWN):
            there, then = other._cell
            if other.path.resolve() == self.path.resolve() and there == place and (now is None or then != now):
                other.close()
        _SHOWN.append(self)

    async def train(self) -> Run:
        """Trains the configuration as the knobs stand, as the Train button does, and waits for the end. A kernel interrupt is a Stop.

        Returns:
            The run: finished, or interrupted where it was stopped.

        Raises:
            LabError: the training failed, knobs are not taken, they do not fit the number of processes, or this panel trains another
                configuration.
        """
        training, line = self._start(), None if self._view else Line()
        try:
            while not training.ended:
                await asyncio.sleep(POLL)
                if line:
                    if run := self._follower_now():
                        run.refresh()
                    line.say(words.progress(training, run))
        except (KeyboardInterrupt, asyncio.CancelledError):
            training.stop()
            while not training.ended:
                await asyncio.sleep(POLL)
        self._close(training)
        if line:
            summary = words.summary(self._follower) if self._follower else ""
            said = training.said if training.phase == "failed" else summary or training.said
            line.say(f"{said} {self._undrawn}".strip(), last=True)
        if training.phase == "failed":
            raise LabError(training.said)
        if training.run is None:
            raise LabError("The training was stopped before its first step: there is no run to give back; train again.")
        return training.run

    # --- starting -----------------------------------------------------------------------------------------------------------------

    def _start(self) -> Training:
        config = self.config
        if self._trains and self._training is not self._guest:
            if same(self._training.config, config):
                return self._training
            raise LabError(f"{self._training.folder} trains in this panel already: wait for it or stop it with panel.stop().")
        if self._view and self._view.form.waiting:
            knob, why = next(iter(self._view.form.waiting.items()))
            raise LabError(f"The knob {knob} is not taken, set it right or put it back first: {why}")
        training = Training.start(config, self.path, self.nproc)
        if self._guest is not None:
            self._guest.leave()
            self._guest = None
        return self._begin(training)

    def _press_train(self) -> None:
        try:
            self._start()
        except LabError as error:
            self._view.say(words.failed(str(error), ""), None, trains=self._trains, guest=self._is_guest, as_html=True)

    def _begin(self, training: Training) -> Training:
        self._training, self._follower, self._figure, self._ending, self._picture = training, None, "", "", NOTHING
        with self._at_no_cost():
            self._fill()
        if self._view:
            self._refresh()
            threading.Thread(target=self._watch, args=(training,), name="longcat_lab panel", daemon=True).start()
        return training

    # --- following: a background thread, so that the panel lives without a cell that runs -----------------------------------------

    def _watch(self, training: Training) -> None:
        while self._training is training and not training.ended and not self._shut:
            began = time.monotonic()
            with contextlib.suppress(Exception):  # a page that has gone, a folder that is being written: the next update shows it
                self._refresh()
            training.wait(pause(time.monotonic() - began))
        if self._training is not training or self._shut:
            return
        if self._loop is not None and self._loop.is_running():
            # The picture is drawn in the kernel's main thread: the drawing library's settings belong to the whole process.
            self._loop.call_soon_threadsafe(self._close, training)
        else:
            self._close(training)

    # --- display ------------------------------------------------------------------------------------------------------------------

    def _ipython_display_(self) -> None:
        from IPython.display import display

        self._loop = running_loop() or self._loop
        if self._view:
            display(self._view.widget)
        else:
            words, (data, metadata) = overview(self._config, self.path)
            display({"text/html": words, "text/plain": plain(words)}, raw=True)
            display(data, metadata=metadata, raw=True)
        self._places.append(Place())
        if self._trains:
            self._fill()
        else:
            with self._at_no_cost():
                self._draw(self._said)

    def __repr__(self) -> str:
        return f"Panel({str(self.path)!r}, {self._training.phase if self._training else 'ready'})"
