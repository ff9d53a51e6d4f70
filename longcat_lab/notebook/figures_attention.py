"""Figures of attention: what is selected beside what is looked at, how alike attentions are, how indexers learn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.colors import BoundaryNorm, ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from longcat_lab.notebook.style import COLOURS, INK, MARKERS, style

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes

    from longcat_lab.training.attention_measures import AttentionMeasures
    from longcat_lab.training.attention_record import AttentionLook

CLASSES = ("not selected", "chosen", "window", "sink")
CLASS_COLOURS = (INK + "33", COLOURS[4], COLOURS[0], COLOURS[2])
FOLDS = 32.0  # the colours of a mass map end at so many times the mean over the visible keys, and at its so-manieth part
ADJACENT = "LSA's paper, adjacent layers of a dense 69B model, K 2048 of 8192 tokens:"
NUMBERED = 8  # attentions up to which a matrix has its numbers written in


def short(name: str) -> str:
    """`layers.0.self_attn.1` as `0.1`: layer, and attention in the layer."""
    return ".".join(part for part in name.split(".") if part.isdigit()) or name


def selection_maps(looks: Mapping[str, AttentionLook]) -> Figure:
    """A row an attention: left what each query uses, by why it is used; right what it would give each key if it saw all (mean over heads,
    as a multiple of what equal attention would give).

    Args:
        looks: title to what `look` found. Where an attention uses all keys, the left map shows the best K of them as chosen.
    """
    with style():
        figure = Figure(figsize=(7.2, 3.3 * len(looks) + 0.3), layout="constrained")
        grid = figure.subplots(len(looks), 2, squeeze=False)
        for row, (title, each) in enumerate(looks.items()):
            kind = np.where(each.used, 1.0, 0.0)
            kind[each.window & each.used], kind[each.sinks & each.used] = 2, 3
            kind[~each.seen] = np.nan
            left, right = grid[row]  # keys that are not visible are NaN, which is transparent
            left.imshow(kind, cmap=ListedColormap(CLASS_COLOURS), norm=BoundaryNorm(np.arange(-0.5, 4), 4), interpolation="nearest")
            mass = each.mass * each.seen.sum(1, keepdims=True)  # 1: what equal attention would give
            mass = np.where(each.seen, mass.clip(1 / FOLDS, FOLDS), np.nan)
            picture = right.imshow(mass, cmap="cividis", norm=LogNorm(1 / FOLDS, FOLDS), interpolation="nearest")
            left.set_title(f"{title}: " + ("keys used" if each.selects else "uses all; its best K"))
            right.set_title("attention, as multiples of the mean key's")
            left.set_ylabel("query")
            right.set_yticklabels([])
            for axes in (left, right):
                axes.grid(False)
                axes.set_xlabel("key" if row == len(looks) - 1 else "")
        bar = figure.colorbar(picture, ax=grid[:, 1], shrink=0.8 / len(looks) ** 0.5, ticks=[1 / FOLDS, 0.25, 1, 4, FOLDS])
        bar.ax.set_yticklabels([f"≤ 1/{FOLDS:g}", "1/4", "mean", "4 ×", f"≥ {FOLDS:g} ×"])
        bar.ax.minorticks_off()
        bar.outline.set_visible(False)
        patches = [Patch(color=colour, label=name) for name, colour in zip(CLASSES, CLASS_COLOURS, strict=True)]
        figure.legend(handles=patches, loc="outside lower center", ncols=4)
    return figure


def _matrix(axes: Axes, values: np.ndarray, labels: Sequence[str], title: str) -> Any:
    picture = axes.imshow(values, cmap="cividis", vmin=0, vmax=1, interpolation="nearest")
    if len(values) <= NUMBERED:
        for row, column in np.ndindex(*values.shape):
            value = values[row, column]
            axes.text(column, row, f"{value:.0%}", ha="center", va="center", fontsize=8, color="white" if value < 0.5 else "black")
        axes.set_xticks(range(len(labels)), labels)
        axes.set_yticks(range(len(labels)), labels)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(False)
    axes.set_title(title)
    return picture


def attention_likeness(measured: AttentionMeasures) -> Figure:
    """Two matrices: how much the top-K sets of two attentions share, and what one attention gives to another's set."""
    labels = [short(name) for name in measured.names]
    with style():
        figure = Figure(figsize=(7.2, 3.3), layout="constrained")
        left, right = figure.subplots(1, 2)
        _matrix(left, measured.overlap, labels, f"overlap of the two top-{measured.topk} sets")
        picture = _matrix(right, measured.coverage, labels, "attention covered by the other's set")
        for axes in (left, right):
            axes.set_ylabel("set of attention (layer.place)")
        left.set_xlabel("set of attention")
        right.set_xlabel("attention that uses it")
        bar = figure.colorbar(picture, ax=right, shrink=0.85)
        bar.ax.yaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
        bar.outline.set_visible(False)
    return figure


