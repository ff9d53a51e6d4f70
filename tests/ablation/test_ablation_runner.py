"""Real processes, real kernels, real signals."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_rooms
import nbformat
import psutil
import pytest
import yaml
from fake_rooms import FAKE, write_question

from longcat_lab.ablation import JobsFailed, executed, load_results, read_sweep, run
from longcat_lab.ablation import store as stores
from longcat_lab.errors import LabError


def until(condition: Callable[[], Any], seconds: float = 120) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
    return found


def record(out: Path, name: str) -> dict[str, Any]:
    return json.loads((out / "jobs" / name / "run.json").read_text())


def count(out: Path, name: str) -> int:
    return len((out / "jobs" / name / "count.txt").read_text())


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def pids(out: Path, name: str) -> tuple[int, int]:
    """Job and kernel, once the notebook runs."""
    until(lambda: (out / "jobs" / name / "started").exists())
    note = until(lambda: (n := stores.holder(out / "jobs" / name)) and "kernel" in n and n)
    return note["pid"], note["kernel"]


def driver(question: Path, out: Path, jobs: int) -> subprocess.Popen[str]:
    repository = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    return subprocess.Popen(
        [sys.executable, fake_rooms.__file__, str(question), str(out), str(jobs)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def statuses(out: Path) -> dict[str, str]:
    frame = load_results(out)
    return {f"{v}/seed-{s}": status for v, s, status in zip(frame["variant"], frame["seed"], frame["status"], strict=True)}


def test_failures_do_not_stop_the_others_and_only_what_is_needed_runs_again(tmp_path: Path) -> None:
    arms = {name: {"behaviour": name} for name in ("ok", "raise", "die", "late")}
    question, out = write_question(tmp_path, arms), tmp_path / "out {braces}"
    with pytest.raises(JobsFailed) as failed:
        run(question, out, 2, rooms=FAKE)
    assert "2 of 4 jobs finished and 2 did not" in str(failed.value)
    assert "raise/seed-0: ValueError: boom; die/seed-0: the kernel died with exit status 9" in str(failed.value)
    assert statuses(out) == {"ok/seed-0": "finished", "raise/seed-0": "failed", "die/seed-0": "failed", "late/seed-0": "finished"}
    assert record(out, "late/seed-0")["job"]["notebook_error"] == "RuntimeError: a figure failed"
    for name in arms:
        nb = nbformat.read(out / "jobs" / name / "seed-0" / "notebook.ipynb", as_version=4)
        assert any(cell.get("outputs") for cell in nb.cells), "the executed notebook is kept, also when it failed"
    assert "TCP without encryption" not in (out / "jobs/ok/seed-0/job.log").read_text()
    row = load_results(out).iloc[0]
    assert row["validation_bpb"] == 2.0 and row["total_params"] == 133600 and row["seconds"] > 0

    # A question with one arm changed: that one runs anew, the failed one once more, the finished ones not at all.
    before = {name: (out / "jobs" / name / "run.json").stat().st_mtime_ns for name in ("ok/seed-0", "late/seed-0")}
    (out / "jobs/raise/seed-0/checkpoint.pt").touch()
    write_question(tmp_path, {**arms, "raise": {"behaviour": "ok"}})
    with pytest.raises(JobsFailed, match="3 of 4 jobs finished and 1 did not"):
        run(question, out, 2, rooms=FAKE)
    assert {name: (out / "jobs" / name / "run.json").stat().st_mtime_ns for name in before} == before
    assert (count(out, "ok/seed-0"), count(out, "raise/seed-0"), count(out, "die/seed-0")) == (1, 1, 2)
    assert not (out / "jobs/raise/seed-0/checkpoint.pt").exists(), "nothing of another configuration is left to resume from"
    assert record(out, "die/seed-0")["job"]["attempts"] == 2
    assert "variants edited when 2 jobs had finished" in read_sweep(out).ablation.changes[0]


def test_killed_driver_leaves_nothing_behind_and_a_new_one_goes_on(tmp_path: Path) -> None:
    arms = {"quick": {}, "slow": {"behaviour": "wait"}, "stubborn": {"behaviour": "stubborn"}}
    question, out = write_question(tmp_path, arms), tmp_path / "out"
    first = driver(question, out, 2)
    try:
        involved = [*pids(out, "slow/seed-0"), *pids(out, "stubborn/seed-0")]
        with pytest.raises(LabError, match=rf"Another process \(pid {first.pid} on .*\) is running the sweep"):
            run(question, out, rooms=FAKE)
        assert statuses(out) == {"quick/seed-0": "finished", "slow/seed-0": "running", "stubborn/seed-0": "running"}
    finally:
        first.kill()
    until(lambda: not any(alive(pid) for pid in involved), 20)  # about two seconds on a machine that is not loaded
    assert statuses(out) == {"quick/seed-0": "finished", "slow/seed-0": "interrupted", "stubborn/seed-0": "interrupted"}
    assert record(out, "slow/seed-0")["reason"] == "the driver is gone"
    assert (out / "jobs/slow/seed-0/saved").exists(), "the notebook was interrupted before it was killed"

    mtime = (out / "jobs/quick/seed-0/run.json").stat().st_mtime_ns
    for name in ("slow", "stubborn"):
        (out / "jobs" / name / "seed-0" / "release").touch()
    assert run(question, out, 2, rooms=FAKE) == out
    assert set(statuses(out).values()) == {"finished"}
    assert (out / "jobs/quick/seed-0/run.json").stat().st_mtime_ns == mtime and count(out, "quick/seed-0") == 1
    assert count(out, "slow/seed-0") == 2 and (out / "jobs/slow/seed-0/saved").exists(), "the folder is kept, to resume from"


def test_interrupt_ends_everything_and_says_how_to_go_on(tmp_path: Path) -> None:
    question, out = write_question(tmp_path, {"a": {"behaviour": "wait"}, "b": {"behaviour": "wait"}, "c": {}}), tmp_path / "out"
    process = driver(question, out, 2)
    involved = [*pids(out, "a/seed-0"), *pids(out, "b/seed-0")]
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=90)
    assert process.returncode == 2
    line = said.strip().splitlines()[-1]
    assert line.startswith("LabInterrupted: Stopped with 0 of 3 jobs finished (2 interrupted, 1 planned); go on with: longcat-lab run "), (
        said
    )
    assert not any(alive(pid) for pid in involved)
    assert statuses(out) == {"a/seed-0": "interrupted", "b/seed-0": "interrupted", "c/seed-0": "planned"}
    assert record(out, "a/seed-0")["reason"] == "stopped by SIGTERM"
    assert record(out, "c/seed-0")["status"] == "planned"


def test_killed_job_is_recorded_by_the_driver_and_its_kernel_is_ended(tmp_path: Path) -> None:
    question, out = write_question(tmp_path, {"a": {"behaviour": "wait"}}), tmp_path / "out"
    said: list[BaseException] = []

    def drive() -> None:
        try:
            run(question, out, rooms=FAKE)
        except LabError as error:
            said.append(error)

    thread = threading.Thread(target=drive)
    thread.start()
    job, kernel = pids(out, "a/seed-0")
    os.kill(job, signal.SIGKILL)
    thread.join(20)
    assert not alive(kernel)
    assert "its process was killed by SIGKILL; see job.log" in str(said[0])
    assert statuses(out) == {"a/seed-0": "failed"} and record(out, "a/seed-0")["status"] == "failed"


def test_nothing_is_written_for_a_question_that_cannot_run(tmp_path: Path) -> None:
    out = tmp_path / "out"
    good = write_question(tmp_path, {"a": {}})
    cases: list[tuple[str, dict[str, Any]]] = [
        ("Cannot|cannot be read", {"ablation_path": tmp_path / "missing.yaml"}),
        (r"Variant 'a': Unknown key 'model.widht', did you mean 'width'", {"overrides": ["model.widht=8"]}),
        ("Variant 'a': 'model.width'", {"overrides": ["model.width=wide"]}),
        ("Unknown key 'ablation.seed', did you mean 'seeds'", {"overrides": ["ablation.seed=3"]}),
        ("Unknown executor 'lokal', did you mean 'local'", {"executor": "lokal"}),
        ("--jobs must be at least 1", {"jobs": 0}),
        ("notebook of 'demo' is not there", {"overrides": ["ablation.notebook=gone.ipynb"]}),
    ]
    for sentence, arguments in cases:
        with pytest.raises(LabError, match=sentence) as error:
            run(**{"ablation_path": good, "out": out, "rooms": FAKE, **arguments})
        assert "\n" not in str(error.value)
        assert not out.exists()


def test_other_folders_are_not_touched(tmp_path: Path) -> None:
    question, out = write_question(tmp_path, {"a": {}}), tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").touch()
    with pytest.raises(LabError, match="holds other files and no sweep"):
        run(question, out, rooms=FAKE)
    (out / "ablation.yaml").write_text(yaml.safe_dump({"name": "other"}))
    with pytest.raises(LabError, match="holds the sweep 'other', not 'demo'"):
        run(question, out, rooms=FAKE)
    assert sorted(p.name for p in out.iterdir()) == ["ablation.yaml", "thesis.tex"]
    with pytest.raises(LabError, match="is a file"):
        run(question, out / "thesis.tex", rooms=FAKE)


def test_a_job_that_prints_much_leaves_a_small_notebook_and_no_link_that_a_copy_cannot_follow(tmp_path: Path) -> None:
    """Three megabytes of prints and links as a tracker's client makes them; what is cut is said, and the folder can be copied."""
    code = fake_rooms.CODE + (
        'print("first line")\nfor _ in range(30):\n    print("y" * 100_000)\nprint("last line")\n'
        '(folder / "wandb" / "logs").mkdir(parents=True)\n(folder / "wandb" / "debug.log").symlink_to("/nowhere/debug.log")\n'
        '(folder / "wandb" / "logs" / "core.log").symlink_to(folder.resolve() / "gone.log")\n'
    )
    fake_rooms.write_notebook(tmp_path / "job.ipynb", fake_rooms.PARAMETERS, fake_rooms.HELLO, code)
    out = run(write_question(tmp_path, {"a": {}}), tmp_path / "out", rooms=FAKE)
    path = out / "jobs/a/seed-0/notebook.ipynb"
    assert path.stat().st_size <= executed.LARGEST
    notebook = nbformat.read(path, as_version=4)
    assert [each.execution_count for each in notebook.cells] == [1, 2, 3, 4] and notebook.cells[2].outputs[0].text.startswith("threads")
    (said,) = [output.text for output in notebook.cells[-1].outputs]
    assert said.startswith("first line\n") and said.endswith("last line\n")
    assert "characters of what was printed are left out here: a job's notebook is held to 1 MB; what is large belongs into a file." in said
    kept = record(out, "a/seed-0")
    assert kept["job"]["notebook_sha256"] == executed.digest(path) and kept["asked"]["hypothesis"] == "b is better"
    assert shutil.copytree(out, tmp_path / "copy") and (tmp_path / "copy/jobs/a/seed-0/wandb/logs").is_dir()
