"""The strokes that the picture of an architecture is made of: boxes, text, lines and bars, as SVG with real text.

Colours of parts are the house palette's. Text has the colour of the page it stands in: JupyterLab's and VS Code's themes say theirs, and
anywhere else it is the grey that is readable on white and on black.
"""

from __future__ import annotations

import html

from longcat_lab.notebook.style import INK

FONT = "DejaVu Sans, Verdana, Arial, sans-serif"
TEXT_COLOUR = f"var(--jp-content-font-color1, var(--vscode-foreground, {INK}))"
WIDTHS = {  # of the font's size, in a wide font; others take `USUAL`
    **dict.fromkeys("ijl", 0.28),
    **dict.fromkeys(" ,.:;|'I", 0.32),
    **dict.fromkeys("frt()-", 0.39),
    **dict.fromkeys("scxyzkv", 0.56),
    **dict.fromkeys("w×+<>=", 0.83),
    **dict.fromkeys("m%M", 0.96),
}
USUAL, BOLD = 0.635, 1.11


class Drawing:
    """Strokes on a sheet; `x` to the right, `y` down, in units of which `width` make the picture's width."""

    def __init__(self, width: float) -> None:
        self.width, self.height = width, 0.0
        self._strokes: list[str] = []

    def text(
        self, x: float, y: float, words: str, *, size: float = 10, bold: bool = False, dim: bool = False, end: bool = False, room: float = 0
    ) -> None:
        """Words with their baseline at `y`; end: `x` is their right end; room: width that they are squeezed into where they need more."""
        look = f' font-size="{size:g}"'
        look += (' font-weight="bold"' if bold else "") + (' opacity=".7"' if dim else "") + (' text-anchor="end"' if end else "")
        if room and sum(WIDTHS.get(c, USUAL) for c in words) * size * (BOLD if bold else 1) > room:
            look += f' textLength="{room:g}" lengthAdjust="spacingAndGlyphs"'
        self._add(f'<text x="{x:g}" y="{y:g}"{look}>{html.escape(words)}</text>', y + 4)

    def box(
        self, x: float, y: float, w: float, h: float, colour: str, *, fill: float = 0.13, dashed: bool = False, weight: float = 1
    ) -> None:
        dash, round = ' stroke-dasharray="4 3"' if dashed else "", min(4, w / 4)
        self._add(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="{round:g}" fill="{colour}" fill-opacity="{fill:g}" '
            f'stroke="{colour}" stroke-width="{weight:g}"{dash}/>',
            y + h + weight,
        )

    def bar(self, x: float, y: float, w: float, share: float, colour: str, h: float = 4) -> None:
        """A bar of which `share` (0 to 1) is filled; a share above 0 can always be seen."""
        filled = max(w * share, 1) if share > 0 else 0
        self._add(f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" fill="{colour}" fill-opacity=".2"/>', y + h)
        self._add(f'<rect x="{x:g}" y="{y:g}" width="{filled:.4g}" height="{h:g}" fill="{colour}"/>', y + h)

    def line(self, *points: tuple[float, float], arrow: bool = True, dashed: bool = False) -> None:
        """A line through `points`, with a head at the last one."""
        way = " ".join(f"{x:g},{y:g}" for x, y in points)
        dash = ' stroke-dasharray="3 3"' if dashed else ""
        self._add(f'<polyline points="{way}" fill="none" stroke="{INK}" stroke-width="1.3"{dash}/>')
        if arrow:
            (x0, y0), (x, y) = points[-2:]
            dx, dy = (x > x0) - (x < x0), (y > y0) - (y < y0)
            tip = f"{x:g},{y:g} {x - 6 * dx - 3 * dy:g},{y - 6 * dy - 3 * dx:g} {x - 6 * dx + 3 * dy:g},{y - 6 * dy + 3 * dx:g}"
            self._add(f'<polygon points="{tip}" fill="{INK}"/>')

    def plus(self, x: float, y: float) -> None:
        """Where something is added to the stream."""
        self._add(f'<circle cx="{x:g}" cy="{y:g}" r="4.5" fill="none" stroke="{INK}" stroke-width="1.3"/>')
        self._add(f'<path d="M{x - 4.5:g} {y:g}h9M{x:g} {y - 4.5:g}v9" stroke="{INK}" stroke-width="1.3"/>')

    def svg(self, description: str) -> str:
        """The picture; `description` is read to those who cannot see it."""
        label = html.escape(description, quote=True)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{label}" viewBox="0 0 {self.width:g} {self.height + 2:g}" '
            f'width="{self.width:g}" style="max-width:100%;height:auto;color:{TEXT_COLOUR}" fill="currentColor" font-family="{FONT}">'
            f"{''.join(self._strokes)}</svg>"
        )

    def _add(self, stroke: str, bottom: float = 0) -> None:
        self._strokes.append(stroke)
        self.height = max(self.height, bottom)
