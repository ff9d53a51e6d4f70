"""The form: a configuration's knobs as widgets, in sections that are built when they are opened, with a search over all of them."""

from __future__ import annotations

import html
from collections.abc import Callable
from typing import Any

import ipywidgets

from longcat_lab.config import ConfigError, RunConfig
from longcat_lab.notebook.panel import knobs as schema
from longcat_lab.notebook.panel.controls import ACCENT, Looks, Row, read
from longcat_lab.notebook.panel.knobs import SECTIONS, Knob

FOUND_AT_MOST = 25  # knobs shown by a search
SHORTEST_SEARCH = 2  # characters


class Form:
    """Knobs of a configuration; `widget` is what is shown, `config` the configuration as it is turned.

    A knob that cannot be turned says why, and waits: the configuration stays as it was, and each later turn tries it again together
    with the others, so that settings which only fit together can be turned one after the other.

    Args:
        config: where the knobs stand at first; it is the pinned baseline too.
        on_change: called with the configuration after each change of it or of the baseline. Keep it short: it runs in the kernel's
            main thread, between two turns.
    """

    def __init__(self, config: RunConfig, on_change: Callable[[RunConfig], None] | None = None) -> None:
        self._config = self._baseline = config
        self._on_change = on_change
        self._waiting: dict[str, Any] = {}  # path -> value that did not fit
        self._wrong: dict[str, str] = {}  # path -> why
        self._looks, self._rows = Looks(), {}
        self._laid: dict[ipywidgets.VBox, list[Any]] = {}

        wide = ipywidgets.Layout(width="auto", flex="1 1 auto", margin="0")
        self.search = ipywidgets.Text(placeholder="find a knob by name or meaning", layout=wide, style=self._looks.text)
        self.pin_button = ipywidgets.Button(description="Pin", icon="thumb-tack", tooltip="compare with the configuration as it is now")
        self.back_button = ipywidgets.Button(description="All back", icon="undo", tooltip="every knob as in the pinned configuration")
        for button in (self.pin_button, self.back_button):
            button.layout = ipywidgets.Layout(width="90px", margin="0 0 0 4px")
        self.message = ipywidgets.HTML(style=self._looks.html)
        self.found = ipywidgets.VBox(layout=ipywidgets.Layout(display="none"))
        self.sections = {name: ipywidgets.VBox() for name in SECTIONS}
        self.accordion = ipywidgets.Accordion(list(self.sections.values()), titles=tuple(SECTIONS))
        # Boxes scroll what does not fit, so that this row would be the first to give up its height to a long form.
        row = ipywidgets.HBox([self.search, self.pin_button, self.back_button], layout=ipywidgets.Layout(flex="0 0 auto"))
        self.widget = ipywidgets.VBox([row, self.message, self.found, self.accordion])
        self.accordion.observe(lambda _: self._refresh(), "selected_index")
        self.search.observe(lambda _: self._refresh(), "value")
        self.pin_button.on_click(lambda _: self.pin())
        self.back_button.on_click(lambda _: self.set_config(self._baseline))
        self.accordion.selected_index = 0

    @property
    def config(self) -> RunConfig:
        """The last configuration that fits together."""
        return self._config

    @property
    def baseline(self) -> RunConfig:
        """The pinned configuration, against which changes are marked."""
        return self._baseline

    @property
    def waiting(self) -> dict[str, str]:
        """Knobs that could not be turned, by path, and the sentence that says why."""
        return dict(self._wrong)

    def set_config(self, config: RunConfig) -> None:
        """Shows another configuration; what was waiting is dropped. The baseline stays."""
        self._waiting.clear()
        self._wrong.clear()
        self._take(config)

    def pin(self) -> None:
        """Makes the configuration as it is now the baseline."""
        self._baseline = self._config
        self._refresh()
        self._tell()

    def turn(self, path: str, value: Any) -> None:
        """Turns a knob as a person would; one that does not fit waits (see `waiting`), and nothing is raised."""
        tries = [{**self._waiting, path: value}, {path: value}] if self._waiting else [{path: value}]
        for changes in tries:
            try:
                config = schema.turn_all(self._config, changes)
            except ConfigError as error:
                sentence = str(error)
                continue
            for each in changes:
                self._drop(each)
            return self._take(self._retried(config))
        self._waiting[path], self._wrong[path] = value, sentence
        self._refresh()

    def put_back(self, path: str) -> None:
        """Drops a value that waits; else the knob goes to its value in the baseline."""
        if path in self._wrong:
            self._drop(path)
            return self._refresh()
        try:
            config = schema.put_back(self._config, path, self._baseline)
        except ConfigError as error:
            self._wrong[path] = str(error)
            return self._refresh()
        self._take(config)

    def _drop(self, path: str) -> None:
        self._waiting.pop(path, None)
        self._wrong.pop(path, None)
        for inner in [each for each in self._waiting if path.endswith(".kind") and each.startswith(path.removesuffix("kind"))]:
            self._drop(inner)  # a setting of a kind that is not taken after all

    def _retried(self, config: RunConfig) -> RunConfig:
        """`config` with those waiting knobs that now fit by themselves."""
        for path, value in list(self._waiting.items()):
            try:
                config = schema.turn(config, path, value)
            except ConfigError as error:
                self._wrong[path] = str(error)
            else:
                self._drop(path)
        return config

    def _take(self, config: RunConfig) -> None:
        news = config != self._config
        self._config = config
        self._refresh()
        if news:
            self._tell()

    def _tell(self) -> None:
        if self._on_change is not None:
            self._on_change(self._config)

    def _turned(self, knob: Knob, raw: Any) -> None:
        try:
            value = read(knob, raw)
        except ConfigError as error:
            self._waiting.pop(knob.path, None)
            self._wrong[knob.path] = str(error)
            return self._refresh(keep=knob.path)
        self.turn(knob.path, value)

    def _refresh(self, keep: str = "") -> None:
        """Shows what is so now: rows that exist are changed in place, others are made where a section is open.

        keep: a knob whose control keeps what a person wrote.
        """
        differs = schema.changed(self._config, self._baseline)
        shown = self._with_needed()
        for path in [path for path, row in self._rows.items() if not row.knob.alike(shown.get(path))]:
            self._rows.pop(path).close()
        words = self.search.value.casefold().split()
        searching = len(self.search.value.strip()) >= SHORTEST_SEARCH
        for box, display in ((self.found, "" if searching else "none"), (self.accordion, "none" if searching else "")):
            if (box.layout.display or "") != display:
                box.layout.display = display
        if searching:
            hits = [k for k in shown.values() if all(word in f"{k.path} {k.help}".casefold() for word in words)]
            self._lay(
                self.found, hits[:FOUND_AT_MOST], f"{len(hits)} knobs; the first {FOUND_AT_MOST}:" if len(hits) > FOUND_AT_MOST else ""
            )
        opened = self.accordion.selected_index
        for i, (name, box) in enumerate(self.sections.items()):
            if i == opened or box in self._laid:
                self._lay(box, [knob for knob in shown.values() if knob.section == name])
        for path, row in self._rows.items():
            row.describe(shown[path], self._note(path, differs), returns=path in differs or path in self._wrong)
            if path != keep:
                row.put(self._waiting.get(path, shown[path].value))
        self._titles(differs)
        self.message.value = self._sentences(differs)

    def _with_needed(self) -> dict[str, Knob]:
        """The knobs that there are, and behind a kind that waits the settings that it needs."""
        shown = {}
        for knob in schema.knobs(self._config):  # anew each time: a cell may have registered a kind
            path = knob.path
            shown[path] = knob
            if path in self._waiting and knob.type in ("kind", "optional") and self._waiting[path]:
                shown |= {each.path: each for each in schema.needed(self._config, path, self._waiting[path])}
        return shown

    def _lay(self, box: ipywidgets.VBox, wanted: list[Knob], remark: str = "") -> None:
        """Puts the rows of `wanted` into `box`, with a heading where another node begins; rows that are there are used again."""
        plan = [remark, *((knob.path, id(self._rows.get(knob.path))) for knob in wanted)]
        if self._laid.get(box) == plan:
            return
        children: list[Any] = [self._heading(remark)] if remark else []
        group = None
        for knob in wanted:
            if knob.group != group:
                group = knob.group
                children.append(self._heading(group or "run"))
            row = self._rows.get(knob.path)
            if row is None:
                row = self._rows[knob.path] = Row(knob, self._looks, self._turned, self.put_back)
            children.append(row.widget)
        headings = [child for child in box.children if isinstance(child, ipywidgets.HTML)]
        box.children = tuple(children)
        for heading in headings:
            heading.close()
        self._laid[box] = [remark, *((knob.path, id(self._rows[knob.path])) for knob in wanted)]

    def _heading(self, text: str) -> ipywidgets.HTML:
        return ipywidgets.HTML(
            f'<div style="opacity:.65;border-bottom:1px solid #80808055">{html.escape(text)}</div>', style=self._looks.html
        )

    def _note(self, path: str, differs: dict[str, tuple[Any, Any]]) -> str:
        if path in self._wrong:  # here too: the lines on top may be scrolled away
            why = html.escape(self._wrong[path])
            return f' <b style="color:{ACCENT}">✕ not taken</b><div style="color:{ACCENT};font-size:.9em">{why}</div>'
        if path in differs:
            before = "empty" if differs[path][0] is None else str(differs[path][0])
            return f' <span style="color:{ACCENT}">●</span> <span style="opacity:.8">was {html.escape(before[:60])}</span>'
        return ""

    def _titles(self, differs: dict[str, Any]) -> None:
        counts = dict.fromkeys(SECTIONS, 0)
        for path in {*differs, *self._wrong}:
            counts[schema.section_of(path)] += 1
        titles = tuple(f"{name}  ● {count}" if count else name for name, count in counts.items())
        if self.accordion.titles != titles:
            self.accordion.titles = titles

    def _sentences(self, differs: dict[str, Any]) -> str:
        lines = [
            f'<div role="alert" style="line-height:1.3;border-left:4px solid {ACCENT};padding-left:.6em;margin:2px 0">{html.escape(why)} '
            f'<span style="opacity:.65">The configuration stays as it was.</span></div>'
            for why in list(self._wrong.values())[-3:]
        ]
        count = len(differs)
        same = "as pinned" if not count else f"{count} knob{'s differ' if count > 1 else ' differs'} from the pinned configuration"
        return "".join(reversed(lines)) + f'<div style="line-height:1.3;opacity:.65">{same}</div>'
