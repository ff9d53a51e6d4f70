"""A tracker gets everything, offline and without an account, and cannot stop a run: the real client, and real ways to fail."""

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
from longcat_lab.files import read_json
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


def test_an_offline_run_holds_configuration_curves_and_summary_over_two_sittings(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "PATIENCE", 60.0)
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


def quiet_failure(folder, *settings):
    """The only warning of a run that is finished nevertheless."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        run = lab.fit(lab.load("tiny", *settings), folder, progress=False)
    assert run.record["status"] == "finished" and len(run.metrics) == 4
    said = [str(each.message) for each in caught if "wandb" in str(each.message)]
    assert len(said) == 1 and said[0].endswith("; the run's folder has every metric."), said
    return said[0]


def test_a_server_out_of_reach(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "2")
    monkeypatch.setattr(trackers, "PATIENCE", 60.0)
    assert "CommError" in quiet_failure(tmp_path / "run", "track=wandb")


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


def test_a_client_that_raises(tmp_path, fake, monkeypatch):
    fake("raise OverflowError('too many rows')")
    monkeypatch.setattr(trackers, "PATIENCE", 60.0)
    assert "OverflowError: too many rows" in quiet_failure(tmp_path / "run", OFFLINE)


def test_a_client_that_hangs_for_ever(tmp_path, fake, monkeypatch):
    fake("threading.Event().wait()")
    monkeypatch.setattr(trackers, "PATIENCE", 0.5)
    monkeypatch.setattr(trackers, "LIMIT", 1.0)
    assert "not taken all of this run 0.5 s after its end" in quiet_failure(tmp_path / "run", OFFLINE)
    wait(lambda: state(tmp_path / "run").get("state") == "off" and not psutil.pid_exists(state(tmp_path / "run")["pid"]))


def test_a_client_that_dies(tmp_path, fake, monkeypatch):
    fake("__import__('os').kill(__import__('os').getpid(), 9)")
    monkeypatch.setattr(trackers, "PATIENCE", 60.0)
    assert "its process ended, see" in quiet_failure(tmp_path / "run", OFFLINE)


def test_a_client_that_is_not_installed(tmp_path):
    """An interpreter that finds all that this one finds, but for the client."""
    shown = tmp_path / "site"
    shown.mkdir()
    for place in site.getsitepackages():
        for entry in Path(place).iterdir():
            if not entry.name.startswith("wandb") and not (shown / entry.name).exists():
                (shown / entry.name).symlink_to(entry)
    fit = f"lab.fit(lab.load('tiny', 'track=wandb'), {str(tmp_path / 'run')!r}, progress=False)"
    code = f"import longcat_lab as lab; print({fit}.record['status'])"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{shown}"}
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "finished", done.stderr
    assert done.stderr.count("wandb is off for this run (ModuleNotFoundError: it is not installed: pip install wandb)") == 1
    assert not (tmp_path / "run/wandb").exists()


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
