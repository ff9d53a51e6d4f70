"""Figures of mixtures: who is busy, whether the budget holds, which tokens take real experts, what a token activates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from longcat_lab.notebook.style import COLOURS, INK, MARKERS, style

if TYPE_CHECKING:
    import pandas

    from longcat_lab.blocks.moe.config import MoEConfig

SMOOTHED = 9  # logged rows in the mean that the bold lines show: one step's tokens are few, their counts jump
FOLDS = 4.0  # the load map's colours end at a quarter and at four times the fair share
MEASURES = {
    "max_violation": "busiest real expert over the mean, −1",
    "load_entropy": "entropy of the real experts' load (1: equal)",
    "router_cosine": "mean cosine of router rows",
    "router_gradient_ratio": "R_g: balance loss's share of the router's gradient",
}


def _mixtures(metrics: pandas.DataFrame, measure: str) -> dict[str, str]:
    """Column to a short title, for every mixture that logged `measure`."""
    columns = [column for column in metrics.columns if column.endswith(f"/{measure}")]
    return {column: column.removesuffix(f".router/{measure}").removesuffix(".mlp").replace("layers.", "layer ") for column in columns}


def expert_load(metrics: pandas.DataFrame, moe: MoEConfig) -> Figure:
    """A map a mixture: every slot's load over the steps, as a multiple of its fair share; real experts above, zero-experts below.

    The fair share of tokens is K_e / N for a real expert and (K - K_e) / Z for a zero-expert.

    Args:
        metrics: of one run; moe: its mixture's configuration.
    """
    columns = _mixtures(metrics, "expert_load")
    real, zero = moe.n_routed_experts, moe.zero_expert_num
    steps = metrics["step"].to_numpy()
    fair = np.full(real + zero, moe.real_experts / real)
    if zero:
        fair[real:] = max(moe.moe_topk - moe.real_experts, 1e-9) / zero
    groups = [("real experts", slice(0, real)), ("zero-experts", slice(real, None))][: 2 if zero else 1]
    with style():
        figure = Figure(figsize=(7.2, 0.9 + 0.11 * (real + zero)))
        grid = figure.add_gridspec(
            len(groups), len(columns), height_ratios=[real, zero][: len(groups)], hspace=0.1, wspace=0.08, left=0.1, right=0.86
        )
        for number, (column, title) in enumerate(columns.items()):
            shares = np.stack(metrics[column].to_list()).T / fair[:, None]
            for row, (name, part) in enumerate(groups):
                axes = figure.add_subplot(grid[row, number])
                own = shares[part]
                picture = axes.imshow(
                    own.clip(1 / FOLDS, FOLDS),
                    norm=LogNorm(1 / FOLDS, FOLDS),
                    cmap="PuOr_r",
                    aspect="auto",
                    interpolation="nearest",
                    extent=(steps[0], steps[-1] + 1e-9, len(own), 0),
                )
                axes.grid(False)
                axes.set_yticks([])
                if number == 0:
                    axes.set_ylabel(f"{len(own)}\n{name}")
                if row == 0:
                    axes.set_title(title)
                if row == len(groups) - 1:
                    axes.set_xlabel("step")
                else:
                    axes.set_xticks([])
        bar = figure.colorbar(picture, cax=figure.add_axes((0.89, 0.2, 0.018, 0.6)), ticks=[1 / FOLDS, 0.5, 1, 2, FOLDS])
        bar.ax.set_yticklabels([f"≤ 1/{FOLDS:g}", "1/2", "fair", "2 ×", f"≥ {FOLDS:g} ×"])
        bar.ax.minorticks_off()
        bar.outline.set_visible(False)
    return figure


def held_budget(runs: Mapping[str, pandas.DataFrame], moe: MoEConfig) -> Figure:
    """A panel a mixture: real experts a token over the steps, each arm; what is asked for and what equal slots would give as lines.

    Args:
        runs: arm to the metrics of its run; moe: the mixture's configuration, of whose budget all arms are told.
    """
    uniform = moe.moe_topk * moe.n_routed_experts / (moe.n_routed_experts + moe.zero_expert_num)
    columns = _mixtures(next(iter(runs.values())), "real_experts_per_token")
    with style():
        figure = Figure(figsize=(7.2, 3.0))
        for number, (column, title) in enumerate(columns.items()):
            axes = figure.add_subplot(1, len(columns), number + 1)
            for index, (name, metrics) in enumerate(runs.items()):
                colour = COLOURS[index % len(COLOURS)]
                axes.plot(metrics["step"], metrics[column], color=colour, alpha=0.3, linewidth=0.7)
                axes.plot(
                    metrics["step"],
                    metrics[column].rolling(SMOOTHED, min_periods=1, center=True).mean(),
                    color=colour,
                    label=name,
                    linewidth=2.2,
                    marker=MARKERS[index % len(MARKERS)],
                    markevery=0.2,
                    markersize=4,
                )
            axes.axhline(moe.real_experts, color=INK, linestyle="--", linewidth=1.2, label="asked for (K_e)")
            if uniform != moe.real_experts:
                axes.axhline(uniform, color=INK, linestyle=":", linewidth=1.2, label="all slots equal")
            axes.set_ylim(0, moe.moe_topk)
            axes.set_title(title)
            axes.set_xlabel("step")
            if number == 0:
                axes.set_ylabel("real experts a token")
            else:
                axes.set_yticklabels([])
        _legend_below(figure, axes)
        figure.tight_layout()
    return figure


def mixture_measures(runs: Mapping[str, pandas.DataFrame], measures: Sequence[str] = tuple(MEASURES)) -> Figure:
    """A panel a measure, mean over the mixtures: balance of load, likeness of the router's rows, the balance loss's share of the gradient.

    Measures that no run logged are left out.
    """
    found = {each: [name for name, table in runs.items() if _mixtures(table, each)] for each in measures}
    found = {each: names for each, names in found.items() if names}
    with style():
        figure = Figure(figsize=(7.2, 2.5 * ((len(found) + 2) // 3)))
        for number, measure in enumerate(found):
            axes = figure.add_subplot((len(found) + 2) // 3, min(3, len(found)), number + 1)
            for index, (name, metrics) in enumerate(runs.items()):
                if name not in found[measure]:
                    continue
                mean = metrics[list(_mixtures(metrics, measure))].mean(axis=1)
                colour = COLOURS[index % len(COLOURS)]
                axes.plot(metrics["step"], mean, color=colour, alpha=0.3, linewidth=0.7)
                axes.plot(
                    metrics["step"],
                    mean.rolling(SMOOTHED, min_periods=1, center=True).mean(),
                    color=colour,
                    label=name,
                    marker=MARKERS[index % len(MARKERS)],
                    markevery=0.2,
                    markersize=4,
                )
            axes.set_title("\n".join(_wrapped(MEASURES.get(measure, measure), 30)), fontsize=8.5)
            axes.set_xlabel("step")
        _legend_below(figure, figure.axes[0])
        figure.tight_layout()
    return figure


def class_experts(table: pandas.DataFrame) -> Figure:
    """A row a class of tokens, a marker a mixture: mean real experts with two standard errors each way; the lines are the mixtures' means.

    Args:
        table: of `experts_by_class`.
    """
    classes, mixtures = list(dict.fromkeys(table["class"])), list(dict.fromkeys(table["mixture"]))
    counts = table.drop_duplicates("class").set_index("class")["tokens"]
    with style():
        figure = Figure(figsize=(7.2, 0.8 + 0.36 * len(classes)))
        axes = figure.add_subplot()
        for index, mixture in enumerate(mixtures):
            own, colour = table[table["mixture"] == mixture].set_index("class"), COLOURS[index % len(COLOURS)]
            shift = 0.26 * (index - (len(mixtures) - 1) / 2) / max(1, (len(mixtures) - 1) / 2)
            places = [classes.index(kind) + shift for kind in own.index]
            axes.axvline(float(np.average(own["mean"], weights=own["tokens"])), color=colour, linewidth=1, linestyle="--")
            axes.errorbar(
                own["mean"],
                places,
                xerr=2 * own["standard_error"].fillna(0),
                fmt=MARKERS[index % len(MARKERS)],
                color=colour,
                markersize=5,
                linewidth=1.6,
                label=mixture.removesuffix(".mlp").replace("layers.", "layer "),
            )
        axes.set_yticks(range(len(classes)), [f"{kind} ({counts[kind]:,})" for kind in classes])
        axes.invert_yaxis()
        axes.set_xlabel("real experts a token (± 2 standard errors)")
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def activated_range(tables: Mapping[str, pandas.DataFrame]) -> Figure:
    """A row a model, from `lab.activated`: parameters a token activates from none to all picks real; the diamond is what is asked for."""
    with style():
        figure = Figure(figsize=(7.2, 0.9 + 0.5 * len(tables)))
        axes = figure.add_subplot()
        for row, table in enumerate(tables.values()):
            colour, values = COLOURS[row % len(COLOURS)], table["activated params"]
            axes.plot([values.min(), values.max()], [row, row], color=colour, linewidth=5, alpha=0.35, solid_capstyle="butt")
            for k, params in values.items():
                if k == int(k):
                    axes.plot(params, row, "|", color=colour, markersize=11)
                    axes.annotate(f"k = {k:g}", (params, row), (0, -14), textcoords="offset points", ha="center", fontsize=7.5)
            expected = table[table["expected"]]
            axes.plot(expected["activated params"], [row], "D", color=colour, markersize=7)
        axes.set_yticks(range(len(tables)), list(tables))
        axes.set_ylim(len(tables) - 0.4, -0.6)
        axes.grid(False, axis="y")
        axes.set_xlabel("parameters that a token activates, with k real experts a mixture (diamond: the budget K_e)")
        axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1e9:g} B" if x >= 1e9 else f"{x / 1e6:g} M" if x >= 1e6 else f"{x / 1e3:g} k")
        axes.locator_params(axis="x", nbins=7)
    return figure


def _legend_below(figure: Figure, axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=len(labels))


def _wrapped(text: str, width: int) -> list[str]:
    import textwrap

    return textwrap.wrap(text, width)
