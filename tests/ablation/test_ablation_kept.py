"""What is there stays: a sweep whose question fails, finished jobs that a change replaces, and what a new attempt must not repeat."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_rooms import FAKE, write_question
from test_ablation_store import ARMS, Pretend, finish, quiet

from longcat_lab.ablation import JobsFailed, LabInterrupted, load_results, read_sweep, run, summary
from longcat_lab.ablation.job import _begin
from longcat_lab.ablation.jobs import Job
from longcat_lab.ablation.report import content
from longcat_lab.ablation.store import check_folder
from longcat_lab.errors import LabError


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def fail(error: BaseException) -> Callable[..., None]:
    def do(*arguments: Any) -> None:
        raise error

    return do


def really(job: Job) -> int:
    """Begins and ends as the job's own process does, and pretends in between."""
    (job.folder / "job.log").write_text(f"log of {job.identity}")
    _begin(job.folder)
    (job.folder / "notebook.ipynb").write_text(job.identity)
    code, path = finish(job), job.folder / "run.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"job": {**record["job"], "end": "finished"}}))
    return code


@pytest.mark.parametrize(
    ("broken", "error"),
    [
        ({"prepare": fail(LabError("No package 'nope'."))}, LabError),
        ({"identity": fail(LabError("No package 'nope'."))}, LabError),
        ({"prepare": fail(KeyboardInterrupt())}, LabInterrupted),
        ({"identity": fail(KeyboardInterrupt())}, LabInterrupted),
    ],
)
def test_question_that_fails_before_its_jobs_leaves_everything(tmp_path: Path, broken: dict[str, Any], error: type[LabError]) -> None:
    rooms, out = replace(FAKE, **broken), tmp_path / "runs" / "out"
    question = write_question(tmp_path, ARMS)
    with pytest.raises(error):
        run(question, out, rooms=rooms, executor=Pretend(finish), console=quiet())
    assert not out.parent.exists(), "the folders made on the way go too"
    out.mkdir(parents=True)
    with pytest.raises(error):
        run(question, out, rooms=rooms, executor=Pretend(finish), console=quiet())
    assert list(out.iterdir()) == [], "a folder that was there stays, as it was"
    run(question, out, rooms=FAKE, executor=Pretend(finish), console=quiet())
    before = files(out)
    with pytest.raises(error):
        run(question, out, rooms=rooms, executor=Pretend(finish), console=quiet(), overrides=["model.depth=3"])
    assert files(out) == before and read_sweep(out).ablation.set == {}


def test_place_that_cannot_be_used_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    question = write_question(tmp_path, ARMS)
    with pytest.raises(LabError, match=r"Cannot write to .*job\.ipynb/x: Not a directory; choose another folder with --out"):
        run(question, tmp_path / "job.ipynb" / "x", rooms=FAKE, console=quiet())
    monkeypatch.setattr(Path, "exists", fail(PermissionError(13, "Permission denied")))
    with pytest.raises(LabError, match=r"Cannot look into .*: Permission denied; choose another folder with --out"):
        check_folder(tmp_path / "x", "demo")


def test_finished_jobs_are_set_aside_not_deleted(tmp_path: Path) -> None:
    question, out, jobs = write_question(tmp_path, ARMS), tmp_path / "out", Pretend(really)
    run(question, out, rooms=FAKE, executor=jobs, console=quiet())
    first = {run["variant"]: run["identity"] for run in read_sweep(out).runs.values()}
    console = quiet()
    for depth in (3, 2, 3):  # there, back again, and once more: each time anew, each result kept
        run(question, out, rooms=FAKE, executor=jobs, console=console, overrides=[f"model.depth={depth}"])
    said = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert [line.endswith(f"; the 2 that had finished are kept in {out / 'superseded'}.") for line in said if "run anew" in line] == [
        True
    ] * 3
    for variant, identity in first.items():
        for name in ("seed-0", "seed-0-2"):
            old = out / "superseded" / identity / variant / name
            assert json.loads((old / "run.json").read_text())["identity"] == identity
            assert (old / "notebook.ipynb").read_text() == identity and (old / "job.log").read_text() == f"log of {identity}"
            assert sorted(p.name for p in old.iterdir()) == ["job.log", "notebook.ipynb", "run.json"]
    check_folder(out, "demo")
    assert set(load_results(out)["status"]) == {"finished"} and len(read_sweep(out).runs) == 2


