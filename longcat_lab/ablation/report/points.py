"""The points of a page's figures as data: figures draw them, the page's script tells them, the check makes them again.

A figure is `x` and `y` (what its axes are) and `series`, each with an `arm` and as many `x` and `y` as it has points; `low` and `high`
where a point has a range; `said` where its words are its own.
"""

from __future__ import annotations

from typing import Any

from longcat_lab.ablation.report import cost, curves
from longcat_lab.ablation.report.judged import diverged
from longcat_lab.ablation.report.parts import finite
from longcat_lab.ablation.statistics import Contrast, Summary, against_baseline, signed
from longcat_lab.ablation.store import Sweep

LABELS = {"loss": "training loss (nats a token)"}


def figures(sweep: Sweep, said: Summary) -> dict[str, dict[str, Any]]:
    """Figure's name -> its points; figures that would be empty are not there."""
    found = {
        f"curve-{metric}": {"x": "training tokens", "y": LABELS.get(metric, metric), "series": series}
        for metric, series in curves.of_sweep(sweep).items()
    }
    contrasts = compared(sweep, said)
    if any(c.n for c in contrasts):
        series = [each for c in contrasts for each in _difference(c)]
        found["differences"] = {"x": f"difference in {sweep.ablation.metric}", "y": "", "series": series}
    series = _quality(sweep)
    if len({each["arm"] for each in series}) > 1:
        found["cost"] = {"x": "cost", "y": sweep.ablation.metric, "series": series}
    return found


def compared(sweep: Sweep, said: Summary) -> list[Contrast]:
    """What the figure of differences has a row for: the claims, then every arm against the baseline that is in none of them."""
    claims = [v.contrast for v in said.verdicts]
    known = {frozenset((c.better, c.than)) for c in claims}
    return claims + [c for c, _ in against_baseline(sweep.results, sweep.ablation) if frozenset((c.better, c.than)) not in known]


def _difference(c: Contrast) -> list[dict[str, Any]]:
    """The seeds of a row, then their mean."""
    arm = f"{c.better} − {c.than}"
    seeds = [f"{arm}, seed {seed}: {signed(value)}" for seed, value in zip(c.seeds, c.differences, strict=True)]
    but = f"; {c.divergence}" if c.divergence else ""
    mean = [f"{arm}: {signed(c.mean)}" + (f", {c.interval}" if c.n > 1 else "") + but] if c.n else []
    return [
        {"arm": arm, "x": [_short(value) for value in c.differences], "y": [], "said": seeds},
        {"arm": arm, "x": [_short(c.mean)] if c.n else [], "y": [], "said": mean},
    ]


def _quality(sweep: Sweep) -> list[dict[str, Any]]:
    """A series a panel and arm: what it cost, and its mean, lowest and highest primary metric over finished seeds.

    An arm of which seeds diverged says so in its name, which its legend shows.
    """
    a, known, found = sweep.ablation, cost.costs(sweep), []
    if a.metric not in sweep.results:
        return []
    for panel, (key, _) in cost.CONVENTIONS.items():
        for name in a.arms:
            own = sweep.results[(sweep.results["variant"] == name) & (sweep.results["status"] == "finished")][a.metric].dropna()
            spent = finite(known[name][key])
            if not len(own) or spent is None:
                continue
            values = {"y": own.mean(), "low": own.min(), "high": own.max()}
            lost = diverged(sweep, name)
            arm = f"{name} ({lost})" if lost else name
            found.append(
                {"panel": cost.AXES.get(panel, panel), "arm": arm, "x": [_short(spent)], **{k: [_short(v)] for k, v in values.items()}}
            )
    return found


def _short(value: float) -> float:
    return float(f"{value:.6g}")
