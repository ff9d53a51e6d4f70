"""Arms that are evaluated from a trained variant: questions, rows, verdicts and the page, with pretended and with real jobs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_rooms
import numpy as np
import pytest
import yaml
from fake_rooms import FAKE, question, write_question
from pydantic import Field
from scipy import stats
from test_ablation_store import Pretend, quiet

from longcat_lab.ablation import JobsFailed, check, judge, load_results, noise, plan, read, read_sweep, render, run, solve
from longcat_lab.ablation.jobs import Job
from longcat_lab.ablation.report import html
from longcat_lab.ablation.store import job_folder
from longcat_lab.config import apply
from longcat_lab.errors import LabError
from longcat_lab.node import Node, validate_node

TWO: dict[str, Any] = {"plain": {}, "b": {"model.experts": 8}}
LESS = {"of": "b", "set": {"model.experts": 2}}
ARM = {"evaluate": {"less": LESS}, "claims": [{"better": "less", "than": "b"}, {"better": "b", "than": "plain"}]}


class Training(Node):
    evaluations: dict[str, dict[str, Any]] = Field(default_factory=dict)


class Config(fake_rooms.Config):
    """The pretended configuration, with the one setting of training that counts here."""

    training: Training = Field(default_factory=Training)


def fake_load(base: str) -> Config:
    return validate_node(Config, {} if base == "small" else yaml.safe_load(Path(base).read_text()))


def fake_apply(config: Config, values: dict[str, Any]) -> Config:
    data = config.to_dict()
    for key, value in values.items():
        *parts, last = key.split(".")
        node = data
        for part in parts:
            node = node[part]
        node[last] = value
    return validate_node(Config, data)


ROOMS = replace(FAKE, load=fake_load, apply=fake_apply, check_evaluations=lambda config: None)


def value(seed: int, experts: int) -> float:
    return 2.0 + 0.1 / experts + [0.0, 0.013, -0.007][seed] * (1 + 0.1 * experts)


def finish(job: Job) -> int:
    """What a job that evaluates its arms too leaves in its folder."""
    fresh = job.folder / "planned.json"
    found = json.loads((fresh if fresh.exists() else job.folder / "run.json").read_text())
    fresh.unlink(missing_ok=True)
    final = {"validation_bpb": value(job.seed, job.config.model.experts), "train_loss": 1.5}
    for name, changes in job.config.training.evaluations.items():
        final[f"{name}/validation_bpb"] = value(job.seed, changes.get("model.experts", job.config.model.experts))
    found |= {"status": "finished", "reason": None, "final": final, "budget": job.totals, "not_engaged": ["x: idle"]}
    found["job"] = {**found["job"], "attempts": found["job"].get("attempts", 0) + 1, "seconds": 7.5}
    (job.folder / "run.json").write_text(json.dumps(found))
    return 0


# ---- the question


def matched(**rule: Any) -> dict[str, Any]:
    return {**ARM, "match": [{"quantity": "total_params", "reference": "plain", **rule}]}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"evaluate": {"less": {"of": "c", "set": {}}}}, r"evaluate\.less \('of'\) names 'c', which is not a variant"),
        ({"evaluate": {"less": LESS, "more": {**LESS, "of": "less"}}}, r"evaluate\.more \('of'\) names 'less', which is evaluated and not"),
        ({"evaluate": {"b": LESS}}, "'b' is in 'variants' and in 'evaluate'; give one of them another name"),
        ({"evaluate": {"a/b": LESS}}, "'evaluate"),
        ({"evaluate": {"less": {"of": "b"}}}, r"'evaluate\.less\.set' is missing"),
        ({"evaluate": {"less": {"off": "b", "set": {}}}}, r"Unknown key 'evaluate\.less\.off', did you mean 'of'"),
        ({"evaluate": {"less": {"of": "b", "set": {"training.steps": 3}}}}, r"evaluate\.less sets 'training\.steps', but only settings"),
        ({"evaluate": {"less": {"of": "b", "set": {"seed": 3}}}}, r"evaluate\.less sets 'seed'"),
        ({**ARM, "baseline": "less"}, "'baseline' names 'less', which is evaluated and not trained; name a variant"),
        ({**ARM, "claims": [{"better": "les", "than": "b"}]}, r"\('better'\) names 'les', which is no variant and not in 'evaluate', did"),
        (matched(reference="less"), r"match 1 \('reference'\) names 'less', which is evaluated and not trained"),
        (matched(free={"less": "model.width"}), "match 1 names 'less', which is evaluated and not trained"),
        (matched(variants=["less"]), "match 1 names 'less', which is evaluated and not trained"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(LabError, match=sentence) as error:
        read({**question(TWO), **change})
    assert "\n" not in str(error.value)


def test_arms_belong_to_the_jobs_of_their_variant(tmp_path: Path) -> None:
    a = read(question(TWO, seeds=[5, 6], **ARM))
    assert a.arms == ["plain", "b", "less"]
    solution = solve(a, ROOMS)
    assert list(solution.configs) == ["plain", "b"] and solution.evaluated["less"].model.experts == 2
    assert solution.totals["less"] == ROOMS.totals(fake_apply(fake_load("small"), {"model.experts": 2}))
    assert list(solution.table.index) == ["plain", "b", "less"] and solution.table.loc["less", "moved"] == ""
    jobs = plan(a, solution, tmp_path, tmp_path / "n.ipynb", ROOMS)
    assert [job.name for job in jobs] == ["plain/seed-5", "b/seed-5", "plain/seed-6", "b/seed-6"]
    assert [job.config.training.evaluations for job in jobs[:2]] == [{}, {"less": {"model.experts": 2}}]
    without = plan(b := read(question(TWO, seeds=[5, 6])), solve(b, ROOMS), tmp_path, tmp_path / "n.ipynb", ROOMS)
    assert [job.identity == other.identity for job, other in zip(jobs, without, strict=True)] == [True, False] * 2
    assert "arms" not in without[1].record() and jobs[1].record()["arms"] == {"less": solution.totals["less"]}


def test_arms_follow_what_was_matched() -> None:
    """An arm changes the variant as it was solved, and moves nothing itself."""
    rule = {"quantity": "total_params", "reference": "plain", "free": {"b": "model.width"}}
    solution = solve(read(question({"plain": {"model.width": 640}, "b": {"model.experts": 80}}, match=[rule], **ARM)), ROOMS)
    assert solution.moved["b"] and "less" not in solution.moved
    assert solution.evaluated["less"].model.width == solution.configs["b"].model.width != 64


def test_a_variants_own_evaluations_stay_unless_the_names_are_the_same(tmp_path: Path) -> None:
    own = {"training.evaluations": {"other": {"model.experts": 3}}}
    solution = solve(read(question({"plain": {}, "b": own}, **ARM)), ROOMS)
    assert solution.configs["b"].training.evaluations == {"other": {"model.experts": 3}, "less": {"model.experts": 2}}
    with pytest.raises(LabError, match=r"Arm 'less': training\.evaluations of 'b' has this name already"):
        solve(read(question({"plain": {}, "b": {"training.evaluations": {"less": {}}}}, **ARM)), ROOMS)
    with pytest.raises(LabError, match=r"Arm 'less': Unknown key 'model\.expert', did you mean 'experts'"):
        solve(read(question(TWO, evaluate={"less": {"of": "b", "set": {"model.expert": 2}}})), ROOMS)


# ---- rows and verdicts


def test_rows_verdicts_and_going_on(tmp_path: Path) -> None:
    path, out, jobs, console = write_question(tmp_path, TWO, seeds=[0, 1, 2], **ARM), tmp_path / "out", Pretend(finish), quiet()
    run(path, out, 1, rooms=ROOMS, executor=jobs, console=console)
    assert jobs.ran == [f"{name}/seed-{seed}" for seed in range(3) for name in TWO], "no job of the arm's own"
    said = console.file.getvalue()  # type: ignore[attr-defined]
    frame = load_results(out)
    assert len(frame) == 9 and sorted(frame.columns[:6]) == sorted(["variant", "seed", "status", "reason", "identity", "seconds"])
    assert not [column for column in frame.columns if "/" in column]
    arm, parent = (frame[frame["variant"] == name].set_index("seed") for name in ("less", "b"))
    assert list(arm["evaluated_from"]) == ["b"] * 3 and list(parent["evaluated_from"]) == [""] * 3
    assert list(arm["validation_bpb"]) == [value(seed, 2) for seed in range(3)]
    assert list(parent["validation_bpb"]) == [value(seed, 8) for seed in range(3)]
    assert arm["train_loss"].isna().all() and arm["seconds"].isna().all() and list(parent["seconds"]) == [7.5] * 3
    assert list(arm["identity"]) == list(parent["identity"]) and list(arm["not_engaged"]) == ["x: idle"] * 3
    assert set(arm["total_params"]) == {2 * (64000 + 1400)} and set(parent["total_params"]) == {2 * (64000 + 5600)}

    # The verdict is that of the paired differences, here reckoned from the numbers themselves, as one of two comparisons.
    differences = np.array([value(seed, 2) - value(seed, 8) for seed in range(3)])
    claim = next(line for line in said.splitlines() if "less" in line and "n = 3" in line)
    sd = differences.std(ddof=1)
    half = stats.t.ppf(0.975, 2) * sd / np.sqrt(3)
    assert f"differs by {differences.mean():+.3g}, {differences.mean() - half:+.3g} to {differences.mean() + half:+.3g}" in claim
    spread = noise(frame, "validation_bpb").loc["less"]
    assert spread["n"] == 3 and spread["sd"] == pytest.approx(np.std([value(s, 2) for s in range(3)], ddof=1))
    assert "jobs," not in said, "six jobs and all of them finished"

    # Nothing runs again; the settled question is the same question; what the jobs say themselves is read without the table.
    run(path, out, 1, rooms=ROOMS, executor=jobs, console=quiet())
    run(out / "ablation.yaml", out, 1, rooms=ROOMS, executor=jobs, console=quiet())
    assert len(jobs.ran) == 6 and load_results(out).equals(frame)
    sweep = read_sweep(out)
    assert len(sweep.runs) == 6 and not sweep.ablation.changes and sweep.ablation.solved["less"]["totals"]["total_params"] == 130800


def test_an_arm_shares_its_jobs_fate(tmp_path: Path) -> None:
    path, out = write_question(tmp_path, TWO, seeds=[0, 1, 2], **ARM), tmp_path / "out"
    fails = Pretend(lambda job: 1 if job.name == "b/seed-1" else finish(job))
    with pytest.raises(JobsFailed, match="5 of 6 jobs finished and 1 did not"):
        run(path, out, 1, rooms=ROOMS, executor=fails, console=quiet())
    frame = load_results(out)
    arm = frame[frame["variant"] == "less"].set_index("seed")
    assert list(arm["status"]) == ["finished", "failed", "finished"] and "ended with exit status 1" in arm.loc[1, "reason"]
    assert set(arm["total_params"]) == {130800}, "known before anything runs"
    console = quiet()
    again = Pretend(finish)
    run(path, out, 1, rooms=ROOMS, executor=again, console=console)
    assert again.ran == ["b/seed-1"] and set(load_results(out)["status"]) == {"finished"}


def test_what_ended_after_the_table_was_written_is_read_from_the_jobs(tmp_path: Path) -> None:
    """A driver that was killed: the table says running, run.json of the job says finished, with the arm's numbers."""
    path, out = write_question(tmp_path, TWO, **ARM), tmp_path / "out"
    before: list[bytes] = []

    def act(job: Job) -> int:
        before.append((out / "results.parquet").read_bytes())
        return finish(job)

    run(path, out, 1, rooms=ROOMS, executor=Pretend(act), console=quiet())
    whole = load_results(out)
    (out / "results.parquet").write_bytes(before[0])
    assert load_results(out)[["variant", "status", "validation_bpb"]].equals(whole[["variant", "status", "validation_bpb"]])
    (job_folder(out, "b", 0) / "run.json").unlink()
    left = load_results(out).set_index("variant")["status"]
    assert left["plain"] == "finished" and left["b"] == left["less"] == "planned"


