"""Checkpoints under SIGKILL: at each operation on files that a save is made of, and at random moments."""

import itertools
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

from longcat_lab.parallel.checkpoint import Checkpoints

OPERATIONS = ("open", "os.mkdir", "os.rename", "os.rmdir", "os.remove", "os.scandir", "shutil.rmtree")


def alone(function, *args):
    """`function(*args)` in a process of its own that has torch and no other thread; it is of this file and returns plain data."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed", "longcat_lab", "longcat_lab.parallel.checkpoint"])
    ours, theirs = context.Pipe()
    process = context.Process(target=_answer, args=(theirs, function, args))
    process.start()
    theirs.close()
    try:
        ended, found = ours.recv()
    finally:
        process.join()
    assert ended, found
    return found


def _answer(pipe, function, args):
    torch.set_num_threads(1)
    try:
        pipe.send((True, function(*args)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))


def save(checkpoints, step, size=64):
    """A checkpoint that says in each of its numbers of which step it is."""
    checkpoints.save(step, {"model/a": torch.full((size, 32), float(step)), "model/b": torch.tensor(step)}, {"n": step})


def whole_step(folder, size=64):
    """The step of what is found, which is as `save` made it."""
    found = {"model/a": torch.zeros(size, 32), "model/b": torch.tensor(0)}
    restored = Checkpoints(folder, "one").load(lambda _: found)
    assert restored.passed_over is None and restored.state == {"n": restored.step}
    assert (found["model/a"] == restored.step).all() and found["model/b"] == restored.step
    return restored.step


def kill(folder, rounds, seed):
    """Per way of saving: what `kill_at_each_operation` and `kill_at_random` give."""
    _warm_up(Path(folder))
    return {
        asynchronous: (
            kill_at_each_operation(Path(folder, f"each-{asynchronous}"), asynchronous),
            kill_at_random(Path(folder, f"random-{asynchronous}"), asynchronous, rounds, seed),
        )
        for asynchronous in (False, True)
    }


def kill_at_each_operation(folder, asynchronous):
    """Steps that are found after a kill at the 1st, 2nd ... operation of the save of step 3, on top of steps 1 and 2."""
    before = folder / "before"
    for step in (1, 2):
        save(Checkpoints(before, "one"), step)
    found = []
    for count in itertools.count(1):
        here = folder / "here"
        shutil.copytree(before, here)
        child = os.fork()
        if child == 0:
            _die_at(count)
            checkpoints = Checkpoints(here, "one", asynchronous=asynchronous)
            save(checkpoints, 3)
            checkpoints.wait()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        found.append(whole_step(here))
        assert len(list(here.glob("checkpoint-*"))) in (2, 3)
        Checkpoints(here, "one").remove_leftovers()
        assert {path.name[:11] for path in here.iterdir()} == {"checkpoint-"}
        save(Checkpoints(here, "one"), 4)  # whatever the kill left is no hindrance
        assert whole_step(here) == 4 and len(list(here.iterdir())) == 2
        shutil.rmtree(here)
        if os.waitstatus_to_exitcode(status) == 0:
            return found
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL


def _warm_up(folder):
    """torch imports much at the first save; children inherit it."""
    for asynchronous in (False, True):
        checkpoints = Checkpoints(folder, "one", asynchronous=asynchronous)
        save(checkpoints, 1)
        checkpoints.remove_all()


def _die_at(count):
    left = itertools.count(1)

    def hook(event, _):
        if event in OPERATIONS and next(left) == count:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def kill_at_random(folder, asynchronous, rounds, seed):
    """How often a child that saves on and on was killed in the middle of a save; the folder goes on from round to round."""
    size, middle, drawn = 2**15, 0, random.Random(seed)
    for _ in range(rounds):
        before = Checkpoints(folder, "one").latest_step()
        told, tell = os.pipe()
        child = os.fork()
        if child == 0:
            checkpoints = Checkpoints(folder, "one", asynchronous=asynchronous)
            checkpoints.remove_leftovers()
            for step in itertools.count(before + 1):
                save(checkpoints, step, size)
                checkpoints.wait()
                os.write(tell, b".")
        os.close(tell)
        done = len(os.read(told, 1))
        time.sleep(drawn.random() * 0.1)  # waits for nothing: the moment itself is the fault
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
        done += len(os.read(told, 10_000))
        os.close(told)
        middle += bool(list(folder.glob(".checkpoint-*")))
        assert done and whole_step(folder, size) - before in (done, done + 1)
    return middle
