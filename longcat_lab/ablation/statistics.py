"""What paired runs allow to be said, and the sentence that says it: the page, the terminal and the table all take it from here.

Differences are `better` minus `than`, paired by seed; metrics are better when lower, so a negative difference is an improvement.
Intervals are Student's t on the paired differences; power uses the noncentral t; several claims share one error rate (Holm).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from longcat_lab.ablation.contrasts import Contrast, contrast, of_arm, signed
from longcat_lab.ablation.ends import DIVERGED
from longcat_lab.ablation.paired import FEWEST, NAN, holm, seeds_needed
from longcat_lab.ablation.spec import Ablation

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Verdict:
    """One claim judged.

    Attributes:
        verdict: "seen", "not seen" or "not resolvable".
        adjusted_p: after Holm over `comparisons` claims.
        seeds_needed: pairs that would likely resolve the smallest effect that matters, at the spread that was seen and as one of
            `comparisons`; None if unknown.
        sentence: all of it in plain English.
    """

    contrast: Contrast
    adjusted_p: float
    comparisons: int
    verdict: str
    seeds_needed: int | None
    sentence: str


@dataclass(frozen=True)
class Summary:
    """All that is said about a sweep: the verdicts, and sentences without one."""

    verdicts: list[Verdict]
    secondary: list[str]
    vanishing: list[str]
    notes: list[str]

    @property
    def lines(self) -> list[str]:
        """All sentences, the verdicts first."""
        return [f"{v.verdict.upper()}: {v.sentence}" for v in self.verdicts] + self.secondary + self.vanishing + self.notes


# ---- judgement


def judge(results: pd.DataFrame, ablation: Ablation) -> list[Verdict]:
    """The claims of a question, in order, each with its verdict.

    seen: significant after Holm, in the claimed direction. not seen: the interval has no room for an improvement that matters.
    not resolvable: everything else, fewer than three pairs included. So is a claim of which an arm diverged on a seed on which the other
    did not: the pairs that are left, on which nothing went wrong, are not taken to speak for that arm.
    """
    count = len(ablation.claims)
    contrasts = [contrast(results, claim.better, claim.than, ablation.metric, comparisons=count) for claim in ablation.claims]
    # Two pairs have a p value, but no claim rests on them.
    adjusted = holm([c.p if c.n >= FEWEST else NAN for c in contrasts])
    return [_verdict(c, p, ablation) for c, p in zip(contrasts, adjusted, strict=True)]


def against_baseline(results: pd.DataFrame, ablation: Ablation) -> list[tuple[Contrast, float]]:
    """Every other arm minus the baseline in the primary metric, and its p after Holm over all of them; described, not judged."""
    others = [name for name in ablation.arms if name != ablation.baseline]
    contrasts = [contrast(results, name, ablation.baseline, ablation.metric, comparisons=len(others)) for name in others]
    return list(zip(contrasts, holm([c.p if c.n >= FEWEST else NAN for c in contrasts]), strict=True))


def _verdict(c: Contrast, p: float, ablation: Ablation) -> Verdict:
    matters, needed, comparisons = ablation.smallest_effect, None, c.comparisons
    if c.n < FEWEST:
        verdict, sentence = "not resolvable", _too_few(c, ablation)
    elif c.constant and c.mean == 0:
        verdict = "not seen"
        sentence = (
            f"{c.better} and {c.than} are equal in {c.metric}, digit for digit, in all {c.n} pairs: expected if they are the same; "
            f"if they are not, the change never took part and was not tested."
        )
    elif c.constant:
        verdict = "not resolvable"
        sentence = (
            f"{c.better} and {c.than} differ by exactly {signed(c.mean)} in {c.metric} in all {c.n} pairs: the seeds varied nothing, "
            f"so there is no noise to compare this with."
        )
    elif p < 1 - c.level and c.mean < 0:
        verdict = "seen"
        small = f" It is less than the {matters:g} that was said to matter." if -c.mean < matters else ""
        sentence = f"{c.better} is better than {c.than}: {c.metric} differs by {signed(c.mean)}, {c.interval}, {_p(p, comparisons)}.{small}"
    elif c.low > -matters:
        verdict = "not seen"
        worse = c.low > 0
        start = f"{c.better} is worse than {c.than}" if worse else f"{c.better} is not better than {c.than} by {matters:g} or more"
        sentence = f"{start}: {c.metric} differs by {signed(c.mean)}, {c.interval}, {_p(p, comparisons)}."
    else:
        verdict, needed = "not resolvable", seeds_needed(matters, c.sd, c.alpha)
        counting = f" (counting {comparisons} comparisons)" if comparisons > 1 else ""
        sentence = (
            f"Too few seeds to tell whether {c.better} is better than {c.than}: {c.metric} differs by {signed(c.mean)}, {c.interval}, "
            f"{_p(p, comparisons)}; {c.n} pairs at this spread find {c.resolvable:.3g} or more, and {_many(needed, c)} to find {matters:g}"
            f"{counting}."
        )
    favoured, other = (c.than, c.better) if verdict == "not seen" else (c.better, c.than)
    if c.n >= FEWEST and favoured in c.alone:
        verdict, needed = "not resolvable", None
        differs = f"exactly {signed(c.mean)} in all {c.n} pairs" if c.constant else f"{signed(c.mean)}, {c.interval}, {_p(p, comparisons)}"
        sentence = (
            f"There {c.metric} differs by {differs}. That cannot tell whether {c.better} is better than {c.than}: {favoured} diverged "
            f"where {other} did not."
        )
    if c.dropped and c.n >= FEWEST:
        sentence += f" Left out: {'; '.join(c.dropped)}."
    return Verdict(c, p, comparisons, verdict, needed, c.first_of_all + sentence)


def _too_few(c: Contrast, ablation: Ablation) -> str:
    seen = f" ({c.metric} differs by {signed(c.mean)} so far)" if c.n else ""
    planned = len(ablation.seeds)
    possible = planned - len({*c.diverged[0], *c.diverged[1]})  # a seed on which an arm diverged is done, and never a pair
    why = f"only {planned} {'seed was' if planned == 1 else 'seeds were'} planned" if planned < FEWEST else f"{planned} were planned"
    if possible < FEWEST <= planned:
        why += f", of which {possible or 'none'} can still be one"
    left = f"; left out: {'; '.join(c.dropped)}" if c.dropped else ""
    pairs = "1 pair" if c.n == 1 else f"{c.n or 'no'} pairs"
    return f"Whether {c.better} is better than {c.than} cannot be told from {pairs}{seen}: a claim needs {FEWEST}, and {why}{left}."


def _p(p: float, comparisons: int) -> str:
    value = "p < 0.0001" if p < 0.0001 else f"p = {p:.2g}"
    return f"{value} after Holm over {comparisons} comparisons" if comparisons > 1 else f"{value}, one comparison"


def _many(needed: int | None, c: Contrast) -> str:
    whole = " on which both finish" if c.divergence else ""
    return f"more than 10000{whole} would be needed" if needed is None else f"about {needed}{whole} would be needed"


def noise(results: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Per variant: finished seeds `n`, `mean` and `sd` of one metric between seeds (NaN where there are too few); how many diverged."""
    import pandas as pd

    rows = {}
    for variant in dict.fromkeys(results["variant"]):
        arm = of_arm(results, variant, metric)
        values = [v for v in arm.values() if isinstance(v, float)]
        rows[variant] = {
            "n": len(values),
            "mean": float(np.mean(values)) if values else NAN,
            "sd": float(np.std(values, ddof=1)) if len(values) > 1 else NAN,
            "diverged": sum(v == DIVERGED for v in arm.values()),
        }
    return pd.DataFrame.from_dict(rows, orient="index", columns=["n", "mean", "sd", "diverged"]).rename_axis("variant")


