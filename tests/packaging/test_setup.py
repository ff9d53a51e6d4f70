"""`make setup`: when it acts, when it does nothing, and what it says when it cannot act. Nothing is installed here."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def setup_env():
    spec = importlib.util.spec_from_file_location("setup_env", ROOT / "tools" / "setup_env.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def wanted(setup_env):
    return setup_env.fingerprint(ROOT, ROOT / "constraints.txt", "notebook,dev")


@pytest.fixture
def venv(tmp_path, setup_env, wanted):
    """An environment that looks finished: a Python that starts (this one), and a stamp."""
    folder = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    setup_env.write_stamp(folder, wanted, "ready")
    return folder


def test_a_missing_environment_is_created(setup_env, wanted, tmp_path):
    assert setup_env.decide(tmp_path / "none", wanted)[0] == "create"


def test_a_finished_environment_is_left_alone(setup_env, wanted, venv):
    assert setup_env.decide(venv, wanted) == ("ready", "")


def test_an_interrupted_environment_is_made_anew(setup_env, wanted, venv):
    setup_env.write_stamp(venv, wanted, "installing")
    assert setup_env.decide(venv, wanted)[0] == "recreate"
    (venv / "pyvenv.cfg").unlink()  # interrupted while the old one was being removed
    assert setup_env.decide(venv, wanted)[0] == "recreate"
    (venv / setup_env.STAMP).write_text("{")
    assert setup_env.decide(venv, wanted)[0] == "recreate"


def test_an_environment_whose_python_is_gone_is_made_anew(setup_env, wanted, venv):
    for python in (venv / "bin").glob("python*"):
        python.unlink()
    assert setup_env.decide(venv, wanted) == ("recreate", "its Python does not start")


def test_an_environment_of_another_python_or_place_is_made_anew(setup_env, wanted, venv):
    action, why = setup_env.decide(venv, {**wanted, "python": "3.99"})
    assert action == "recreate" and "3.99" in why
    assert setup_env.decide(venv, {**wanted, "folder": "/elsewhere"})[0] == "recreate"


def test_changed_requirements_update_the_environment(setup_env, wanted, venv):
    assert setup_env.decide(venv, {**wanted, "sources": "other"})[0] == "update"
    (venv / setup_env.STAMP).unlink()  # somebody's own environment: its packages stay
    assert setup_env.decide(venv, wanted)[0] == "update"


def test_a_folder_that_is_no_environment_is_not_touched(setup_env, wanted, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.txt").write_text("x")
    with pytest.raises(setup_env.SetupError, match="no virtual environment"):
        setup_env.decide(folder, wanted)
    assert (folder / "thesis.txt").exists()


def test_fingerprint_follows_both_files(setup_env, tmp_path):
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    prints = [setup_env.fingerprint(tmp_path, tmp_path / "constraints.txt", "notebook")["sources"]]
    for name in ("pyproject.toml", "constraints.txt"):
        with (tmp_path / name).open("a") as f:
            f.write("# more\n")
        prints.append(setup_env.fingerprint(tmp_path, tmp_path / "constraints.txt", "notebook")["sources"])
    prints.append(setup_env.fingerprint(tmp_path, tmp_path / "constraints.txt", "notebook,dev")["sources"])
    assert len(set(prints)) == 4


def test_torch_is_asked_for_by_its_exact_locked_version(setup_env, tmp_path):
    assert setup_env.pinned(ROOT / "constraints.txt", "torch") == "2.13.0"
    (tmp_path / "lock.txt").write_text("torch-npu==2.13.0\nnumpy==2\n")
    with pytest.raises(setup_env.SetupError, match="make lock"):
        setup_env.pinned(tmp_path / "lock.txt", "torch")


def make(*args: str) -> subprocess.CompletedProcess:
    outer = {"MAKEFLAGS", "MFLAGS", "MAKELEVEL", "PYTHON", "VENV", "ARGS", "JOBS", "UPGRADE"}
    clean = {k: v for k, v in os.environ.items() if k not in outer}
    return subprocess.run(["make", "--no-print-directory", *args], cwd=ROOT, capture_output=True, text=True, timeout=120, env=clean)


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@needs_make
def test_make_alone_lists_every_target():
    out = make().stdout
    targets = {"setup", "demo", "test", "test-slow", "lint", "format", "notebooks-strip", "lab", "lock", "clean"}
    assert targets <= {line.split()[0] for line in out.splitlines() if line.startswith("  ")}


@needs_make
def test_a_wrong_python_is_one_sentence(tmp_path):
    old = tmp_path / "python3.9"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    for python in (old, tmp_path / "nowhere"):
        done = make("setup", f"PYTHON={python}", f"VENV={tmp_path / 'venv'}")
        assert done.returncode != 0
        assert "longcat_lab needs Python 3.11 or newer" in done.stderr and str(python) in done.stderr
        assert not (tmp_path / "venv").exists()


@needs_make
def test_demo_ends_with_the_report():
    commands = make("-n", "demo").stdout.splitlines()
    assert "longcat-lab run ablations/demo.yaml" in commands[-2]
    assert commands[-1].endswith("longcat-lab report runs/demo")
