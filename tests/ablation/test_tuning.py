"""A setting swept for each arm before the question, and a whole sweep with it: real jobs in real kernels, of stand-in rooms."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import fake_rooms
import pytest
from rich.console import Console
from worded import JOB, ROOMS, write

from longcat_lab.ablation import LabInterrupted, forecast, load_results, read, read_sweep, register_executor, run, solve, summary, tuning
from longcat_lab.ablation.executors import EXECUTORS
from longcat_lab.ablation.report import content
from longcat_lab.errors import LabError

ARMS: dict[str, Any] = {"a": {}, "b": {"effect": -0.1}}
TUNE: dict[str, Any] = {"setting": "training.rate", "values": [1.0, 2.0, 3.0], "seeds": [100]}


def curve(**means: float) -> tuning.Curve:
    return tuning.Curve({float(name[1:]): mean for name, mean in means.items()})


def test_the_best_value_ties_and_edges() -> None:
    tried = [1.0, 2.0, 3.0]
    assert curve(v1=2.0, v2=1.0, v3=1.5).best == 2.0 and curve(v1=2.0, v2=1.0, v3=1.5).remark(tried) == ""
    assert curve(v1=1.0, v2=1.0, v3=1.5).best == 1.0
    assert curve(v1=1.0, v2=1.0, v3=1.5).remark(tried).startswith("2 values are equal, the smallest was taken; the best is at the edge")
    lost = tuning.Curve({2.0: 1.0}, ("3 is left out (diverged)",))
    assert lost.best == 2.0 and lost.remark(tried) == "3 is left out (diverged)"


def test_the_tuning_is_a_question_of_its_own(tmp_path: Path) -> None:
    a = read(write(tmp_path, ARMS, tune={**TUNE, "steps": 5}, control="a_a", match="flops", free="model.width", seeds=[0, 1, 2]))
    found = read(tuning.question(a, solve(a, ROOMS)))
    assert list(found.variants) == ["a_1", "a_2", "a_3", "b_1", "b_2", "b_3"] and found.seeds == [100]
    assert found.variants["b_3"] == {"effect": -0.1, "model.width": 64, "training.steps": 5, "training.rate": 3.0}
    asked = tuning.chosen(a, {"a": curve(v1=1.0, v2=2.0), "b": curve(v1=2.0, v2=1.0)})
    assert {name: values["training.rate"] for name, values in asked.variants.items()} == {"a": 1.0, "b": 2.0, "a_a": 1.0}
    assert "on seeds 100, which are not the seeds here" in asked.tuned
    with pytest.raises(LabError, match="both have 1: what is chosen on a seed cannot be tested on it"):
        read(write(tmp_path, ARMS, tune={**TUNE, "seeds": [1]}, seeds=[0, 1, 2]))


def test_stopped_while_tuning_says_how_to_go_on(tmp_path: Path) -> None:
    class Interrupted:
        slots = 1

        def submit(self, job: Any) -> Any:
            raise KeyboardInterrupt

    register_executor("interrupted", lambda *asked: Interrupted())
    path, home = write(tmp_path, ARMS, tune=TUNE), tmp_path / "runs" / "demo"
    try:
        with pytest.raises(LabInterrupted) as stopped:
            run(path, home, 2, ["ablation.smallest_effect=0.2"], executor="interrupted", rooms=ROOMS, console=Console(file=io.StringIO()))
    finally:
        EXECUTORS.pop("interrupted")
    assert str(stopped.value) == (
        f"Stopped while tuning training.rate, before the question's own jobs ({home / 'tuning'}). Go on with: longcat-lab run {path} "
        f"--out {home} --jobs 2 --executor interrupted ablation.smallest_effect=0.2"
    )
    assert stopped.value.folder == home


def test_a_job_of_the_tuning_that_was_killed_is_no_result(tmp_path: Path) -> None:
    """Nothing is chosen without it, nothing of the question runs, and the next run goes on from what is there."""
    from longcat_lab.ablation import JobsFailed

    path = write(tmp_path, {"b": {"effect": -0.1}}, tune={**TUNE, "values": [1.0, 2.0]}, seeds=[0])
    home, first = tmp_path / "runs" / "demo", tmp_path / "first"
    first.touch()
    kill = f"""
import os, signal
from pathlib import Path
if "tuning/jobs/b_2" in job_folder and Path({str(first)!r}).exists():
    os.unlink({str(first)!r})
    os.kill(os.getpid(), signal.SIGKILL)