def test_an_arm_that_is_in_no_claim_stands_beside_the_baseline_and_lacks_what_training_alone_measures(tmp_path: Path) -> None:
    path = write_question(tmp_path, TWO, seeds=[0, 1, 2], evaluate={"less": LESS}, also=["train_loss"])
    console = quiet()
    run(path, tmp_path / "out", 1, rooms=ROOMS, executor=Pretend(finish), console=console)
    said = [line for line in console.file.getvalue().splitlines() if "secondary" in line]  # type: ignore[attr-defined]
    assert [line.partition(":")[0] for line in said] == [
        "validation_bpb, b against plain",
        "validation_bpb, less against plain",
        "train_loss, b against plain",
    ]
    claim = {**ARM, "metric": "train_loss"}
    run(
        write_question(tmp_path, TWO, seeds=[0, 1, 2], **claim), tmp_path / "two", 1, rooms=ROOMS, executor=Pretend(finish), console=console
    )
    assert "Whether less is better than b cannot be told from no pairs" in console.file.getvalue()  # type: ignore[attr-defined]
    assert "less has no finite train_loss" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_metric_that_no_job_has_is_named_without_the_arms_names(tmp_path: Path) -> None:
    path = write_question(tmp_path, {"b": {}}, metric="less-validation_bpb", evaluate={"less": LESS})
    with pytest.raises(LabError, match="did you mean 'validation_bpb'"):
        run(path, tmp_path / "out", 1, rooms=ROOMS, executor=Pretend(finish), console=quiet())


