"""What a driver does when engines refuse, when others are quicker, when a notebook was edited, and when nothing answers any more."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas
import psutil
import pytest
from fake_rooms import FAKE, write_notebook, write_question
from test_ablation_store import ARMS, Pretend, finish, quiet

from longcat_lab.ablation import LabInterrupted, driving, load_results, run, store
from longcat_lab.ablation import lock as locks
from longcat_lab.ablation.ends import NODE, End
from longcat_lab.ablation.executors import Refused
from longcat_lab.ablation.executors.local import make
from longcat_lab.ablation.jobs import Job
from longcat_lab.ablation.resources import Resources
from longcat_lab.ablation.warm import Warm, _lives
from longcat_lab.errors import LabError
from longcat_lab.files import read_json
from longcat_lab.training.environment import environment_for

SEEDS = {"seeds": [0, 1, 2]}


class Full(Pretend):
    """Takes `room` jobs at a time and refuses the others; jobs end only when they are looked at."""

    slots = 6

    def __init__(self, room: int) -> None:
        super().__init__(finish)
        self.room, self.there, self.refused, self.stopped = room, 0, 0, 0

    def submit(self, job: Job) -> Any:
        if self.there >= self.room:
            self.refused += 1
            raise Refused(f"The queue is full for {job.name}.")
        self.there += 1
        self.ran.append(job.name)
        return _Taken(self, job)


class _Taken:
    def __init__(self, queue: Full, job: Job) -> None:
        self.queue, self.job, self.looks = queue, job, 0

    def poll(self) -> int | None:
        self.looks += 1
        if self.looks < 3:
            return None
        self.queue.there -= 1
        return finish(self.job)

    def stop(self, force: bool = False) -> None:
        self.queue.stopped += 1


def test_an_engine_that_is_full_is_asked_again_and_what_runs_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driving, "REFUSALS", (0.01, 0.02, 0.04))
    queue, console = Full(2), quiet()
    out = run(write_question(tmp_path, ARMS, **SEEDS), tmp_path / "out", rooms=FAKE, executor=queue, console=console)
    assert (load_results(out)["status"] == "finished").all() and len(queue.ran) == len(set(queue.ran)) == 6
    assert queue.refused and not queue.stopped
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "The queue is full for a/seed-1. 2 jobs are there, 4 wait; it is asked again in 0 s." in said

    nothing = Full(0)
    with pytest.raises(LabError, match=r"The queue is full .* It was asked 4 times, and none of these jobs is there"):
        run(tmp_path / "demo.yaml", tmp_path / "other", rooms=FAKE, executor=nothing, console=quiet())
    assert nothing.refused == 4
    monkeypatch.undo()


def test_what_finished_for_another_driver_is_not_run_again(tmp_path: Path) -> None:
    seen: list[Job] = []

    def act(job: Job) -> int:
        other = job.folder.parents[1] / "b" / "seed-0"  # ends, for a driver that was killed, after this one had looked
        record = read_json(other / "run.json")
        record |= {"status": "finished", "reason": None, "final": {"validation_bpb": 7.0}, "job": {**record["job"], "attempts": 1}}
        (other / "run.json").write_text(json.dumps(record))
        seen.append(job)
        return finish(job)

    engine = Pretend(act)
    out = run(write_question(tmp_path, ARMS), tmp_path / "out", 1, rooms=FAKE, executor=engine, console=quiet())
    assert engine.ran == ["a/seed-0"]
    assert load_results(out).set_index("variant")["validation_bpb"]["b"] == 7.0

    # The process of a job that was started twice finds the result, and leaves it as it is.
    before = (seen[0].folder / "run.json").read_bytes()
    done = subprocess.run([sys.executable, "-m", "longcat_lab.ablation.job", str(seen[0].folder)], capture_output=True, text=True)
    assert done.returncode == 0 and "It has finished already" in done.stdout
    assert (seen[0].folder / "run.json").read_bytes() == before


def test_an_edited_notebook_makes_its_jobs_anew_and_another_one_is_what_goes_on(tmp_path: Path) -> None:
    question, out = write_question(tmp_path, ARMS), tmp_path / "out"
    notebook = tmp_path / "job.ipynb"
    first = Pretend(finish)
    run(question, out, 1, rooms=FAKE, executor=first, console=quiet())
    content = json.loads(notebook.read_text())
    content["cells"].append({"cell_type": "markdown", "id": "t", "metadata": {}, "source": "Words."})
    notebook.write_text(json.dumps(content))
    again = Pretend(finish)
    run(question, out, 1, rooms=FAKE, executor=again, console=quiet())
    assert len(first.ran) == 2 and not again.ran, "words compute nothing"

    content["cells"][-1] |= {"cell_type": "code", "execution_count": None, "outputs": [], "source": "another = 1"}
    notebook.write_text(json.dumps(content))
    edited, console = Pretend(lambda job: 1), quiet()
    with pytest.raises(LabError, match="0 of 2 jobs finished"):
        run(question, out, 1, rooms=FAKE, executor=edited, console=console)
    assert edited.ran == ["a/seed-0", "b/seed-0"]
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "2 of 2 jobs run anew: their configuration, data, notebook or code changed" in said
    assert "the 2 that had finished are kept" in said

    other = write_notebook(tmp_path / "other.ipynb", "job_folder = ''", "print(1)")
    asked: list[str] = []

    def act(job: Job) -> int:
        fresh = job.folder / "planned.json"
        asked.append(read_json(fresh if fresh.exists() else job.folder / "run.json")["job"]["notebook"])
        return finish(job)

    run(question, out, 1, [f"ablation.notebook={other}"], rooms=FAKE, executor=Pretend(act), console=quiet())
    assert asked == [str(other)] * 2


class Deaf(Pretend):
    """Its jobs never end, whatever they are told; each look at them is Ctrl-C."""

    patience = 100.0

    def __init__(self, number: int) -> None:
        super().__init__(lambda job: 0)
        self.number, self.forced = number, []

    def poll(self) -> Any:
        os.kill(os.getpid(), self.number)
        return None

    def stop(self, force: bool = False) -> None:
        self.forced.append(force)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_third_ctrl_c_leaves_jobs_that_do_not_end(tmp_path: Path, number: int) -> None:
    before = signal.signal(number, signal.default_int_handler)  # this process may have been started with nohup
    try:
        _three_times(tmp_path, number)
    finally:
        signal.signal(number, before)


def _three_times(tmp_path: Path, number: int) -> None:
    engine = Deaf(number)
    with pytest.raises(LabInterrupted, match=r"Stopped with 0 of 2 jobs finished \(1 interrupted, 1 planned\)"):
        run(write_question(tmp_path, ARMS), tmp_path / "out", 1, rooms=FAKE, executor=engine, console=quiet())
    assert engine.forced == [False, True]
    table = pandas.read_parquet(tmp_path / "out" / "results.parquet").set_index("variant")
    assert table["reason"]["a"] == "it was told to end and may still be there"


def test_ctrl_c_while_jobs_are_submitted_ends_that(tmp_path: Path) -> None:
    class Slow(Pretend):
        slots = 6

        def submit(self, job: Job) -> Any:
            super().submit(job)
            if len(self.ran) == 2:
                os.kill(os.getpid(), signal.SIGINT)
            return self

    engine = Slow(finish)
    with pytest.raises(LabInterrupted, match=r"Stopped with 2 of 6 jobs finished \(4 planned\)"):
        run(write_question(tmp_path, ARMS, **SEEDS), tmp_path / "out", rooms=FAKE, executor=engine, console=quiet())
    assert len(engine.ran) == 2


def test_the_table_is_written_when_jobs_have_ended_and_not_for_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from longcat_lab.ablation import runner

    written: list[int] = []
    write = store.write_results

    def counting(folder: Path, rows: Any) -> None:
        found = list(rows)
        written.append(sum(row["status"] == "finished" for row in found))
        write(folder, found)

    class Slow(Pretend):
        def submit(self, job: Job) -> Any:
            self.ran.append(job.name)
            return _Taken(self, job)

        there = 0

    monkeypatch.setattr(store, "write_results", counting)
    monkeypatch.setattr(runner, "LEAST", 0.0)
    monkeypatch.setattr(runner, "SHARE", 0)
    run(write_question(tmp_path, ARMS), tmp_path / "each", 1, rooms=FAKE, executor=Slow(finish), console=quiet())
    assert written == [0, 1, 2, 2], "at the start, at each end, and at the very end; never in between"
    written.clear()
    monkeypatch.setattr(runner, "LEAST", 1000.0)
    run(tmp_path / "demo.yaml", tmp_path / "seldom", 1, rooms=FAKE, executor=Slow(finish), console=quiet())
    assert written == [0, 2]


def test_what_another_process_still_writes_is_left_to_it(tmp_path: Path) -> None:
    """The engine says that a job is over while a process, on a disk that shows files late, holds the job's folder."""
    held: list[Any] = []

    def act(job: Job) -> int:
        held.append(store.Lock.take(job.folder))
        record = read_json(job.folder / "run.json")
        (job.folder / "run.json").write_text(json.dumps(record | {"status": "running", "job": {**record["job"], "attempts": 1}}))
        return 1

    with pytest.raises(LabError, match="its process ended with exit status 1"):
        run(write_question(tmp_path, {"a": {}}), tmp_path / "out", 1, rooms=FAKE, executor=Pretend(act), console=quiet())
    assert read_json(tmp_path / "out/jobs/a/seed-0/run.json")["status"] == "running"
    held[0].release()


