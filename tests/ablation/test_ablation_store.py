"""Folders, full disks, the runner with jobs that only pretend, and the table a person sees."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_rooms import FAKE, write_question
from rich.console import Console

from longcat_lab.ablation import JobsFailed, LabInterrupted, load_results, read, read_sweep, run
from longcat_lab.ablation.executors import BUSY
from longcat_lab.ablation.executors.local import LocalExecutor, cores
from longcat_lab.ablation.jobs import Job
from longcat_lab.ablation.store import Lock, check_folder, is_free
from longcat_lab.ablation.table import Cell, Display, short, span, time_left
from longcat_lab.errors import LabError


class Pretend:
    """An executor without processes: `act(job)` writes what the job would have, and gives its exit status."""

    def __init__(self, act: Callable[[Job], int]) -> None:
        self.act, self.ran = act, []

    def submit(self, job: Job) -> Pretend:
        self.ran.append(job.name)
        self.code = self.act(job)
        return self

    def poll(self) -> int:
        return self.code

    def stop(self, force: bool = False) -> None:
        pass


def finish(job: Job) -> int:
    fresh = job.folder / "planned.json"
    run = json.loads((fresh if fresh.exists() else job.folder / "run.json").read_text())
    fresh.unlink(missing_ok=True)
    value = 2.0 + job.config.effect + [0.0, 0.013, -0.007][job.seed] * (1 + job.config.effect)
    run |= {"status": "finished", "reason": None, "final": {"validation_bpb": value}}
    run["job"]["attempts"] = run["job"].get("attempts", 0) + 1
    (job.folder / "run.json").write_text(json.dumps(run))
    return 0


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


ARMS: dict[str, Any] = {"a": {}, "b": {"effect": -0.1}}
CLAIM = {"claims": [{"better": "b", "than": "a"}], "seeds": [0, 1, 2]}


def test_sweep_resumes_by_identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    question, out, jobs, console = write_question(tmp_path, ARMS, **CLAIM), tmp_path / "out", Pretend(finish), quiet()
    assert run(question, out, rooms=FAKE, executor=jobs, console=console) == out
    assert jobs.ran == ["a/seed-0", "b/seed-0", "a/seed-1", "b/seed-1", "a/seed-2", "b/seed-2"]
    assert "SEEN: b is better than a: validation_bpb differs by -0.1" in console.file.getvalue()  # type: ignore[attr-defined]
    sweep = read_sweep(out)
    assert list(sweep.results["status"]) == ["finished"] * 6 and len(sweep.runs) == 6 and sweep.ablation.name == "demo"
    assert sweep.ablation.solved["a"]["totals"]["total_params"] == FAKE.totals(FAKE.load("small"))["total_params"]
    # The resolved question runs as it is, to the same answers.
    run(out / "ablation.yaml", out, rooms=FAKE, executor=jobs, console=console)
    assert len(jobs.ran) == 6 and read(out / "ablation.yaml").changes == []
    # Other code: everything anew, and said.
    monkeypatch.setenv("FAKE_CODE", "edited")
    run(question, out, rooms=FAKE, executor=jobs, console=console)
    assert len(jobs.ran) == 12
    assert "6 of 6 jobs run anew: their configuration, data, notebook or code changed" in console.file.getvalue()  # type: ignore[attr-defined]
    # One more seed: only that one.
    more = run(question, out, rooms=FAKE, executor=jobs, console=console, overrides=["ablation.seeds=[0, 1]", "ablation.tuned=nothing"])
    assert more == out and len(jobs.ran) == 12 and len(load_results(out)) == 4


def test_job_that_never_began_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    question, out = write_question(tmp_path, {"a": {}}), tmp_path / "out"
    run(question, out, rooms=FAKE, executor=Pretend(finish), console=quiet())
    before = (out / "jobs/a/seed-0/run.json").read_text()
    monkeypatch.setenv("FAKE_CODE", "edited")
    for code, reason in [(BUSY, "still uses its folder"), (-11, "was killed by SIGSEGV"), (1, "ended with exit status 1")]:
        with pytest.raises(JobsFailed, match=reason):
            run(question, out, rooms=FAKE, executor=Pretend(lambda job, code=code: code), console=quiet())
        assert (out / "jobs/a/seed-0/run.json").read_text() == before
        assert load_results(out).loc[0, "status"] == "failed" and reason in load_results(out).loc[0, "reason"]
    monkeypatch.setenv("FAKE_CODE", "")
    jobs = Pretend(finish)
    run(question, out, rooms=FAKE, executor=jobs, console=quiet())
    assert jobs.ran == [], "back to the code that had finished"


def test_interrupt_during_preparation(tmp_path: Path) -> None:
    from dataclasses import replace

    def prepare(config: Any, progress: Any) -> None:
        raise KeyboardInterrupt

    question, out = write_question(tmp_path, ARMS), tmp_path / "out"
    with pytest.raises(LabInterrupted, match=r"Stopped with 0 of 2 jobs finished \(2 planned\); go on with: longcat-lab run") as stopped:
        run(question, out, rooms=replace(FAKE, prepare=prepare), console=quiet())
    assert stopped.value.folder == out
    assert not out.exists()
    with pytest.raises(LabError, match="There is no sweep in"):
        read_sweep(out)
    run(question, out, rooms=FAKE, executor=Pretend(finish), console=quiet())


def test_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    code = """
import resource, sys
from pathlib import Path
from longcat_lab.ablation import store
from longcat_lab.errors import LabError
folder = Path(sys.argv[1])
row = {"variant": "a", "seed": 0, "status": "planned", "reason": "", "identity": "x", "seconds": None}
store.write_results(folder, [row])
before = (folder / "results.parquet").read_bytes()
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    store.write_results(folder, [{**row, "seed": seed, "identity": str(seed) * 30} for seed in range(2000)])
except LabError as error:
    print(error)
