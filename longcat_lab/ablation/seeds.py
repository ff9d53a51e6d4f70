"""What the planned seeds can tell apart, at the noise known so far."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from longcat_lab.ablation import floor, store
from longcat_lab.ablation.paired import FEWEST, resolvable, seeds_needed
from longcat_lab.ablation.rooms import Rooms
from longcat_lab.ablation.spec import Ablation
from longcat_lab.ablation.statistics import Contrast, contrast
from longcat_lab.errors import LabError


def told(a: Ablation, folder: Path, baseline: Any, rooms: Rooms) -> tuple[list[str], dict[str, Any]]:
    """Sentences, and `resolvable` and `seeds_needed` where the noise is known (see `planned.Forecast`).

    Args:
        baseline: its configuration. The noise of another model or length is told, and nothing follows from it.
    """
    count, pairs = max(1, len(a.claims)), _pairs(a, folder)
    worst = max(pairs, key=lambda c: len(_lost(a, c)), default=None)
    n = len(a.seeds) - (len(_lost(a, worst)) if worst else 0)  # a seed on which an arm diverged is done, and never a pair
    alpha = 0.05 / count
    over = f" and {count} claims" if count > 1 else ""
    lines, finish = [], ""
    if worst and n < len(a.seeds):
        finish = " on which both finish"
        lines = [f"{worst.divergence}: of {len(a.seeds)} planned pairs {n} can be had, and are counted here."]
    if n < FEWEST:
        lines.append(f"Seeds: {n} {'left' if lines else 'planned'}; a claim needs {FEWEST}.")
    else:
        least = resolvable(n, 1.0, alpha)
        lines += [f"Seeds: {n} paired seeds{over} find an effect of {least:.2g} sd of a pair's difference or more (80 % power)."]
    sd, source = _noise(pairs)
    entry = floor.known(folder, a, lambda: baseline, rooms.code) if math.isnan(sd) else {}
    if entry.get("about") == floor.SAME:
        sd, source = entry["sd"], floor.said(entry)
    if math.isnan(sd):
        how = "control: a_a adds the arm that measures it, in this question or in another one of this preset"
        if "a_a" in a.control:
            how = "the arm a_a of this question will measure it"
        so_far = f"known {floor.about(entry)} alone ({floor.said(entry)}), which measures nothing here" if entry else "not known yet"
        return [
            *lines,
            f"The noise of {a.metric} at {floor.preset(a)} is {so_far}: {how} (5 seeds are better than 3), and "
            f"{floor.place(folder)} keeps it.",
        ], {}
    found, needed = resolvable(n, sd, alpha), seeds_needed(a.smallest_effect, sd, alpha)
    lines.append(f"Noise known so far: {source}.")
    start = f"The smallest effect in {a.metric} that these seeds resolve is {found:.3g}; " if n >= 2 else ""
    if n >= FEWEST and found <= a.smallest_effect:
        lines.append(f"{start}{a.smallest_effect:g} is said to matter, which is within reach.")
    else:
        many = f"more than 10000 seeds{finish} would be needed" if needed is None else f"about {needed} seeds{finish} would do"
        lines.append(f"{start}{a.smallest_effect:g} is said to matter, which is out of reach: {many}.")
    return lines, {"resolvable": found, "seeds_needed": needed}


def _pairs(a: Ablation, folder: Path) -> list[Contrast]:
    """What this sweep has already of its claims; of a question without one, of every arm against the baseline."""
    try:
        results = store.load_results(folder)
    except LabError:
        return []
    pairs = [(claim.better, claim.than) for claim in a.claims] or [(name, a.baseline) for name in a.arms if name != a.baseline]
    return [contrast(results, *pair, a.metric) for pair in pairs]


def _lost(a: Ablation, c: Contrast) -> set[int]:
    return {*c.diverged[0], *c.diverged[1]} & {*a.seeds}


def _noise(pairs: list[Contrast]) -> tuple[float, str]:
    """The sd of a pair's difference among the sweep's own pairs, and where it is from; NaN where there are too few."""
    if found := [c for c in pairs if c.n >= FEWEST and c.sd > 0]:
        most = max(found, key=lambda c: c.sd)
        return most.sd, f"sd {most.sd:.3g} of the {most.n} pairs of {most.better} and {most.than} that this sweep has already"
    return math.nan, ""
