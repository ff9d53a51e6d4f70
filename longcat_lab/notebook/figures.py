"""The figures: curves of runs, paired differences with their intervals, where a model's parameters and FLOPs are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from longcat_lab.notebook.style import COLOURS, INK, MARKERS, style

if TYPE_CHECKING:
    import pandas

    from longcat_lab.ablation import Verdict


def curves(
    runs: Mapping[str, Sequence[pandas.DataFrame]], metric: str = "loss", label: str = "training loss (nats a token)", skip: float = 0.05
) -> Figure:
    """A line an arm: the mean over its seeds, and a band from the lowest to the highest.

    Args:
        runs: arm to the metrics of its runs (a table of steps each).
        skip: share of the first steps that is not drawn, so that the fall at the start does not flatten the rest.
    """
    with style():
        figure = Figure(figsize=(7.2, 3.4))
        axes = figure.add_subplot()
        for index, (name, tables) in enumerate(runs.items()):
            tables = [table for table in tables if metric in table]
            if not tables:
                continue
            shared = sorted(set.intersection(*(set(table["tokens"]) for table in tables)))
            shared = [x for x in shared if x >= skip * max(shared)]
            values = np.array([table.set_index("tokens")[metric].loc[shared].to_numpy() for table in tables])
            colour = COLOURS[index % len(COLOURS)]
            axes.plot(shared, values.mean(0), color=colour, label=name, marker=MARKERS[index % len(MARKERS)], markevery=0.2, markersize=4)
            if len(tables) > 1:
                axes.fill_between(shared, values.min(0), values.max(0), color=colour, alpha=0.18, linewidth=0)
        axes.set_xlabel("training tokens")
        axes.set_ylabel(label)
        axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1e6:g} M" if x >= 1e6 else f"{x / 1e3:g} k")
        axes.legend()
    return figure


def differences(verdicts: Sequence[Verdict], smallest_effect: float, metric: str) -> Figure:
    """A row a claim: each seed's paired difference, their mean and interval; the grey band holds what is too small to matter."""
    with style():
        figure = Figure(figsize=(7.2, 0.9 + 0.65 * max(1, len(verdicts))))
        axes = figure.add_subplot()
        axes.axvspan(-smallest_effect, smallest_effect, color=INK, alpha=0.15, linewidth=0)
        axes.axvline(0, color=INK, linewidth=0.8)
        for row, verdict in enumerate(verdicts):
            c, colour = verdict.contrast, COLOURS[row % len(COLOURS)]
            if c.n == 0:
                continue
            if np.isfinite(c.low):
                axes.plot([c.low, c.high], [row, row], color=colour, linewidth=2.5, solid_capstyle="butt")
            axes.plot(c.mean, row, "o", color=colour, markersize=7)
            axes.plot(list(c.differences), [row + 0.22] * c.n, "|", color=colour, markersize=9)
        axes.set_yticks(range(len(verdicts)), [f"{v.contrast.better} − {v.contrast.than}\n{v.verdict}" for v in verdicts])
        axes.set_ylim(len(verdicts) - 0.4, -0.6)
        axes.grid(False, axis="y")
        axes.set_xlabel(f"difference in {metric}, paired by seed (left of the grey band: better by an amount that matters)")
    return figure


def architecture_costs(tables: Mapping[str, pandas.DataFrame]) -> Figure:
    """Two stacked bars a model, from `lab.budget`: where its parameters are, and where its FLOPs are."""
    with style():
        figure = Figure(figsize=(7.2, 0.8 + 0.45 * len(tables)))
        parts = list(dict.fromkeys(part for table in tables.values() for part in table.index if not part.startswith("total")))
        for column, (quantity, title) in enumerate((("params", "parameters"), ("FLOPs/token", "forward FLOPs a token"))):
            axes = figure.add_subplot(1, 2, column + 1)
            for row, table in enumerate(tables.values()):
                left = 0.0
                for index, part in enumerate(parts):
                    width = float(table[quantity].get(part, 0))
                    axes.barh(row, width, left=left, color=COLOURS[index % len(COLOURS)], label=part if row == 0 or width else None)
                    left += width
            axes.set_yticks(range(len(tables)), list(tables) if column == 0 else [""] * len(tables))
            axes.invert_yaxis()
            axes.set_title(title)
            axes.grid(False, axis="y")
            axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1e6:g} M" if x >= 1e6 else f"{x / 1e3:g} k" if x else "0")
            axes.locator_params(axis="x", nbins=5)
        handles, labels = axes.get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))
        figure.legend(unique.values(), unique.keys(), loc="upper center", bbox_to_anchor=(0.5, -0.02), ncols=len(unique))
        figure.tight_layout()
    return figure
