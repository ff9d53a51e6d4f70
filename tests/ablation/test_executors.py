"""What jobs may ask for, and how an executor deals it out; retries and divergence with jobs that only pretend."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_rooms import FAKE, PARAMETERS, question, write_notebook, write_question
from test_ablation_kept import really
from test_ablation_store import ARMS, CLAIM, Pretend, finish, quiet

from longcat_lab.ablation import JobsFailed, Resources, load_results, read_sweep, register_executor, run
from longcat_lab.ablation.ends import End
from longcat_lab.ablation.executors import EXECUTORS, make
from longcat_lab.ablation.executors import local as local_executor
from longcat_lab.ablation.jobs import Job
from longcat_lab.ablation.resources import number_of_bytes, seconds
from longcat_lab.ablation.settle import MOST
from longcat_lab.errors import LabError


def test_times_and_amounts() -> None:
    assert [seconds(text) for text in ("45 s", "90min", "1 h 30 min", "2 d", "1.5 h")] == [45, 5400, 5400, 172800, 5400]
    assert [number_of_bytes(text) for text in ("8 GB", "512MiB", "1.5 TB")] == [8 * 10**9, 2**29, 15 * 10**11]
    for text in ("", "8", "8 G B", "h", "2 hours", "-2 h", "0 s", "1 h,", "8 gb"):
        with pytest.raises(ValueError, match="should be"):
            seconds(text)
        with pytest.raises(ValueError, match="should be"):
            number_of_bytes(text)


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        (["resources.memory=8"], r"'resources\.memory': input should be a valid string, got 8"),
        (["resources.memory=much"], r"'resources\.memory': should be an amount of memory such as '8 GB'.*got 'much'"),
        (["resources.time=2 hours"], r"'resources\.time': should be a time such as '2 h'"),
        (["resources.card_count=2"], r"Unknown key 'resources\.card_count'"),
        (["resources.retry=[diverged]"], r"'resources\.retry\.0'.*got 'diverged'"),
        (["resources.cores=100000"], "resources.cores asks for 100000, and this machine has"),
        (["resources.cards=3"], "resources.cards asks for 3, and this machine has 2: ask for fewer, or use a cluster"),
        (["resources.memory=900 TB"], r"resources\.memory asks for 900 TB, and this machine has"),
        (["resources.cards=2"], "asks for 2 processes, and .*job.ipynb has no parameter for them: add `processes = None`"),
        (["resources.slurm={nodes: 2}", "executor"], "one notebook on one node"),
        (["resources.slurm={mem: 8G}", "executor"], "resources.slurm sets 'mem', which comes from the other settings"),
    ],
)
def test_what_cannot_be_is_one_sentence_and_starts_nothing(tmp_path: Path, wanted: list[str], sentence: str) -> None:
    overrides = [f"ablation.{each}" for each in wanted if each != "executor"]
    question, executor = write_question(tmp_path, {"a": {}}), "slurm" if "executor" in wanted else "local"
    if executor == "slurm":
        from slurm_cluster import missing

        if why := missing():
            pytest.skip(why)
    with pytest.raises(LabError, match=sentence) as error:
        run(question, tmp_path / "out", rooms=FAKE, executor=executor, overrides=overrides)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_a_layout_that_does_not_fit_is_told_before_anything_starts(tmp_path: Path) -> None:
    def refuse(config: Any, processes: int) -> None:
        raise LabError(f"{processes} processes do not divide 3 layers.")

    question = write_question(tmp_path, {"a": {}}, resources={"processes": 2})
    write_notebook(tmp_path / "job.ipynb", PARAMETERS + "\nprocesses: int | None = None", "1")
    with pytest.raises(LabError, match="Variant 'a', with 2 processes: 2 processes do not divide 3 layers"):
        run(question, tmp_path / "out", rooms=replace(FAKE, check_layout=refuse), console=quiet())
    assert run(question, tmp_path / "out", rooms=FAKE, executor=Pretend(finish), console=quiet()) == tmp_path / "out"


def test_slots_follow_cores_and_cards(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(local_executor, "cores", lambda: 8)

    def made(jobs: int | None = None, **asked: Any) -> tuple[int, int]:
        executor = make("local", Resources(**asked), jobs, tmp_path, FAKE)
        return executor.slots, executor.threads  # type: ignore[attr-defined]

    assert [made(), made(8), made(cores=3), made(8, cores=2), made(4, cards=1), made(cards=2)] == [
        *[(4, 2), (8, 1), (2, 3), (4, 2), (2, 4), (1, 8)],
    ]


def test_an_engine_of_ones_own_is_known_by_its_name(tmp_path: Path) -> None:
    asked: list[Any] = []

    def mine(resources: Resources, jobs: int | None, folder: Path, rooms: Any) -> Pretend:
        asked.append((resources.memory, jobs, folder))
        return Pretend(finish)

    register_executor("mine", mine)
    try:
        question = write_question(tmp_path, ARMS, resources={"memory": "1 GB"})
        run(question, tmp_path / "out", 3, rooms=FAKE, executor="mine", console=quiet())
        assert asked == [("1 GB", 3, tmp_path / "out")]
        with pytest.raises(LabError, match="Unknown executor 'mien', did you mean 'mine'"):
            run(question, tmp_path / "out", rooms=FAKE, executor="mien")
    finally:
        del EXECUTORS["mine"]


class Told(Pretend):
    """Whose engine says how a job ended."""

    def __init__(self, act: Any, end: End | None) -> None:
        super().__init__(act)
        self.end = end

    def why(self) -> End | None:
        return self.end if self.code else None


@pytest.mark.parametrize(("kind", "tries", "asked"), [("node lost", MOST + 1, MOST + 1), ("cancelled", 1, 1), ("time-out", 1, 3)])
def test_what_is_tried_again(tmp_path: Path, kind: str, tries: int, asked: int) -> None:
    """By default, and where it is asked for; what only takes a job's place away always."""
    question, jobs = write_question(tmp_path, {"a": {}}, resources={"retries": 2}), Told(lambda job: 1, End(kind, "so it was"))
    with pytest.raises(JobsFailed, match="a/seed-0: so it was"):
        run(question, tmp_path / "out", rooms=FAKE, executor=jobs, console=quiet())
    assert len(jobs.ran) == tries
    assert json.loads((tmp_path / "out/jobs/a/seed-0/run.json").read_text())["job"]["end"] == kind
    question = write_question(tmp_path, {"a": {}}, resources={"retries": 2, "retry": [kind] if kind == "time-out" else []})
    with pytest.raises(JobsFailed):
        run(question, tmp_path / "out", rooms=FAKE, executor=jobs, console=quiet())
    assert len(jobs.ran) - tries == asked
    assert read_sweep(tmp_path / "out").ablation.changes == [], "what a job may take is no part of the question"