def test_unfinished_jobs_are_cleared(tmp_path: Path) -> None:
    def stop(job: Job) -> int:
        _begin(job.folder)
        return -9

    question, out = write_question(tmp_path, {"a": {}}), tmp_path / "out"
    with pytest.raises(JobsFailed, match="SIGKILL"):
        run(question, out, rooms=FAKE, executor=Pretend(stop), console=quiet())
    run(question, out, rooms=FAKE, executor=Pretend(really), console=quiet(), overrides=["model.depth=3"])
    assert not (out / "superseded").exists()


def test_runs_of_another_identity_are_not_shown(tmp_path: Path) -> None:
    question, out = write_question(tmp_path, ARMS), tmp_path / "out"
    run(question, out, rooms=FAKE, executor=Pretend(finish), console=quiet())
    half = Pretend(lambda job: finish(job) if job.variant == "a" else 1)
    with pytest.raises(JobsFailed):
        run(question, out, rooms=FAKE, executor=half, console=quiet(), overrides=["model.depth=3"])
    assert list(read_sweep(out).runs) == [("a", 0)], "b still holds what ran at another depth"


def test_killed_before_it_began_does_not_repeat_an_old_reason(tmp_path: Path) -> None:
    def fails(job: Job) -> int:
        _begin(job.folder)
        data = json.loads((job.folder / "run.json").read_text())
        (job.folder / "run.json").write_text(json.dumps({**data, "status": "failed", "reason": "ValueError: old"}))
        return 1

    question, out = write_question(tmp_path, {"a": {}}), tmp_path / "out"
    with pytest.raises(JobsFailed, match="ValueError: old"):
        run(question, out, rooms=FAKE, executor=Pretend(fails), console=quiet())
    with pytest.raises(JobsFailed, match="was killed by SIGKILL") as failed:
        run(question, out, rooms=FAKE, executor=Pretend(lambda job: -9), console=quiet())
    assert "old" not in str(failed.value) and "SIGKILL" in load_results(out).loc[0, "reason"]


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (
            {"metric": "validation_bbp"},
            "'metric' names 'validation_bbp', which a/seed-0 has finished without, did you mean 'validation_bpb'",
        ),
        ({"also": ["total_params", "xyz"]}, "'also' names 'xyz', .*; known here: .*validation_bpb"),
        ({"vanishes": {"where": "there", "metric": "validation_pbp"}}, r"'vanishes\.metric' names .* did you mean 'validation_bpb'"),
    ],
)
def test_metric_that_no_job_has_stops_the_sweep_at_the_first(tmp_path: Path, wrong: dict[str, Any], sentence: str) -> None:
    question, out, jobs = write_question(tmp_path, ARMS, seeds=[0, 1, 2], **wrong), tmp_path / "out", Pretend(finish)
    with pytest.raises(LabError, match=sentence + ".*Correct it and run the sweep again: what is finished is kept") as error:
        run(question, out, 1, rooms=FAKE, executor=jobs, console=quiet())
    assert "\n" not in str(error.value) and jobs.ran == ["a/seed-0"]
    assert list(load_results(out)["status"]) == ["finished"] + ["planned"] * 5
    write_question(tmp_path, ARMS, seeds=[0, 1, 2])
    run(question, out, 1, rooms=FAKE, executor=jobs, console=quiet())
    assert len(jobs.ran) == 6, "the finished job stayed finished"


def test_metric_that_no_job_has_stops_what_runs(tmp_path: Path) -> None:
    stopped: list[str] = []

    class Endless(Pretend):
        def submit(self, job: Job) -> Any:
            self.ran.append(job.name)
            handle = Endless(self.act)
            handle.name, handle.code = job.name, self.act(job) if job.variant == "a" else None
            return handle

        def poll(self) -> Any:
            return -15 if self.name in stopped else self.code

        def stop(self, force: bool = False) -> None:
            stopped.append(self.name)

    question, out = write_question(tmp_path, ARMS, metric="nothing"), tmp_path / "out"
    with pytest.raises(LabError, match="'metric' names 'nothing'"):
        run(question, out, 2, rooms=FAKE, executor=Endless(finish), console=quiet())
    assert "b/seed-0" in stopped and list(load_results(out)["status"]) == ["finished", "interrupted"]


# ---- an edited question, and what has begun in its folder


def begin(folder: Path, status: str, **more: Any) -> None:
    """Turns a job that has finished into one that ended otherwise, or has only logged."""
    record = json.loads((folder / "run.json").read_text())
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 3.5}\n')
    (folder / "run.json").write_text(json.dumps({**record, "status": status, "final": {}, **more}))


