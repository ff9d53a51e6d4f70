"""Figures of large runs: who shares what, memory by stage, a step's time line, a layer on two lanes, bytes on the wire."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import NullLocator

from longcat_lab.notebook.style import COLOURS, INK, MARKERS, style

if TYPE_CHECKING:
    from longcat_lab.parallel.layout import Layout
    from longcat_lab.parallel.planner import Estimate

# What is divided, in words, by the axis of the layout that divides it.
DIVIDED = {
    "pipeline": "layers",
    "sequences": "sequences of a batch",
    "context": "tokens of a sequence",
    "tensor": "heads, inner columns",
    "weights": "dense weights (their storage)",
    "expert": "experts",
    "embedding": "n-gram rows",
}
MEMORY = {
    "weights": "weights",
    "gradients": "gradients",
    "state": "optimizer state",
    "tables": "n-gram tables with state",
    "activations": "activations",
    "work": "laid out and dropped",
    "buffers": "communicators",
    "beside": "beside the model",
}
WHAT = {"F": "forward", "B": "backward", "W": "weights' gradient"}
PURPOSES = ("expert", "tensor", "context", "data", "pipeline", "embedding", "norm")


def layout_map(layout: Layout) -> Figure:
    """A row for each thing that is divided, a column a rank: ranks with the same number hold the same part."""
    rows = {}
    for axis, words in DIVIDED.items():
        places = [layout.coordinates(rank) for rank in range(layout.world)]
        parts = {
            "sequences": [layout.batch_place(rank) for rank in range(layout.world)],
            "weights": [place["data_shard"] * layout.context + place["context"] for place in places],
        }.get(axis)
        rows[words] = parts if parts is not None else [place[axis] for place in places]
    with style():
        figure = Figure(figsize=(7.2, 0.7 + 0.34 * len(rows)))
        axes = figure.add_subplot()
        for row, parts in enumerate(rows.values()):
            for rank, part in enumerate(parts):
                colour = COLOURS[part % len(COLOURS)]
                axes.broken_barh([(rank + 0.06, 0.88)], (row - 0.38, 0.76), facecolors=colour, alpha=0.35 if len(set(parts)) > 1 else 0.12)
                axes.text(rank + 0.5, row, str(part), ha="center", va="center", fontsize=min(9.0, 130 / layout.world))
        axes.set_yticks(range(len(rows)), rows)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        step = max(1, layout.world // 16)
        axes.set_xticks([rank + 0.5 for rank in range(0, layout.world, step)], range(0, layout.world, step))
        axes.set_xlim(0, layout.world)
        axes.set_xlabel(f"rank ({layout.told()})", fontsize=8)
        axes.grid(False)
        axes.tick_params(length=0)
        axes.spines[["left", "bottom"]].set_visible(False)
    return figure


def memory_by_stage(estimates: Mapping[str, Estimate]) -> Figure:
    """Stacked bars, one a stage and a panel an estimate, in GB of the stage's fullest rank; the dashed line is what may be used."""
    with style():
        figure = Figure(figsize=(7.2, 3.3))
        top = 1.08 * max(max(one.peak, one.capacity) for one in estimates.values()) / 1e9
        used = [key for key in MEMORY if any(getattr(stage, key) for one in estimates.values() for stage in one.memory)]
        for number, (name, one) in enumerate(estimates.items()):
            axes = figure.add_subplot(1, len(estimates), number + 1)
            bottom = [0.0] * len(one.memory)
            for key in used:
                values = [getattr(stage, key) / 1e9 for stage in one.memory]
                axes.bar(range(len(values)), values, bottom=bottom, width=0.78, **_fill(list(MEMORY).index(key)))
                bottom = [a + b for a, b in zip(bottom, values, strict=True)]
            axes.axhline(one.capacity / 1e9, color=INK, linestyle="--", linewidth=1.2)
            axes.set_ylim(0, top)
            axes.set_title(name, fontsize=9)
            axes.set_xlabel("pipeline stage")
            axes.set_xticks(range(0, len(one.memory), max(1, len(one.memory) // 8)))
            axes.grid(False, axis="x")
            axes.set_axisbelow(True)
            if number == 0:
                axes.set_ylabel("GB a rank")
            else:
                axes.set_yticklabels([])
        handles = [Patch(label=MEMORY[key], **_fill(list(MEMORY).index(key))) for key in used]
        figure.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0.02), ncols=4)
        figure.tight_layout()
    return figure


def step_timeline(one: Estimate, micros: int | None = None) -> Figure:
    """Lanes by stage: forward and backward of every micro-batch, the wait between; communication in sight as a dark end of each.

    micros: micro-batches that are drawn, fewer than a step's where those would be too many to see (3 a stage where left out).
    """
    from longcat_lab.parallel.planner.pipeline import play

    setup = one.setup
    count = min(setup.micros, micros or 3 * setup.pipeline)
    played = play(setup.schedule, setup.pipeline, count)
    slowest = max(stage.micro for stage in one.times)
    scale = slowest / 3  # seconds of a unit: one stage's forward pass
    colours = {"F": COLOURS[0], "B": COLOURS[1], "W": COLOURS[2]}
    with style():
        figure = Figure(figsize=(7.2, 0.9 + 0.26 * setup.pipeline))
        axes = figure.add_subplot()
        for event in played.events:
            start, width = event.start * scale, (event.end - event.start) * scale
            late = event.chunk >= setup.pipeline
            axes.broken_barh([(start, width)], (event.stage - 0.4, 0.8), facecolors=colours[event.what], alpha=0.9 if late else 0.5)
            stage = one.times[event.stage]
            shown = width * sum(stage.exposed.values()) / slowest
            axes.broken_barh([(start + width - shown, shown)], (event.stage - 0.4, 0.8), facecolors=COLOURS[4])
        axes.set_ylim(setup.pipeline - 0.4, -0.6)
        axes.set_yticks(range(setup.pipeline))
        axes.set_ylabel("stage")
        axes.set_xlabel(f"seconds; {count} of {setup.micros} micro-batches, {setup.schedule}")
        axes.grid(False, axis="y")
        shown = {key: WHAT[key] for key in ("F", "B", "W") if any(event.what == key for event in played.events)}
        handles = [Patch(color=colours[key], alpha=0.7, label=words) for key, words in shown.items()]
        handles.append(Patch(color=COLOURS[4], label="communication in sight"))
        figure.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0.02), ncols=4)
        figure.tight_layout()
    return figure


