"""Every way a job can end, really brought about: told apart in run.json, with a one-line reason, its notebook and its log kept."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import fake_rooms
import nbformat
import psutil
import pytest
from fake_rooms import FAKE, write_question
from test_ablation_runner import alive, count, record, statuses, until
from test_ablation_store import quiet

from longcat_lab.ablation import JobsFailed, ends, load_results, run
from longcat_lab.errors import Diverged, LabError, is_out_of_memory


def end(out: Path, name: str) -> tuple[str, str, str]:
    """Kind, status and reason of a job with seed 0, as its run.json says them."""
    run = record(out, f"{name}/seed-0")
    return run["job"]["end"], run["status"], run["reason"]


def test_ends_are_told_apart_and_retried_as_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    locks = tmp_path / "locks"
    locks.mkdir()
    monkeypatch.setenv("CARD_LOCKS", str(locks))
    arms = {name: {"behaviour": name} for name in ("ok", "raise", "die", "memory", "nan", "eat")} | {"killed": {"behaviour": "killed once"}}
    question = write_question(tmp_path, arms, resources={"memory": "1 GB", "cards": 1, "retries": 1})
    out, console = tmp_path / "out", quiet()
    with pytest.raises(JobsFailed, match="2 of 7 jobs finished, 1 diverged and 4 did not") as failed:
        run(question, out, 3, rooms=FAKE, console=console)
    assert sorted(path.name for path in locks.iterdir()) == ["4", "5"], "two jobs at a time, for there are two cards, each with its own"

    assert end(out, "ok") == ("finished", "finished", None)
    assert end(out, "raise") == ("error", "failed", "ValueError: boom")
    assert end(out, "die") == ("dead kernel", "failed", "the kernel died with exit status 9")
    assert end(out, "memory") == ("out of memory", "failed", "MemoryError: Unable to allocate 9.1 TiB")
    assert end(out, "nan") == ("diverged", "diverged", "diverged at step 120: loss nan")
    assert end(out, "killed") == ("finished", "finished", None)
    kind, status, reason = end(out, "eat")
    assert (kind, status) == ("out of memory", "failed")
    assert reason.startswith("out of memory: its processes took 1") and reason.endswith(" GB, more than the 1 GB of resources.memory")
    assert not alive(int((out / "jobs/eat/seed-0/eater").read_text())), "also what the kernel has started is ended"
    # Tried again: the dead kernels, once each, and nothing else.
    assert {name: record(out, f"{name}/seed-0")["job"]["attempts"] for name in arms} == dict.fromkeys(arms, 1) | {"die": 2, "killed": 2}
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "killed/seed-0: the kernel was killed by SIGKILL; it is tried again (1 of 1)." in said
    assert "1 of 7 jobs diverged, which is a result: nan/seed-0 (diverged at step 120: loss nan)." in said
    for name in arms:
        folder = out / "jobs" / name / "seed-0"
        assert nbformat.read(folder / "notebook.ipynb", as_version=4).cells and (folder / "job.log").is_file()
        assert name in ("ok", "killed", "nan") or reason_of(failed.value, name), "one line of each is in the sentence"
    outputs = [
        output for cell in nbformat.read(out / "jobs/raise/seed-0/notebook.ipynb", as_version=4).cells for output in cell.get("outputs", [])
    ]
    assert any(output.get("ename") == "ValueError" for output in outputs), "the failed notebook keeps its error"
    rows = load_results(out).set_index("variant")
    assert (
        rows.loc["nan", "status"] == "diverged"
        and rows.loc["nan", "train_loss"] == 3.5
        and rows.loc["raise", "reason"] == "ValueError: boom"
    )

    monkeypatch.undo()
    # A divergence is a result: it is not run again, and set aside like one when the configuration changes.
    fine = {name: arms[name] for name in ("ok", "nan", "killed")}
    run(write_question(tmp_path, fine), out, rooms=FAKE, console=console)
    assert count(out, "nan/seed-0") == 1 and "3 of 3 jobs have finished before" in console.file.getvalue()  # type: ignore[attr-defined]
    run(write_question(tmp_path, {"ok": {}, "nan": {"behaviour": "ok"}}, baseline="ok"), out, rooms=FAKE, console=console)
    (old,) = (out / "superseded").glob("*/nan/seed-0/run.json")
    assert json.loads(old.read_text())["status"] == "diverged" and statuses(out)["nan/seed-0"] == "finished"


def reason_of(error: LabError, name: str) -> bool:
    return f"{name}/seed-0: " in str(error)


def test_time_is_up_as_if_a_person_stopped_it_and_then_by_force(tmp_path: Path) -> None:
    arms = {"wait": {"behaviour": "wait"}, "stubborn": {"behaviour": "stubborn"}}
    out = tmp_path / "out"
    question = write_question(tmp_path, arms, resources={"time": "14 s", "grace": "2 s"})
    with pytest.raises(JobsFailed, match=r"time-out: it ran for the 14 s of resources\.time"):
        run(question, out, 2, rooms=FAKE, console=quiet())
    for name in arms:
        assert end(out, name) == ("time-out", "failed", "time-out: it ran for the 14 s of resources.time")
    began = {name: (out / "jobs" / name / "seed-0" / "started").exists() for name in arms}
    assert (out / "jobs/wait/seed-0/saved").exists() == began["wait"], "the notebook was interrupted before it was killed"
    assert not (out / "jobs/stubborn/seed-0/saved").exists()
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(out) in " ".join(p.info["cmdline"] or [])]


def test_full_disk_is_told_and_gone_on_from(tmp_path: Path) -> None:
    """The sweep's folder on a disk of one megabyte, which its only job fills to the last byte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        question, out, console = write_question(tmp_path, {"a": {"behaviour": "fill"}}), disk / "out", quiet()
        with pytest.raises(LabError, match=r"No space left while writing .*results.parquet: free some and run") as failed:
            run(question, out, rooms=FAKE, console=console)
        assert "\n" not in str(failed.value)
        folder, said = out / "jobs/a/seed-0", console.file.getvalue()  # type: ignore[attr-defined]
        assert "a/seed-0 failed: no space left on the disk for its record; see job.log" in said
        (folder / "big").unlink()
        (folder / "freed").touch()
        assert run(question, out, rooms=FAKE, console=quiet()) == out
        assert end(out, "a") == ("finished", "finished", None) and count(out, "a/seed-0") == 2
        assert [path for path in out.rglob("*") if ".tmp" in path.name] == []
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_the_systems_own_killing_for_lack_of_memory_is_known(tmp_path: Path) -> None:
    """A sweep inside a control group of 1.5 GB, whose kernel takes more."""
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    one = next((Path("/sys/fs/cgroup/memory") / path.lstrip("/") for _, kinds, path in lines if "memory" in kinds.split(",")), None)
    two = next((Path("/sys/fs/cgroup") / path.lstrip("/") for _, kinds, path in lines if not kinds), None)
    group = (one or two or Path("/nowhere")) / f"longcat_lab-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / ("memory.limit_in_bytes" if one else "memory.max")).write_text(str(1_500_000_000))
    except OSError as error:
        if group.is_dir():
            group.rmdir()
        pytest.skip(f"no control group of its own can be made here: {error.strerror}")
    try:
        question, out = write_question(tmp_path, {"a": {"behaviour": "eat"}}), tmp_path / "out"
        environment = {**os.environ, "PYTHONPATH": str(Path(fake_rooms.__file__).parents[2]), "EATEN": "3000"}
        command = f"echo $$ > {group}/cgroup.procs; exec {sys.executable} {fake_rooms.__file__} {question} {out} 1"
        done = subprocess.run(["sh", "-c", command], env=environment, capture_output=True, text=True, timeout=200)
        assert done.returncode == 2 and end(out, "a")[:2] == ("out of memory", "failed"), done.stdout + done.stderr
        assert end(out, "a")[2] == "out of memory: the system killed the kernel (SIGKILL)"
    finally:
        left = [int(pid) for pid in (group / "cgroup.procs").read_text().split()]
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        until(lambda: not (group / "cgroup.procs").read_text(), 20)
        group.rmdir()
    assert left == [], "what the dead kernel had started has ended with its job"


