"""Jobs that are forks of one process: each begins where the imports ended, and none sees another; they end when that process does."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from fake_rooms import FAKE, PARAMETERS, write_notebook, write_question
from test_ablation_store import quiet

from longcat_lab.ablation import load_results, run
from longcat_lab.ablation import warm as warm_room
from longcat_lab.ablation.warm import Warm
from longcat_lab.files import read_json

LOOKS = """
import json, os, random, sys, threading
from pathlib import Path
import numpy as np
import nbformat
folder = Path(job_folder)
seen = {
    "draws": [random.random(), float(np.random.rand())], "left": [hasattr(json, "left"), "LEFT" in os.environ],
    "pid": os.getpid(), "parent": os.getppid(), "session": os.getsid(0), "path": sys.path, "folder": os.getcwd(),
    "threads": os.environ["OMP_NUM_THREADS"], "backend": sys.modules["matplotlib"].get_backend() if "matplotlib" in sys.modules else "",
}
json.left, os.environ["LEFT"] = True, "1"
(folder / "seen.json").write_text(json.dumps(seen))
record = json.loads((folder / "run.json").read_text())
(folder / "run.json").write_text(json.dumps({**record, "status": "finished", "final": {"validation_bpb": 1.0}}))
"""
PLOTS = "import matplotlib.pyplot as plt\nplt.plot([1, 2]);"


def seen_by(tmp_path: Path, name: str, **more: Any) -> list[dict[str, Any]]:
    write_notebook(tmp_path / "job.ipynb", PARAMETERS, LOOKS, PLOTS)
    out = run(write_question(tmp_path, {"a": {}, "b": {"effect": 1.0}}, **more), tmp_path / name, jobs=1, rooms=FAKE, console=quiet())
    assert (load_results(out)["status"] == "finished").all()
    notebooks = [json.loads((out / "jobs" / each / "seed-0/notebook.ipynb").read_text()) for each in "ab"]
    assert all("image/png" in json.dumps(notebook) for notebook in notebooks)  # plt draws below the cell, as ever
    return [read_json(out / "jobs" / each / "seed-0/seen.json") for each in "ab"]


def test_a_fork_is_like_a_kernel_that_starts_from_nothing_and_sees_no_other_job(tmp_path: Path) -> None:
    warm, cold = seen_by(tmp_path, "warm"), seen_by(tmp_path, "cold", resources={"warm": False})
    for job in (*warm, *cold):
        assert job["left"] == [False, False] and job["session"] == job["pid"]
    assert (
        len({job["pid"] for job in warm}) == 2 and warm[0]["draws"][0] != warm[1]["draws"][0] and warm[0]["draws"][1] != warm[1]["draws"][1]
    )
    for key in ("folder", "threads", "backend", "path"):
        assert warm[0][key] == cold[0][key], key


@pytest.fixture
def warm() -> Any:
    found = Warm(dict(os.environ), ours=False)
    yield found
    with contextlib.suppress(OSError):
        found.close()


def until(condition: Any, seconds: float = 120.0) -> Any:
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)
    return found


def test_how_a_job_ended_is_told_and_all_end_with_their_process(tmp_path: Path, warm: Warm) -> None:
    folders = [tmp_path / "jobs" / str(number) / "seed-0" for number in range(3)]
    for folder in folders:
        folder.mkdir(parents=True)
    never = warm.submit(folders[0], folders[0] / "job.log", dict(os.environ))
    assert warm.cancel(never.number) and never.poll() == -signal.SIGTERM and never.pid is None
    nothing = warm.submit(folders[1], folders[1] / "job.log", dict(os.environ))  # no run.json is there
    assert nothing.wait() == 1 and "run.json is missing" in (folders[1] / "job.log").read_text()

    notebook = write_notebook(tmp_path / "long.ipynb", PARAMETERS, "import time; time.sleep(100)")
    (folders[2] / "run.json").write_text(json.dumps({"status": "planned", "identity": "i", "job": {"notebook": str(notebook)}}))
    job = warm.submit(folders[2], folders[2] / "job.log", dict(os.environ))
    kernel = until(lambda: (read_json(folders[2] / ".lock") or {}).get("kernel"))
    assert warm.fits and job.poll() is None and psutil.pid_exists(job.pid)
    os.kill(warm.process.pid, signal.SIGKILL)
    until(lambda: not psutil.pid_exists(job.pid) and not psutil.pid_exists(kernel))
    assert job.poll() == -signal.SIGKILL and not warm.fits
    assert read_json(folders[2] / "run.json")["job"]["end"] == "driver gone"
    assert not (folders[2] / ".kernel.json").exists()


def test_an_edited_library_needs_another_process(warm: Warm, monkeypatch: pytest.MonkeyPatch) -> None:
    until(lambda: warm.fits and warm.ready)
    monkeypatch.setattr(warm_room, "sources", lambda: (("a file", 1, 2),))
    assert not warm.fits


def test_a_sweep_goes_on_when_its_process_is_killed(tmp_path: Path) -> None:
    """By its own first job, once; the job is ended with it, and goes on in another process."""
    kills = """
import json, os, psutil, signal
from pathlib import Path
folder = Path(job_folder)
run = json.loads((folder / "run.json").read_text())
if run["config"]["effect"] == 0.0 and run["job"]["attempts"] == 1:
    above = [p for p in psutil.Process().parents() if "longcat_lab.ablation.warm" in p.cmdline()]
    above[-1].kill()
    import time; time.sleep(100)
record = json.loads((folder / "run.json").read_text())
(folder / "run.json").write_text(json.dumps({**record, "status": "finished", "final": {"validation_bpb": 1.0}}))
"""
    write_notebook(tmp_path / "job.ipynb", PARAMETERS, kills)
    question = write_question(tmp_path, {"a": {}, "b": {"effect": 1.0}})
    console = quiet()
    out = run(question, tmp_path / "out", jobs=1, rooms=FAKE, console=console)
    assert (load_results(out)["status"] == "finished").all()
    attempts = {each: read_json(out / "jobs" / each / "seed-0/run.json")["job"]["attempts"] for each in "ab"}
    assert attempts == {"a": 2, "b": 1}
    assert console.file.getvalue().count("a/seed-0: the process that had started it is gone; it goes on in another one.") == 1
