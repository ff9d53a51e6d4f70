"""Arms that should show nothing, judged: the baseline once more with other initial values, and variants with their feature off."""

from __future__ import annotations

from typing import TYPE_CHECKING

from longcat_lab.ablation import words
from longcat_lab.ablation.paired import FEWEST
from longcat_lab.ablation.statistics import Contrast, contrast, signed

if TYPE_CHECKING:
    import pandas as pd

    from longcat_lab.ablation.spec import Ablation


def lines(results: pd.DataFrame, ablation: Ablation) -> list[str]:
    """A sentence for each control that is an arm; the shuffled text has its own, see `statistics.summary`."""
    count, said = len(ablation.controls), []
    for name, kind in ablation.controls.items():
        c = contrast(results, name, ablation.baseline, ablation.metric, comparisons=count)
        said.append(c.first_of_all + (_same(c, ablation) if kind == words.A_A else _off(c, ablation)))
    return said


def _same(c: Contrast, ablation: Ablation) -> str:
    what = f"Control {c.better} ({c.than} once more, other initial values on the same order of the data)"
    if early := _early(c, what):
        return early
    if c.constant:
        return f"{what}: all {c.n} pairs differ by {signed(c.mean)} in {c.metric}: the initial values made no noise, so it is not measured."
    noise = f"{c.metric} differs by {signed(c.mean)}, {c.interval}; the noise floor is this sd of a pair's difference: {c.sd:.3g}"
    if c.p < c.alpha:
        return f"{what} FAILED: {noise}. Equal arms come out as different, so no verdict here is to be trusted before it is known why."
    if c.alone:
        return f"{what} is open: {noise}. {_alone(c)}"
    wide = f" {c.n} pairs of such noise find {c.resolvable:.3g} or more."
    return f"{what} passed: {noise}. No difference is seen, as it should be.{wide}"


def _off(c: Contrast, ablation: Ablation) -> str:
    what = f"Control {c.better} ({c.better.removesuffix(words.OFF)} with its feature off)"
    if early := _early(c, what):
        return early
    matters, differs = ablation.smallest_effect, f"{c.metric} differs from {c.than} by {signed(c.mean)}, {c.interval}"
    if c.alone and c.low > -matters and c.high < matters:
        return f"{what} is open: {differs}. {_alone(c)}"
    if c.constant and c.mean == 0:
        return f"{what} passed: equal to {c.than} in {c.metric}, digit for digit, in all {c.n} pairs."
    if c.low > -matters and c.high < matters:
        return f"{what} passed: {differs}, within the {matters:g} that was said to matter."
    if c.low > 0 or c.high < 0:
        return f"{what} FAILED: {differs}: something else than the feature is another one too."
    return f"{what} is open: {differs}: too few seeds to tell whether it equals {c.than} within {matters:g}."


def _alone(c: Contrast) -> str:
    return f"{' and '.join(c.alone)} diverged where the other did not, which the pairs that are left do not show."


def _early(c: Contrast, what: str) -> str:
    return "" if c.n >= FEWEST else f"{what}: not judged yet, {c.n} of {FEWEST} pairs are complete."
