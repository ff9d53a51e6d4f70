"""Runs that are followed from outside: how far they are, who works on them, and what becomes of those."""

import contextlib
import json
import time

import psutil

import longcat_lab as lab

DEADLINE = 240


def config_of(steps, *more):
    return lab.load("tiny", f"training.steps={steps}", "training.log_every=1", "training.evaluation_sequences=2", *more)


def until(condition, seconds=DEADLINE):
    """What `condition` gives, once it is true."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)
    return found


def rows(folder):
    """Whole lines of metrics.jsonl."""
    with contextlib.suppress(FileNotFoundError):
        return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().split("\n")[:-1]]
    return []


def checkpoints(folder):
    return [path.name for path in folder.glob("checkpoint-*")]


def workers(folder, attempt=None):
    """Processes that train in `folder` for torchrun, by rank."""
    found = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            command = process.cmdline()
            if str(folder) in command and "--standalone" not in command and "--nnodes" not in command and "RANK" in process.environ():
                environment = process.environ()
                if attempt in (None, int(environment["TORCHELASTIC_RESTART_COUNT"])):
                    found[int(environment["RANK"])] = process
    return found


def everybody(folder):
    """All processes that have to do with `folder` by their command: torchrun too."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if str(folder) in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def same_bits(run, other):
    """Whether each step of both trained on the same samples to the same numbers."""
    columns = ["step", "tokens", "loss", "gradient_norm", "learning_rate"]
    assert run[columns].to_dict("list") == other[columns].to_dict("list")


def trained_at_once(config, folder):
    """For `dist_run`: the run without any interruption, on as many processes as there are."""
    run = lab.fit(config_of(*config), folder, progress=False)
    return run.metrics