def likeness_by_distance(measures: Mapping[str, AttentionMeasures]) -> Figure:
    """Two panels over the distance of two attentions: overlap of their top-K sets, and coverage where the later one reuses the earlier
    one's; lines are means over the pairs, bands reach to the least and the best pair. Coverage at distance 0 is the best of all K keys.
    """
    with style():
        figure = Figure(figsize=(7.2, 3.2))
        panels = figure.subplots(1, 2)
        for index, (name, each) in enumerate(measures.items()):
            colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
            distances = range(len(each.names))
            for axes, part, start in zip(panels, (0, 1), (1, 0), strict=True):
                pairs = [each.by_distance(distance)[part] for distance in distances[start:]]
                axes.plot(distances[start:], [pair.mean() for pair in pairs], color=colour, marker=marker, label=name)
                low, high = [pair.min() for pair in pairs], [pair.max() for pair in pairs]
                axes.fill_between(distances[start:], low, high, color=colour, alpha=0.15, linewidth=0)
        chance = next(iter(measures.values())).chance
        for axes, title in zip(panels, ("overlap of the top-K sets", "attention covered by the earlier one's set"), strict=True):
            axes.axhline(chance, color=INK, linewidth=1, linestyle=":", label="keys at random")
            axes.set_title(title)
            axes.set_xlabel("distance (attentions)")
            axes.yaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.set_ylim(0, 1.02)
        panels[1].legend(fontsize=8)
        figure.text(0.5, -0.06, f"{ADJACENT} overlap 57.4 %, coverage 93.2 %", ha="center", fontsize=8)
        figure.tight_layout()
    return figure


def fixed_share(measures: Mapping[str, AttentionMeasures]) -> Figure:
    """What sinks and window alone cover, by how many keys a query sees: a line a model, mean over its attentions."""
    first = next(iter(measures.values()))
    with style():
        figure = Figure(figsize=(7.2, 2.8))
        axes = figure.add_subplot()
        for index, (name, each) in enumerate(measures.items()):
            colour, covered = COLOURS[index % len(COLOURS)], 1 - each.fixed_by_position
            parts = covered.shape[1]
            seen = each.topk + (np.arange(parts) + 0.5) * (each.longest - each.topk) / parts
            axes.plot(seen, covered.mean(0), color=colour, marker=MARKERS[index % len(MARKERS)], label=name)
            axes.fill_between(seen, covered.min(0), covered.max(0), color=colour, alpha=0.12, linewidth=0)
        seen = np.linspace(first.topk + 1, first.longest, 50)
        axes.plot(seen, (first.sinks + first.window) / seen, color=INK, linewidth=1, linestyle=":", label="equal attention")
        axes.set_xlabel("keys a query sees")
        axes.set_ylabel("attention on the fixed keys")
        axes.yaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
        axes.set_ylim(0, 1.02)
        axes.set_title(f"{first.sinks} sink and {first.window} window keys (bands: from attention to attention)")
        axes.legend()
    return figure


