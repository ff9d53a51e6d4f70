"""`lab.fit(..., nproc=2)`: processes started, heard, stopped and ended from one."""

import os
import signal
import threading

import pytest

import longcat_lab as lab
from longcat_lab.errors import Diverged, LabError
from longcat_lab.files import read_json
from longcat_lab.training.requests import is_training
from tests.parallel.launched import checkpoints, config_of, everybody, rows, until, workers
from tests.parallel.test_faults import BREAKS, SPARSE

LAST = 2e-5  # of test_equality: sums in another order


def interrupt_after(folder, steps, number):
    """A thread that presses Ctrl-C (or asks as a launcher does) once when so many steps are logged, and keeps the workers' environments."""
    seen, over = {}, threading.Event()

    def press():
        until(lambda: over.is_set() or len(rows(folder)) >= steps)
        if over.is_set():
            return
        seen["environments"] = [process.environ() for process in workers(folder).values()]
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=press)
    thread.start()
    return thread, seen, over


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_all_processes_with_a_checkpoint_from_which_another_number_goes_on(tmp_path, capfd, number):
    config, folder = config_of(200, "training.checkpoint_every=1000"), tmp_path / "run"
    thread, seen, over = interrupt_after(folder, 3, number)
    try:
        with pytest.raises(KeyboardInterrupt):
            lab.fit(config, folder, nproc=2)
    finally:
        over.set()
        thread.join()
    assert not everybody(folder) and not is_training(folder)
    record = read_json(folder / "run.json")
    done = record["timings"]["steps_done"]
    assert record["status"] == "interrupted" and record["layout"] == "2 processes: data_shard 2" and 3 <= done < 200
    assert checkpoints(folder) == [f"checkpoint-{done:08d}"]
    assert len(seen["environments"]) == 2
    assert {each["OMP_NUM_THREADS"] for each in seen["environments"]} == {str(config.training.threads)}
    assert "200" in capfd.readouterr().err  # the bar
    run = lab.fit(config, folder, progress=False)
    assert run.record["status"] == "finished" and run.metrics["step"].tolist() == list(range(1, 201))
    alone = lab.fit(config, tmp_path / "alone", progress=False)
    assert run.metrics["loss"].tolist() == pytest.approx(alone.metrics["loss"].tolist(), rel=LAST)
    assert lab.fit(config, folder, nproc=2, progress=False).record == run.record  # finished: nothing to start


def test_what_a_worker_says_is_one_sentence_and_nobody_starts_it_again(tmp_path):
    config = config_of(20, "training.optimizer.learning_rate=1e30", "training.schedule.warmup_steps=0")
    with pytest.raises(Diverged, match=r"^The loss is nan at step \d+: lower training.optimizer.learning_rate"):
        lab.fit(config, tmp_path / "run", nproc=1, progress=False)
    assert not everybody(tmp_path / "run") and not is_training(tmp_path / "run")
    assert (tmp_path / "run" / "train.log").read_text().count("longcat-lab: ") == 1


@pytest.mark.parametrize("nproc", [0, -1, 1.5, "2"])
def test_numbers_of_processes(tmp_path, nproc):
    with pytest.raises(LabError, match=r"nproc .* is no number of processes"):
        lab.fit(config_of(4), tmp_path / "run", nproc=nproc)


def test_what_cannot_be_launched_is_told_before_anything_starts(tmp_path, fresh_registry):
    with pytest.raises(LabError, match="does not divide"):
        lab.fit(config_of(4), tmp_path / "run", nproc=3)

    @lab.register("selection")
    class Mine(lab.Selection):
        kind: str = "mine"

    config = config_of(4, "model.attention.kind=dsa", "model.attention.selection.kind=mine")
    with pytest.raises(LabError, match=r"is only known in .* put it into a Python file"):
        lab.fit(config, tmp_path / "run", nproc=2)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_process_that_raises_is_told_by_the_caller(tmp_path, fresh_registry):
    (tmp_path / "rule.py").write_text(BREAKS)
    more = [f"plugins=[{tmp_path / 'rule.py'}]", *SPARSE, "model.attention.selection.kind=breaks"]
    folder = tmp_path / "run"
    with pytest.raises(LabError, match=r"^Process 1 failed at step \d \(ValueError: a rule that breaks\): its traceback is in .*process-1"):
        lab.fit(config_of(20, *more), folder, nproc=2, progress=False)
    assert not everybody(folder)
    assert "in rank" in (folder / "process-1.txt").read_text()


@pytest.mark.slow
def test_stop_ends_all_after_the_step_and_another_number_of_processes_goes_on(tmp_path):
    config, folder = config_of(200, "training.checkpoint_every=1000"), tmp_path / "run"
    run = lab.fit(config, folder, nproc=4, progress=False, stop=lambda: len(rows(folder)) >= 3)
    assert run.record["status"] == "interrupted" and run.record["reason"] == "stopped as asked"
    run = lab.fit(config, folder, nproc=2, progress=False)
    alone = lab.fit(config, tmp_path / "alone", progress=False)
    assert run.metrics["loss"].tolist() == pytest.approx(alone.metrics["loss"].tolist(), rel=LAST)
    assert not everybody(folder)