"""
    fake_rooms.write_notebook(tmp_path / "job.ipynb", 'job_folder = ""', kill, JOB)
    with pytest.raises(JobsFailed) as failed:
        run(path, home, 2, ["ablation.smallest_effect=0.2"], rooms=ROOMS, console=Console(file=io.StringIO()))
    said = str(failed.value)
    start = "The tuning of training.rate has failed, so nothing is chosen and no job of the question itself has begun: 1 of its 2 jobs"
    assert said.startswith(f"{start} did not finish (b_2/seed-100: ") and "\n" not in said
    assert f"run them once more with: longcat-lab run {path} --out {home} --jobs 2 ablation.smallest_effect=0.2 (or " in said
    assert failed.value.folder == home / "tuning" and [each.name for each in home.iterdir()] == ["tuning"]
    assert load_results(home / "tuning").set_index("variant")["status"].to_dict() == {"b_1": "finished", "b_2": "failed"}
    plan = forecast(path, home, measure=False, rooms=ROOMS)
    assert any("2 jobs: 1 done, 1 to do" in line for line in plan.lines)

    done = home / "tuning" / "jobs" / "b_1" / "seed-100" / "notebook.ipynb"
    stamp = done.stat().st_mtime_ns
    assert run(path, home, 2, rooms=ROOMS, console=Console(file=io.StringIO())) == home
    assert done.stat().st_mtime_ns == stamp
    assert read_sweep(home).ablation.tuning["chosen"] == {"b": 2.0} and not (home / "superseded").exists()


def test_a_value_at_which_a_job_diverges_is_left_out(tmp_path: Path) -> None:
    """That is a result, and the question goes on without the value."""
    path = write(tmp_path, {"b": {"effect": -0.1}}, tune={**TUNE, "values": [1.0, 2.0]}, seeds=[0])
    home = tmp_path / "runs" / "demo"
    diverge = """
import json
from pathlib import Path
record = json.loads((Path(job_folder) / "run.json").read_text())
if "tuning/jobs/b_2" in job_folder:
    (Path(job_folder) / "run.json").write_text(json.dumps({**record, "status": "diverged", "reason": "loss nan", "final": {}}))
    raise ArithmeticError("The loss is nan.")
"""
    fake_rooms.write_notebook(tmp_path / "job.ipynb", 'job_folder = ""', diverge, JOB)
    assert run(path, home, 2, rooms=ROOMS, console=Console(file=io.StringIO())) == home
    told = read_sweep(home).ablation.tuning
    assert told["chosen"] == {"b": 1.0} and told["means"]["b"] == [[1.0, pytest.approx(2.9)]]
    assert "2 is left out (diverged)" in told["remarks"]["b"]


def test_a_sweep_tunes_asks_controls_and_keeps_its_noise(tmp_path: Path) -> None:
    """Tuning, the question's own jobs with the A/A arm, the noise floor; and once more, where nothing is left to do."""
    claims = [{"better": "b", "than": "a"}]
    more = {"seeds": [0, 1, 2], "data_seeds": [1, 1, 2], "control": "a_a", "claims": claims}
    path, home = write(tmp_path, ARMS, tune={**TUNE, "values": [1.0, 2.0]}, **more), tmp_path / "runs" / "demo"
    quiet = Console(file=io.StringIO())
    assert run(path, home, 2, rooms=ROOMS, console=quiet) == home
    sweep = read_sweep(home)
    a = sweep.ablation
    assert a.tuning["chosen"] == {"a": 1.0, "b": 2.0, "a_a": 1.0}, "the stand-in's own best rates"
    assert a.tuning["means"]["a"] == [[1.0, pytest.approx(2.0)], [2.0, pytest.approx(3.0)]]
    assert set(load_results(home / "tuning")["seed"]) == {100} and len(load_results(home / "tuning")) == 4
    assert (sweep.results["status"] == "finished").all() and len(sweep.results) == 9
    ran = {cell: (each["config"]["seed"], each["config"]["data"]["seed"]) for cell, each in sweep.runs.items()}
    assert ran["a", 0] == ran["b", 0] == (0, 1) and ran["a", 1] == (1, None) and ran["a_a", 0][1] == 1 and ran["a_a", 0][0] != 0

    said = summary(sweep.results, a)
    assert said.verdicts[0].contrast.mean == pytest.approx(-0.1) and any("Control a_a" in line for line in said.notes)
    assert any("training.rate was tuned beforehand on seeds 100: a 1, b 2, a_a 1." in line for line in said.notes)
    parts = content.parts(sweep, said)
    assert [[cell.text for cell in row] for row in parts["tuning-table"].rows] == [
        ["a", "2.0000", "3.0000", "1"],
        ["b", "2.9000", "1.9000", "2"],
    ]
    assert any("the best is at the edge of the grid" in line for line in parts["reading"].lines)
    [entry] = json.loads((home.parent / "noise.json").read_text())
    assert (entry["n"], entry["sweep"], entry["code"]) == (3, "demo", "c0de")

    written, stamps = (home / "ablation.yaml").read_text(), {p: p.stat().st_mtime_ns for p in home.glob("**/seed-*/notebook.ipynb")}
    assert len(stamps) == 13
    run(path, home, 2, rooms=ROOMS, console=quiet)
    assert {p: p.stat().st_mtime_ns for p in home.glob("**/seed-*/notebook.ipynb")} == stamps, "what is finished is not run again"
    assert (home / "ablation.yaml").read_text() == written
    run(home / "ablation.yaml", home, 2, rooms=ROOMS, console=quiet)
    assert {p: p.stat().st_mtime_ns for p in home.glob("**/seed-*/notebook.ipynb")} == stamps, "nor from the folder's own question"
    plan = forecast(path, home, measure=False, rooms=ROOMS)
    assert set(plan.status.values()) == {"finished"} and any("4 jobs: 4 done, 0 to do" in line for line in plan.lines)
