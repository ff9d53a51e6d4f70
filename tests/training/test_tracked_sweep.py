"""A tracked sweep, with the real command, client and kernel: a group, a run a job with its executed notebook, the same identities."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from longcat_lab.files import read_json
from tests.training.offline_log import held

pytest.importorskip("wandb")
ROOT = Path(__file__).resolve().parents[2]
QUESTION = """
name: tracked
question: Is it tracked?
hypothesis: It is.
base: tiny
baseline: a
variants: {a: {}}
seeds: [1]
smallest_effect: 0.1
"""


def test_a_job_is_a_run_of_its_sweeps_group_and_holds_the_executed_notebook(tmp_path):
    (tmp_path / "q.yaml").write_text(QUESTION)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path / "home")}

    def run(*overrides):
        command = [sys.executable, "-m", "longcat_lab", "run", "q.yaml", *overrides]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr

    run("track=wandb")
    job = tmp_path / "runs/tracked/jobs/a/seed-1"
    record = read_json(job / "run.json")
    assert record["config"]["tracking"]["wandb"] == "offline"
    assert read_json(job / "wandb/state.json")["state"] == "finished"  # by the end of the sweep, not some time later
    found = held(job)
    assert (found["run"].run_group, found["run"].job_type, found["run"].display_name) == ("tracked", "a", "a/seed-1")
    assert found["config"]["seed"] == 1 and [row["_step"] for row in found["history"]] == [5, 10, 15, 20]
    assert found["summary"]["validation_bpb"] == record["final"]["validation_bpb"]
    [artifact] = found["artifact"]
    assert artifact.type == "notebook" and [entry.path for entry in artifact.manifest.contents] == ["notebook.ipynb"]
    kept = Path(artifact.manifest.contents[0].local_path)
    assert kept.is_relative_to(job) and kept.read_bytes() == (job / "notebook.ipynb").read_bytes()

    before = (job / "run.json").stat().st_mtime_ns
    run()  # where it is tracked decides no number: nothing runs anew, and the question has not been edited
    assert (job / "run.json").stat().st_mtime_ns == before
    assert "edited" not in (tmp_path / "runs/tracked/ablation.yaml").read_text()
