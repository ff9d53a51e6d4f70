"""What the planned seeds can tell apart, at the noise known so far."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from longcat_lab.ablation import floor, store
from longcat_lab.ablation.paired import FEWEST, resolvable, seeds_needed
from longcat_lab.ablation.spec import Ablation
from longcat_lab.ablation.statistics import contrast
from longcat_lab.errors import LabError


def told(a: Ablation, folder: Path) -> tuple[list[str], dict[str, Any]]:
    """Sentences, and `resolvable` and `seeds_needed` where the noise is known (see `planned.Forecast`)."""
    count, n = max(1, len(a.claims)), len(a.seeds)
    alpha = 0.05 / count
    over = f" and {count} claims" if count > 1 else ""
    if n < FEWEST:
        lines = [f"Seeds: {n} planned; a claim needs {FEWEST}."]
    else:
        least = resolvable(n, 1.0, alpha)
        lines = [f"Seeds: {n} paired seeds{over} find an effect of {least:.2g} sd of a pair's difference or more (80 % power)."]
    sd, source = _noise(a, folder)
    if math.isnan(sd):
        how = "control: a_a adds the arm that measures it, in this question or in another one of this preset"
        if "a_a" in a.control:
            how = "the arm a_a of this question will measure it"
        return [
            *lines,
            f"The noise of {a.metric} at {floor.preset(a)} is not known yet: {how} (5 seeds are better than 3), and "
            f"{floor.place(folder)} keeps it.",
        ], {}
    found, needed = resolvable(n, sd, alpha), seeds_needed(a.smallest_effect, sd, alpha)
    lines.append(f"Noise known so far: {source}.")
    start = f"The smallest effect in {a.metric} that these seeds resolve is {found:.3g}; " if n >= 2 else ""
    if n >= FEWEST and found <= a.smallest_effect:
        lines.append(f"{start}{a.smallest_effect:g} is said to matter, which is within reach.")
    else:
        many = "more than 10000 seeds would be needed" if needed is None else f"about {needed} seeds would do"
        lines.append(f"{start}{a.smallest_effect:g} is said to matter, which is out of reach: {many}.")
    return lines, {"resolvable": found, "seeds_needed": needed}


def _noise(a: Ablation, folder: Path) -> tuple[float, str]:
    """The sd of a pair's difference, and where it is from: the sweep's own pairs, else the floor of preset and metric."""
    try:
        results = store.load_results(folder)
    except LabError:
        results = None
    if results is not None and a.metric in results:
        pairs = [(claim.better, claim.than) for claim in a.claims] or [(name, a.baseline) for name in a.arms if name != a.baseline]
        found = [c for pair in pairs if (c := contrast(results, *pair, a.metric)).n >= FEWEST and c.sd > 0]
        if found:
            most = max(found, key=lambda c: c.sd)
            return most.sd, f"sd {most.sd:.3g} of the {most.n} pairs of {most.better} and {most.than} that this sweep has already"
    entry = floor.known(folder, a)
    return (entry["sd"], floor.said(entry)) if entry else (math.nan, "")
