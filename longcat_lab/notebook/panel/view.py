"""The panel's widgets: knobs, budget and picture, the buttons, a line of status, the curves, the runs to compare with."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import ipywidgets

from longcat_lab.config import RunConfig
from longcat_lab.errors import LabError
from longcat_lab.notebook.panel.budget_view import budget_html
from longcat_lab.notebook.panel.curves import Curves
from longcat_lab.notebook.panel.form import Form
from longcat_lab.notebook.panel.picture import architecture_svg
from longcat_lab.notebook.style import COLOURS
from longcat_lab.parallel.layout import make_layout

LOOK = """<style>
.longcat-panel-wrong { color: var(--jp-error-color1, #b3261e); font-weight: 600; }
.longcat-panel-layout { opacity: .75; }
.longcat-panel-status pre { max-height: 16em; overflow: auto; }
</style>"""
BAR = (
    '<div style="height:4px;line-height:0;background:var(--jp-border-color2,#ccc)">'
    f'<div style="height:4px;width:{{:.2f}}%;background:{COLOURS[0]}"></div></div>'
)


class Frame(ipywidgets.VBox):
    """What a notebook's file keeps of the widgets is this text, for readers without a kernel."""

    def __init__(self, children: Any, words: str) -> None:
        super().__init__(children)
        self._words = words
        self.add_class("longcat-panel")

    def __repr__(self) -> str:
        return self._words


class Live:
    """A line of status, how much is done, and the curves: what a training shows while it goes on."""

    def __init__(self) -> None:
        self.look = ipywidgets.HTML(LOOK)
        self.status = ipywidgets.HTML(layout=ipywidgets.Layout(flex="1 1 auto", margin="2px 0 0 12px"))
        self.status.add_class("longcat-panel-status")
        self.bar = ipywidgets.HTML(layout=ipywidgets.Layout(width="100%", margin="0 0 4px 0"))
        self.curves = Curves()

    def say(self, sentence: str, share: float | None, as_html: bool = False) -> None:
        """The line of status, and how much is done (0 to 1; None: nothing to show)."""
        self.status.value = sentence if as_html else html.escape(sentence)
        self.bar.value = "" if share is None else BAR.format(100 * share)


class View:
    """The widgets of one panel.

    Args:
        nproc: how many processes Train takes at first; `processes` holds how many now.
        on_train, on_stop: called by the buttons, in the kernel's main thread.
        on_compare: called when other runs are chosen (`chosen`).
    """

    def __init__(
        self,
        config: RunConfig,
        nproc: int,
        words: str,
        on_train: Callable[[], None],
        on_stop: Callable[[], None],
        on_compare: Callable[[], None],
    ) -> None:
        self._offering, self._live = False, Live()
        self.form = Form(config, self._turned)
        self.budget, self.drawing = ipywidgets.HTML(), ipywidgets.HTML()
        self.train = ipywidgets.Button(description="Train", button_style="primary", icon="play", tooltip="train this configuration")
        self.stop = ipywidgets.Button(description="Stop", icon="stop", disabled=True, tooltip="end after this step; the checkpoint is kept")
        # No bounds: such a box would put a wrong number right without a word, and there is a sentence for it.
        self.processes = ipywidgets.IntText(
            nproc,
            description="processes",
            tooltip="that train, laid out as the knobs under parallel say",
            layout=ipywidgets.Layout(width="124px", flex="0 0 auto"),
            style={"description_width": "68px"},
        )
        self.laid_out = ipywidgets.HTML()
        self.status, self.curves = self._live.status, self._live.curves
        self.earlier = ipywidgets.SelectMultiple(layout=ipywidgets.Layout(width="100%", height="84px"))
        # Not in an accordion: what can be drawn beside the live run is one of the first things that a person looks for.
        beside = [ipywidgets.HTML("drawn beside it (Ctrl or ⌘ for several):"), self.earlier]
        self.beside = ipywidgets.VBox(beside, layout=ipywidgets.Layout(width="100%", display="none"))
        half = {"flex": "1 1 440px", "min_width": "0", "max_height": "560px", "overflow": "auto"}
        knobs = ipywidgets.Box([self.form.widget], layout=ipywidgets.Layout(**half))
        costs = ipywidgets.VBox([self.drawing, self.budget], layout=ipywidgets.Layout(**half))
        top = ipywidgets.Box([knobs, costs], layout=ipywidgets.Layout(display="flex", flex_flow="row wrap", width="100%", grid_gap="16px"))
        line = ipywidgets.HBox(
            [self.train, self.stop, self.processes, self.status],
            layout=ipywidgets.Layout(align_items="flex-start", width="100%", margin="8px 0 2px 0"),
        )
        self.widget = Frame([self._live.look, top, line, self.laid_out, self._live.bar, self.curves, self.beside], words)
        self.train.on_click(lambda _: on_train())
        self.stop.on_click(lambda _: on_stop())
        self.earlier.observe(lambda _: None if self._offering else on_compare(), "value")
        self.processes.observe(lambda _: self._lay_out(self.form.config), "value")
        self._turned(config)

    def _lay_out(self, config: RunConfig) -> None:
        """Below the buttons: how Train would lay several processes out, or why it could not."""
        wanted = max(1, self.processes.value)
        try:
            layout = make_layout(config, wanted)
        except LabError as error:
            self.laid_out.value = f'<span class="longcat-panel-wrong">{html.escape(str(error))}</span>'
        else:
            self.laid_out.value = f'<span class="longcat-panel-layout">Train starts {layout.told()}.</span>' if wanted > 1 else ""

    def _turned(self, config: RunConfig) -> None:
        self._lay_out(config)
        self.budget.value = budget_html(config, self.form.baseline)
        self.drawing.value = architecture_svg(config, self.form.baseline)

    def close(self) -> None:
        """Takes the widgets off the page, and out of the kernel."""
        waiting, found = [self.widget, *(row.widget for row in self.form._rows.values())], []
        while waiting:
            widget = waiting.pop()
            found.append(widget)
            waiting += getattr(widget, "children", ())
        for widget in found:
            widget.close()

    def offer(self, runs: dict[str, Path], chosen: Iterable[Path]) -> None:
        """The runs that can be drawn beside the live one: name to folder, and which are. Nobody is called."""
        chosen, self._offering = set(chosen), True
        if tuple(runs.items()) != self.earlier.options:
            self.earlier.options = tuple(runs.items())
        self.earlier.value = tuple(folder for folder in runs.values() if folder in chosen)
        self.beside.layout.display = "" if runs else "none"
        self._offering = False

    @property
    def chosen(self) -> dict[str, Path]:
        """Name to folder of the runs to draw beside."""
        return {name: folder for name, folder in self.earlier.options if folder in self.earlier.value}

    def say(
        self, sentence: str, share: float | None, *, trains: bool, stopping: bool = False, guest: bool = False, as_html: bool = False
    ) -> None:
        """As `Live.say`, and which button can be pressed.

        guest: what trains is not what Train would train.
        """
        self._live.say(sentence, share, as_html)
        self.train.disabled = trains and not guest
        self.stop.disabled = not trains or stopping
