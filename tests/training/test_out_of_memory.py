"""Memory really refused by the operating system: one sentence with the settings to change, and a process that can go on."""

import errno
import os
import subprocess
import sys

import pytest
import torch

import longcat_lab as lab
from longcat_lab.errors import is_out_of_memory
from longcat_lab.files import read_json
from longcat_lab.training.out_of_memory import sentence

# A run before, so that all libraries are loaded when the limit is set.
CHILD = """
import resource, sys
from pathlib import Path
import longcat_lab as lab
folder, room, *settings = sys.argv[1:]
lab.fit(lab.load("tiny", "training.steps=3"), folder + "/before", progress=False)
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + int(room) * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    lab.fit(lab.load("tiny", "training.steps=3", *settings), folder + "/run", progress=False)
except lab.LabError as error:
    print(error)
again = lab.fit(lab.load("tiny", "training.steps=3"), folder + "/after", progress=False)
print(again.record["status"])
"""


# The limit counts address space, of which glibc reserves 64 MiB for each thread, and it keeps freed blocks below a threshold that grows by
# itself: with both fixed, what the process gives back is really there for the run after.
GIVES_BACK = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "131072"}


def limited(folder, room, *settings):
    """`room`: MiB that may be taken beyond what the process had."""
    command = [sys.executable, "-c", CHILD, str(folder), str(room), *settings]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, **GIVES_BACK})
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is set as Linux sets it")
def test_a_batch_too_large_is_one_sentence_and_the_same_process_trains_a_smaller_one(tmp_path):
    said, after = limited(tmp_path, 400, "data.batch_size=2000")
    assert said == (
        "Out of memory on cpu at step 1 of 3: set training.micro_batch_size=1000 or training.recompute=true, which train the same in less; "
        "or lower data.batch_size (now 2000) or data.sequence_length (now 64)."
    )
    record = read_json(tmp_path / "run/run.json")
    assert (record["status"], record["reason"], record["timings"]["steps_done"]) == ("failed", said, 0)
    assert after == "finished"


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is set as Linux sets it")
def test_what_is_too_large_before_the_first_step_is_the_same_sentence(tmp_path):
    said, after = limited(tmp_path, 40, "data.batch_size=4000")
    assert said == "Out of memory on cpu before the first step: lower data.batch_size (now 4000) or data.sequence_length (now 64)."
    assert after == "finished"


def test_only_settings_that_help_are_named():
    config, cpu = lab.load("tiny", "training.micro_batch_size=1", "training.recompute=true"), torch.device("cpu")
    assert "micro_batch_size" not in str(sentence(config, cpu, 3)) and "recompute" not in str(sentence(config, cpu, 3))
    assert "in the evaluation after the last step: lower data.batch_size" in str(sentence(lab.load("tiny"), cpu, 20))


def test_what_counts_as_out_of_memory():
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**60, dtype=torch.int8)
    assert is_out_of_memory(refused.value)
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(torch.OutOfMemoryError("x"))
    assert is_out_of_memory(OSError(errno.ENOMEM, "x"))
    for other in (OSError(errno.ENOSPC, "x"), RuntimeError("shape '[2]' is invalid"), ValueError("out of memory")):
        assert not is_out_of_memory(other)
