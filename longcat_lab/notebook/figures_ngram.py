"""Figures of hashed n-grams before training: collisions by size, how tables fill, what tables tell apart together, and why."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from longcat_lab.blocks.ngram_embedding.numbers import shortest_vector
from longcat_lab.notebook.style import COLOURS, INK, MARKERS, style

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes

    from longcat_lab.blocks.ngram_embedding.analyse import Analysis

SIMPLE = 5  # largest q of the fractions p/q that are marked
LABELLED = 3  # and of those whose name is written
TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10, 15, 20, 30, 50, 100)  # of collisions over a uniform hash's
WINDOW = 1.6  # half a side of the lattice's picture, in square roots of the table's rows


def _fractions(low: float, high: float, largest: int) -> dict[tuple[int, int], float]:
    """(p, q) in lowest terms with q up to `largest`, and p / q from low to high."""
    return {
        (p, q): p / q
        for q in range(1, largest + 1)
        for p in range(math.ceil(low * q - 1e-9), math.floor(high * q + 1e-9) + 1)
        if math.gcd(p, q) == 1
    }


def _line(axes: Axes, index: int, x, y, **more) -> None:
    axes.plot(x, y, color=COLOURS[index % len(COLOURS)], marker=MARKERS[index % len(MARKERS)], **more)


def collision_spikes(table: pandas.DataFrame) -> Figure:
    """Collisions of distinct n-grams over those of a uniform hash, by size; grey lines at simple fractions p/q of the vocabulary.

    Args:
        table: of `collision_sweep`.
    """
    with style():
        figure = Figure(figsize=(7.2, 3.6))
        axes = figure.add_subplot()
        low, high = table["ratio"].min(), table["ratio"].max()
        for (_, q), at in _fractions(low, high, SIMPLE).items():
            axes.axvline(at, color=INK, linewidth=2.4 / q, alpha=0.4, zorder=0)
        axes.axhline(1, color=INK, linestyle="--", linewidth=1.2)
        for index, (family, own) in enumerate(table.groupby("family", sort=False)):
            own = own.sort_values("ratio")
            _line(axes, index, own["ratio"], own["relative"], label=family, markersize=3, linewidth=1.1)
        axes.set_yscale("log")
        low_y, high_y = axes.get_ylim()
        axes.set_yticks([y for y in TICKS if low_y <= y <= high_y], minor=False)
        axes.set_yticks([], minor=True)
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
        axes.set_xlabel("rows of a table over vocabulary (vocab_ratio)")
        axes.set_ylabel("collisions over a uniform hash's")
        axes.grid(False, axis="x")
        _name_fractions(axes, low, high)
        figure.legend(loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=table["family"].nunique())
    return figure


def _name_fractions(axes: Axes, low: float, high: float) -> None:
    """p/q above the marks; thirds only where there is room."""
    named = _fractions(low, high, LABELLED)
    if len(named) > 14:
        named = {key: at for key, at in named.items() if key[1] <= 2}
    if len(named) > 24:
        named = {key: at for key, at in named.items() if key[1] == 1}
    top = axes.secondary_xaxis("top")
    top.set_xticks(list(named.values()), [str(p) if q == 1 else f"{p}/{q}" for p, q in named], fontsize=7.5)
    top.tick_params(length=0, pad=1)
    top.spines["top"].set_visible(False)


def hit_rate(table: pandas.DataFrame) -> Figure:
    """Share of rows that any n-gram has used, against tokens seen; a line an order, dotted what a uniform hash would use.

    Args:
        table: of `hit_rates`.
    """
    with style():
        figure = Figure(figsize=(7.2, 3.2))
        axes = figure.add_subplot()
        for index, (order, own) in enumerate(table.groupby("order")):
            _line(axes, index, own["tokens"], own["hit_rate"], label=f"{order}-grams", markersize=4, markevery=2)
            axes.plot(own["tokens"], own["uniform"], ":", color=COLOURS[index % len(COLOURS)])
        axes.plot([], [], ":", color=INK, label="uniform hash")
        axes.set_xscale("log")
        axes.set_ylim(0, 1.02)
        axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1e6:g} M" if x >= 1e6 else f"{x / 1e3:g} k" if x >= 1e3 else f"{x:g}")
        axes.set_xlabel("tokens seen")
        axes.set_ylabel("share of rows used (hit rate)")
        axes.legend()
    return figure


def table_load(analysis: Analysis) -> Figure:
    """A bar a table: distinct n-grams a row, and the share of tokens whose row serves another n-gram too; an order a colour."""
    table = analysis.table
    panels = (("load", "distinct n-grams a row (load)"), ("sharing", "share of tokens on a shared row"))
    with style():
        figure = Figure(figsize=(7.2, 0.9 + 0.26 * len(table)))
        for number, (column, label) in enumerate(panels):
            axes = figure.add_subplot(1, 2, number + 1)
            axes.barh(range(len(table)), table[column], color=[COLOURS[(order - 2) % len(COLOURS)] for order in table["order"]])
            for row, value in enumerate(table[column]):
                axes.annotate(f"{value:.2f}", (value, row), (3, 0), textcoords="offset points", va="center", fontsize=7.5)
            names = [f"order {order}, table {split + 1}" for order, split in zip(table["order"], table["split"], strict=True)]
            axes.set_yticks(range(len(table)), names if number == 0 else [""] * len(table))
            axes.set_xlim(0, 1.15 * max(table[column].max(), 1e-9))
            axes.invert_yaxis()
            axes.grid(False, axis="y")
            axes.set_xlabel(label)
        figure.tight_layout()
    return figure


def joint_uniqueness(table: pandas.DataFrame) -> Figure:
    """Distinct n-grams that share their rows in all tables of their order, by the number of tables; a ring where the bound promises none.

    Args:
        table: of `joint_sweep`.
    """
    with style():
        figure = Figure(figsize=(7.2, 3.2))
        axes = figure.add_subplot()
        for index, (order, own) in enumerate(table.groupby("order")):
            shift = 0.04 * (index - (table["order"].nunique() - 1) / 2)  # zeros would hide one another
            _line(axes, index, own["tables"] + shift, own["collisions"], label=f"{order}-grams", markersize=5)
            bound = own[own["tables"] == own["needed"]]
            axes.plot(bound["tables"] + shift, bound["collisions"], "o", color=COLOURS[index % len(COLOURS)], mfc="none", ms=13, mew=1.4)
        axes.plot([], [], "o", color=INK, mfc="none", ms=11, mew=1.4, label="fewest tables that tell all apart")
        axes.set_yscale("symlog", linthresh=1)
        axes.set_ylim(-0.35, None)
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:,.0f}")
        axes.set_xticks(sorted(table["tables"].unique()))
        axes.set_xlabel("tables an order (splits)")
        axes.set_ylabel("n-grams with another's rows")
        axes.legend()
    return figure


def lattice(base: int, rows: int, window: int) -> np.ndarray:
    """Differences (dt, dp) of two bigrams that share a row, both up to `window`: int64 [points, 2]."""
    found = []
    for dp in range(-window, window + 1):
        nearest = -(base * dp) % rows
        first = nearest - rows * ((nearest + window) // rows)  # the smallest from -window on
        found += [(dt, dp) for dt in range(first, window + 1, rows)]
    return np.array(found, dtype=np.int64).reshape(-1, 2)


def collision_lattice(tables: Mapping[str, tuple[int, int]]) -> Figure:
    """A panel a table: by how much the ids of two 2-grams differ that share a row, and the shortest such step as an arrow.

    Over the whole plane all sizes have equally many; a bad one has them in lines of tiny steps, which join frequent tokens.

    Args:
        tables: title to (weight of the previous token, rows), as in `HashPlan.weights[1]` and `HashPlan.moduli`.
    """
    with style():
        figure = Figure(figsize=(7.2, 3.9))
        for number, (title, (base, rows)) in enumerate(tables.items()):
            axes = figure.add_subplot(1, len(tables), number + 1)
            window = math.ceil(WINDOW * math.sqrt(rows))
            points = lattice(base, rows, window)
            axes.plot(points[:, 0], points[:, 1], "o", color=COLOURS[0], markersize=4, markeredgewidth=0)
            vector = shortest_vector(base, rows)
            vector = vector if vector[1] > 0 else (-vector[0], -vector[1])
            axes.annotate("", vector, (0, 0), arrowprops={"arrowstyle": "-|>", "color": COLOURS[4], "linewidth": 1.8, "shrinkA": 0})
            axes.set_title(f"{title}\nshortest step ({vector[0]}, {vector[1]})")
            axes.set_xlim(-window, window)
            axes.set_ylim(-window, window)
            axes.set_aspect("equal")
            axes.locator_params(nbins=5)
            axes.set_xlabel("difference of the current id")
            if number == 0:
                axes.set_ylabel("difference of the previous id")
        figure.tight_layout()
    return figure
