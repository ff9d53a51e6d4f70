"""What a result page is made of, before it is HTML: tables of cells and lines of text, each under a name.

The page shows the parts, its JSON holds them, and the check makes them again from the folder: so all three can be compared.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

NONE = "–"  # shown where there is no value


@dataclass(frozen=True)
class Cell:
    """One field of a table.

    Attributes:
        text: as it is shown.
        value: what the text was rounded from; None where it is no number.
        links: (words, address relative to the page); their words stand for the text.
    """

    text: str
    value: float | None = None
    links: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Table:
    """Rows under columns; the first cell of a row names it. `marked` is a column that is shown marked."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    marked: tuple[str, ...] = ()


@dataclass(frozen=True)
class Lines:
    """Paragraphs of text, or the items of a list, or one text as it stands (`pre`, folded under `title`)."""

    lines: tuple[str, ...]
    kind: str = "p"
    title: str = ""


Part = Table | Lines


def finite(value: Any) -> float | None:
    """The value as a float, or None where it is none or not finite."""
    if isinstance(value, bool) or value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def number(value: Any, digits: int = 4) -> Cell:
    """A number with so many digits after the point and its thousands apart."""
    known = finite(value)
    return Cell(NONE) if known is None else Cell(f"{known:,.{digits}f}", known)


def figures(value: Any, digits: int = 3, sign: bool = False) -> Cell:
    """A number with so many significant digits; with its sign where asked for."""
    known = finite(value)
    if known is None:
        return Cell(NONE)
    return Cell(f"{known:{'+' if sign and known else ''}.{digits}g}", known)


def marked(cell: Cell, words: str) -> Cell:
    """The cell with words in brackets that nobody may read its number without; as it is where there are none."""
    return Cell(f"{cell.text} ({words})", cell.value) if words else cell


def short(value: Any, unit: str = "") -> Cell:
    """Three significant digits and a prefix: 12.3 M, 4.56 T."""
    known = finite(value)
    if known is None:
        return Cell(NONE)
    for factor, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(known) >= factor:
            return Cell(f"{_three(known / factor)} {prefix}{unit}", known)
    return Cell(f"{_three(known)} {unit}".rstrip(), known)


def _three(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(rows: list[dict[str, Any]], marked: tuple[str, ...] = ()) -> Table:
    """A table from rows of cells or texts; the first row's keys are the columns."""
    columns = tuple(rows[0]) if rows else ()
    cells = tuple(tuple(value if isinstance(value, Cell) else Cell(str(value)) for value in row.values()) for row in rows)
    return Table(columns, cells, marked)


def plain(parts: dict[str, Part]) -> dict[str, Any]:
    """The parts as data for JSON; a cell is its text, or [text, value] where it is a number."""
    found: dict[str, Any] = {}
    for name, part in parts.items():
        if isinstance(part, Lines):
            found[name] = list(part.lines)
        else:
            rows = [[cell.text if cell.value is None else [cell.text, cell.value] for cell in row] for row in part.rows]
            found[name] = {"columns": list(part.columns), "rows": rows}
    return found