def test_a_metric_that_only_an_arm_has_is_one_of_the_questions(tmp_path: Path) -> None:
    def only_the_arm_has_it(job: Job) -> int:
        code = finish(job)
        run = json.loads((job.folder / "run.json").read_text())
        run["final"] |= {f"{arm}/uncovered": 0.5 for arm in job.arms}
        (job.folder / "run.json").write_text(json.dumps(run))
        return code

    path, jobs = write_question(tmp_path, {"b": {}}, metric="uncovered", evaluate={"less": LESS}), Pretend(only_the_arm_has_it)
    run(path, tmp_path / "out", 1, rooms=ROOMS, executor=jobs, console=quiet())
    assert jobs.ran and set(load_results(tmp_path / "out").set_index("variant")["uncovered"].dropna()) == {0.5}


def test_weights_that_nobody_trains_are_named_before_anything_is_written(tmp_path: Path) -> None:
    def refuse(config: Config) -> None:
        raise LabError(f"training.evaluations.{next(iter(config.training.evaluations))} needs tensors.")

    out, rooms = tmp_path / "out", replace(ROOMS, check_evaluations=refuse)
    with pytest.raises(LabError, match=r"Variant 'b': training\.evaluations\.less needs tensors"):
        run(write_question(tmp_path, TWO, **ARM), out, 1, rooms=rooms, executor=Pretend(finish), console=quiet())
    assert not out.exists()
    real = {**question({"plain": {}}, evaluate={"less": {"of": "plain", "set": {"model.num_layers": 2}}}), "base": "tiny"}
    (tmp_path / "real.yaml").write_text(yaml.safe_dump(real))
    with pytest.raises(
        LabError, match=r"Variant 'plain': training\.evaluations\.less needs tensors that this run does not train: layers\.1\."
    ):
        run(tmp_path / "real.yaml", out, 1, console=quiet())
    assert not out.exists()


