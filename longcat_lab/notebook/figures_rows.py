"""Figures of the rows of n-gram tables: how often each is hit, how long it grows, how far one hit moves it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from longcat_lab.notebook.style import COLOURS, MARKERS, style

if TYPE_CHECKING:
    import pandas

POINTS = 200  # of a curve over ranks: more make the picture large and no finer


def row_use(counts: Mapping[str, np.ndarray]) -> Figure:
    """Hits of each row, the most used first; the legend says how many rows were never hit, or once.

    Args:
        counts: name to times hit, whole numbers [M], as of `row_counts`.
    """
    with style():
        figure = Figure(figsize=(7.2, 3.4))
        axes = figure.add_subplot()
        for index, (name, hits) in enumerate(counts.items()):
            used = np.sort(hits[hits > 0])[::-1]
            ranks = np.unique(np.geomspace(1, max(1, len(used)), POINTS).round().astype(int))[: len(used)]
            label = f"{name}: {np.mean(hits == 0):.0%} of rows never, {np.mean(hits == 1):.0%} once"
            colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
            axes.plot(ranks, used[ranks - 1], color=colour, marker=marker, markevery=0.1, markersize=4, label=label)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(0.8, 1.5 * max([1, *(np.count_nonzero(hits) for hits in counts.values())]))
        axes.set_ylim(0.8, 1.5 * max([1, *(int(hits.max()) for hits in counts.values())]))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda x, _: f"{x / 1e6:g} M" if x >= 1e6 else f"{x / 1e3:g} k" if x >= 1e3 else f"{x:g}")
        axes.set_xlabel("row, the most used first")
        axes.set_ylabel("times hit")
        axes.legend()
    return figure


def row_norm_by_frequency(counts: np.ndarray | Mapping[str, np.ndarray], norms: np.ndarray | Mapping[str, np.ndarray]) -> Figure:
    """Median and quartiles of the length of rows, by how often they were hit: 0, 1, 2-3, 4-7, 8-15 and so on.

    Args:
        counts: times hit, whole numbers [M], or name to such. norms: L2 norms [M] under the same names.
    """
    counts, norms = (each if isinstance(each, Mapping) else {"": each} for each in (counts, norms))
    with style():
        figure = Figure(figsize=(7.2, 3.2))
        axes = figure.add_subplot()
        longest = 0
        for index, (name, hits) in enumerate(counts.items()):
            bins = np.where(hits > 0, np.frexp(hits.astype(float))[1], 0)  # 0 | 1 | 2-3 | 4-7 ...
            present = np.unique(bins)
            low, median, high = np.array([np.quantile(norms[name][bins == each], (0.25, 0.5, 0.75)) for each in present]).T
            colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
            axes.plot(present, median, color=colour, marker=marker, markersize=5, label=name or "median")
            axes.fill_between(present, low, high, color=colour, alpha=0.18, linewidth=0, label=None if name else "quartiles")
            longest = max(longest, int(present.max()))
        shown = range(0, longest + 1, 1 + longest // 12)
        axes.set_xticks(shown, ["never" if each == 0 else f"{2 ** (each - 1):,}" for each in shown])
        axes.set_xlabel("times hit, from this many to below twice as many")
        axes.set_ylabel("L2 norm of a row (median, quartiles)")
        axes.legend()
    return figure


def once_hit_displacements(table: pandas.DataFrame) -> Figure:
    """How far a row moves in all after one hit among many steps without: a bar an optimizer's mode and beta2.

    Args:
        table: columns mode, beta2 and displacement, the sum of its steps over the learning rate.
    """
    modes, betas = list(dict.fromkeys(table["mode"])), list(dict.fromkeys(table["beta2"]))
    table = table.assign(rank=table["mode"].map(modes.index)).sort_values(["rank", "beta2"], kind="stable").reset_index(drop=True)
    with style():
        figure = Figure(figsize=(7.2, 0.9 + 0.28 * len(table)))
        axes = figure.add_subplot()
        axes.barh(table.index, table["displacement"], color=[COLOURS[betas.index(beta) % len(COLOURS)] for beta in table["beta2"]])
        for row, value in zip(table.index, table["displacement"], strict=True):
            axes.annotate(f"{value:.3g}", (value, row), (3, 0), textcoords="offset points", va="center", fontsize=8)
        axes.set_yticks(table.index, [f"{mode}, β₂ = {beta:g}" for mode, beta in zip(table["mode"], table["beta2"], strict=True)])
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.set_xlim(0.5 * table["displacement"].min(), 1.6 * table["displacement"].max())
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axes.xaxis.set_minor_formatter(lambda x, _: "")
        axes.grid(False, axis="y")
        axes.set_xlabel("displacement after one hit, in learning rates")
    return figure
