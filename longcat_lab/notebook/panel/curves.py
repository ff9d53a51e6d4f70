"""The live curves: a small canvas in the browser, fed with thinned float32."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import anywidget
import numpy as np
import traitlets

from longcat_lab.notebook.panel.follow import TOGETHER, Follower, panels_of, part
from longcat_lab.notebook.style import COLOURS


class Curves(anywidget.AnyWidget):
    """Small multiples, a panel a curve, over the tokens trained: the live run bold, earlier runs thin.

    Attributes:
        head: what there is to draw and where its numbers are in `live` and `earlier`.
        live, earlier: float32, of each curve all tokens and then all values. Earlier runs are sent when they are chosen, not each time.
    """

    _esm = Path(__file__).with_name("curves.js")
    _css = Path(__file__).with_name("curves.css")
    head = traitlets.Dict().tag(sync=True)
    live = traitlets.Bytes().tag(sync=True)
    earlier = traitlets.Bytes().tag(sync=True)

    def __init__(self, **settings: Any) -> None:
        super().__init__(head={"runs": [], "curves": [], "palette": list(COLOURS)}, **settings)
        self._earlier: tuple[list[dict[str, Any]], bytes] = ([], b"")

    def set_earlier(self, runs: Mapping[str, Follower]) -> None:
        """Chooses what is drawn beside the live run; `show` sends it."""
        self._earlier = pack(runs, "earlier")

    def show(self, run: Follower | None, name: str = "", figure: str = "") -> None:
        """Sends the live run as it is now.

        Args:
            figure: the key of a static picture of the same curves; where the page shows that, the canvas hides.
        """
        runs, live = pack({name: run} if run else {}, "live")
        both = runs + self._earlier[0]
        panels = panels_of(each["series"] for each in both)
        head = {
            "palette": list(COLOURS),
            "runs": both,
            "curves": [{"name": curve, "points": points, "title": title, "unit": unit} for curve, points, title, unit in panels],
            "together": TOGETHER,
            "asked": run.asked() if run else {},
            "load": _load(run) if run and run.load else None,
            "end": _tokens_at_the_end(run) if run else 0,
            "figure": figure,
        }
        with self.hold_sync():  # one message: a header must not arrive without its numbers
            self.head, self.live = head, live
            self.earlier = self._earlier[1]


def pack(runs: Mapping[str, Follower], where: str) -> tuple[list[dict[str, Any]], bytes]:
    """Each run's curves with their places in one block of float32 (in numbers, not bytes), and the block."""
    heads, parts, at = [], [], 0
    for name, run in runs.items():
        series = {}
        for curve, (x, y) in run.curves().items():
            series[curve] = [at, len(x)]
            parts += [x, y]
            at += 2 * len(x)
        heads.append({"name": name, "from": where, "series": series})
    return heads, np.concatenate(parts).tobytes() if parts else b""


def _load(run: Follower) -> dict[str, Any]:
    real, slots = run.real_experts(), len(run.load)
    mean = sum(run.load[:real]) / max(1, real)
    return {"of": run.load_of, "share": [round(share, 6) for share in run.load], "real": min(real, slots), "mean": mean}


def _tokens_at_the_end(run: Follower) -> float:
    data, training = part(run.record, "config", "data"), part(run.record, "config", "training")
    sizes = (data.get("batch_size"), data.get("sequence_length"), training.get("steps"))
    return float(math.prod(sizes)) if all(isinstance(size, int) for size in sizes) else 0.0
