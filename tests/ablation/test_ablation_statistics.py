"""Against closed forms, an independent test, hand-computed corrections, and simulation."""

from __future__ import annotations

import math
from typing import Any

import fake_rooms
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from longcat_lab.ablation import contrast, judge, noise, read, summary
from longcat_lab.ablation.paired import holm, paired_t, power, resolvable, seeds_needed


def table(**arms: list[float | str | None]) -> pd.DataFrame:
    """One row per job; a text in place of a value is the status of a job that did not finish."""
    rows: list[dict[str, Any]] = []
    for variant, values in arms.items():
        for seed, value in enumerate(values):
            status = value if isinstance(value, str) else "finished"
            rows.append(
                {
                    "variant": variant,
                    "seed": seed,
                    "status": status,
                    "reason": "",
                    "validation_bpb": value if status == "finished" else None,
                }
            )
    frame = pd.DataFrame(rows)
    frame["validation_bpb"] = pd.to_numeric(frame["validation_bpb"])
    return frame


def ablation(claims: list[tuple[str, str]], seeds: int = 3, **more: Any) -> Any:
    names = list(dict.fromkeys(["plain", *(name for pair in claims for name in pair)]))
    pairs = [{"better": better, "than": than} for better, than in claims]
    return read(fake_rooms.question({name: {} for name in names}, claims=pairs, seeds=list(range(seeds)), **more))


@pytest.mark.parametrize(("n", "factor"), [(3, 2.48), (5, 1.24), (8, 0.84)])
def test_half_width_in_standard_deviations(n: int, factor: float) -> None:
    values = np.random.default_rng(n).normal(0.3, 2.0, n)
    _, sd, low, high, _ = paired_t(values)
    assert (high - low) / 2 / sd == pytest.approx(factor, abs=0.006)


