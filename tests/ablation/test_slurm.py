"""Sweeps through a real Slurm, of one node: started here, stopped afterwards."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fake_rooms
import pandas
import psutil
import pytest
import yaml
from fake_rooms import FAKE, question, write_question
from slurm_cluster import Cluster, missing, running
from test_ablation_runner import alive, count, pids, record, statuses, until
from test_ablation_store import quiet

from longcat_lab.ablation import JobsFailed, run, store
from longcat_lab.errors import LabError
from longcat_lab.files import read_json

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running(tmp_path_factory.mktemp("slurm") / "cluster") as found:
        yield found


@pytest.fixture
def slurm(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    return cluster


def number(out: Path, name: str) -> str:
    """What the queue knows a job by."""
    return str(until(lambda: read_json(out / "jobs" / name / "seed-0" / store.ENGINE))["slurm"])


def test_a_sweep_over_slurm_is_the_sweep_of_this_machine(tmp_path: Path, slurm: Cluster) -> None:
    asked = {"memory": "1 GB", "cards": 1, "card": "npu", "time": "3 min", "slurm": {"partition": "high", "comment": "a b"}}
    asked_for = write_question(tmp_path, {"a": {}, "b": {"effect": -0.1}, "bad": {"behaviour": "raise"}}, resources=asked)
    with pytest.raises(JobsFailed, match=r"2 of 3 jobs finished and 1 did not \(bad/seed-0: ValueError: boom"):
        run(asked_for, tmp_path / "there", rooms=FAKE, executor="slurm", console=quiet())
    with pytest.raises(JobsFailed):
        run(asked_for, tmp_path / "here", rooms=FAKE, console=quiet(), overrides=["ablation.resources={}"])
    for name in ("a", "b"):
        there, here = (record(tmp_path / place, f"{name}/seed-0") for place in ("there", "here"))
        assert there["final"] == here["final"] and there["job"]["end"] == "finished"
    told = slurm.call("scontrol", "show", "job", number(tmp_path / "there", "a"))
    for each in ("Partition=high", "JobName=demo/a/seed-0", "TimeLimit=00:05:00", "Requeue=1", "Comment=a b", "gres:npu:1"):
        assert each in told, told
    assert "MinMemoryNode=953M" in told and "ExitCode=0:0" in told
    assert "ExitCode=1:0" in slurm.call("scontrol", "show", "job", number(tmp_path / "there", "bad"))
    assert not list((tmp_path / "there/slurm").glob(".*"))


def test_what_the_queue_refuses_is_one_sentence(tmp_path: Path, slurm: Cluster) -> None:
    asked_for = write_question(tmp_path, {"a": {}}, resources={"slurm": {"partition": "nowhere"}})
    with pytest.raises(LabError, match=r"Slurm refuses a/seed-0: invalid partition specified: nowhere") as error:
        run(asked_for, tmp_path / "out", rooms=FAKE, executor="slurm", console=quiet())
    assert "\n" not in str(error.value)


def here_too(slurm: Cluster) -> dict[str, str]:
    """For processes that find this library, and the cluster."""
    return {**slurm.environment, "PYTHONPATH": os.pathsep.join([str(Path(fake_rooms.__file__).parents[2]), *sys.path])}


def driver(folder: Path, slurm: Cluster) -> subprocess.Popen[bytes]:
    with open(folder / "driver.log", "wb") as log:
        return subprocess.Popen(
            [sys.executable, fake_rooms.__file__, str(folder / "demo.yaml"), str(folder / "out"), "8", "slurm"],
            env=here_too(slurm),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def lose(job: str) -> None:
    """End everything of a job at once, what watches over it on the node included, as a node that loses its power does."""
    steps = [p for p in psutil.process_iter(["cmdline"]) if " ".join(p.info["cmdline"] or []).startswith(f"slurmstepd: [{job}.")]
    for process in [*steps, *(below for step in steps for below in step.children(recursive=True))]:
        with contextlib.suppress(psutil.Error):
            process.kill()


@pytest.mark.slow
def test_jobs_outlive_their_driver_and_go_on_after_requeue_slot_end_preemption_and_a_lost_node(tmp_path: Path, slurm: Cluster) -> None:
    """Four jobs; a driver that is killed; then each job is taken from its node in another way, and goes on in its folder."""
    arms = {name: {"behaviour": "wait"} for name in ("requeue", "slot", "step", "cancel")}
    write_question(tmp_path, arms, resources={"grace": "5 s"})
    out = tmp_path / "out"
    first = driver(tmp_path, slurm)
    involved = {name: pids(out, f"{name}/seed-0") for name in arms}
    first.kill()
    first.wait()
    second = driver(tmp_path, slurm)
    said = tmp_path / "driver.log"
    until(lambda: said.read_text().count("it is followed, not started again") == 4)
    assert all(alive(pid) for pair in involved.values() for pid in pair), "jobs outlive the driver that started them"
    third = subprocess.run(second.args, env=here_too(slurm), capture_output=True, text=True, timeout=100)
    assert third.returncode == 2 and "Another process" in third.stdout

    slurm.call("scontrol", "requeue", number(out, "requeue"))
    slurm.call("scancel", "--signal=USR2", number(out, "slot"))
    slurm.call("scancel", number(out, "cancel"))
    lose(number(out, "step"))
    until(lambda: "cancel/seed-0 failed" in said.read_text(), 100)
    again = ("requeue", "slot", "step")
    until(lambda: all((record(out, f"{name}/seed-0")["job"]).get("attempts") == 2 for name in again), 240)
    until(lambda: not any(alive(pid) for name in again for pid in involved[name]))
    # Slurm's own SIGTERM reaches the kernel too, which dies of it unless it trains; at the end of a slot the job alone is told.
    assert (out / "jobs/slot/seed-0/saved").exists()

    # A job of a partition before theirs takes all cores: one of them is preempted, waits, and goes on.
    slurm.call("sbatch", "--partition=high", "--cpus-per-task=4", "--mem=100M", "--output=/dev/null", "--wrap=sleep 3")
    until(lambda: sum(record(out, f"{name}/seed-0")["job"]["attempts"] for name in again) >= 7, 240)
    for name in again:
        (out / "jobs" / name / "seed-0" / "release").touch()
    assert second.wait(200) == 2
    line = said.read_text().strip().splitlines()[-1]
    assert re.search(r"3 of 4 jobs finished and 1 did not \(cancel/seed-0: Slurm's job \d+ was cancelled\)", line), said.read_text()
    assert statuses(out) == dict.fromkeys((f"{name}/seed-0" for name in again), "finished") | {"cancel/seed-0": "failed"}
    assert record(out, "cancel/seed-0")["job"]["end"] == "cancelled" and count(out, "cancel/seed-0") == 1

    # Ctrl-C asks the rest to stop.
    last = driver(tmp_path, slurm)
    until(lambda: count(out, "cancel/seed-0") == 2)
    last.send_signal(signal.SIGINT)
    assert last.wait(120) == 2 and "LabInterrupted: Stopped with 3 of 4 jobs finished (1 interrupted)" in said.read_text()
    assert record(out, "cancel/seed-0")["reason"] == "stopped by SIGTERM"
    until(lambda: not slurm.call("squeue", "--noheader"), 60)


@pytest.mark.slow
def test_a_real_training_that_is_requeued_has_the_numbers_of_one_that_was_not(tmp_path: Path, slurm: Cluster) -> None:
    settings = {"training.steps": 200, "training.checkpoint_every": 10, "training.log_every": 20}
    real = {key: value for key, value in question({"a": {}}).items() if key != "base"} | {"base": "tiny", "set": settings}
    (tmp_path / "q.yaml").write_text(yaml.safe_dump(real))
    command = [sys.executable, "-m", "longcat_lab", "run", str(tmp_path / "q.yaml")]
    environment = here_too(slurm)
    sweep = subprocess.Popen([*command, "--out", str(tmp_path / "there"), "--executor", "slurm"], env=environment)
    home = tmp_path / "there/jobs/a/seed-0"
    until(lambda: list(home.glob("checkpoint-*")))
    slurm.call("scontrol", "requeue", number(tmp_path / "there", "a"))
    assert sweep.wait(250) == 0
    subprocess.run([*command, "--out", str(tmp_path / "here")], env=environment, check=True, timeout=250)
    there, here = (record(tmp_path / place, "a/seed-0") for place in ("there", "here"))
    assert there["job"]["attempts"] == 2 and here["job"]["attempts"] == 1 and there["identity"] == here["identity"]
    assert there["final"] == here["final"]
    columns = ["step", "loss", "gradient_norm"]
    tables = [pandas.read_parquet(tmp_path / place / "jobs/a/seed-0/metrics.parquet")[columns] for place in ("there", "here")]
    pandas.testing.assert_frame_equal(*tables)