@pytest.mark.parametrize(
    ("name", "text", "kind"),
    [
        ("LabError", "Out of memory on cpu at step 3 of 9: set ...", ends.MEMORY),
        ("OutOfMemoryError", "CUDA out of memory. Tried to allocate 2.00 GiB", ends.MEMORY),
        ("RuntimeError", "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried ...", ends.MEMORY),
        ("OSError", "[Errno 12] Cannot allocate memory", ends.MEMORY),
        ("OSError", "[Errno 28] No space left on device: 'x'", ends.DISK),
        ("LabError", "No space left while writing x: free some and run the same command again.", ends.DISK),
        ("SafetensorError", "Error while serializing: I/O error: No space left on device (os error 28)", ends.DISK),
        ("OSError", "[Errno 2] No such file or directory: 'x'", ends.ERROR),
        ("ValueError", "no space left in this sentence", ends.ERROR),
    ],
)
def test_errors_of_cells_by_kind(name: str, text: str, kind: str) -> None:
    assert ends.of_cell(name, text) == kind


def test_exit_statuses_by_kind() -> None:
    said: dict[int, Any] = {code: ends.of_exit(code) for code in (-9, -11, 1, ends.NO_ROOM)}
    assert [end.kind for end in said.values()] == ["killed", "killed", "error", "disk full"]
    assert said[-11].reason == "its process was killed by SIGSEGV; see job.log" and {end.status for end in said.values()} == {"failed"}
    assert ends.End(ends.DRIVER, "").status == "interrupted" and ends.End(ends.DIVERGED, "").status == "diverged"
    assert issubclass(Diverged, LabError) and not is_out_of_memory(Diverged("x"))
    assert not ends.OutOfMemoryKills().risen()
