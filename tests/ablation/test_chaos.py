"""Dozens of real jobs whose kernels, jobs, warm processes and drivers are killed at random; in the end nothing can tell."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time

import pandas as pd
import psutil
import pytest

from longcat_lab.ablation import check, render, store
from longcat_lab.files import read_json

SEED = 20261122
TROUBLE = 100.0  # seconds
VICTIMS = ("driver", "warm", "job", "kernel", "kernel")
QUESTION = """
name: chaos
question: Does anything that dies change a number?
hypothesis: No.
base: tiny
set: {training.steps: 120, training.checkpoint_every: 10, training.log_every: 1, training.evaluation_sequences: 2}
baseline: one
variants: {one: {}, two: {model.num_layers: 2}, three: {model.num_layers: 3}}
seeds: [0, 1, 2, 3, 4, 5, 6, 7]
smallest_effect: 0.1
"""
TIMED = ("seconds", "tokens_per_second")


def driver(question, folder, temporary):
    command = [sys.executable, "-m", "longcat_lab", "run", str(question), "--out", str(folder), "--jobs", "2"]
    environment = {**os.environ, "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"}
    temporary.mkdir(exist_ok=True)
    log = open(folder.with_suffix(".log"), "ab")  # noqa: SIM115 (the process has it)
    with log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)


def concerned(*words):
    """Processes whose command or environment names one of `words`, but this one."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                said = " ".join([*process.cmdline(), process.environ().get("TMPDIR", "")])
                if any(word in said for word in words):
                    found.append(process)
    return found


def until(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)


def holders(folder):
    return [store.holder(job) for job in folder.glob("jobs/*/seed-*") if not store.is_free(job)]


def kernels(folder):
    return [note["kernel"] for note in holders(folder) if "kernel" in note]


def is_warm(process):
    with contextlib.suppress(psutil.Error):  # a zombie has no command
        return "longcat_lab.ablation.warm" in process.cmdline()


def killed(driving, folder, choose, wanted):
    """Kills the first of `wanted` that there is, one of several at random; what it was, or nothing."""
    victims = {
        "driver": [driving.pid],
        "job": [note["pid"] for note in holders(folder) if "pid" in note],
        "kernel": kernels(folder),
        "warm": [process.pid for process in psutil.Process(driving.pid).children() if is_warm(process)],
    }
    what = next((name for name in wanted if victims[name]), "")
    if not what:  # between one and the next
        return ""
    wanted.remove(what)
    with contextlib.suppress(ProcessLookupError):
        os.kill(choose.choice(victims[what]), signal.SIGKILL)
    return what


def numbers(folder):
    """All that two runs of one sweep must have alike."""
    found = {}
    for job in sorted(folder.glob("jobs/*/seed-*")):
        run = read_json(job / "run.json")
        metrics = pd.read_parquet(job / "metrics.parquet").drop(columns=list(TIMED))
        found[f"{job.parent.name}/{job.name}"] = run["status"], run["identity"], run["final"], plain(metrics)
    return found


def plain(metrics):
    """Lists of numbers, also where a cell is an array, for comparison to the bit."""
    return {name: [value.tolist() if hasattr(value, "tolist") else value for value in metrics[name]] for name in metrics}


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_what_dies_at_random_changes_no_number_and_leaves_nothing(tmp_path):
    question = tmp_path / "chaos.yaml"
    question.write_text(QUESTION)
    calm, folder = tmp_path / "calm", tmp_path / "sweep"
    other, temporary = tmp_path / "other", tmp_path / "temporary"
    assert driver(question, calm, other).wait() == 0, calm.with_suffix(".log").read_text()[-2000:]

    choose, deaths, wanted = random.Random(SEED), [], []
    driving, end = driver(question, folder, temporary), time.monotonic() + TROUBLE
    while time.monotonic() < end:
        until(lambda now=driving: now.poll() is not None or kernels(folder), 120)  # a driver needs a while before it has any
        with contextlib.suppress(subprocess.TimeoutExpired):
            if driving.wait(choose.uniform(0.2, 1.5)) == 0:
                break  # all are done before the time is over
        if driving.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                wanted += choose.sample(VICTIMS, len(VICTIMS)) if len(wanted) < len(VICTIMS) else []
                deaths += [name] if (name := killed(driving, folder, choose, wanted)) else []
        if driving.poll() is not None:
            driving = driver(question, folder, temporary)
    for _ in range(5):  # jobs that were killed have failed; the next call runs them again
        if driving.wait() == 0:
            break
        driving = driver(question, folder, temporary)
    assert driving.wait() == 0, folder.with_suffix(".log").read_text()[-3000:]

    assert len(deaths) >= 8 and len(set(deaths)) >= 3, deaths
    undisturbed, disturbed = numbers(calm), numbers(folder)
    assert len(disturbed) == 24 and repr(disturbed) == repr(undisturbed)  # not a number is itself here
    assert all(metrics["step"] == list(range(1, 121)) for *_, metrics in disturbed.values())
    assert any((read_json(job / "run.json")["job"]["attempts"]) > 1 for job in folder.glob("jobs/*/seed-*"))
    assert files(folder) == files(calm)
    assert not concerned(str(folder), str(temporary))
    render(folder)
    assert check(folder) == []  # every notebook is whole, every job accounted for
    assert sorted(path.name for path in temporary.iterdir()) == sorted(path.name for path in other.iterdir())  # torch's cache