def diverges(job: Job) -> int:
    really(job)
    if job.variant == "b" and job.seed == 1:
        path = job.folder / "run.json"
        run = {**json.loads(path.read_text()), "status": "diverged", "reason": "diverged at step 120: loss nan", "final": {}}
        path.write_text(json.dumps(run))
    return 0


def test_an_arm_that_diverged_says_so_wherever_it_is_judged(tmp_path: Path) -> None:
    question, out, console = write_question(tmp_path, ARMS, **{**CLAIM, "seeds": [0, 1, 2, 3]}), tmp_path / "out", quiet()
    act = Pretend(lambda job: diverges(job) if job.seed < 3 else _three(job))
    assert run(question, out, rooms=FAKE, executor=act, console=console) == out, "a result, so the sweep has not failed"
    said = " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
    assert "NOT RESOLVABLE: b diverged on 1 of 4 seeds: the interval is of the 3 seeds alone on which both finished. There " in said
    assert "n = 3)" in said and "b diverged where a did not. Left out: seed 1 (b diverged" in said and "SEEN: b is better" not in said
    assert "1 of 8 jobs diverged, which is a result: b/seed-1 (diverged at step 120: loss nan)." in said
    before = len(act.ran)
    run(question, out, rooms=FAKE, executor=act, console=console)
    assert len(act.ran) == before, "it is not run again"
    rows = load_results(out).set_index(["variant", "seed"])
    assert rows.loc[("b", 1), "status"] == "diverged" and rows.loc[("b", 1), "reason"] == "diverged at step 120: loss nan"


def _three(job: Job) -> int:
    """Seed 3, for which the stand-in of a job has no noise of its own."""
    really(replace(job, seed=0))
    return 0


@pytest.mark.slow
def test_a_job_of_two_processes_trains_one_run(tmp_path: Path) -> None:
    """The real notebook and the real loop; the second process is torchrun's."""
    asked = question({"a": {}}, base="tiny", set={"training.steps": 6, "training.log_every": 2, "training.schedule.warmup_steps": 2})
    (tmp_path / "q.yaml").write_text(yaml.safe_dump(asked))
    command = [sys.executable, "-m", "longcat_lab", "run", "q.yaml", "--out", "out", "ablation.resources.processes=2"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "out/jobs/a/seed-0"
    record = json.loads((folder / "run.json").read_text())
    assert record["job"]["end"] == "finished" and (folder / "train.log").is_file(), "the log of the two processes"
    assert record["layout"].startswith("2 processes")
