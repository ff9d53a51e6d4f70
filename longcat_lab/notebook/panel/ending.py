"""What is left of a panel in the notebook's file: a static picture of the run and one line, for readers without a kernel or a browser."""

from __future__ import annotations

import hashlib
import html
from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from longcat_lab.config import RunConfig, load, presets
from longcat_lab.notebook.panel.budget_view import budget_html
from longcat_lab.notebook.panel.follow import TOGETHER, Follower, panels_of, read_all
from longcat_lab.notebook.panel.frontend import NOTHING
from longcat_lab.notebook.panel.knobs import changed
from longcat_lab.notebook.panel.picture import architecture_svg
from longcat_lab.notebook.panel.words import not_engaged, summary
from longcat_lab.notebook.style import COLOURS, INK, Bundle, bundle, style
from longcat_lab.training.trackers import trouble

POINTS = 300  # of a curve in a picture that is kept in a file
COLUMNS = 3
# Where widgets were, a page without their kernel says "Loading widget...", or that a model was not found. Here it says what to do.
AGAIN = """<style>
.jp-OutputArea:has(.longcat-panel-ending) .jp-OutputArea-output:not([data-mime-type], :has(*)) { font-size: 0; }
.jp-OutputArea:has(.longcat-panel-ending) .jp-OutputArea-output:not([data-mime-type], :has(*))::after {
  content: "Run this cell again for the knobs and the live curves."; font-size: var(--jp-ui-font-size1, 13px); opacity: .7; }
</style>"""


def ending(folder: Path, earlier: Mapping[str, Path], said: str = "") -> tuple[str, str, Bundle]:
    """A run's summary as HTML, the key that it carries (`data-panel-figure`), and the picture of the run's curves.

    Args:
        earlier: name to folder of the runs that are drawn beside it.
        said: a sentence that is shown in place of the summary.
    """
    run = Follower(folder)
    run.refresh()
    others = read_all(earlier)
    lines = [said or summary(run), not_engaged(run.record), trouble(folder, run.record)]
    key = hashlib.sha256("\0".join([str(folder), *lines, *map(str, earlier.values())]).encode()).hexdigest()[:16]
    words = "".join(f"<p style='margin:4px 0'>{html.escape(line)}</p>" for line in [*lines, f"Its folder: {_place(folder)}"] if line)
    drawn = bundle(figure(run, others), f"Curves of the run {folder.name}") if run.curves() else NOTHING
    return f'<div class="longcat-panel-ending" data-panel-figure="{key}">{words}</div>', key, drawn


def _place(folder: Path) -> str:
    """As seen from the working folder, if it is below: a notebook's file is read on other machines."""
    return str(folder.relative_to(Path.cwd())) if folder.is_relative_to(Path.cwd()) else str(folder)


def figure(run: Follower, others: Mapping[str, Follower]) -> Figure:
    """Small multiples: the run bold, the others thin."""
    drawn = panels_of(each.curves(POINTS) for each in (run, *others.values()))
    panels = len(drawn) + bool(run.load)
    rows = -(-panels // COLUMNS)
    with style():
        made = Figure(figsize=(9.6, 2.15 * rows), layout="constrained")
        places = made.subplots(rows, COLUMNS, squeeze=False).ravel()
        for axes, (name, points, title, unit) in zip(places, drawn, strict=False):
            for index, (label, each) in enumerate([*others.items(), ("this run", run)]):
                colour = COLOURS[0] if each is run else COLOURS[1 + index % (len(COLOURS) - 1)]
                wide, size = (2.0, 5) if each is run else (0.9, 3)
                x, y = each.curves(POINTS).get(name, ((), ()))
                if len(x):
                    marker = {"marker": "o", "markersize": size} if len(x) < 3 else {}
                    axes.plot(x, y, color=colour, linewidth=wide, label=label, **marker)
                x, y = each.curves(POINTS).get(points, ((), ()))
                if len(x):
                    axes.plot(x, y, "o:", color=colour, linewidth=0.7 * wide, markersize=size)
            if points:
                marks = [
                    Line2D([], [], color=INK, label=TOGETHER[name]),
                    Line2D([], [], color=INK, ls=":", marker="o", label=TOGETHER[points]),
                ]
                axes.legend(handles=marks, loc="upper right", fontsize="x-small")
            if name in run.asked():
                axes.axhline(run.asked()[name], color=INK, linestyle="--", linewidth=1)
            if name == "learning_rate":
                axes.set_ylim(bottom=0)
            axes.set_title(f"{title} ({unit})" if unit else title, parse_math=False)  # names may hold a $
            axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1e6:g} M" if x >= 1e6 else f"{x / 1e3:g} k" if x else "0")
            axes.locator_params(axis="x", nbins=5)
            axes.set_xlim(left=0)
        if run.load:
            _bars(places[len(drawn)], run)
        for axes in places[panels:]:
            axes.set_visible(False)
        if others:
            handles, labels = places[0].get_legend_handles_labels()
            for text in made.legend(handles, labels, loc="outside lower left", ncols=2).get_texts():
                text.set_parse_math(False)
    return made


def _bars(axes: object, run: Follower) -> None:
    real = run.real_experts()
    colours = [COLOURS[0] if slot < real else INK for slot in range(len(run.load))]
    axes.bar(range(len(run.load)), run.load, color=colours)
    mean = sum(run.load[:real]) / max(1, real)
    axes.plot([-0.5, real - 0.5], [mean, mean], color=INK, linestyle="--", linewidth=1)
    axes.set_xticks([])
    axes.set_title(f"expert load{f', {run.load_of}' if run.load_of else ''} (share of tokens)", parse_math=False)
    axes.set_xlabel(f"{real} experts" + (f", {len(run.load) - real} zero-experts" if len(run.load) > real else ""))


def overview(config: RunConfig, path: Path) -> tuple[str, Bundle]:
    """The configuration without a browser: as HTML its budget and what it has otherwise than the nearest preset, and its picture."""
    name, different = nearest_preset(config)
    head = f"<tr><th style='text-align:left'>knob</th><th>{name}</th><th>here</th></tr>"
    rows = "".join(_row(knob, before, now) for knob, (before, now) in different.items())
    table = f"<table>{head}{rows}</table>" if rows else ""
    line = f"Preset <b>{name}</b> {'with other knobs' if rows else 'as it is'}; its runs lie in {html.escape(str(path))}."
    drawn = {"image/svg+xml": architecture_svg(config, None), "text/plain": f"Architecture of {name}{' with other knobs' * bool(rows)}"}
    return f"<div class='longcat-panel-overview'><p>{line}</p>{table}{budget_html(config, None)}</div>", (drawn, {})


def _row(knob: str, before: object, now: object) -> str:
    shown = [html.escape(str(each)) for each in (knob, before, now)]
    return f"<tr><td style='text-align:left'><code>{shown[0]}</code></td><td>{shown[1]}</td><td>{shown[2]}</td></tr>"


def nearest_preset(config: RunConfig) -> tuple[str, dict[str, tuple[object, object]]]:
    """The preset with the fewest differing knobs, and those knobs: path to (there, here)."""
    found = {name: changed(config, load(name)) for name in presets()}
    name = min(found, key=lambda name: (len(found[name]), name))
    return name, found[name]
