"""All that a page says of a sweep, made from its folder alone."""

from __future__ import annotations

from typing import Any

from longcat_lab.ablation.report import cost, judged, points, record
from longcat_lab.ablation.report.parts import Part, plain
from longcat_lab.ablation.statistics import Summary
from longcat_lab.ablation.store import Sweep


def parts(sweep: Sweep, said: Summary) -> dict[str, Part]:
    """Every part of the page by its name."""
    return {**judged.parts(sweep, said), **cost.parts(sweep), **record.parts(sweep, said)}


def facts(sweep: Sweep, said: Summary, made: dict[str, Part]) -> dict[str, Any]:
    """Every text and number of the page, and the points of its figures, as data for JSON."""
    return {"sweep": sweep.ablation.name, "parts": plain(made), "figures": points.figures(sweep, said)}