def shortcut_lanes(lanes: Mapping[str, Sequence]) -> Figure:
    """A panel a case: arithmetic and network of one shortcut layer from the fork to the join, in microseconds.

    Args:
        lanes: name of the case to what `planner.overlap.shortcut` gave.
    """
    with style():
        figure = Figure(figsize=(7.2, 0.5 + 0.95 * len(lanes)))
        end = 1e6 * max(lane.end for each in lanes.values() for lane in each)
        for number, (name, each) in enumerate(lanes.items()):
            axes = figure.add_subplot(len(lanes), 1, number + 1)
            for lane in each:
                row = int(lane.lane == "network")
                kind = lane.what.split()[0]
                colour = {"dispatch": 4, "combine": 3, "experts": 0}.get(kind, 2)
                start, width = 1e6 * lane.start, 1e6 * (lane.end - lane.start)
                axes.broken_barh([(start, width)], (row - 0.4, 0.8), facecolors=COLOURS[colour], alpha=0.5, edgecolor=INK, linewidth=0.5)
                if width > 0.09 * end:
                    axes.text(start + width / 2, row, lane.what, ha="center", va="center", fontsize=7.5)
            axes.set_yticks([0, 1], ["arithmetic", "network"])
            axes.set_ylim(1.5, -0.5)
            axes.set_xlim(0, 1.02 * end)
            axes.set_title(name, fontsize=9)
            axes.grid(False, axis="y")
            if number + 1 < len(lanes):
                axes.set_xticklabels([])
        axes.set_xlabel("microseconds from the fork")
        figure.tight_layout()
    return figure