assert (folder / "results.parquet").read_bytes() == before
print(sorted(p.name for p in folder.iterdir()))
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    said, files = done.stdout.strip().splitlines()
    assert "No space left" in said and "results.parquet" in said and files == "['results.parquet']"


def test_locks_end_with_their_process(tmp_path: Path) -> None:
    code = "import sys, pathlib; from longcat_lab.ablation.store import Lock; lock = Lock.take(pathlib.Path(sys.argv[1]))"
    code += "; print(1, flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout is not None
    other.stdout.readline()
    assert not is_free(tmp_path) and Lock.take(tmp_path) is None
    other.kill()
    lock = Lock.take(tmp_path, wait=10)
    assert lock is not None and lock.before["pid"] == other.pid and not is_free(tmp_path)
    lock.release()
    assert is_free(tmp_path)
    other.communicate()
    check_folder(tmp_path, "any")  # a lock alone is no sweep


def test_no_sweep_here(tmp_path: Path) -> None:
    for function in (load_results, read_sweep):
        with pytest.raises(LabError, match="There is no sweep in"):
            function(tmp_path)


def test_threads_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longcat_lab.ablation.executors.local.cores", lambda: 8)
    assert [LocalExecutor(jobs).threads for jobs in (1, 3, 8, 20)] == [8, 2, 1, 1]
    assert cores() >= 1


# ---- the table


def test_time_left() -> None:
    done = [Cell(str(i), "finished", seconds=10.0) for i in range(2)]
    running = [Cell("r", "running", left=4.0, began=90.0), Cell("s", "running", began=97.0)]
    waiting = [Cell(str(i), "planned") for i in range(3)]
    assert time_left([*done, *running], 2, now=100.0) == 7.0
    assert time_left([*done, *running, *waiting], 2, now=100.0) == 24.0  # ends at 4 and 7, then 14, 17 and 24
    assert time_left([*done, *waiting], 3) == 10.0
    assert time_left(waiting, 2) is None and time_left(done, 2) == 0.0
    assert time_left([running[0], *waiting], 1, now=100.0) == 4.0 + 3 * 14.0  # nothing finished: by what the running one says


def test_numbers_for_people() -> None:
    assert [span(s) for s in (None, 4.4, 65, 3700, 90000)] == ["", "4 s", "1 min 05 s", "1 h 01 min", "1 d 1 h"]
    assert [short(x) for x in (None, 950, 12345, 4.5e6)] == ["", "950", "12.3k", "4.5M"]


def test_terminal_shows_a_table_and_a_log_shows_changes() -> None:
    def show(terminal: bool) -> str:
        cells = [Cell("a/seed-0"), Cell("b/seed-0"), *(Cell(f"c/seed-{i}") for i in range(40))]
        console = Console(file=io.StringIO(), force_terminal=terminal, width=100, height=20)
        with Display(cells, 2, console) as display:
            display.prepare("data: 3 of 7 files")
            cells[0].status, cells[0].reason, cells[0].seconds = "failed", "ValueError: boom", 3.0
            cells[1].status = "running"
            cells[1].progress({"step": 120, "steps": 300, "tokens_per_second": 45600.0, "seconds_left": 71.0, "loss": 2.34567})
            display.update(force=True)
        return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]

    table, log = show(True), show(False)
    for text in (
        "data: 3 of 7 files",
        "120/300",
        "45.6k",
        "2.3457",
        "1 min 11 s",
        "ValueError: boom",
        "0 of 42 finished, 1 running, 1 failed",
        "and 28 more",
    ):
        assert text in table
    assert log == "a/seed-0 failed after 3 s: ValueError: boom\nb/seed-0 running\n"


def test_log_has_a_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    cells, console = [Cell("a/seed-0", "running", step=5, steps=9, loss=1.5), Cell("b/seed-0")], quiet()
    display = Display(cells, 1, console)
    display.update()
    display._spoke -= 31
    display.update()
    display.update()
    assert console.file.getvalue() == "0 of 2 finished, 1 running; a/seed-0 5/9 loss 1.5\n"  # type: ignore[attr-defined]


def test_disk_that_fills_up_during_a_sweep_stops_it_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped: list[str] = []

    class Endless(Pretend):
        def poll(self) -> Any:
            return 0 if self.first or stopped else None

        def submit(self, job: Job) -> Any:
            handle = Endless(self.act)
            handle.first = not self.ran
            self.ran.append(job.name)
            self.act(job)
            monkeypatch.setattr("longcat_lab.ablation.store.write_results", full)
            return handle

        def stop(self, force: bool = False) -> None:
            stopped.append("force" if force else "asked")

    def full(*arguments: Any) -> None:
        raise LabError("No space left while writing.")

    question, out = write_question(tmp_path, ARMS), tmp_path / "out"
    with pytest.raises(LabError, match="No space left"):
        run(question, out, 2, rooms=FAKE, executor=Endless(finish), console=quiet())
    assert stopped == ["asked"]
    monkeypatch.undo()
    assert list(load_results(out)["status"]) == ["finished", "finished"], "what the jobs wrote themselves is not lost"
