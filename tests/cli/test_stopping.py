"""A sweep with the real loop is stopped in the middle, by Ctrl-C and by kill -9; running it again finishes the rest."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas
import psutil
import pytest

from longcat_lab.files import read_json

ROOT = Path(__file__).resolve().parents[2]
QUESTION = """
name: stopping
question: Does a stopped sweep go on?
hypothesis: It does.
base: tiny
set: {training.steps: 300, training.checkpoint_every: 10, training.log_every: 50}
baseline: a
variants: {a: {training.steps: 20}, b: {}}
seeds: [0]
smallest_effect: 0.1
"""


def start(folder):
    (folder / "q.yaml").write_text(QUESTION)
    return subprocess.Popen(
        [sys.executable, "-m", "longcat_lab", "run", "q.yaml", "--jobs", "1"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def wait_for(condition, process):
    deadline = time.monotonic() + 120
    while not (found := condition()):
        assert process.poll() is None and time.monotonic() < deadline, process.stdout.read() if process.poll() is not None else "too late"
        time.sleep(0.02)
    return found


def of_this_sweep(folder):
    """Processes that name the sweep's folder: jobs and, through their working folder or arguments, kernels."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        try:
            if str(folder) in " ".join(process.info["cmdline"] or []) or str(folder) in (process.environ().get("PWD") or ""):
                found.append(process)
        except psutil.Error:
            continue
    return [p for p in found if p.pid != os.getpid()]


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGKILL], ids=["ctrl-c", "kill-9"])
def test_a_stopped_sweep_goes_on_where_it_was(tmp_path, number):
    first, second = (tmp_path / "runs/stopping/jobs" / variant / "seed-0" for variant in "ab")
    process = start(tmp_path)
    wait_for(lambda: list(second.glob("checkpoint-*")), process)
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL), said
    if number == signal.SIGINT:
        assert "go on with: longcat-lab run q.yaml" in said.splitlines()[-1]
    deadline = time.monotonic() + 20
    while of_this_sweep(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert of_this_sweep(tmp_path) == []

    finished, before = (first / "run.json").stat().st_mtime_ns, read_json(second / "run.json")
    assert read_json(first / "run.json")["status"] == "finished" and before["status"] != "finished"
    reached = max(int(path.name.split("-")[1]) for path in second.glob("checkpoint-*"))
    again = start(tmp_path)
    said, _ = again.communicate(timeout=120)
    assert again.returncode == 0, said
    assert (first / "run.json").stat().st_mtime_ns == finished
    after = read_json(second / "run.json")
    assert after["status"] == "finished" and after["job"]["attempts"] == 2
    metrics = pandas.read_parquet(second / "metrics.parquet")
    assert metrics["step"].tolist() == list(range(50, 301, 50))
    assert reached >= 10 and after["timings"]["started"] == before["timings"]["started"]
    assert set(pandas.read_parquet(tmp_path / "runs/stopping/results.parquet")["status"]) == {"finished"}