def test_starts_that_fail_and_places_that_are_lost_are_tried_again(tmp_path: Path) -> None:
    class Shaky(Pretend):
        def submit(self, job: Job) -> Any:
            self.ran.append(job.name)
            if len(self.ran) == 1:
                raise OSError(errno.EAGAIN, "Resource temporarily unavailable")
            self.code = 1 if len(self.ran) == 2 else self.act(job)
            return self

        def why(self) -> Any:
            return End(NODE, "its node was lost") if self.code else None

    engine, console = Shaky(finish), quiet()
    asked = {"retries": 1, "retry": ["not started"]}
    out = run(write_question(tmp_path, {"a": {}}, resources=asked), tmp_path / "out", 1, rooms=FAKE, executor=engine, console=console)
    assert (load_results(out)["status"] == "finished").all() and len(engine.ran) == 3
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "could not be started: Resource temporarily unavailable; it is tried again (1 of 1)" in said
    assert "its node was lost; it is queued again and goes on from its checkpoint" in said


def test_a_finished_run_keeps_no_checkpoint_whoever_was_killed(tmp_path: Path) -> None:
    """Its process died between the word that it has finished and the removal of what it could have gone on from."""
    left = [tmp_path / "out/jobs/a/seed-0" / name for name in ("checkpoint-00000110", ".checkpoint-00000120.old.tmp")]

    def act(job: Job) -> int:
        for place in left:
            place.mkdir(exist_ok=True)
            (place / "manifest.json").write_text("{}")
        return finish(job)

    question = write_question(tmp_path, {"a": {}})
    run(question, tmp_path / "out", 1, rooms=FAKE, executor=Pretend(act), console=quiet())
    assert not any(place.exists() for place in left)
    left[0].mkdir()  # as an earlier driver left it, which was killed too
    run(question, tmp_path / "out", 1, rooms=FAKE, executor=Pretend(act), console=quiet())
    assert not left[0].exists()


