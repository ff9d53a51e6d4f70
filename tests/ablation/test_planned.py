"""What a plan says before anything runs, the noise floor that sweeps leave to each other, and whether two sweeps agree."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_rooms import PARAMETERS, write_notebook
from scipy import stats
from worded import ROOMS, Worded, finish, write

from longcat_lab.ablation import floor, forecast, rank_agreement, read, solve, store, summary
from longcat_lab.ablation.paired import least_p, resolvable, seeds_needed, sign_flips
from longcat_lab.ablation.ranks import agreement
from longcat_lab.ablation.statistics import judge
from longcat_lab.ablation.sweep import before, noise
from longcat_lab.errors import LabError
from longcat_lab.node import validate_node

ARMS: dict[str, Any] = {
    "plain": {"model.width": 512},
    "deep": {"model.width": 512, "model.depth": 3},
    "much": {"model.width": 512, "effect": 1.0},
}
CLAIMS = [{"better": "deep", "than": "plain"}, {"better": "much", "than": "plain"}]


def begun(folder: Path, values: dict[str, list[float]], **more: Any) -> Path:
    """A sweep's folder below `folder`/runs with results, as a sweep leaves it."""
    path = write(folder, {key: {} for key in (name for name in values if name != "a_a")}, **more)
    a = read(path)
    home = folder / "runs" / a.name
    a = before(a, home, ROOMS, 1, lambda line: None)
    a = a.model_copy(update={"noise": noise(a, home, ROOMS)})
    store.write_question(home, a, solve(a, ROOMS))
    finish(home, values)
    return home


# ---- the plan


def test_a_plan_says_jobs_cost_matching_and_power(tmp_path: Path) -> None:
    path = write(
        tmp_path, ARMS, seeds=[0, 1, 2], claims=CLAIMS, match="flops", free="model.width", control="a_a", set={"training.steps": 100}
    )
    found = forecast(path, tmp_path / "runs" / "demo", 2, rooms=ROOMS)
    assert len(found.status) == 12 and set(found.status.values()) == {"to do"}
    one = {name: ROOMS.measure(config, 1) for name, config in found.solution.configs.items()}
    jobs = {name: (5.0 - 4.0) + 100 * each.step + 2.0 for name, each in one.items()}  # 4 s of imports, which forks do not have
    assert found.seconds == pytest.approx(4.0 + 3 * sum(jobs.values())) and found.slots == 2
    assert found.seconds / 2 <= found.wall <= found.seconds / 2 + max(jobs.values()) + 2.0
    cold = forecast(path, tmp_path / "runs" / "demo", 2, ["ablation.resources.warm=false"], rooms=ROOMS)
    assert cold.seconds == pytest.approx(3 * sum(each + 4.0 for each in jobs.values()))
    assert "count once" in "".join(found.lines) and "count once" not in "".join(cold.lines)
    text = "\n".join(found.lines)
    assert (
        "4 variants × 3 seeds = 12 jobs: 0 done, 12 to do" in text
        and "Held equal: training FLOPs of deep, much within 1 % of plain." in text
    )
    assert f"model.width={found.solution.moved['deep']['model.width']}" in text and "a_a (control)" in text
    assert "from 3 measured steps of each variant" in text and "set-up s" in text and "evaluation s" in text
    row = next(line for line in found.lines if line.startswith("  deep ") and "model.width" in line)
    assert row.count("×") == 4, "all four quantities, held or not"
    assert f"find an effect of {resolvable(3, 1.0, 0.025):.2g} sd" in text and "is not known yet: the arm a_a of this question will" in text
    assert math.isnan(found.resolvable) and found.seeds_needed is None
    assert sorted(each.name for each in tmp_path.iterdir()) == ["demo.yaml", "job.ipynb"], "nothing was made"


