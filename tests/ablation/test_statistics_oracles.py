"""The arithmetic of paired comparisons against statsmodels, on random numbers that are drawn anew each time."""

from __future__ import annotations

import numpy as np
import pytest

from longcat_lab.ablation.paired import holm, paired_t, power, resolvable, seeds_needed

multitest = pytest.importorskip("statsmodels.stats.multitest")
weightstats = pytest.importorskip("statsmodels.stats.weightstats")
TTestPower = pytest.importorskip("statsmodels.stats.power").TTestPower


@pytest.fixture
def draw() -> np.random.Generator:
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"seed {seed}")  # shown where a test fails
    return np.random.default_rng(seed)


def test_interval_and_p_of_paired_differences(draw: np.random.Generator) -> None:
    for n in (2, 3, 5, 8, 40):
        differences = draw.normal(draw.normal(), draw.uniform(0.1, 3), n)
        mean, sd, low, high, p = paired_t(differences)
        theirs = weightstats.DescrStatsW(differences)
        assert (mean, sd) == pytest.approx((theirs.mean, theirs.std_ddof(1)), rel=1e-12)
        assert (low, high) == pytest.approx(theirs.tconfint_mean(0.05), rel=1e-10, abs=1e-12)
        assert p == pytest.approx(theirs.ttest_mean(0)[1], rel=1e-9)


def test_holm_over_many_claims(draw: np.random.Generator) -> None:
    for n in range(1, 12):
        values = draw.uniform(0, 0.2, n) ** 2
        assert holm(list(values)) == pytest.approx(multitest.multipletests(values, method="holm")[1], rel=1e-12)


def test_power_smallest_effect_and_seeds(draw: np.random.Generator) -> None:
    theirs = TTestPower()
    for n in (3, 4, 7, 20):
        sd = draw.uniform(0.2, 2)
        effect = sd * draw.uniform(0.2, 1.5)  # theirs is no number any more where an effect is many sd
        assert power(effect, n, sd) == pytest.approx(theirs.power(effect / sd, n, 0.05), abs=1e-9)
        assert resolvable(n, sd) / sd == pytest.approx(theirs.solve_power(nobs=n, alpha=0.05, power=0.8), rel=1e-6)
    for ratio in draw.uniform(0.2, 2, 5):
        asked = theirs.solve_power(effect_size=ratio, alpha=0.05, power=0.8)
        assert seeds_needed(ratio, 1.0) == max(3, int(np.ceil(asked)))
