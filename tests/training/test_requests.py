"""Asked from outside: a run in another process, or another thread, is seen, stopped after its step, and goes on with the same bits."""

import os
import subprocess
import sys
import threading
import time

import pytest
import torch

import longcat_lab as lab
from longcat_lab.files import read_json, write_json
from longcat_lab.training.requests import ask_to_stop, is_training, stop_asked
from longcat_lab.training.sitting import alone_in

SETTINGS = ("training.steps=150", "training.checkpoint_every=1000")


def wait(condition, process=None):
    deadline = time.monotonic() + 120
    while not condition():
        assert (process is None or process.poll() is None) and time.monotonic() < deadline
        time.sleep(0.01)


def rows(folder):
    path = folder / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return lab.fit(lab.load("tiny", *SETTINGS), tmp_path_factory.mktemp("runs") / "whole", progress=False)


def same(a, b):
    first, second = a.model.state_dict(), b.model.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_of_another_process_stops_as_asked_and_goes_on_with_the_same_bits(whole, tmp_path):
    folder = tmp_path / "run"
    write = ", ".join(map(repr, SETTINGS))
    code = f"import longcat_lab as lab; lab.fit(lab.load('tiny', {write}), {str(folder)!r}, progress=False)"
    assert not is_training(folder) and not ask_to_stop(folder) and not folder.exists()
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        wait(lambda: rows(folder), process)
        assert is_training(folder) and ask_to_stop(folder)
        assert process.wait(60) == 0
    finally:
        process.kill()
    record = read_json(folder / "run.json")
    assert (record["status"], record["reason"]) == ("interrupted", "stopped as asked")
    done = record["timings"]["steps_done"]
    assert 0 < done < 150 and [path.name for path in folder.glob("checkpoint-*")] == [f"checkpoint-{done:08d}"]
    assert not is_training(folder) and not stop_asked(folder) and not ask_to_stop(folder)
    again = lab.fit(lab.load("tiny", *SETTINGS), folder, progress=False)
    assert same(whole, again) and again.metrics["loss"].tolist() == whole.metrics["loss"].tolist()
    assert again.record["final"] == whole.record["final"]


def test_a_run_of_another_thread_of_this_process_stops_as_asked(tmp_path):
    folder = tmp_path / "run"
    thread = threading.Thread(target=lab.fit, args=(lab.load("tiny", *SETTINGS), folder), kwargs={"progress": False})
    thread.start()
    wait(lambda: rows(folder))
    assert is_training(folder) and ask_to_stop(folder)
    thread.join(60)
    assert lab.Run(folder).record["status"] == "interrupted" and not stop_asked(folder)


def test_a_request_that_nobody_answered_stops_no_later_run(tmp_path):
    """As it is left where a process was killed between the request and the end of its step."""
    write_json(tmp_path / "run/stop.json", {})
    run = lab.fit(lab.load("tiny"), tmp_path / "run", progress=False)
    assert run.record["status"] == "finished" and not stop_asked(run.path)
    write_json(run.path / "stop.json", {})
    assert lab.fit(lab.load("tiny"), run.path, progress=False).record["status"] == "finished" and not stop_asked(run.path)


def test_those_who_look_do_not_see_each_other_and_do_not_keep_a_run_from_its_folder(tmp_path):
    with alone_in(tmp_path):
        assert is_training(tmp_path)
    seen, over = [], threading.Event()

    def look(times=1000):
        seen.extend(is_training(tmp_path) for _ in range(times))

    threads = [threading.Thread(target=look) for _ in range(3)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(seen) == 3000 and not any(seen)

    one = threading.Thread(target=lambda: [look(1) for _ in iter(over.is_set, True)])
    one.start()
    try:
        for _ in range(50):
            with alone_in(tmp_path):  # raises if it cannot have the folder
                pass
    finally:
        over.set()
        one.join()


def test_a_killed_run_is_not_training(tmp_path):
    hold = f"with alone_in(Path({str(tmp_path)!r})): print(1, flush=True), input()"
    code = f"from pathlib import Path\nfrom longcat_lab.training.sitting import alone_in\n{hold}"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdout.readline()
    assert is_training(tmp_path) and ask_to_stop(tmp_path) and stop_asked(tmp_path)
    process.kill()
    process.communicate()
    assert not is_training(tmp_path) and not ask_to_stop(tmp_path)


def test_the_record_keeps_the_highest_memory_of_all_sittings(whole, tmp_path):
    assert 2**26 < whole.record["timings"]["peak_memory_bytes"] < 2**34
    stopped = lab.fit(lab.load("tiny"), tmp_path / "run", progress=False, stop=lambda: True)
    record = stopped.record
    assert record["timings"]["peak_memory_bytes"] > 2**26
    record["timings"]["peak_memory_bytes"] = 2**50
    write_json(stopped.path / "run.json", record)
    assert lab.fit(lab.load("tiny"), tmp_path / "run", progress=False).record["timings"]["peak_memory_bytes"] == 2**50


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="this system cannot count the peak anew")
def test_the_peak_of_a_run_is_not_that_of_what_came_before_it_in_the_process(tmp_path):
    """In a process of its own: what other tests have left in this one counts as resident."""
    code = """
import sys, torch, longcat_lab as lab
large = torch.ones(2**28)  # 1 GiB, far more than the run takes
del large
print(lab.fit(lab.load("tiny"), sys.argv[1], progress=False).record["timings"]["peak_memory_bytes"])
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 2**26 < int(done.stdout.split()[-1]) < 2**30
