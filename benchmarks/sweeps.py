"""What a sweep costs beside its jobs: processor time of a job that is a fork against one that starts from nothing, what driver and
papermill take while a job trains, and how busy two cores are with many short jobs."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from benchmarks.harness import Row, row_of
from longcat_lab.ablation import run, store
from longcat_lab.files import read_json

QUESTION = {
    "name": "sweep",
    "question": "What does a sweep cost beside its jobs?",
    "hypothesis": "Little.",
    "base": "tiny",
    "set": {"training.steps": 4, "training.evaluation_sequences": 2},
    "baseline": "a",
    "variants": {"a": {}},
    "smallest_effect": 0.1,
}
JOBS, ROUNDS, MANY = 6, 3, 200
TRAINS = {"base": "nano", "set": {"training.steps": 200, "training.evaluation_sequences": 2}}
SPINS = """
import json, time
from pathlib import Path
while time.process_time() < began + 1.0:
    pass
file = Path(job_folder) / "run.json"
file.write_text(json.dumps({**json.loads(file.read_text()), "status": "finished", "final": {"validation_bpb": 1.0}}))
"""


def _notebook(path: Path) -> Path:
    cells = [("import time\njob_folder = ''\nbegan = time.process_time()", ["parameters"]), (SPINS, [])]
    made = [
        {"cell_type": "code", "id": f"c{n}", "metadata": {"tags": tags}, "execution_count": None, "outputs": [], "source": text}
        for n, (text, tags) in enumerate(cells)
    ]
    path.write_text(json.dumps({"cells": made, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    return path


def _sweep(folder: Path, jobs: int, **more: Any) -> tuple[float, float]:
    """Seconds on the clock, and of processor time of all processes but this one, for a sweep of `jobs` jobs, two at a time."""
    question = folder / f"{len(list(folder.iterdir()))}.yaml"
    question.write_text(json.dumps({**QUESTION, "seeds": list(range(jobs)), **more}))
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    run(question, question.with_suffix(""), jobs=2, console=Console(quiet=True))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter() - started, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def sweep_jobs() -> Iterator[Row]:
    """Processor time a job of six real ones (4 steps of `tiny`), kernel and imports included, as forks and from nothing."""
    with tempfile.TemporaryDirectory() as folder:
        pairs = [
            (1e3 * _sweep(Path(folder), JOBS)[1] / JOBS, 1e3 * _sweep(Path(folder), JOBS, resources={"warm": False})[1] / JOBS)
            for _ in range(ROUNDS)
        ]
    yield row_of("sweep_jobs/real", "forks", "from nothing", pairs, "ms")


def _spent(processes: list[psutil.Process]) -> float:
    """Seconds of processor time of these processes until now, without what they started."""
    times = [process.cpu_times() for process in processes]
    return sum(each.user + each.system for each in times)


def sweep_overhead() -> Iterator[Row]:
    """Processor time of driver with its table, papermill and the process that forks, in % of that of the kernel, from a job's first step
    to its end."""
    pairs = []
    for _ in range(ROUNDS):
        with tempfile.TemporaryDirectory() as folder:
            question, out = Path(folder) / "trains.yaml", Path(folder) / "out"
            question.write_text(json.dumps({**QUESTION, **TRAINS, "seeds": [0]}))
            driver = subprocess.Popen(
                [sys.executable, "-m", "longcat_lab", "run", str(question), "--out", str(out), "--jobs", "1"],
                stdout=subprocess.DEVNULL,
                env={**os.environ, "FORCE_COLOR": "1", "COLUMNS": "150", "LINES": "50"},  # it draws its table
            )
            job = store.job_folder(out, "a", 0)
            while not (read_json(job / "progress.json") or {}).get("step"):
                time.sleep(0.05)
            holder = store.holder(job)
            kernel = [psutil.Process(holder["kernel"])]
            beside = [psutil.Process(holder["pid"]), *psutil.Process(holder["pid"]).parents()]
            beside = beside[: 1 + next(n for n, process in enumerate(beside) if process.pid == driver.pid)]
            before = after = _spent(beside), _spent(kernel)
            while driver.poll() is None:
                try:
                    after = _spent(beside), _spent(kernel)
                except psutil.Error:  # the kernel has ended
                    break
                time.sleep(0.1)
            driver.wait()
        pairs.append((100 * (after[0] - before[0]) / (after[1] - before[1]), 100.0))
    yield row_of("sweep_overhead/training", "driver and papermill", "kernel", pairs, "%")


def many_jobs() -> Iterator[Row]:
    """200 jobs that each compute for one second, two at a time: how busy two cores are, and what the driver holds at the end."""
    held: list[int] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.5):
            held.append(psutil.Process().memory_info().rss)

    with tempfile.TemporaryDirectory() as folder:
        notebook = _notebook(Path(folder) / "spins.ipynb")
        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        seconds, computed = _sweep(Path(folder), MANY, notebook=str(notebook))
        over.set()
        thread.join()
    yield row_of("many_jobs/busy", "computed", "two cores", [(100 * computed / seconds / 2, 100.0)], "%")
    yield row_of("many_jobs/useful", "the jobs' own seconds", "two cores", [(100 * MANY / seconds / 2, 100.0)], "%")
    quarter = len(held) // 4
    yield row_of("many_jobs/memory", "driver at the end", "after a quarter", [(held[-1] / 2**20, held[quarter] / 2**20)], "MiB")