def index_divergence(runs: Mapping[str, pandas.DataFrame], stages: tuple[int, int] | None = None) -> Figure:
    """A panel a model: the index KL of each attention over the optimizer steps; dashed where an attention uses another's indexer.

    Args:
        runs: title to metrics; those without any index KL are left out.
        stages: optimizer steps after which the warm-up begins and ends.
    """
    columns = {name: [c for c in table.columns if c.endswith("/index_kl")] for name, table in runs.items()}
    columns = {name: found for name, found in columns.items() if found}
    with style():
        figure = Figure(figsize=(7.2, 3.0))
        panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
        for axes, (name, found) in zip(panels, columns.items(), strict=True):
            table = runs[name]
            owners = [column for column in found if column.replace("/index_kl", "/selected_share") in table.columns]  # who selects tells it
            for index, column in enumerate(found):
                look = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)], "markersize": 3.5}
                label = short(column.removesuffix("/index_kl"))
                axes.plot(table["step"], table[column], linestyle="-" if column in owners else "--", label=label, markevery=0.2, **look)
            top = max(float(runs[each][column].max()) for each, names in columns.items() for column in names)
            axes.set_ylim(0, 1.1 * top)
            for step, text in zip(stages or (), ("warm-up", "sparse"), strict=False):
                axes.axvline(step, color=INK, linewidth=0.8, linestyle=":")
                axes.annotate(f" {text}", (step, 1.08 * top), fontsize=8, va="top")
            axes.set_title(f"{name} (dashed: uses another's indexer)" if len(owners) < len(found) else name)
            axes.set_xlabel("optimizer step")
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, title="attention (layer.place)", loc="upper center", bbox_to_anchor=(0.5, 0.02), ncols=len(labels))
        panels[0].set_ylabel("KL(attention ‖ indexer), nats")
        figure.tight_layout()
    return figure


def probe_accuracy(summaries: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Share of right answers to a probe, a line a model: by the length of the sequence, and by where in it the answer was told.

    Args:
        summaries: of runs that were trained on a probe (`data.probe`).
    """
    panels = {"probe_accuracy_length_": "tokens of the sequence", "probe_accuracy_depth_": "where the answer stands (0: at the start)"}
    found = {key: [name for name in summaries if any(each.startswith(key) for each in summaries[name])] for key in panels}
    with style():
        figure = Figure(figsize=(7.2, 2.9))
        for axes, (key, label) in zip(figure.subplots(1, 2, sharey=True), panels.items(), strict=True):
            for index, name in enumerate(summaries):
                if name in found[key]:
                    points = sorted((int(each.removeprefix(key)), value) for each, value in summaries[name].items() if each.startswith(key))
                    look = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)], "label": name}
                    axes.plot(*zip(*points, strict=True), **look)
            axes.set_ylim(-0.02, 1.02)
            axes.set_xlabel(label)
            axes.yaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if any(found.values()):
            max(figure.axes, key=lambda axes: len(axes.get_lines())).legend()
        figure.axes[0].set_ylabel("right answers")
        figure.tight_layout()
    return figure


def position_losses(losses: Mapping[str, Mapping[str, float]]) -> Figure:
    """Held-out loss by place in the sequence, a line a model; and what each loses against the first one there.

    Args:
        losses: name to what `loss_by_position` gave.
    """
    with style():
        figure = Figure(figsize=(7.2, 2.8))
        left, right = figure.subplots(1, 2)
        base = next(iter(losses))
        for index, (name, found) in enumerate(losses.items()):
            keys = sorted(found, key=lambda key: int(key.rsplit("_", 1)[1]))
            places = range(1, len(keys) + 1)
            look = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)], "label": name}
            left.plot(places, [found[key] for key in keys], **look)
            right.plot(places, [found[key] - losses[base][key] for key in keys], **look)
        for axes, title in ((left, "held-out loss (nats a token)"), (right, f"the same, minus {base}")):
            axes.set_title(title)
            axes.set_xlabel(f"part of the sequence (1: its start, {len(keys)}: its end)")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        left.legend()
        figure.tight_layout()
    return figure
