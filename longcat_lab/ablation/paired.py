"""The arithmetic of paired comparisons: Student's t on differences, its power (noncentral t), sign flips, and Holm's correction."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
from scipy import optimize, stats

FEWEST = 3  # pairs, for a claim
POWER = 0.8
EXACT = 14  # pairs up to which all sign flips are tried; above, so many are drawn
FLIPS = 2**EXACT
NAN = math.nan


def paired_t(differences: np.ndarray, level: float = 0.95) -> tuple[float, float, float, float, float]:
    """(mean, sd, low, high, two-sided p) of paired differences; NaN where n is too small, p NaN where there is no spread."""
    n = len(differences)
    if n == 0:
        return NAN, NAN, NAN, NAN, NAN
    mean = float(np.mean(differences))
    if n == 1:
        return mean, NAN, NAN, NAN, NAN
    sd = float(np.std(differences, ddof=1))
    if sd <= 1e-12 * float(np.max(np.abs(differences))):  # equal but for rounding; all zero included
        return mean, 0.0, mean, mean, NAN
    error = sd / math.sqrt(n)
    half = float(stats.t.ppf((1 + level) / 2, n - 1)) * error
    return mean, sd, mean - half, mean + half, float(2 * stats.t.sf(abs(mean) / error, n - 1))


def sign_flips(differences: Sequence[float]) -> float:
    """Two-sided p of the mean under all flips of the differences' signs: exact up to EXACT pairs; needs symmetry, no normal distribution.

    NaN without a pair. See `least_p`: few pairs cannot reach a small one, whatever they show.
    """
    values = np.asarray(differences, dtype=float)
    if not len(values):
        return NAN
    if len(values) <= EXACT:
        found = stats.permutation_test((values,), np.mean, permutation_type="samples", n_resamples=math.inf, vectorized=True)
        return float(found.pvalue)
    flips = np.random.default_rng(0).choice([-1.0, 1.0], (FLIPS, len(values)))
    reached = np.abs((flips * values).mean(axis=1)) >= abs(values.mean()) * (1 - 1e-12)
    return float((reached.sum() + 1) / (FLIPS + 1))


def least_p(n: int) -> float:
    """The smallest p that sign flips of `n` pairs can give: all pairs on one side, one of the 2^n flips for each side."""
    return min(1.0, 2.0 ** (1 - n)) if n else NAN


def power(effect: float, n: int, sd: float, alpha: float = 0.05) -> float:
    """Probability that a two-sided paired t test at `alpha` finds a true `effect` (same unit as `sd`)."""
    return _found(effect / sd * math.sqrt(n), n, alpha)


def _found(shift: float, n: int, alpha: float) -> float:
    critical = stats.t.ppf(1 - alpha / 2, n - 1)
    wrong_side = stats.nct.cdf(-critical, n - 1, shift)  # scipy gives NaN where this is too small to compute
    return float(stats.nct.sf(critical, n - 1, shift) + np.nan_to_num(wrong_side))


@functools.lru_cache(4096)  # a page asks the same again for its figures and its check
def resolvable(n: int, sd: float, alpha: float = 0.05, wanted: float = POWER) -> float:
    """Smallest true effect that `n` pairs with this sd find with probability `wanted`; NaN below two pairs, 0 without spread."""
    if n < 2 or math.isnan(sd):
        return NAN
    if sd == 0:
        return 0.0
    top = 4.0  # of the noncentrality: about 2.8 for many pairs, 17 for two
    while _found(top, n, alpha) < wanted:
        top *= 2
    return sd / math.sqrt(n) * float(optimize.brentq(lambda shift: _found(shift, n, alpha) - wanted, 1e-9, top))


@functools.lru_cache(4096)
def seeds_needed(effect: float, sd: float, alpha: float = 0.05, wanted: float = POWER, most: int = 10_000) -> int | None:
    """Fewest pairs (3 at least) that find `effect` with probability `wanted`; None if more than `most`, or if sd is unknown."""
    if math.isnan(sd):
        return None
    low, high = FEWEST, FEWEST
    while resolvable(high, sd, alpha, wanted) > effect:
        low, high = high, high * 2
        if high > most:
            return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if resolvable(middle, sd, alpha, wanted) <= effect else (middle + 1, high)
    return low


def holm(values: Sequence[float]) -> list[float]:
    """Holm's adjusted p values. A NaN counts as a comparison that was made, and stays NaN."""
    order = sorted(range(len(values)), key=lambda i: 2.0 if math.isnan(values[i]) else values[i])
    adjusted, largest = [NAN] * len(values), 0.0
    for rank, i in enumerate(order):
        if not math.isnan(values[i]):
            largest = max(largest, min(1.0, (len(values) - rank) * values[i]))
            adjusted[i] = largest
    return adjusted