def asked_again(tmp_path: Path, prepare: Callable[[Path], Any], **change: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
    """A sweep of two jobs, then what `prepare` does to its folder, then the question once more; what file and page say of it."""
    out = tmp_path / "out"
    run(write_question(tmp_path, ARMS), out, rooms=FAKE, executor=Pretend(really), console=quiet())
    prepare(out)
    variants = change.pop("variants", ARMS)
    asked = {**change, "hypothesis": "a is better"}
    run(write_question(tmp_path, variants, **asked), out, rooms=FAKE, executor=Pretend(really), console=quiet())
    sweep = read_sweep(out)
    said = content.parts(sweep, summary(sweep.results, sweep.ablation))
    return sweep.ablation.to_dict(), (*said["hypothesis"].lines, *said["not-planned"].lines)


NEVER = ("Hypothesis, written before running: a is better", "has not been edited")


def test_new_seeds_in_a_folder_with_answers_do_not_make_a_hypothesis_new(tmp_path: Path) -> None:
    asked, said = asked_again(tmp_path, lambda out: None, seeds=[1, 2])
    assert said[0] == "Hypothesis, written before running: b is better" and not any(words in line for words in NEVER for line in said)
    (change,) = asked["changes"]
    assert change.endswith("hypothesis, seeds edited when 2 jobs had finished; no longer planned: a/seed-0, b/seed-0")
    assert "not planned by this question: jobs/a/seed-0 (done, validation_bpb 2.0000); jobs/b/seed-0 (done, validation_bpb" in said[-1]


def test_renamed_variants_do_not_make_a_hypothesis_new(tmp_path: Path) -> None:
    renamed = {"base": {}, "other": {"effect": -0.1}}
    asked, said = asked_again(tmp_path, lambda out: None, variants=renamed)
    assert said[0] == "Hypothesis, written before running: b is better" and not any(words in line for words in NEVER for line in said)
    assert "edited when 2 jobs had finished; no longer planned: a/seed-0, b/seed-0" in asked["changes"][0]


@pytest.mark.parametrize("status", ["interrupted", "failed"])
def test_curves_of_jobs_that_did_not_finish_count_as_seen(tmp_path: Path, status: str) -> None:
    asked, said = asked_again(tmp_path, lambda out: [begin(folder, status) for folder in out.glob("jobs/*/*")])
    assert said[0] == "Hypothesis, written before running: b is better" and not any(words in line for words in NEVER for line in said)
    assert asked["changes"][0].endswith("hypothesis edited when 2 jobs had begun")


def test_what_was_set_aside_counts_as_seen(tmp_path: Path) -> None:
    def aside(out: Path) -> None:
        (out / "superseded" / "0123").mkdir(parents=True)
        for folder in list(out.glob("jobs/*")):
            folder.rename(out / "superseded" / "0123" / folder.name)

    asked, said = asked_again(tmp_path, aside)
    assert said[0] == "Hypothesis, written before running: b is better" and not any(words in line for words in NEVER for line in said)
    assert asked["changes"][0].endswith("hypothesis edited when 2 jobs had finished")
    assert "set aside because configuration, data or code changed later: superseded/0123/a/seed-0 (done, validation_bpb" in said[-1]


def test_an_edit_before_anything_began_is_none(tmp_path: Path) -> None:
    def not_begun(out: Path) -> None:
        for folder in out.glob("jobs/*/*"):
            begin(folder, "planned", asked=None, job={"notebook": "job.ipynb"})
            (folder / "metrics.jsonl").unlink()

    asked, said = asked_again(tmp_path, not_begun)
    assert asked["changes"] == [] and said[0] == "Hypothesis, written before running: a is better"
    assert said[1].startswith("The question file has not been edited since a job began. The first of the jobs here started 2")


def test_an_edit_of_the_sweeps_own_file_is_found_when_it_is_run_again(tmp_path: Path) -> None:
    """Each job has kept what was asked; so the file cannot be edited and then pass for what was written before running."""

    def by_hand(out: Path) -> None:
        text = (out / "ablation.yaml").read_text()
        (out / "ablation.yaml").write_text(text.replace("b is better", "a is better"))

    asked, said = asked_again(tmp_path, by_hand)
    assert asked["before"] == {"hypothesis": "b is better"} and asked["changes"][0].endswith("hypothesis edited when 2 jobs had finished")
    assert said[:2] == ("Hypothesis, written before running: b is better", "The hypothesis was edited later, to: a is better")
