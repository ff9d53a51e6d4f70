"""One look for all figures: static SVG, colours that colour-blind readers can tell apart, readable on white and on black."""

from __future__ import annotations

import html
import io
from collections.abc import Iterator
from contextlib import contextmanager

import matplotlib
from matplotlib.figure import Figure

# Okabe and Ito's palette without its black and its yellow, which vanish on one of the two backgrounds.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
MARKERS = ("o", "s", "D", "^", "v", "P")  # a second way to tell arms apart
INK = "#808080"  # text and axes: the same contrast on white and on black

SETTINGS = {
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": INK,
    "grid.alpha": 0.2,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "font.size": 9,
    "font.family": "DejaVu Sans",  # comes with matplotlib, so that pictures do not depend on the machine
    "lines.linewidth": 1.6,
    "svg.hashsalt": "longcat_lab",  # same figure, same bytes
    "svg.fonttype": "path",
}


@contextmanager
def style() -> Iterator[None]:
    """Figures made inside look like all others."""
    with matplotlib.rc_context(SETTINGS):
        yield


def svg(figure: Figure) -> str:
    """The figure as SVG text, without a date."""
    buffer = io.StringIO()
    with style():
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def picture(figure: Figure, description: str, name: str = "") -> str:
    """The figure as HTML, with words for those who cannot see it; `name` is what a result page's script finds its points by."""
    of = f'data-figure="{html.escape(name)}" ' if name else ""
    start = f'<svg role="img" aria-label="{html.escape(description)}" {of}style="max-width:100%;height:auto" '
    return svg(figure).replace("<svg ", start, 1)


def show(figure: Figure, description: str, name: str = "") -> None:
    """Displays the figure in a notebook as a static picture; see `picture`."""
    from IPython.display import HTML, display

    display(HTML(picture(figure, description, name)))
