"""The figures: curves of runs, paired differences with their intervals, quality against cost, where parameters and FLOPs are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from longcat_lab.ablation.report.curves import SKIP, bands
from longcat_lab.notebook.style import COLOURS, INK, MARKERS, style

if TYPE_CHECKING:
    import pandas
    from matplotlib.legend import Legend

    from longcat_lab.ablation import Contrast, Verdict


def curves(
    runs: Mapping[str, Sequence[pandas.DataFrame]], metric: str = "loss", label: str = "training loss (nats a token)", skip: float = SKIP
) -> Figure:
    """A line an arm: the mean over its seeds, and a band from the lowest to the highest.

    Args:
        runs: arm to the metrics of its runs (a table of steps each).
        skip: share of the first steps that is not drawn, so that the fall at the start does not flatten the rest.
    """
    return band_curves(bands(runs, metric, skip), label)


def band_curves(series: Sequence[Mapping[str, Any]], label: str, name: str = "") -> Figure:
    """Curves from their points (see `ablation.report.curves.bands`); a seed that ended badly has a thin broken line of its own.

    Args:
        name: of the figure on a result page, whose script finds the curves by it.
    """
    arms = list(dict.fromkeys(each["arm"] for each in series))
    with style():
        figure = Figure(figsize=(7.2, 3.4))
        axes = figure.add_subplot()
        for index, each in enumerate(series):
            order, gid = arms.index(each["arm"]), f"lab-{name}-{index}" if name else None
            colour, marker = COLOURS[order % len(COLOURS)], MARKERS[order % len(MARKERS)]
            if "seed" in each:
                look = marker if len(each["x"]) < 2 else "--"
                axes.plot(each["x"], each["y"], look, color=colour, linewidth=0.9, markersize=4, label=name_of(each), gid=gid)
                continue
            alone = len(each["x"]) == 1  # no line and no band: a larger mark, and a stroke from the lowest to the highest
            marks = {"marker": marker, "markevery": None if alone else 0.2, "markersize": 6 if alone else 4}
            axes.plot(each["x"], each["y"], color=colour, label=each["arm"], gid=gid, **marks)
            if each["n"] > 1 and alone:
                axes.vlines(each["x"], each["low"], each["high"], color=colour, alpha=0.5, gid=f"{gid}-band" if gid else None)
            elif each["n"] > 1:
                band = axes.fill_between(each["x"], each["low"], each["high"], color=colour, alpha=0.18, linewidth=0)
                band.set_gid(f"{gid}-band" if gid else None)
        axes.set_xlabel("training tokens")
        axes.set_ylabel(label)
        axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1e6:g} M" if x >= 1e6 else f"{x / 1e3:g} k")
        _name_legend(axes.legend(), [name_of(each) for each in series], name)
    return figure


def name_of(series: Mapping[str, Any]) -> str:
    """What a legend calls a curve: its arm, or one seed that ended badly."""
    return f"{series['arm']}, seed {series['seed']} ({series['status']})" if "seed" in series else series["arm"]


def _name_legend(legend: Legend, names: Sequence[str], name: str) -> None:
    """Ids for the words of a legend: the figure, and the first series that has their name."""
    for text in legend.get_texts() if name else ():
        if text.get_text() in names:
            text.set_gid(f"lab-{name}-legend-{names.index(text.get_text())}")


def differences(
    verdicts: Sequence[Verdict], smallest_effect: float, metric: str, others: Sequence[Contrast] = (), name: str = ""
) -> Figure:
    """A row a claim: each seed's paired difference, their mean and interval; the grey band holds what is too small to matter.

    Args:
        others: comparisons that nothing was claimed of; rows below, paler.
        name: of the figure on a result page.
    """
    rows = [(v.contrast, v.verdict) for v in verdicts] + [(c, "no claim") for c in others]
    with style():
        figure = Figure(figsize=(7.2, 0.9 + 0.62 * max(1, len(rows))))
        axes = figure.add_subplot()
        axes.axvspan(-smallest_effect, smallest_effect, color=INK, alpha=0.15, linewidth=0)
        axes.axvline(0, color=INK, linewidth=0.8)
        for row, (c, said) in enumerate(rows):
            colour = INK if said == "no claim" else COLOURS[row % len(COLOURS)]
            seeds, mean = (f"lab-{name}-{2 * row + each}" if name else None for each in (0, 1))
            if c.n == 0:
                continue
            if np.isfinite(c.low):
                axes.plot([c.low, c.high], [row, row], color=colour, linewidth=2.5, solid_capstyle="butt")
            axes.plot(c.mean, row, "o", color=colour, markersize=7, gid=mean)
            axes.plot(list(c.differences), [row + 0.22] * c.n, "|", color=colour, markersize=9, gid=seeds)
        labels = [f"{c.better} − {c.than}\n{said}" + (f"\n{c.divergence}" if c.divergence else "") for c, said in rows]
        axes.set_yticks(range(len(rows)), labels)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.grid(False, axis="y")
        axes.set_xlabel(f"difference in {metric}, paired by seed (left of the grey band: better by an amount that matters)")
    return figure


def quality_against_cost(
    series: Sequence[Mapping[str, Any]], metric: str, chosen: Mapping[str, str] | None = None, name: str = ""
) -> Figure:
    """A panel a convention of cost: each arm's mean of the metric over what it cost, with the range of its seeds.

    Args:
        series: a point each: `panel`, `arm`, and of one value each `x`, `y`, `low`, `high`.
        chosen: panels that were held equal -> the words for their titles.
    """
    panels, arms = (list(dict.fromkeys(each[key] for each in series)) for key in ("panel", "arm"))
    with style():
        figure = Figure(figsize=(7.2, 2.5 * ((len(panels) + 1) // 2)))
        for place, panel in enumerate(panels):
            axes = figure.add_subplot((len(panels) + 1) // 2, min(2, len(panels)), place + 1)
            for index, each in enumerate(series):
                if each["panel"] != panel:
                    continue
                order = arms.index(each["arm"])
                colour, gid = COLOURS[order % len(COLOURS)], f"lab-{name}-{index}" if name else None
                range_gid = f"{gid}-range" if gid else None
                axes.plot(each["x"] * 2, [each["low"][0], each["high"][0]], color=colour, linewidth=1.6, alpha=0.6, gid=range_gid)
                axes.plot(each["x"], each["y"], MARKERS[order % len(MARKERS)], color=colour, markersize=7, label=each["arm"], gid=gid)
            axes.set_title(f"{panel} ({chosen[panel]})" if chosen and panel in chosen else panel)
            axes.margins(x=0.12)
            costs = [each["x"][0] for each in series if each["panel"] == panel]
            if min(costs) > 0.95 * max(costs):  # equal but for rounding: no wide axis for that
                axes.set_xlim(0.9 * min(costs), 1.1 * max(costs))
            axes.xaxis.set_major_formatter(_prefixed)
            axes.locator_params(axis="x", nbins=4)
            if place % 2 == 0:
                axes.set_ylabel(metric)
        figure.tight_layout()
        handles = {text: handle for axes in figure.axes for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)}
        below = figure.legend(handles.values(), handles, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=min(4, len(handles)))
        _name_legend(below, [each["arm"] for each in series], name)
    return figure


def _prefixed(x: float, _: object) -> str:
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(x) >= factor:
            return f"{x / factor:g} {prefix}"
    return f"{x:g}"


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