def test_a_plan_without_measuring_asks_no_machine(tmp_path: Path) -> None:
    path = write(tmp_path, ARMS, seeds=[0, 1], set={"training.steps": 100})
    found = forecast(path, tmp_path / "out", measure=False, rooms=ROOMS)
    assert found.measured == {} and found.wall is None and "Cost: nothing was measured." in found.lines
    assert "Seeds: 2 planned; a claim needs 3." in found.lines
    timed = write(tmp_path, ARMS, match="wall_clock", free="training.steps")
    with pytest.raises(LabError, match="no steps of it have been measured"):
        forecast(timed, tmp_path / "out", measure=False, rooms=ROOMS)
    held = forecast(timed, tmp_path / "out", rooms=ROOMS)
    assert held.solution.quantities["deep"]["wall_clock"] == pytest.approx(held.solution.quantities["plain"]["wall_clock"], rel=0.01)
    assert any(line.startswith("wall_clock rests on measured steps: plain") for line in held.lines)


def test_a_plan_of_a_sweep_that_has_begun_counts_what_is_done(tmp_path: Path) -> None:
    home = begun(
        tmp_path, {"plain": [2.0, 2.1, 1.9], "deep": [1.9, 2.02, 1.79]}, seeds=[0, 1, 2, 3], claims=CLAIMS[:1], smallest_effect=0.005
    )
    for variant in ("plain", "deep"):
        for seed in range(3):
            place = store.job_folder(home, variant, seed)
            run = json.loads((place / "run.json").read_text())
            config = next(c for (v, s), c in cells(tmp_path / "demo.yaml").items() if (v, s) == (variant, seed))
            (place / "run.json").write_text(json.dumps({**run, "identity": ROOMS.identity(config)}))
    found = forecast(tmp_path / "demo.yaml", home, measure=False, rooms=ROOMS)
    assert sum(status == "finished" for status in found.status.values()) == 6 and found.status["deep", 3] == "to do"
    sd = float(np.std([-0.1, -0.08, -0.11], ddof=1))
    assert found.resolvable == pytest.approx(resolvable(4, sd)) and found.seeds_needed == seeds_needed(0.005, sd)
    assert f"out of reach: about {found.seeds_needed} seeds would do" in found.lines[-1]


def cells(path: Path) -> dict[tuple[str, int], Any]:
    from longcat_lab.ablation.jobs import cells as of

    a = read(path)
    return of(a, solve(a, ROOMS), ROOMS)


def test_real_steps_are_measured_in_a_process_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from longcat_lab import load
    from longcat_lab.ablation.measured import measure

    monkeypatch.chdir(tmp_path)
    found = measure(load("tiny", "training.steps=50"), 1, steps=3)
    assert len(found.steps) == 3 and 0 < found.step < found.setup and found.evaluation > 0 and found.peak_memory > 10**6
    assert found.job(50) == pytest.approx(found.setup + 50 * found.step + found.evaluation)
    assert 0 < found.imports < found.setup and found.job(50, forked=True) == pytest.approx(found.job(50) - found.imports)
    assert not list(tmp_path.iterdir())
    with pytest.raises(LabError, match=r"cannot be measured here: .*training\.device 'nosuch'"):
        measure(load("tiny", "training.device=nosuch"), 1)


@pytest.mark.slow
def test_steps_of_processes_that_train_together_are_measured_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from longcat_lab import load
    from longcat_lab.ablation.measured import measure

    monkeypatch.chdir(tmp_path)
    found = measure(load("tiny", "training.steps=5000"), 1, processes=2, steps=3)
    assert len(found.steps) >= 3 and 0 < found.step < found.setup and found.evaluation == 0
    assert not list(tmp_path.iterdir())


def test_jobs_of_a_cluster_are_not_held_to_what_this_machine_has(tmp_path: Path) -> None:
    class Queue:
        slots = 1000

        def submit(self, job: Any) -> Any:
            raise AssertionError("a plan starts nothing")

    path = write(tmp_path, ARMS, claims=CLAIMS, resources={"cards": 8, "cores": 4096})
    write_notebook(tmp_path / "job.ipynb", f"{PARAMETERS}\nprocesses = None")
    with pytest.raises(LabError, match="cores asks for 4096, and this machine has"):
        forecast(path, tmp_path / "out", rooms=ROOMS)
    found = forecast(path, tmp_path / "out", executor=Queue(), rooms=ROOMS)
    assert found.slots == len(found.status) and "8 processes and 4096 threads each" in "\n".join(found.lines)
    assert found.lines.index("Steps were measured on this machine: where the jobs run they may take another time.")


# ---- the noise floor


