"""Figures of prediction steps: how well each predicts, and what it saves in decoding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from longcat_lab.notebook.style import COLOURS, INK, MARKERS, style

if TYPE_CHECKING:
    import pandas


def step_losses(metrics: pandas.DataFrame, skip: float = 0.05) -> Figure:
    """A line a step: training loss of the next token and of each prediction step over the optimizer steps.

    skip: share of the first steps that is not drawn, so that the fall at the start does not flatten the rest.
    """
    columns = {"loss": "next token"}
    for column in sorted(c for c in metrics.columns if c.startswith("mtp/mtp_loss_")):
        columns[column] = f"{int(column.rsplit('_', 1)[1]) + 1} tokens ahead"
    drawn = metrics[metrics["step"] >= skip * metrics["step"].max()]
    with style():
        figure = Figure(figsize=(7.2, 3.2))
        axes = figure.add_subplot()
        for index, (column, name) in enumerate(columns.items()):
            look = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)], "markevery": 0.2, "markersize": 4}
            axes.plot(drawn["step"], drawn[column], label=name, **look)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("training loss (nats a token)")
        axes.legend()
    return figure


def step_quality(summary: Mapping[str, Any]) -> Figure:
    """Two panels of bars by distance: held-out loss (steps only) and accuracy, the trunk's own next token first.

    Args:
        summary: of a run with prediction steps.
    """
    steps = sum(key.startswith("mtp_accuracy_") for key in summary)
    ahead = np.arange(1, steps + 2)
    accuracy = [summary["next_accuracy"], *(summary[f"mtp_accuracy_{k}"] for k in range(1, steps + 1))]
    losses = [summary[f"mtp_validation_loss_{k}"] for k in range(1, steps + 1)]
    with style():
        figure = Figure(figsize=(7.2, 2.8))
        panels = ((ahead, accuracy, "held-out accuracy", "{:.1%}"), (ahead[1:], losses, "held-out loss (nats a token)", "{:.2f}"))
        for number, (places, values, title, form) in enumerate(panels):
            axes = figure.add_subplot(1, 2, number + 1)
            colours = [COLOURS[(place - 1) % len(COLOURS)] for place in places]
            bars = axes.bar(places, values, color=colours, width=0.6)
            axes.bar_label(bars, [form.format(value) for value in values], color=INK, fontsize=8.5, padding=2)
            axes.margins(y=0.14)
            axes.set_title(title)
            axes.set_xticks(places, [f"{place}\n(step {place - 1})" if place > 1 else "1\n(trunk)" for place in places])
            axes.grid(False, axis="x")
            axes.set_axisbelow(True)
            axes.set_xlabel("tokens ahead")
        figure.tight_layout()
    return figure


def drafting(tables: Mapping[str, pandas.DataFrame]) -> Figure:
    """Left: tokens that a pass of the trunk gains, by the steps that draft. Right: how often each step's draft holds.

    Args:
        tables: name of the kind of text to a table of `drafting_table` or `after_real_text`.
    """
    steps = max(int(table.index.max()) for table in tables.values())
    with style():
        figure = Figure(figsize=(7.2, 3.1))
        left, right = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2)
        width = 0.8 / len(tables)
        for index, (name, table) in enumerate(tables.items()):
            colour = COLOURS[index % len(COLOURS)]
            left.plot(table.index, table["accepted_length"], color=colour, marker=MARKERS[index % len(MARKERS)], label=name)
            for place, value in table["accepted_length"].items():
                if place:
                    left.annotate(
                        f"{value:.2f}",
                        (place, value),
                        (0, (7, -14)[index % 2]),
                        textcoords="offset points",
                        ha="center",
                        fontsize=8,
                        color=colour,
                    )
            values = [table.iloc[-1][f"acceptance_{k}"] for k in range(1, steps + 1)]
            places = np.arange(1, steps + 1) + width * (index - (len(tables) - 1) / 2)
            bars = right.bar(places, values, color=colour, width=0.9 * width, label=name)
            right.bar_label(bars, [f"{value:.0%}" for value in values], color=INK, fontsize=8, padding=2)
        left.plot(range(steps + 1), range(1, steps + 2), color=INK, linestyle=":", linewidth=1, label="all drafts hold")
        left.set_xticks(range(steps + 1))
        left.set_ylim(0.7, steps + 1.2)
        left.set_xlabel("prediction steps that draft")
        left.set_title("tokens gained by one verifying pass")
        right.set_xticks(range(1, steps + 1), [f"step {place}" for place in range(1, steps + 1)])
        right.set_ylim(0, 1.12)
        right.grid(False, axis="x")
        right.set_axisbelow(True)
        right.set_title("drafts that hold, where all before held")
        right.yaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=len(labels))
        figure.tight_layout()
    return figure
