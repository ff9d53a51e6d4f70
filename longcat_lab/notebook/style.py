"""One look for all figures: static pictures, colours that colour-blind readers can tell apart, readable on white and on black."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

# Okabe and Ito's palette without its black and its yellow, which vanish on one of the two backgrounds.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
MARKERS = ("o", "s", "D", "^", "v", "P")  # a second way to tell arms apart
INK = "#808080"  # text and axes: the same contrast on white and on black
DPI = 144  # of the PNG; it is shown at two thirds of its size, and sharp on fine screens
INCH = 96  # of a page, in its pixels
COLOURS_KEPT, ERROR = 255, 1.0  # colours of a small PNG, and how far they may be from the true ones: the mean, in steps of 255
Bundle = tuple[dict[str, str], dict[str, Any]]  # what a notebook's file holds of an output: mime type to content, and its metadata

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


def png(figure: Figure) -> tuple[bytes, int, int]:
    """The figure as PNG, transparent, without a date; its width and height on a page, in pixels."""
    from PIL import Image

    buffer, small = io.BytesIO(), io.BytesIO()
    with style():
        figure.savefig(buffer, format="png", dpi=DPI, bbox_inches="tight", metadata={"Software": None})
    drawn = Image.open(buffer)
    few = drawn.quantize(COLOURS_KEPT, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    true, near = (np.asarray(each.convert("RGBA"), dtype=np.float32) for each in (drawn, few))
    error = (np.abs(true - near)[..., :3] * true[..., 3:] / 255).mean()  # of what can be seen
    (few if error <= ERROR else drawn).save(small, format="png", optimize=True)  # a map of many shades keeps them
    width, height = (round(size * INCH / DPI) for size in drawn.size)
    return small.getvalue(), width, height


def bundle(figure: Figure, description: str) -> Bundle:
    """The figure as a notebook's output: SVG, PNG for viewers that take no SVG, words for those who take neither.

    No HTML: viewers that do not trust a file (JupyterLab for a notebook that was run elsewhere, pages that show repositories) prefer HTML
    to pictures and strip the SVG in it.
    """
    pixels, width, height = png(figure)
    data = {"image/svg+xml": picture(figure, description), "image/png": base64.b64encode(pixels).decode(), "text/plain": description}
    return data, {"image/png": {"width": width, "height": height, "alt": description}}


def show(figure: Figure, description: str) -> None:
    """Displays the figure in a notebook as a static picture; see `bundle`."""
    from IPython.display import display

    data, metadata = bundle(figure, description)
    display(data, metadata=metadata, raw=True)
