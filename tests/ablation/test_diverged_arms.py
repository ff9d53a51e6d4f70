"""Arms that diverged on some seeds: nobody reads a verdict, a mean, a rank or a plan without it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_rooms import FAKE, write_question
from test_ablation_kept import really
from test_ablation_statistics import ablation, table
from test_ablation_store import Pretend, quiet

from longcat_lab.ablation import check, contrast, forecast, judge, noise, read_sweep, render, run, summary
from longcat_lab.ablation.jobs import Job
from longcat_lab.ablation.paired import resolvable
from longcat_lab.ablation.ranks import agreement
from longcat_lab.ablation.report import content
from longcat_lab.errors import LabError
from longcat_lab.notebook.figures import differences

PLAIN = [2.00, 2.10, 1.95, 2.02, 2.05, 1.98]
LOST = "diverged"


def better(*lost: int) -> list[float | str | None]:
    """A clear improvement on every seed but those."""
    noise = [0.001, -0.002, 0.0005, 0.001, -0.001, 0.0]
    return [LOST if seed in lost else PLAIN[seed] - 0.1 + noise[seed] for seed in range(6)]


def but(values: list[float], *lost: int) -> list[float | str | None]:
    return [LOST if seed in lost else value for seed, value in enumerate(values)]


# ---- verdicts


def test_an_arm_that_diverged_where_the_other_finished_is_not_called_better() -> None:
    [whole] = judge(table(plain=PLAIN, b=better()), ablation([("b", "plain")], 6))
    assert whole.verdict == "seen" and "diverged" not in whole.sentence
    [v] = judge(table(plain=PLAIN, b=better(0, 1, 2)), ablation([("b", "plain")], 6))
    assert v.contrast.n == 3 and v.adjusted_p < 0.001, "the pairs that are left would be enough"
    assert v.verdict == "not resolvable" and v.seeds_needed is None
    assert v.sentence.startswith("b diverged on 3 of 6 seeds: the interval is of the 3 seeds alone on which both finished. There ")
    assert "That cannot tell whether b is better than plain: b diverged where plain did not. Left out: seed 0 (b diverged)" in v.sentence
    [v] = judge(table(plain=PLAIN, b=better(4)), ablation([("b", "plain")], 6))
    assert v.verdict == "not resolvable", "one seed is enough"


@pytest.mark.parametrize("other", ["failed", "planned", "running"])
def test_a_divergence_counts_also_before_the_other_job_is_there(other: str) -> None:
    plain: list[Any] = [*PLAIN[:5], other]
    [v] = judge(table(plain=plain, b=better(5)), ablation([("b", "plain")], 6))
    assert v.verdict == "not resolvable" and v.sentence.startswith("b diverged on 1 of 6 seeds")


def test_a_claim_may_stay_seen_where_the_other_arm_diverged_and_says_it_first() -> None:
    [v] = judge(table(plain=but(PLAIN, 1, 3), b=better()), ablation([("b", "plain")], 6))
    assert v.verdict == "seen"
    start = "plain diverged on 2 of 6 seeds: the interval is of the 4 seeds alone on which both finished. b is better than plain: "
    assert v.sentence.startswith(start)
    [v] = judge(table(plain=but(PLAIN, 1), b=better(1)), ablation([("b", "plain")], 6))
    assert v.verdict == "seen", "on one seed both diverged: it speaks for neither"
    assert v.sentence.startswith("b diverged on 1 and plain diverged on 1 of 6 seeds: the interval is of the 5 seeds alone")


def test_an_arm_that_diverged_where_the_better_one_finished_does_not_make_it_no_better() -> None:
    worse = [value + 0.1 + 0.001 * seed for seed, value in enumerate(PLAIN)]
    [v] = judge(table(plain=but(PLAIN, 0, 1), b=worse), ablation([("b", "plain")], 6))
    assert v.verdict == "not resolvable" and "plain diverged where b did not" in v.sentence
    [v] = judge(table(plain=but(PLAIN, 0), b=but(PLAIN)), ablation([("b", "plain")], 6))
    assert v.verdict == "not resolvable" and "differs by exactly 0 in all 5 pairs" in v.sentence and "nan" not in v.sentence
    [v] = judge(table(plain=PLAIN, b=but(worse, 0, 1)), ablation([("b", "plain")], 6))
    assert v.verdict == "not seen" and v.sentence.startswith("b diverged on 2 of 6 seeds: ") and "b is worse than plain" in v.sentence


def test_pairs_that_cannot_be_had_are_not_counted() -> None:
    noisy = [value + step for value, step in zip(PLAIN, [0.02, -0.05, 0.04, -0.03, 0.01, -0.04], strict=True)]
    [v] = judge(table(plain=but(PLAIN, 1, 2), b=noisy), ablation([("b", "plain")], 6))
    assert v.verdict == "not resolvable" and v.contrast.n == 4 and v.contrast.resolvable == resolvable(4, v.contrast.sd)
    assert f"about {v.seeds_needed} on which both finish would be needed" in v.sentence
    [v] = judge(table(plain=PLAIN, b=better(0, 1, 2, 3)), ablation([("b", "plain")], 6))
    assert v.sentence.startswith("b diverged on 4 of 6 seeds: the interval is of the 2 seeds alone on which both finished. Whether ")
    assert "a claim needs 3, and 6 were planned, of which 2 can still be one; left out" in v.sentence
    [v] = judge(table(plain=PLAIN, b=better(*range(6))), ablation([("b", "plain")], 6))
    assert v.sentence.startswith("b diverged on 6 of 6 seeds, and no pair is complete. ") and "of which none can still be one" in v.sentence


def test_what_is_said_beside_the_verdicts_says_it_too() -> None:
    question = ablation([("b", "plain")], 6, also=["ood"], vanishes={"where": "shuffled text", "metric": "shuffled"})
    results = table(plain=PLAIN, b=better(1))
    results["ood"] = results["shuffled"] = results["validation_bpb"]
    found = summary(results, question)
    first = "b diverged on 1 of 6 seeds: the interval is of the 5 seeds alone on which both finished. "
    assert found.lines[0].startswith(f"NOT RESOLVABLE: {first}")
    assert found.secondary[0].startswith(f"ood, b against plain: {first}") and found.vanishing[0].startswith(first)
    gone = summary(table(plain=PLAIN, b=better(*range(6))), ablation([("b", "plain")], 6, also=["ood"]))
    assert gone.secondary == ["ood, b against plain: b diverged on 6 of 6 seeds, and no pair is complete."]
    assert noise(results, "validation_bpb")["diverged"].to_dict() == {"plain": 0, "b": 1}
    assert contrast(table(plain=PLAIN, b=better()), "b", "plain", "validation_bpb").divergence == ""


@pytest.mark.parametrize(
    ("arm", "lost", "said"),
    [
        ("a_a", (), "passed: "),
        ("a_a", (2,), "is open: "),
        ("b_off", (), "passed: "),
        ("b_off", (2,), "is open: "),
    ],
)
def test_a_control_that_diverged_where_the_baseline_did_not_has_not_passed(arm: str, lost: tuple[int, ...], said: str) -> None:
    shifted = [value + step for value, step in zip(PLAIN, [0.001, -0.002, 0.0015, -0.001, 0.0005, -0.0005], strict=True)]
    off = {"model.experts": 4}
    question = ablation([("b", "plain")], 6, control=["a_a", "feature_off"], switch_off={"b": off})
    assert set(question.controls) == {"a_a", "b_off"}
    arms = {"plain": PLAIN, "b": better(), "a_a": shifted, "b_off": shifted} | {arm: but(shifted, *lost)}
    (line,) = [each for each in summary(table(**arms), question).notes if f"Control {arm} " in each]
    assert said in line and line.startswith("Control" if not lost else f"{arm} diverged on 1 of 6 seeds: ")
    assert line.endswith(f"{arm} diverged where the other did not, which the pairs that are left do not show.") == bool(lost)


# ---- ranks


def test_ranks_say_which_seeds_are_in_no_mean() -> None:
    here = table(a=[2.0, 2.1, 2.05], b=[1.9, LOST, LOST], c=[1.8, 1.9, 1.85], d=[LOST] * 3)
    there = table(a=[3.0, 3.1, 3.05], b=[2.9, 3.0, 2.95], c=[LOST, 2.9, 2.85], d=[2.7, 2.8, 2.75])
    found = agreement(here, there, "validation_bpb", "large", [])
    assert found.arms == ("a", "b", "c") and found.means[0][1] == pytest.approx(1.9)
    assert found.sentence.endswith(
        "; seeds that diverged are in no mean (b here: 2 of 3; c in large: 1 of 3; d here: 3 of 3; d is not ranked)"
    )
    assert "diverged" not in agreement(there, there, "validation_bpb", "large", ["c"]).sentence
    with pytest.raises(LabError, match=r"ranks of 2 arms .* are needed; seeds that diverged are in none \(b here: 2 of 3; d here"):
        agreement(here, there, "validation_bpb", "large", ["c"])


# ---- a sweep


def end(job: Job) -> int:
    """Ends as a job does; b diverges on the last three of six seeds. The stand-in of a job knows the noise of three."""
    really(replace(job, seed=job.seed % 3))
    path = job.folder / "run.json"
    record = json.loads(path.read_text())
    if job.variant == "b" and job.seed >= 3:
        record |= {"status": LOST, "reason": "diverged at step 120: loss nan", "final": {}}
    path.write_text(json.dumps(record))
    return 0


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("diverged")
    question = write_question(home, {"a": {}, "b": {"effect": -0.1}}, claims=[{"better": "b", "than": "a"}], seeds=list(range(6)))
    return run(question, home / "out", rooms=FAKE, executor=Pretend(end), console=quiet())


def test_the_page_shows_no_mean_without_it(sweep: Path) -> None:
    found = read_sweep(sweep)
    said = summary(found.results, found.ablation)
    made = content.parts(found, said)
    (answer,) = made["answer"].lines
    assert answer.startswith(
        "With 9 of 12 jobs finished and 3 diverged: not resolvable at this budget: b better than a; b diverged on 3 of 6 "
    )
    assert made["reading"].lines[0].startswith("9 of 12 jobs finished, 3 diverged; ")
    assert "\nb diverged on 3 of 6 seeds: the interval is of the 3 seeds alone" in made["claims"].lines[0]
    assert [row[-1].text.endswith(" (3 of 6 seeds diverged)") for row in made["arms"].rows] == [False, True]
    for part, column in (("claims-table", 2), ("baseline-table", 2), ("seeds-table", 1)):
        cell = made[part].rows[0][column]
        assert cell.text.endswith(" (b diverged on 3 of 6 seeds)") and cell.value is not None
    figures = content.facts(found, said, made)["figures"]
    assert figures["differences"]["series"][1]["said"][0].endswith("(95 % interval, n = 3); b diverged on 3 of 6 seeds")
    assert {each["arm"] for each in figures["cost"]["series"]} == {"a", "b (3 of 6 seeds diverged)"}
    (drawn,) = differences(said.verdicts, 0.01, "validation_bpb").axes
    assert drawn.get_yticklabels()[0].get_text() == "b − a\nnot resolvable\nb diverged on 3 of 6 seeds"


def test_the_plan_counts_the_pairs_that_can_be_had(sweep: Path) -> None:
    found = forecast(sweep.parent / "demo.yaml", sweep, measure=False, rooms=FAKE)
    text = "\n".join(found.lines)
    assert "b diverged on 3 of 6 seeds: of 6 planned pairs 3 can be had, and are counted here." in text
    assert "Seeds: 3 paired seeds find" in text
    c = contrast(read_sweep(sweep).results, "b", "a", "validation_bpb")
    assert found.resolvable == resolvable(3, c.sd)


@pytest.mark.slow
def test_the_page_agrees_with_its_folder(sweep: Path) -> None:
    page = render(sweep)
    assert page.is_file() and [problem for problem in check(sweep) if "jobs/" not in problem] == []