def summary(results: pd.DataFrame, ablation: Ablation) -> Summary:
    """Verdicts, secondary metrics, the controls, and what a reader must know about the rest."""
    from longcat_lab.ablation import controls, floor, ranks, tuning

    pairs = [(claim.better, claim.than) for claim in ablation.claims]
    claimed = {name for pair in pairs for name in pair}
    others = [name for name in ablation.arms if name not in {*claimed, *ablation.controls, ablation.baseline}]
    unclaimed = [(name, ablation.baseline) for name in others]
    # An arm of no claim stands beside the baseline, in the primary metric too.
    wanted = [(metric, *pair) for metric in ablation.also for pair in pairs]
    wanted += [(metric, *pair) for metric in (ablation.metric, *ablation.also) for pair in unclaimed]
    secondary = [_plainly(contrast(results, better, than, metric)) for metric, better, than in wanted]
    vanishing = []
    if control := ablation.vanishes:
        there = [contrast(results, *pair, control.metric) for pair in pairs or unclaimed]
        vanishing = [_vanished(c, control.where, ablation.smallest_effect) for c in there]
    notes = []
    jobs = results[results["variant"].isin(list(ablation.variants))]  # an arm that is evaluated from one of them has no job
    counts: dict[Any, int] = jobs["status"].value_counts().to_dict()
    if counts.get("finished", 0) != len(jobs):
        notes.append(f"Of {len(jobs)} jobs, " + ", ".join(f"{n} {status}" for status, n in sorted(counts.items())) + ".")
    notes += [*controls.lines(results, ablation), *floor.lines(ablation), *ranks.lines(results, ablation), *tuning.lines(ablation)]
    return Summary(judge(results, ablation), [s for s in secondary if s], [s for s in vanishing if s], notes)


def _plainly(c: Contrast) -> str:
    what = f"{c.metric}, {c.better} against {c.than}: {c.first_of_all}"
    if c.n < 2:
        return f"{what}{signed(c.mean)} in one pair." if c.n else what.rstrip() if c.divergence else ""
    return f"{what}{signed(c.mean)}, {c.interval}; secondary, no verdict."


def _vanished(c: Contrast, where: str, matters: float) -> str:
    if c.n < FEWEST:
        return ""
    differs = f"{c.metric} of {c.better} against {c.than} differs by {signed(c.mean)}, {c.interval}"
    start = f"{c.first_of_all}Where the effect should vanish ({where}), {differs}: "
    if c.constant:
        return start + ("exactly equal." if c.mean == 0 else "the same in all pairs, so there is no noise to compare it with.")
    if c.low > 0 or c.high < 0:
        return start + "it does not vanish there."
    small = -matters < c.low and c.high < matters
    return start + ("no effect that matters is there." if small else "too few seeds to tell whether an effect is left there.")
