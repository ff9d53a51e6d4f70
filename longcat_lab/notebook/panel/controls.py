"""One row of the form: a knob's name and help, the control that turns it, and the button that puts it back."""

from __future__ import annotations

import html
import json
from collections.abc import Callable
from typing import Any

import ipywidgets

from longcat_lab.config.yaml import parse_yaml
from longcat_lab.notebook.panel.knobs import MISSING, Knob

ACCENT = "#D55E00"  # of the house palette: what differs from the pinned configuration
LARGEST = 2**53 - 1  # a browser's integers
SLIDER_STEPS = 200
EMPTY = "(none)"


class Looks:
    """Layouts and styles that all rows of a form share: each would be a message to the browser and an object there."""

    def __init__(self) -> None:
        self.row = ipywidgets.Layout(align_items="flex-start", margin="0 0 6px 0", overflow="visible")
        self.name = ipywidgets.Layout(flex="1 1 0", min_width="0", margin="0 8px 0 0")
        self.control = ipywidgets.Layout(flex="0 0 auto", width="190px", margin="0")
        self.button = ipywidgets.Layout(flex="0 0 auto", width="30px", margin="0 0 0 4px", padding="0")
        self.html = ipywidgets.HTML().style
        self.text = ipywidgets.Text().style
        self.box = ipywidgets.Checkbox().style
        self.slider = ipywidgets.IntSlider().style


class Row:
    """A knob's widgets; `widget` is what is shown.

    Args:
        turned: called with the knob and what the control holds (for `read`) when a person has moved it.
        back: called with the path when a person wants the former value.
    """

    def __init__(self, knob: Knob, looks: Looks, turned: Callable[[Knob, Any], None], back: Callable[[str], None]) -> None:
        self.knob, self._turned, self._back, self._looks = knob, turned, back, looks
        self._quiet = False
        self._button: ipywidgets.Button | None = None
        self.name = ipywidgets.HTML(layout=looks.name, style=looks.html)
        self.control = make_control(knob, looks)
        self.control.observe(self._moved, "value")
        self.widget = ipywidgets.HBox([self.name, self.control], layout=looks.row)

    def describe(self, knob: Knob, note: str = "", returns: bool = False) -> None:
        """`note` stands behind the name (HTML); where `returns`, there is a button that puts the knob back."""
        self.knob = knob
        self.name.value = _name(knob, note)
        if returns != (len(self.widget.children) == 3):
            if returns and self._button is None:
                self._button = ipywidgets.Button(icon="undo", tooltip=f"put {knob.label} back", layout=self._looks.button)
                self._button.on_click(lambda _: self._back(self.knob.path))
            self.widget.children = (self.name, self.control, *([self._button] if returns else []))

    def put(self, value: Any) -> None:
        """Shows a value, without telling anybody that the control has moved."""
        shown = shown_as(self.knob, value)
        if self.control.value != shown:
            self._quiet = True
            try:
                self.control.value = shown
            finally:
                self._quiet = False

    def close(self) -> None:
        for widget in (self.widget, self.name, self.control, self._button):
            if widget is not None:
                widget.close()

    def _moved(self, change: dict[str, Any]) -> None:
        if not self._quiet:
            self._turned(self.knob, change["new"])


def make_control(knob: Knob, looks: Looks) -> ipywidgets.DOMWidget:
    """The widget that turns a knob: a slider's ends are the schema's bounds, and it reports when a person is done, not at each key."""
    value = shown_as(knob, knob.value)
    if knob.type in ("bool", "optional"):
        return ipywidgets.Checkbox(value, indent=False, layout=looks.control, style=looks.box, tooltip=knob.help)
    if knob.type in ("choice", "kind"):
        return ipywidgets.Dropdown(options=list(_choices(knob)), value=value, layout=looks.control, style=looks.text, tooltip=knob.help)
    if _written(knob):
        hint = "empty: none" if knob.nullable else "needed" if knob.default is MISSING else ""
        return ipywidgets.Text(value, placeholder=hint, continuous_update=False, layout=looks.control, style=looks.text, tooltip=knob.help)
    return _number(knob, value, looks)


def read(knob: Knob, raw: Any) -> Any:
    """The value that a control holds.

    Raises:
        ConfigError: its text is no YAML.
    """
    if knob.type in ("choice", "kind"):
        return _choices(knob)[raw]
    if knob.type in ("bool", "optional") or not isinstance(raw, str):
        return raw
    if not raw.strip() and knob.nullable:
        return None
    return raw if knob.type == "text" else parse_yaml(raw, f"'{knob.path}'")


def shown_as(knob: Knob, value: Any) -> Any:
    """What a control holds for `value`; the inverse of `read`."""
    if knob.type in ("choice", "kind"):
        return EMPTY if value is None else str(value)
    if knob.type in ("bool", "optional"):
        return bool(value)
    if _written(knob):
        return "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return value


def _written(knob: Knob) -> bool:
    """Whether its control is a line of text: lists, and numbers that may be empty, which number boxes cannot be."""
    return knob.nullable or knob.default is MISSING or knob.type in ("text", "list")


def _choices(knob: Knob) -> dict[str, Any]:
    empty = {EMPTY: None} if knob.nullable else {}
    return {**empty, **{str(choice): choice for choice in knob.choices if choice is not None}}


def _number(knob: Knob, value: Any, looks: Looks) -> ipywidgets.DOMWidget:
    whole = knob.type == "int"
    smallest, most = (-LARGEST, LARGEST) if whole else (-1e308, 1e308)
    # A bound that is itself not allowed is a step away for integers; a float may come as near as it likes, and is refused at the bound.
    low = smallest if knob.lower is None else knob.lower + (whole and knob.lower_open)
    high = most if knob.upper is None else knob.upper - (whole and knob.upper_open)
    rest = {"value": value, "continuous_update": False, "layout": looks.control, "tooltip": knob.help}
    if whole and high - low <= SLIDER_STEPS:
        return ipywidgets.IntSlider(min=low, max=high, step=knob.multiple_of or 1, style=looks.slider, **rest)
    if not whole and high - low <= 1:
        step = 0.001 if knob.upper_open else 0.01
        ends = (min(value, low + step * knob.lower_open), max(value, high - step * knob.upper_open))
        return ipywidgets.FloatSlider(min=ends[0], max=ends[1], step=step, readout_format=".4g", style=looks.slider, **rest)
    # No bounds here: such a box would put a wrong number right without a word, and the schema has a sentence for it.
    if whole:
        return ipywidgets.IntText(step=knob.multiple_of or 1, style=looks.text, **rest)
    return ipywidgets.FloatText(step=None, style=looks.text, **rest)


def _name(knob: Knob, note: str) -> str:
    help = ". ".join(part for part in (knob.help.rstrip("."), knob.range) if part)
    return (
        f'<div title="{html.escape(help)}" style="line-height:1.3;overflow-wrap:anywhere"><b>{html.escape(knob.label)}</b>{note}'
        f'<div style="opacity:.65;font-size:.85em;overflow:hidden;display:-webkit-box;-webkit-line-clamp:2;-webkit-box-orient:vertical">'
        f"{html.escape(help)}</div></div>"
    )