@given(st.integers(3, 12), st.integers(0, 10**6))
def test_agrees_with_scipy(n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(2, 0.1, n), rng.normal(2.02, 0.1, n)
    ours, theirs = contrast(table(b=list(a), a=list(b)), "b", "a", "validation_bpb"), stats.ttest_rel(a, b)
    assert ours.p == pytest.approx(theirs.pvalue, rel=1e-9)
    interval = theirs.confidence_interval(0.95)
    assert (ours.low, ours.high) == pytest.approx((interval.low, interval.high), rel=1e-9)


def test_power_by_simulation() -> None:
    rng = np.random.default_rng(7)
    for n in (3, 5, 8):
        effect = resolvable(n, 0.02)
        found = stats.ttest_1samp(rng.normal(effect, 0.02, (20_000, n)), 0, axis=1).pvalue < 0.05
        assert found.mean() == pytest.approx(0.8, abs=0.01)
        assert power(effect, n, 0.02) == pytest.approx(0.8, abs=1e-6)


def test_coverage_by_simulation() -> None:
    rng = np.random.default_rng(11)
    inside = [low <= 0.01 <= high for _, _, low, high, _ in (paired_t(rng.normal(0.01, 0.03, 4)) for _ in range(3000))]
    assert np.mean(inside) == pytest.approx(0.95, abs=0.012)


def test_seeds_needed_is_the_first_that_suffices() -> None:
    for ratio in (0.3, 0.8, 1.5, 10):
        n = seeds_needed(ratio, 1.0)
        assert n is not None and resolvable(n, 1.0) <= ratio and (n == 3 or resolvable(n - 1, 1.0) > ratio)
    # (1.96 + 0.84)^2 / 0.3^2 = 87.2 by the normal approximation; the t needs a little more.
    assert seeds_needed(0.3, 1.0) == pytest.approx(89, abs=1)
    assert seeds_needed(1e-6, 1.0) is None


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.02, 0.02, 0.9]) == pytest.approx([0.06, 0.06, 0.9])
    assert holm([0.6, 0.5]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []
    first, missing = holm([0.01, math.nan])
    assert first == pytest.approx(0.02) and math.isnan(missing), "a claim without data still counts as one that was made"


def test_seen() -> None:
    results = table(plain=[2.00, 2.10, 1.95], ngram=[1.90, 1.99, 1.86])
    [v] = judge(results, ablation([("ngram", "plain")]))
    assert v.verdict == "seen" and v.comparisons == 1
    assert v.sentence.startswith(
        "ngram is better than plain: validation_bpb differs by -0.1, -0.125 to -0.0752 (95 % interval, n = 3), p = 0.0033"
    )


def test_seen_but_small() -> None:
    [v] = judge(table(plain=[2.0, 2.1, 1.9], b=[1.9990, 2.0991, 1.8989]), ablation([("b", "plain")]))
    assert v.verdict == "seen" and "less than the 0.01 that was said to matter" in v.sentence


def test_correction_can_take_a_verdict_back() -> None:
    results = table(plain=[2.00, 2.10, 1.95], b=[1.96, 2.02, 1.89], c=[2.01, 2.08, 1.97])
    alone, both = judge(results, ablation([("b", "plain")]))[0], judge(results, ablation([("b", "plain"), ("c", "plain")]))[0]
    assert alone.verdict == "seen" and both.verdict == "not resolvable"
    assert both.adjusted_p == pytest.approx(2 * both.contrast.p) and "after Holm over 2 comparisons" in both.sentence


def test_not_seen_says_which() -> None:
    worse, equal = table(plain=[2.0, 2.1, 1.9], b=[2.10, 2.21, 1.99]), table(plain=[2.0, 2.1, 1.9], b=[2.001, 2.099, 1.9])
    [v] = judge(worse, ablation([("b", "plain")]))
    assert v.verdict == "not seen" and v.sentence.startswith("b is worse than plain")
    [v] = judge(equal, ablation([("b", "plain")]))
    assert v.verdict == "not seen" and v.sentence.startswith("b is not better than plain by 0.01 or more")


def test_not_resolvable_says_how_many_seeds() -> None:
    [v] = judge(table(plain=[2.0, 2.1, 1.9], b=[1.97, 2.11, 1.88]), ablation([("b", "plain")]))
    assert v.verdict == "not resolvable" and v.seeds_needed == seeds_needed(0.01, v.contrast.sd)
    assert f"about {v.seeds_needed} would be needed to find 0.01" in v.sentence


def test_several_comparisons_resolve_less_and_need_more() -> None:
    results = table(plain=[2.0, 2.1, 1.9], b=[1.97, 2.11, 1.88], c=[1.98, 2.12, 1.87])
    [alone], [first, _] = (judge(results, ablation(claims)) for claims in ([("b", "plain")], [("b", "plain"), ("c", "plain")]))
    sd = alone.contrast.sd
    assert alone.contrast.resolvable == pytest.approx(resolvable(3, sd)) and "counting" not in alone.sentence
    assert first.contrast.resolvable == pytest.approx(resolvable(3, sd, 0.025)) and first.contrast.alpha == pytest.approx(0.025)
    assert alone.seeds_needed == seeds_needed(0.01, sd) < seeds_needed(0.01, sd, 0.025) == first.seeds_needed
    assert first.sentence.endswith(f"about {first.seeds_needed} would be needed to find 0.01 (counting 2 comparisons).")
    assert (first.contrast.low, first.contrast.p) == (alone.contrast.low, alone.contrast.p)
    assert contrast(results, "b", "plain", "validation_bpb").resolvable == alone.contrast.resolvable


@pytest.mark.parametrize(
    ("there", "sentence"),
    [
        ([8.101, 8.199, 8.0005], "no effect that matters is there."),
        ([8.05, 8.2, 8.1], "too few seeds to tell whether an effect is left there."),
        ([7.9, 8.01, 7.81], "it does not vanish there."),
        ([8.1, 8.2, 8.0], "exactly equal."),
    ],
)
def test_vanished_only_where_the_interval_is_narrow(there: list[float], sentence: str) -> None:
    question = ablation([("b", "plain")], vanishes={"where": "shuffled text", "metric": "shuffled"})
    results = table(plain=[2.0, 2.1, 1.9], b=[1.9, 1.99, 1.81])
    results["shuffled"] = [8.1, 8.2, 8.0, *there]
    assert summary(results, question).vanishing[0].endswith(sentence)


def test_few_seeds_never_claim() -> None:
    [v] = judge(table(plain=[2.0, 2.1], b=[1.0, 1.100001]), ablation([("b", "plain")], seeds=2))
    assert v.verdict == "not resolvable" and "a claim needs 3, and only 2 seeds were planned" in v.sentence
    [v] = judge(table(plain=[2.0], b=["planned"]), ablation([("b", "plain")], seeds=1))
    assert "no pairs" in v.sentence and "only 1 seed was planned" in v.sentence


def test_incomplete_pairs_are_dropped_and_said() -> None:
    results = table(plain=[2.0, 2.1, 1.9, 2.0, 2.2], b=[1.9, 1.99, 1.81, "failed", math.nan])
    [v] = judge(results, ablation([("b", "plain")], seeds=5))
    assert v.contrast.seeds == (0, 1, 2) and v.verdict == "seen"
    assert v.sentence.endswith("Left out: seed 3 (b failed); seed 4 (b has no finite validation_bpb).")
    assert contrast(results, "b", "plain", "nothing").n == 0


def test_without_spread_nothing_is_claimed() -> None:
    [same] = judge(table(plain=[2.0, 2.1, 1.9], b=[2.0, 2.1, 1.9]), ablation([("b", "plain")]))
    assert same.verdict == "not seen" and "was not tested" in same.sentence and math.isnan(same.adjusted_p)
    [shifted] = judge(table(plain=[2.0, 2.1, 1.9], b=[1.9, 2.0, 1.8]), ablation([("b", "plain")]))
    assert shifted.verdict == "not resolvable" and "the seeds varied nothing" in shifted.sentence


def test_no_claims_from_noise() -> None:
    """A/A: two arms that differ by nothing but noise are called different no more often than the level allows."""
    rng, question = np.random.default_rng(3), ablation([("b", "plain")], seeds=5, smallest_effect=10)
    verdicts = [judge(table(plain=list(rng.normal(2, 0.02, 5)), b=list(rng.normal(2, 0.02, 5))), question)[0].verdict for _ in range(400)]
    assert verdicts.count("seen") / 400 < 0.045  # 2.5 % expected: only the claimed direction counts


def test_summary_of_everything_and_of_nothing() -> None:
    question = ablation([("b", "plain")], also=["ood"], vanishes={"where": "shuffled text", "metric": "shuffled"})
    results = table(plain=[2.0, 2.1, 1.9], b=[1.9, 1.99, 1.81])
    results["ood"], results["shuffled"] = results["validation_bpb"] + 1, [8.0, 8.1, 8.0, 8.05, 8.0, 8.1]
    found = summary(results, question)
    assert found.lines[0].startswith("SEEN: b is better") and found.secondary[0].startswith("ood, b against plain: -0.1,")
    assert "too few seeds to tell whether an effect is left there" in found.vanishing[0]
    planned = table(plain=["planned"] * 3, b=["planned"] * 3)
    assert [v.verdict for v in summary(planned, question).verdicts] == ["not resolvable"]
    assert summary(planned, question).notes == ["Of 6 jobs, 6 planned."]


def test_noise() -> None:
    found = noise(table(plain=[2.0, 2.1, 1.9], b=[1.0, "failed", "planned"]), "validation_bpb")
    assert found.loc["plain", "sd"] == pytest.approx(0.1) and found.loc["b", "n"] == 1 and math.isnan(found.loc["b", "sd"])
