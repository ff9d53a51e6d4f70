"""Processes that are killed: torchrun starts them again, and the run goes on as if nothing had been."""

import os
import subprocess
import sys
import threading

import pytest

import longcat_lab as lab
from longcat_lab.files import read_json
from longcat_lab.training.requests import is_training
from tests.parallel.launched import checkpoints, config_of, everybody, rows, same_bits, trained_at_once, until, workers
from tests.parallel.processes import dist_run
from tests.parallel.test_faults import free_port

LAST = 2e-5  # of test_equality: sums in another order
LAUNCHES = """
import sys
import longcat_lab as lab
from tests.parallel.launched import config_of
lab.fit(config_of(*{config!r}), {folder!r}, nproc={nproc}, progress=False)
"""


class Killer(threading.Thread):
    """Kills the worker of `rank` once there is a checkpoint and `steps` steps are logged; watches from where the run goes on."""

    def __init__(self, folder, rank, steps):
        super().__init__()
        self.folder, self.rank, self.steps, self.fewest, self.restarted = folder, rank, steps, None, {}
        self.over = threading.Event()

    def run(self):
        until(lambda: self.over.is_set() or (len(rows(self.folder)) >= self.steps and checkpoints(self.folder)))
        if self.over.is_set():
            return
        self.kept = min(int(name[-8:]) for name in checkpoints(self.folder))
        workers(self.folder, attempt=0)[self.rank].kill()
        self.restarted = until(lambda: self.over.is_set() or workers(self.folder, attempt=1))
        self.fewest = self.steps
        while not self.over.is_set():
            self.fewest = min(self.fewest, len(rows(self.folder)))
            self.over.wait(0.05)


def killed(config, folder, nproc, rank, steps):
    killer = Killer(folder, rank, steps)
    killer.start()
    try:
        run = lab.fit(config, folder, nproc=nproc, progress=False)
    finally:
        killer.over.set()
        killer.join()
    assert set(killer.restarted) <= set(range(nproc)) and killer.restarted
    assert killer.fewest >= killer.kept > 0  # it went on, and did not begin anew
    assert not everybody(folder)
    return run


@pytest.mark.slow
def test_a_killed_worker_is_started_again_and_no_sample_is_lost_or_repeated(tmp_path):
    settings = (60, "training.checkpoint_every=5")
    run = killed(config_of(*settings), tmp_path / "run", 2, rank=1, steps=7)
    assert run.record["status"] == "finished"
    same_bits(run.metrics, dist_run(trained_at_once, 2, settings, tmp_path / "whole")[0])


@pytest.mark.slow
def test_the_first_of_four_is_killed(tmp_path):
    tables = ("model.embedding.ngram.order=3", "model.embedding.ngram.splits=2", "model.embedding.ngram.table_rows=101")
    settings = (60, "training.checkpoint_every=5", "parallel.tensor=2", "parallel.embedding=2", *tables)
    run = killed(config_of(*settings), tmp_path / "run", 4, rank=0, steps=7)
    same_bits(run.metrics, dist_run(trained_at_once, 4, settings, tmp_path / "whole", timeout=120)[0])


@pytest.mark.slow
@pytest.mark.parametrize("nproc", [1, 4])
def test_the_caller_is_killed_nobody_stays_and_two_go_on(tmp_path, nproc):
    steps = 400 if nproc == 1 else 60  # that it does not end by itself
    settings, folder = (steps, "training.checkpoint_every=5"), tmp_path / "run"
    text = LAUNCHES.format(config=settings, folder=str(folder), nproc=nproc)
    caller = subprocess.Popen([sys.executable, "-c", text], env={**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])})
    try:
        until(lambda: len(rows(folder)) >= 7 and checkpoints(folder))
        assert len(workers(folder)) == nproc
    finally:
        caller.kill()
        caller.wait()
    until(lambda: not everybody(folder) and not is_training(folder), 30)
    assert read_json(folder / "run.json")["status"] == "running" and len(rows(folder)) < steps
    run = lab.fit(config_of(*settings), folder, nproc=2, progress=False)
    assert run.record["layout"] == "2 processes: data_shard 2"
    alone = lab.fit(config_of(*settings), tmp_path / "alone", progress=False)
    assert run.metrics["step"].tolist() == list(range(1, steps + 1))
    assert run.metrics["loss"].tolist()[:60] == pytest.approx(alone.metrics["loss"].tolist()[:60], rel=LAST)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_machine_that_does_not_come_back(tmp_path):
    """Two launchers with two workers each; one is killed with a signal that it cannot pass on."""
    steps = 600  # more than two launchers take from their first steps until one of them is dead
    settings = [f"training.steps={steps}", "training.log_every=1", "training.evaluation_sequences=2", "training.checkpoint_every=5"]
    folder = tmp_path / "run"
    place = f"127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2", "--nproc-per-node", "2", "--max-restarts", "3"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", place, "--rdzv-id", "shrinks"]
    command += ["--rdzv-conf", "join_timeout=120,last_call_timeout=5"]
    command += ["-m", "longcat_lab", "train", "tiny", *settings, "parallel.timeout=60", "--out", str(folder)]
    environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with open(tmp_path / "said", "wb") as said:
        first = subprocess.Popen(command, stdout=said, stderr=said, env=environment)
        try:
            until(lambda: workers(folder))  # it is the one that holds the store
            second = subprocess.Popen(command, stdout=said, stderr=said, env=environment)
            until(lambda: (read_json(folder / "run.json") or {}).get("layout", "").startswith("4 processes"))
            there = len(rows(folder))
            until(lambda: len(rows(folder)) >= there + 7 and checkpoints(folder))
            assert len(workers(folder)) == 4
            second.kill()
            second.wait()
            until(lambda: len(workers(folder)) < 4, 60)  # its own workers end with it
            assert first.wait(400) == 0, (tmp_path / "said").read_text()[-3000:]
        finally:
            for process in everybody(folder):
                process.kill()
    run = lab.Run(folder)
    assert run.record["layout"] == "2 processes: data_shard 2" and run.metrics["step"].tolist() == list(range(1, steps + 1))
    alone = lab.fit(config_of(steps), tmp_path / "alone", progress=False)
    assert run.metrics["loss"].tolist()[:60] == pytest.approx(alone.metrics["loss"].tolist()[:60], rel=LAST)