def test_a_notebook_that_was_not_written_to_its_end_is_executed_once_more(tmp_path: Path) -> None:
    """The run has ended, and the process that wrote the notebook was killed before its last cell."""

    def act(job: Job) -> int:
        (job.folder / "notebook.ipynb").write_text("{}")
        code = finish(job)
        record = read_json(job.folder / "run.json")
        ended = {"end": "finished"} if record["job"]["attempts"] > 1 else {}
        (job.folder / "run.json").write_text(json.dumps(record | {"job": {**record["job"], **ended}}))
        return code if ended else -9

    question, engine, console = write_question(tmp_path, {"a": {}}), Pretend(act), quiet()
    out = run(question, tmp_path / "out", 1, rooms=FAKE, executor=engine, console=console)
    assert engine.ran == ["a/seed-0"] * 2 and list(load_results(out)["status"]) == ["finished"]
    assert "its notebook was not written to the end" in console.file.getvalue()  # type: ignore[attr-defined]

    record = read_json(out / "jobs/a/seed-0/run.json")  # the driver was killed too
    (out / "jobs/a/seed-0/run.json").write_text(json.dumps(record | {"job": {"attempts": 1, "notebook": record["job"]["notebook"]}}))
    again = Pretend(act)
    run(question, out, 1, rooms=FAKE, executor=again, console=quiet())
    assert again.ran == ["a/seed-0"]