def wire(one: Estimate, fabric) -> Figure:
    """Bars by link class, stacked by purpose: left the bytes that a rank sends in a step, right the time that the wires need for them."""
    levels = ("in a server", "in a superpod", "between")
    by_purpose = {purpose: [0.0, 0.0, 0.0] for purpose in PURPOSES}
    for (purpose, _), sent in one.traffic().items():
        by_purpose[purpose] = [a + b for a, b in zip(by_purpose[purpose], sent, strict=True)]
    used = [purpose for purpose in PURPOSES if sum(by_purpose[purpose]) > 1e-4 * sum(map(sum, by_purpose.values()))]
    with style():
        figure = Figure(figsize=(7.2, 2.7))
        panels = (("GB that a rank sends in a step", (1e9,) * 3), ("seconds that this takes, hidden or not", fabric.bandwidth))
        for number, (title, divisors) in enumerate(panels):
            axes = figure.add_subplot(1, 2, number + 1)
            left = [0.0] * 3
            for purpose in used:
                values = [value / by for value, by in zip(by_purpose[purpose], divisors, strict=True)]
                axes.barh(range(3), values, left=left, height=0.7, **_fill(PURPOSES.index(purpose)))
                left = [a + b for a, b in zip(left, values, strict=True)]
            axes.set_yticks(range(3), levels if number == 0 else [])
            axes.invert_yaxis()
            axes.set_title(title, fontsize=9)
            axes.grid(False, axis="y")
            axes.set_axisbelow(True)
        handles = [Patch(label=purpose, **_fill(PURPOSES.index(purpose))) for purpose in used]
        figure.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0.02), ncols=len(used))
        figure.tight_layout()
    return figure


def scaling(rows: Mapping[str, Sequence[tuple[int, float, float]]]) -> Figure:
    """Left tokens a day, right share of the peak, over the number of cards, both of the fastest plan.

    Args:
        rows: name to (cards, tokens a day, MFU).
    """
    with style():
        figure = Figure(figsize=(7.2, 2.7))
        left, right = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2)
        for index, (name, each) in enumerate(rows.items()):
            cards, tokens, shares = zip(*each, strict=True)
            look = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)], "markersize": 5, "label": name}
            left.plot(cards, tokens, **look)
            right.plot(cards, [100 * share for share in shares], **look)
            left.plot(cards, [tokens[0] * n / cards[0] for n in cards], color=look["color"], linestyle=":", linewidth=1)
        left.set_xscale("log")
        left.set_yscale("log")
        left.set_title("tokens a day (dotted: in proportion)", fontsize=9)
        right.set_xscale("log")
        right.set_ylim(0, 115 * max(share for each in rows.values() for _, _, share in each))
        right.set_title("MFU (%)", fontsize=9)
        counts = sorted({cards for each in rows.values() for cards, *_ in each})
        for axes in (left, right):
            axes.set_xlabel("cards")
            axes.set_xticks(counts, [f"{cards:,}" for cards in counts])
            axes.xaxis.set_minor_locator(NullLocator())
        left.legend()
        figure.tight_layout()
    return figure


def table_degrees(rows: Sequence[tuple[int, float, float]], capacity: float) -> Figure:
    """The first stage's fullest rank by the degree that divides the n-gram rows: tables, and everything else; in GB.

    Args:
        rows: (degree, bytes of tables with their state, bytes of everything); capacity: bytes that may be used.
    """
    with style():
        figure = Figure(figsize=(7.2, 2.6))
        axes = figure.add_subplot()
        places = range(len(rows))
        axes.bar(places, [(whole - tables) / 1e9 for _, tables, whole in rows], width=0.6, label="everything else", **_fill(4))
        below = [(whole - tables) / 1e9 for _, tables, whole in rows]
        axes.bar(places, [tables / 1e9 for _, tables, _ in rows], bottom=below, width=0.6, label="n-gram tables", **_fill(3))
        axes.axhline(capacity / 1e9, color=INK, linestyle="--", linewidth=1.2)
        axes.set_xticks(places, [f"{degree}\n{tables / 1e9:.1f} GB of tables" for degree, tables, _ in rows])
        axes.set_xlabel("embedding degree")
        axes.set_ylabel("GB a rank, stage 0")
        axes.margins(y=0.12)
        axes.grid(False, axis="x")
        axes.set_axisbelow(True)
        axes.legend(loc="upper right")
    return figure


def _fill(number: int) -> dict[str, object]:
    """A colour for each of eight kinds; those beyond the palette are hatched."""
    fill: dict[str, object] = {"facecolor": COLOURS[number % len(COLOURS)], "alpha": 0.75}
    return fill | ({"hatch": "///", "edgecolor": INK, "linewidth": 0} if number >= len(COLOURS) else {})
