"""A tracker gets everything, offline and without an account, and cannot stop a run: the real client, and real ways to fail."""

import html
import os
import signal
import site
import subprocess
import sys
import time
import warnings
from pathlib import Path

import psutil
import pytest

import longcat_lab as lab
from longcat_lab.files import read_json, write_json
from longcat_lab.training import trackers
from tests.training.offline_log import held

pytest.importorskip("wandb")
ROOT = Path(__file__).resolve().parents[2]
OFFLINE = "tracking.wandb=offline"


@pytest.fixture(autouse=True)
def no_account(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name in list(os.environ):
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)


def wait(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def state(folder):
    return read_json(Path(folder) / trackers.STATE) or {}


def test_the_short_form_is_offline_unless_the_environment_says_otherwise(monkeypatch):
    def mode(*overrides):
        return lab.load("tiny", *overrides).tracking.wandb

    assert mode() == "off" and mode("track=wandb") == "offline" and mode(OFFLINE, "track=off") == "off"
    assert lab.apply("tiny", {"track": "wandb"}).tracking.wandb == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert mode("track=wandb") == "online"
    for said, meant in (("offline", "offline"), ("disabled", "off"), ("online", "online")):
        monkeypatch.setenv("WANDB_MODE", said)
        assert mode("track=wandb") == meant
    with pytest.raises(lab.LabError, match=r"'track': there is no tracker 'wand', did you mean 'wandb'\?"):
        mode("track=wand")
    assert lab.identity(lab.load("tiny", "track=wandb")) == lab.identity(lab.load("tiny"))


def test_an_offline_run_holds_configuration_curves_and_summary_over_two_sittings(tmp_path):
    config, folder, asked = lab.load("tiny", "track=wandb"), tmp_path / "run", []
    lab.fit(config, folder, progress=False, stop=lambda: asked.append(1) or len(asked) == 12)
    wait(lambda: state(folder).get("state") == "finished")
    first = held(folder)
    assert [row["_step"] for row in first["history"]] == [5, 10] and first["summary"]["status"] == "interrupted"
    run = lab.fit(config, folder, progress=False)
    wait(lambda: state(folder).get("state") == "finished")
    found = held(folder)  # which finds exactly one offline run
    assert found["run"].run_id == first["run"].run_id and found["run"].display_name == "run"
    assert found["config"]["model"] == run.record["config"]["model"] and found["config"]["identity"] == run.record["identity"]
    assert [row["_step"] for row in found["history"]] == [5, 10, 15, 20]
    assert [row["loss"] for row in found["history"]] == run.metrics["loss"].tolist()
    assert found["summary"]["validation_bpb"] == run.record["final"]["validation_bpb"] and found["summary"]["status"] == "finished"
    assert not (tmp_path / "home").exists()


def test_sittings_that_follow_each_other_faster_than_their_trackers(tmp_path):
    config, folder, pids = lab.load("tiny", OFFLINE), tmp_path / "run", set()
    for last in (6, 12, None):
        asked = []
        lab.fit(config, folder, progress=False, stop=lambda asked=asked, last=last: asked.append(1) or len(asked) == last)
        wait(lambda: state(folder)["pid"] not in {os.getpid(), *pids})
        pids.add(state(folder)["pid"])
    wait(lambda: state(folder)["state"] == "finished" and not any(map(psutil.pid_exists, pids)))
    found = held(folder)  # one run, in one place
    assert [row["_step"] for row in found["history"]] == [5, 10, 15, 20] and found["summary"]["status"] == "finished"
    assert trackers.trouble(folder, read_json(folder / "run.json")) == ""


def gone(folder):
    pid = state(folder).get("pid", os.getpid())
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def quiet_failure(folder, *settings, meanwhile=lambda: False):
    """What is said in the one warning of a run that is finished nevertheless, and then of its folder.

    meanwhile: asked after the first row, as `stop`.
    """
    rows = folder / "metrics.jsonl"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        stop = lambda: meanwhile() if rows.exists() and rows.stat().st_size else False  # noqa: E731
        run = lab.fit(lab.load("tiny", *settings), folder, progress=False, stop=stop)
        assert run.record["status"] == "finished" and len(run.metrics) == 4
        at_the_end = [state(folder)["state"]]
        trackers.settle(folder, 60.0)  # as at the end of a job
        at_the_end.append(state(folder)["state"])
        told = lambda: [str(each.message) for each in caught if "wandb" in str(each.message)]  # noqa: E731
        wait(lambda: told() and state(folder)["state"] == "off" and gone(folder))
    assert len(told()) == 1 and told()[0].endswith("; the run's folder has every metric."), told()
    return told()[0], trackers.trouble(folder, run.record), at_the_end


def test_a_server_out_of_reach_is_waited_for_by_nobody(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "8")
    said, later, at_the_end = quiet_failure(tmp_path / "run", "track=wandb")
    assert said.startswith("wandb has not answered yet") and str(tmp_path / "run" / trackers.STATE) in said
    assert at_the_end == ["starting", "starting"]  # neither the run nor what waits at a job's end stayed until it gave up
    assert later.startswith("wandb is off for this run (") and "CommError" in later


def test_nobody_can_say_yet(tmp_path):
    def told(mode, status="finished", wanted="online", pid=None, now="starting"):
        write_json(tmp_path / trackers.STATE, {"state": now, "pid": pid or os.getpid(), "mode": mode, "reason": None})
        return trackers.trouble(tmp_path, {"status": status, "config": {"tracking": {"wandb": wanted}}})

    assert told("online").startswith("wandb has not answered yet") and told("offline") == told("online", "running") == ""
    assert told("online", now="logging") == told("online", now="finished") == told("online", wanted="off") == ""
    assert told("offline", pid=2**22 + 1) == "wandb is off for this run (its process ended); the run's folder has every metric."
    assert "off" in told("offline", pid=-1) and "off" in told("offline", pid=10**30) and "off" in told("offline", pid="x")
    assert trackers.trouble(tmp_path, None) == trackers.trouble(tmp_path, {"config": 3}) == ""


FAKE = """
import threading
class Settings:
    def __init__(self, **settings): pass
class Run:
    step, summary, dir, id = 0, {}, "x/files", "x"
    def log(self, row, step): BODY
    def finish(self, exit_code): pass
def init(**settings): return Run()
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    def install(body):
        (tmp_path / "fake/wandb").mkdir(parents=True)
        (tmp_path / "fake/wandb/__init__.py").write_text(FAKE.replace("BODY", body))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))

    return install


def test_a_client_that_raises(tmp_path, fake):
    fake("raise OverflowError('too many rows')")
    said, later, _ = quiet_failure(tmp_path / "run", OFFLINE, meanwhile=lambda: wait(lambda: gone(tmp_path / "run")))
    assert "OverflowError: too many rows" in said and said == later


def test_a_client_that_hangs_for_ever(tmp_path, fake, monkeypatch):
    fake("threading.Event().wait()")
    monkeypatch.setattr(trackers, "LIMIT", 1.0)
    said, later, at_the_end = quiet_failure(tmp_path / "run", OFFLINE)
    assert "not finished after 1 s" in said and said == later and at_the_end[0] != "off"


def test_a_client_that_dies(tmp_path, fake):
    fake("__import__('os').kill(__import__('os').getpid(), 9)")
    said, later, _ = quiet_failure(tmp_path / "run", OFFLINE, meanwhile=lambda: wait(lambda: gone(tmp_path / "run")))
    assert "its process ended, see" in said and said == later


def test_a_script_ends_when_its_offline_run_is_whole(tmp_path):
    """What runs in a batch system or a container is ended with the script."""
    code = "import longcat_lab as lab; from longcat_lab.training import trackers; trackers.PATIENCE = 60.0\n"
    code += f"lab.fit(lab.load('tiny', '{OFFLINE}'), 'run', progress=False); print(open('run/' + trackers.STATE).read())"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "wandb" not in done.stderr, done.stderr
    assert '"finished"' not in done.stdout  # the run did not wait for it
    assert state(tmp_path / "run")["state"] == "finished" and held(tmp_path / "run")["summary"]["status"] == "finished"


def test_a_client_that_is_not_installed(tmp_path):
    """An interpreter that finds all that this one finds, but for the client."""
    shown = tmp_path / "site"
    shown.mkdir()
    for place in site.getsitepackages():
        for entry in Path(place).iterdir():
            if not entry.name.startswith("wandb") and not (shown / entry.name).exists():
                (shown / entry.name).symlink_to(entry)
    fit = f"lab.fit(lab.load('tiny', 'track=wandb'), {str(tmp_path / 'run')!r}, progress=False)"
    code = f"import longcat_lab as lab; run = {fit}; print(run.record['status'])\n"
    code += "from longcat_lab.notebook.panel.ending import ending; print(ending(run.path, {})[0])"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{shown}"}
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, env=environment)
    status, shown = done.stdout.split("\n", 1)
    assert status == "finished", done.stderr
    sentence = "wandb is off for this run (ModuleNotFoundError: it is not installed: pip install wandb); the run's folder has every metric."
    assert done.stderr.count(sentence) == 1
    assert f"<p style='margin:4px 0'>{html.escape(sentence)}</p>" in shown  # the panel says it too
    assert [path.name for path in (tmp_path / "run/wandb").iterdir()] == ["state.json"]


def test_a_killed_run_leaves_its_curves_and_no_process(tmp_path):
    folder = tmp_path / "run"
    code = f"import longcat_lab as lab; lab.fit(lab.load('tiny', '{OFFLINE}', 'training.steps=5000'), {str(folder)!r}, progress=False)"
    process = subprocess.Popen([sys.executable, "-c", code])
    wait(lambda: process.poll() is None and state(folder).get("state") == "logging")
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait(lambda: state(folder)["state"] == "finished" and not psutil.pid_exists(state(folder)["pid"]))
    found = held(folder)
    assert found["history"] and found["summary"]["status"] == "running"