def test_the_floor_is_kept_and_the_next_sweep_knows_it(tmp_path: Path) -> None:
    values = {"plain": [2.0, 2.1, 1.9, 2.05], "a_a": [2.004, 2.098, 1.905, 2.049], "deep": [1.9, 2.0, 1.8, 1.9]}
    first = begun(tmp_path / "one", values, seeds=[0, 1, 2, 3], control="a_a", name="first")
    assert not known(first, read(first / "ablation.yaml"))
    [entry] = floor.keep(first)
    sd = float(np.std([0.004, -0.002, 0.005, -0.001], ddof=1))
    assert entry == {
        "preset": "small",
        "metric": "validation_bpb",
        "steps": 200,
        "n": 4,
        "sd": pytest.approx(sd),
        "sweep": "first",
        "code": "c0de",
        "fingerprint": floor.fingerprint(solve(read(first / "ablation.yaml"), ROOMS).configs["plain"].to_dict()),
    }
    floor.keep(first)
    assert len(json.loads((first.parent / "noise.json").read_text())) == 1, "the same sweep is filed once"
    said = summary(store.load_results(first), read(first / "ablation.yaml")).notes
    assert any(
        "Control a_a" in line and "passed" in line and f"noise floor is this sd of a pair's difference: {sd:.3g}" in line for line in said
    )

    arms = {name: {**values, "model.width": 64} for name, values in ARMS.items()}
    path = write(tmp_path / "one", arms, seeds=[0, 1, 2], name="second", smallest_effect=0.001, claims=CLAIMS)
    plan = forecast(path, first.parent / "second", measure=False, rooms=ROOMS)
    assert plan.resolvable == pytest.approx(resolvable(3, sd, 0.025)) and plan.seeds_needed == seeds_needed(0.001, sd, 0.025)
    assert any("Noise known so far: sd" in line and "sweep first" in line for line in plan.lines)
    second = begun(tmp_path / "one", {"plain": [1.0] * 3, "deep": [1.0] * 3}, seeds=[0, 1, 2], name="second")
    words = f"The noise floor that was known of small when this sweep began: sd {sd:.3g}"
    assert any(line.startswith(words) for line in summary(store.load_results(second), read(second / "ablation.yaml")).lines)
    shutil.move(first.parent, tmp_path / "elsewhere")
    elsewhere = tmp_path / "elsewhere" / "second"
    assert any(line.startswith(words) for line in summary(store.load_results(elsewhere), read(elsewhere / "ablation.yaml")).lines)


def known(folder: Path, a: Any, code: str = "c0de") -> dict[str, Any]:
    return floor.known(folder, a, lambda: solve(a, ROOMS).configs[a.baseline], lambda: code)


OTHER = "of another model or length"


@pytest.mark.parametrize(
    ("changed", "entry", "words"),
    [
        ({}, {}, ""),
        ({"data.seed": 5, "training.threads": 4}, {}, ""),
        ({}, {"code": "older"}, "of other code"),
        ({"model.depth": 24}, {}, OTHER),
        ({"training.steps": 20000}, {}, OTHER),
        ({"training.steps": 20000}, {"code": "older"}, OTHER),
        ({}, {"fingerprint": None}, "of an unknown model or length"),
        ({}, {"fingerprint": [1]}, "of an unknown model or length"),
    ],
)
def test_a_floor_of_something_else_is_told_and_nothing_follows_from_it(
    tmp_path: Path, changed: dict[str, Any], entry: dict[str, Any], words: str
) -> None:
    values = {"plain": [2.0, 2.1, 1.9], "a_a": [2.004, 2.098, 1.905]}
    first = begun(tmp_path, values, seeds=[0, 1, 2], control="a_a", name="first")
    [filed] = floor.keep(first)
    filed = {key: value for key, value in (filed | entry).items() if value is not None}  # older entries have no fingerprint
    (first.parent / "noise.json").write_text(json.dumps([filed]))
    more = {"seeds": [0, 1, 2], "name": "second", "smallest_effect": 1e-6, "set": changed}
    path, home = write(tmp_path, {"plain": {}, "deep": {"model.depth": 3}}, **more), first.parent / "second"
    plan = forecast(path, home, measure=False, rooms=ROOMS)
    text = "\n".join(plan.lines)
    if not words:
        assert plan.resolvable == pytest.approx(resolvable(3, filed["sd"])) and "out of reach" in text and OTHER not in text
    else:
        assert math.isnan(plan.resolvable) and plan.seeds_needed is None and "out of reach" not in text
        assert f"at small is known {words} alone (sd {filed['sd']:.3g} of a pair's" in text and "control: a_a adds the arm" in text
    second = begun(tmp_path, {"plain": [1.0] * 3, "deep": [1.0] * 3}, **more)
    said = f"known of small when this sweep began{f', {words}' if words else ''}: sd {filed['sd']:.3g}"
    assert any(said in line for line in summary(store.load_results(second), read(second / "ablation.yaml")).lines)


