"""One paired comparison of two arms in one metric: its difference with an interval, and what of it is missing.

A pair is there where both arms finished on a seed. A seed on which an arm diverged is a result and no pair: what is said of the pairs
that are left says so first, since they are those on which nothing went wrong.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from longcat_lab.ablation.ends import DIVERGED
from longcat_lab.ablation.paired import NAN, least_p, paired_t, resolvable, sign_flips

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Contrast:
    """One paired comparison, in the units of its metric.

    Attributes:
        seeds: the seeds whose pair is complete; `n` of them.
        differences: of those pairs, in the same order.
        mean, sd: of the paired differences.
        low, high: interval of the mean at `level`.
        p: two-sided; NaN where no test is possible.
        resolvable: smallest true effect that this n and sd would find with 80 % power, as one of `comparisons`.
        dropped: one phrase per seed without a complete pair.
        planned: how many seeds either arm has a job of.
        diverged: the seeds on which `better` diverged, and those on which `than` did.
        flipped: two-sided p of the sign flips, this comparison's own.
    """

    better: str
    than: str
    metric: str
    seeds: tuple[int, ...]
    differences: tuple[float, ...]
    mean: float
    sd: float
    low: float
    high: float
    p: float
    resolvable: float
    level: float
    dropped: tuple[str, ...]
    comparisons: int = 1
    flipped: float = NAN
    planned: int = 0
    diverged: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())

    @property
    def alpha(self) -> float:
        """The level of the strictest of Holm's steps, which an effect must pass if no other claim does."""
        return (1 - self.level) / self.comparisons

    @property
    def n(self) -> int:
        return len(self.seeds)

    @property
    def constant(self) -> bool:
        """All pairs differ by the same amount: the seeds varied nothing, so there is no noise to compare with."""
        return self.n > 1 and self.sd == 0

    @property
    def interval(self) -> str:
        """`-0.0274 to -0.0150 (95 % interval, n = 3)`."""
        return f"{signed(self.low)} to {signed(self.high)} ({100 * self.level:g} % interval, n = {self.n})"

    @property
    def alone(self) -> tuple[str, ...]:
        """The arms that diverged on a seed on which the other one did not: the pairs that are left say nothing of that."""
        first, second = map(set, self.diverged)
        return (*([self.better] if first - second else []), *([self.than] if second - first else []))

    @property
    def divergence(self) -> str:
        """`b diverged on 3 of 6 seeds`, of either arm; empty where none did."""
        said = [f"{name} diverged on {len(seeds)}" for name, seeds in zip((self.better, self.than), self.diverged, strict=True) if seeds]
        return f"{' and '.join(said)} of {self.planned} seeds" if said else ""

    @property
    def first_of_all(self) -> str:
        """What diverged and of what the interval is then, as the sentence before all others, with a space; empty where nothing did."""
        if not self.divergence:
            return ""
        if not self.n:
            return f"{self.divergence}, and no pair is complete. "
        what, left = ("the interval", f"{self.n} seeds") if self.n > 1 else ("what follows", "seed")
        return f"{self.divergence}: {what} is of the {left} alone on which both finished. "

    @property
    def without_normality(self) -> str:
        """What the check without a distribution says, in a sentence; empty below two pairs."""
        if self.n < 2:
            return ""
        least = least_p(self.n)
        small = f"{self.n} pairs allow no p below {least:.2g}" + (", so they cannot be significant in it" if least > self.alpha else "")
        counted = "one comparison" if self.comparisons == 1 else f"not corrected for {self.comparisons} comparisons"
        return f"Sign flips, which need no normal distribution: p = {self.flipped:.2g}, {counted} ({small})."


def signed(value: float) -> str:
    """Three significant digits with a sign."""
    return "0" if value == 0 else f"{value:+.3g}"


def contrast(results: pd.DataFrame, better: str, than: str, metric: str, level: float = 0.95, comparisons: int = 1) -> Contrast:
    """The paired difference of two variants in one metric. Pairs that are not complete are dropped, and said.

    Args:
        results: one row per job with `variant`, `seed`, `status`, `reason` and the metric (see `store.load_results`).
        comparisons: how many are judged together; `resolvable` is then at (1 - level) / comparisons, Holm's strictest step.
            The interval and `p` are this comparison's own.
    """
    arms = [of_arm(results, name, metric) for name in (better, than)]
    differences, dropped = {}, []
    for seed in sorted({*arms[0], *arms[1]}):
        sides = [(name, arm.get(seed, "not planned")) for name, arm in zip((better, than), arms, strict=True)]
        problems = [f"{name} {value}" for name, value in sides if isinstance(value, str)]
        if problems:
            dropped.append(f"seed {seed} ({', '.join(problems)})")
        else:
            differences[seed] = sides[0][1] - sides[1][1]
    values = np.array(list(differences.values()), dtype=float)
    mean, sd, low, high, p = paired_t(values, level)
    found = resolvable(len(values), sd, (1 - level) / comparisons)
    pairs = tuple(differences), tuple(differences.values())
    flipped = sign_flips(values) if len(values) > 1 else NAN
    lost = tuple(tuple(seed for seed, value in sorted(arm.items()) if value == DIVERGED) for arm in arms)
    planned = len({*arms[0], *arms[1]})
    rest = tuple(dropped), comparisons, flipped, planned, (lost[0], lost[1])
    return Contrast(better, than, metric, *pairs, mean, sd, low, high, p, found, level, *rest)


def of_arm(results: pd.DataFrame, variant: str, metric: str) -> dict[int, float | str]:
    """seed -> value, or why there is none."""
    found: dict[int, float | str] = {}
    for row in results[results["variant"] == variant].to_dict("records"):
        value = row.get(metric)
        if row["status"] != "finished":
            found[int(row["seed"])] = str(row["status"])
        elif value is None or not math.isfinite(value):
            found[int(row["seed"])] = f"has no finite {metric}"
        else:
            found[int(row["seed"])] = float(value)
    return found