# ---- the real thing


TURNED = {"model.rope.theta": 50.0, "model.moe.moe_topk": 3}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One variant, three seeds, three real jobs; one arm is the variant as it is, the other has other settings."""
    folder = tmp_path_factory.mktemp("sweep")
    asked = question(
        {"mixed": {"model.moe.n_routed_experts": 6}},
        base="tiny",
        set={"training.steps": 4, "training.evaluation_sequences": 4},
        evaluate={"same": {"of": "mixed", "set": {}}, "turned": {"of": "mixed", "set": TURNED}},
        seeds=[0, 1, 2],
        claims=[{"better": "turned", "than": "mixed"}, {"better": "same", "than": "mixed"}],
    )
    (folder / "real.yaml").write_text(yaml.safe_dump(asked))
    return run(folder / "real.yaml", folder / "out", 2, console=quiet())


def test_real_jobs_evaluate_their_arms(sweep: Path) -> None:
    from longcat_lab.training import Run, evaluate
    from longcat_lab.training.device import deterministic
    from longcat_lab.training.evaluation_arms import with_weights

    frame = load_results(sweep).set_index(["variant", "seed"])
    assert len(frame) == 9 and set(frame["status"]) == {"finished"} and [p.name for p in (sweep / "jobs").iterdir()] == ["mixed"]
    for seed in range(3):
        assert frame.loc[("same", seed), "validation_bpb"] == frame.loc[("mixed", seed), "validation_bpb"]
        assert frame.loc[("turned", seed), "validation_bpb"] != frame.loc[("mixed", seed), "validation_bpb"]
        trained = Run(sweep / "jobs" / "mixed" / f"seed-{seed}")
        config = apply(trained.config, TURNED)
        with deterministic(1):
            by_hand = evaluate(with_weights(config, trained.model), trained.corpus, config, "validation")
        assert frame.loc[("turned", seed), "validation_bpb"] == by_hand
    turned, same = judge(load_results(sweep), read_sweep(sweep).ablation)
    assert turned.contrast.n == 3 and turned.contrast.sd > 0
    assert "same and mixed are equal in validation_bpb, digit for digit, in all 3 pairs" in same.sentence
    modified = {path: path.stat().st_mtime_ns for path in sweep.rglob("run.json")}
    run(sweep / "ablation.yaml", sweep, 2, console=(console := quiet()))
    assert {path: path.stat().st_mtime_ns for path in sweep.rglob("run.json")} == modified, "nothing runs again"
    assert "3 of 3 jobs have finished before and are not run again" in console.file.getvalue()  # type: ignore[attr-defined]


def test_the_page_says_what_was_not_trained(sweep: Path) -> None:
    text = render(sweep).read_text(encoding="utf-8")
    assert "3 of 3 jobs finished" in text and "turned better than mixed" in text
    assert "turned is evaluated from mixed with other settings, not trained." in text
    tables = html.shown(text).tables
    for part in ("arms", "cost-table"):
        assert ["turned", "evaluated from mixed, not trained"] in [row[:2] for row in tables[part]]
    assert ["weights", "trained", *["evaluated from mixed, not trained"] * 2] in tables["mechanisms-table"]
    assert ["turned", "evaluated from mixed, not trained", "model.rope.theta", "10000.0", "50.0"] in tables["differences-table"]
    assert [row[1:] for row in tables["matching-table"] if row[0] == "same"] == [["1.00 ×", "1.00 ×", "–", "–"]], "it took no training"
    assert check(sweep) == []
    assert not any("training.evaluations" in row[2] for row in tables["differences-table"])
    for seed in range(3):
        assert f"turned/seed-{seed} (evaluated from mixed/seed-{seed}, not trained)" in text
        assert text.count(f'href="jobs/mixed/seed-{seed}/notebook.ipynb"') == 3
    assert "jobs/turned" not in text