def test_of_several_floors_the_one_of_the_same_model_counts(tmp_path: Path) -> None:
    """However few its pairs are; and two files of one name are two models."""
    for folder, width in (("one", 64), ("two", 128)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.yaml").write_text(json.dumps({"model": {"width": width}}))
    rooms = dataclasses.replace(ROOMS, load=lambda base: validate_node(Worded, json.loads(Path(base).read_text())))
    one, two = (read(write(tmp_path / folder, {"plain": {}}, base="mine.yaml", name=folder)) for folder in ("one", "two"))
    configs = {a.name: solve(a, rooms).configs["plain"] for a in (one, two)}
    entries = [
        {"preset": "mine", "metric": "validation_bpb", "n": n, "sd": sd, "sweep": sweep, "code": "c0de", "fingerprint": mark}
        for n, sd, sweep, mark in (
            (9, 0.9, "far", floor.fingerprint(configs["two"].to_dict())),
            (3, 0.3, "near", floor.fingerprint(configs["one"].to_dict())),
            (40, 0.4, "old", None),
        )
    ]
    (tmp_path / "noise.json").write_text(json.dumps(entries))

    def found(a: Any) -> tuple[str, str]:
        entry = floor.known(tmp_path / "new", a, lambda: configs[a.name], lambda: "c0de")
        return entry["sweep"], entry["about"]

    assert found(one) == ("near", "same") and found(two) == ("far", "same")
    (tmp_path / "noise.json").write_text(json.dumps(entries[:1] + entries[2:]))
    assert found(one) == ("far", "other")


def test_a_floor_that_somebody_broke_is_none(tmp_path: Path) -> None:
    a = read(write(tmp_path, ARMS))
    for text in (
        "{",
        "{}",
        '[1, {"preset": "small"}]',
        '[{"preset": "small", "metric": "validation_bpb", "sweep": "x", "n": 3, "sd": -1}]',
    ):
        (tmp_path / "noise.json").write_text(text)
        assert known(tmp_path / "demo", a) == {}


@pytest.mark.parametrize(
    ("off", "sentence"),
    [
        ([2.0, 2.1, 1.9], "passed: equal to plain in validation_bpb, digit for digit"),
        ([2.001, 2.101, 1.9005], "passed: validation_bpb differs from plain by"),
        ([2.2, 2.31, 2.09], "FAILED"),
        ([2.1, 2.0, 1.95], "is open"),
        ([2.1], "not judged yet, 1 of 3 pairs"),
    ],
)
def test_a_feature_that_is_off_must_equal_the_baseline(tmp_path: Path, off: list[float], sentence: str) -> None:
    path = write(
        tmp_path, {"plain": {}, "deep": {"model.depth": 3}}, seeds=[0, 1, 2], control="feature_off", switch_off={"deep": {"model.depth": 2}}
    )
    a = read(path)
    finish(tmp_path / "out", {"plain": [2.0, 2.1, 1.9], "deep": [1.0, 1.1, 0.9], "deep_off": off})
    found = summary(store.load_results(tmp_path / "out"), a)
    assert any(line.startswith("Control deep_off (deep with its feature off)") and sentence in line for line in found.notes)
    assert not any("deep_off" in line for line in found.secondary), "a control is no result"


def test_a_failed_a_a_is_said(tmp_path: Path) -> None:
    a = read(write(tmp_path, {"plain": {}}, seeds=[0, 1, 2], control="a_a"))
    finish(tmp_path / "out", {"plain": [2.0, 2.1, 1.9], "a_a": [2.1, 2.201, 1.999]})
    assert any("Control a_a" in line and "FAILED" in line for line in summary(store.load_results(tmp_path / "out"), a).notes)


# ---- without a distribution, and ranks


def test_sign_flips_by_hand_and_by_counting() -> None:
    assert sign_flips([1.0, 2.0, 3.0]) == pytest.approx(0.25) == least_p(3), "all on one side: the least that three pairs allow"
    assert sign_flips([3.0, -1.0]) == pytest.approx(1.0) and math.isnan(sign_flips([]))
    values = np.random.default_rng(1).normal(0.4, 1, 9)
    signs = 1 - 2 * ((np.arange(2**9)[:, None] >> np.arange(9)) & 1)
    counted = np.mean(np.abs((signs * values).mean(axis=1)) >= abs(values.mean()) - 1e-12)
    assert sign_flips(values) == pytest.approx(counted)
    many = np.random.default_rng(2).normal(0.3, 1, 40)
    assert sign_flips(many) == pytest.approx(stats.ttest_1samp(many, 0).pvalue, abs=0.02) and sign_flips(many) == sign_flips(many)


def test_three_pairs_cannot_be_significant_by_flips_and_the_claim_says_so(tmp_path: Path) -> None:
    a = read(write(tmp_path, {"plain": {}, "deep": {}}, seeds=[0, 1, 2], claims=CLAIMS[:1]))
    finish(tmp_path / "out", {"plain": [2.0, 2.1, 1.95], "deep": [1.9, 1.99, 1.86]})
    [verdict] = judge(store.load_results(tmp_path / "out"), a)
    assert verdict.verdict == "seen" and verdict.contrast.flipped == pytest.approx(0.25)
    said = verdict.contrast.without_normality
    assert "p = 0.25, one comparison (3 pairs allow no p below 0.25, so they cannot be significant in it)" in said


def test_ranks_of_two_sweeps(tmp_path: Path) -> None:
    arms = {"plain": [2.0, 2.2], "deep": [1.9, 1.8], "much": [1.5, 1.7], "wide": [1.0, 1.2]}
    ours = begun(tmp_path / "a", {**arms, "only": [1.0, 1.0]})
    theirs = begun(tmp_path / "b", {name: [x + 1 for x in values] for name, values in arms.items()} | {"much": [0.1, 0.2]})
    found = rank_agreement(ours, theirs)
    x, y = [2.1, 1.85, 1.6, 1.1], [3.1, 2.85, 0.15, 2.1]
    assert found.arms == ("plain", "deep", "much", "wide") and found.means[0] == pytest.approx(x) and found.means[1] == pytest.approx(y)
    exact = stats.kendalltau(x, y, method="exact")
    assert (found.tau, found.tau_p) == pytest.approx((exact.statistic, exact.pvalue)) and found.tau == pytest.approx(4 / 6)
    assert found.rho == pytest.approx(stats.spearmanr(x, y).statistic) == pytest.approx(0.8) and found.agreeing == pytest.approx(5 / 6)
    assert found.rho_p == pytest.approx(8 / 24) and found.least_p == pytest.approx(2 / 24)
    with pytest.raises(LabError, match="ranks of 2 arms cannot be compared"):
        agreement(store.load_results(ours).query("variant in ('plain', 'deep')"), store.load_results(theirs), "validation_bpb", "b", [])

    other = read(write(tmp_path / "b", {key: {} for key in arms}, compare_with=str(ours), seeds=[0, 1]))
    store.write_question(theirs, other, solve(other, ROOMS))
    assert "compare_with: ../../../a/runs/demo" in (theirs / "ablation.yaml").read_text(), "both can be moved together"
    [line] = [each for each in summary(store.load_results(theirs), read(theirs / "ablation.yaml")).notes if "Kendall" in each]
    assert "tau +0.67" in line and "5 of 6 pairs of arms in the same order" in line
    shutil.rmtree(ours)
    [line] = [each for each in summary(store.load_results(theirs), read(theirs / "ablation.yaml")).notes if "no sweep" in each]
    assert line.count("\n") == 0