def test_what_killed_processes_were_writing_is_cleared(tmp_path: Path) -> None:
    question = write_question(tmp_path, {"a": {}}, resources={"warm": False})
    folder = tmp_path / "out" / "jobs" / "a" / "seed-0"
    run(question, tmp_path / "out", 1, rooms=FAKE, executor=Pretend(lambda job: finish(job)), console=quiet())
    left = [tmp_path / "out" / ".results.parquet.17-1.tmp", folder / ".run.json.17-1.tmp", folder / ".progress.json.18-1.tmp"]
    for path in left:
        path.write_text("{")
    (folder / "run.json").write_text((folder / "run.json").read_text().replace('"finished"', '"interrupted"'))
    run(question, tmp_path / "out", 1, rooms=FAKE, console=quiet())
    assert not [path for path in left if path.exists()]


# ---- what a job may take


def test_jobs_at_a_time_are_as_many_as_cards_cores_and_memory_allow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    rooms = replace(FAKE, cards=lambda: [str(number) for number in range(8)])
    monkeypatch.setattr("longcat_lab.ablation.executors.local.cores", lambda: 64)
    assert make(Resources(), None, tmp_path, rooms).slots == 4
    assert make(Resources(cards=1), None, tmp_path, rooms).slots == 8
    assert make(Resources(cards=2, cores=32), None, tmp_path, rooms).slots == 2
    most = f"{0.4 * psutil.virtual_memory().total / 1e9:.3f} GB"
    engine = make(Resources(memory=most), 6, tmp_path, rooms)
    assert engine.slots == 2 and engine.threads == 32
    engine = make(Resources(), 6, tmp_path, rooms)
    engine.reserve(16)
    assert engine.slots == 4 and engine.threads == 16


def test_thread_counts_of_the_environment_make_no_job_larger(monkeypatch: pytest.MonkeyPatch) -> None:
    for there, wanted in (("64", "4"), ("2", "2"), ("4,2", "4,2"), ("many", "4")):
        monkeypatch.setenv("OMP_NUM_THREADS", there)
        assert environment_for(4)["OMP_NUM_THREADS"] == wanted
    assert environment_for(4, keep=False)["OMP_NUM_THREADS"] == "4"


def test_more_threads_than_cores_are_refused(tmp_path: Path) -> None:
    from worded import ROOMS, write

    arms = {"a": {}, "b": {"training.threads": 8}}
    with pytest.raises(LabError, match=r"line \d+: Variant 'b' has training.threads=8, and resources.cores gives its jobs 2"):
        run(write(tmp_path, arms, resources={"cores": 2}), tmp_path / "out", rooms=ROOMS, executor=Pretend(finish), console=quiet())
    assert not (tmp_path / "out").exists()


# ---- disks without locks, processes that are dead or never there


def test_a_disk_without_locks_is_used_with_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*arguments: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.warns(UserWarning, match="has no locks"):
        held = locks.Lock.take(tmp_path)
    assert held is not None and locks.is_free(tmp_path) and locks.holder(tmp_path)["pid"] == os.getpid()


def test_a_process_that_nobody_waited_for_is_dead(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert _lives(child.pid)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it is over, and left as it is
    assert psutil.pid_exists(child.pid) and not _lives(child.pid)
    child.wait()


def test_a_process_that_cannot_import_is_a_reason(tmp_path: Path) -> None:
    from test_warm import until

    warm = Warm({**os.environ, "PYTHONHOME": "/nowhere"}, ours=False)
    job = warm.submit(tmp_path, tmp_path / "job.log", dict(os.environ))
    until(lambda: job.poll() is not None)
    assert job.status == 1 and "came to no end of its imports" in job.error and not job.lost and not warm.fits
    warm.close()
