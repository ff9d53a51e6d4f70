"""All that a page says of a sweep, made from its folder alone."""

from __future__ import annotations

import html as entities
from typing import Any

from longcat_lab.ablation.report import cost, judged, points, record
from longcat_lab.ablation.report.parts import Part, plain
from longcat_lab.ablation.statistics import Summary
from longcat_lab.ablation.store import Sweep

# What stands between the parts. Nothing else may: the check takes these away and finds what is left.
TITLES = {
    name: f"<h3>{words}</h3>"
    for name, words in {
        "claims": "Claims",
        "baseline": "Against the baseline",
        "seeds": "Seeds for a smaller effect",
        "arms": "Arms",
    }.items()
}
SENTENCES = {
    name: f"<p>{entities.escape(words)}</p>"
    for name, words in {
        "no pair": "No pair of jobs is complete yet: there is no difference to draw.",
        "no curve": "No job has left a curve yet.",
        "own blocks": "Parameters by part are not drawn: this sweep has blocks of its own, and a page runs no code of its folder.",
        "other settings": "Parameters by part are not drawn: this version of the code does not read these configurations.",
        "other totals": "Parameters by part are not drawn: this version of the code counts other totals than the jobs recorded.",
    }.items()
}
BY_PART = "Parameters and FLOPs of each arm by part"  # the words of the one picture whose points are in no JSON
ANSWER = ('<div class="lab-answer">', "</div>")


def classes(said: Summary) -> dict[str, tuple[str, ...]]:
    """Part -> the classes of its lines, where they differ."""
    return {"claims": tuple(f"lab-verdict lab-{verdict.verdict.replace(' ', '-')}" for verdict in said.verdicts)}


def parts(sweep: Sweep, said: Summary) -> dict[str, Part]:
    """Every part of the page by its name."""
    return {**judged.parts(sweep, said), **cost.parts(sweep), **record.parts(sweep, said)}


def facts(sweep: Sweep, said: Summary, made: dict[str, Part]) -> dict[str, Any]:
    """Every text and number of the page, and the points of its figures, as data for JSON."""
    return {"sweep": sweep.ablation.name, "parts": plain(made), "figures": points.figures(sweep, said)}
