"""What is wrong with one process of several: one sentence by the first process, and every process ends in bounded time.

Real `longcat-lab train` in real processes, which are forked from a server that has imported torch once.
"""

import functools
import multiprocessing
import os
import resource
import shutil
import socket
import subprocess
import sys
import time
from multiprocessing.connection import wait
from pathlib import Path

import psutil
import pytest

import longcat_lab
from longcat_lab.files import read_json
from tests.parallel.launched import until
from tests.parallel.processes import PRELOADED

DEADLINE = 90  # seconds for all processes of a test; far below the 300 that a process waits for another one
SMALL = ["tiny", "training.steps=6", "training.evaluation_sequences=2", "training.log_every=1", "training.checkpoint_every=2"]
SPARSE = [
    "model.attention.kind=dsa",
    "model.attention.index_n_heads=2",
    "model.attention.index_head_dim=16",
    "model.attention.index_topk=16",
]
BREAKS = """
import os
import longcat_lab as lab

CALLS = []

@lab.register("selection")
class Breaks(lab.Selection):
    kind: str = "breaks"

    def rank(self, at):
        CALLS.append(1)
        if os.environ.get("RANK") == "1" and len(CALLS) > 2:
            raise ValueError("a rule that breaks")
        return -at.distance.float().expand_as(at.visible)
"""


def free_port():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


def command(arguments, environment, out, setup):
    """In the new process."""
    os.environ.update(environment)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(out.with_suffix(f".{name}"), os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    if setup is not None:
        setup()
    sys.argv = ["longcat-lab", "train", *map(str, arguments)]
    from longcat_lab.cli import main

    main()


def train(folder, arguments, world=2, environments=None, setups=None, ranks=None):
    """Exit codes and what was said, by rank, of `longcat-lab train ARGUMENTS[rank]`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    port, processes, outs = str(free_port()), [], []
    for rank in ranks or range(world):
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {key: str(value) for key, value in (environment | (environments or {}).get(rank, {})).items()}
        outs.append(folder / f"rank-{rank}")
        setup = (setups or {}).get(rank)
        process = context.Process(target=command, args=(arguments[rank], dict(os.environ) | environment, outs[-1], setup), daemon=True)
        process.start()
        processes.append(process)
    end, alive = time.monotonic() + DEADLINE, list(processes)
    while alive and (left := end - time.monotonic()) > 0:
        wait([process.sentinel for process in alive], left)
        alive = [process for process in alive if process.is_alive()]
    for process in alive:
        process.kill()
        process.join()
    said = [out.with_suffix(".err").read_text() for out in outs]
    assert not alive, said
    return (
        [process.exitcode for process in processes],
        [lines(text) for text in said],
        [out.with_suffix(".out").read_text() for out in outs],
    )


def lines(text):
    return [line for line in text.splitlines() if line.startswith("longcat-lab: ") or "Traceback" in line]


def both(tmp_path, *more, world=2):
    return [[*SMALL, *more, "--out", tmp_path / "run"]] * world


def test_all_is_well_and_the_first_process_alone_speaks(tmp_path):
    codes, said, printed = train(tmp_path, both(tmp_path))
    assert codes == [0, 0] and said == [[], []]
    assert "status                       finished" in printed[0] and not printed[1]
    assert read_json(tmp_path / "run" / "run.json")["layout"] == "2 processes: data_shard 2"


@pytest.mark.parametrize(
    "override, sentence",
    [
        ("seed=5", "Process 1 has seed=5, process 0 has 0"),
        ("parallel.tensor=2", "Process 1 has parallel.tensor=2, process 0 has 1"),
        ("model.num_layers=0", "model.num_layers"),
    ],
)
def test_processes_with_different_settings(tmp_path, override, sentence):
    arguments = both(tmp_path)
    arguments = [arguments[0], [*arguments[1][:-2], override, *arguments[1][-2:]]]
    codes, said, _ = train(tmp_path, arguments)
    assert codes == [2, 2]
    assert len(said[0]) == 1 and sentence in said[0][0] and said[1] == []


def other_code(folder):
    """A version of the library that differs in one comment: its files, as this process reads them to say what it is made of."""
    from longcat_lab.training import provenance

    shutil.copytree(Path(longcat_lab.__file__).parent, folder / "longcat_lab", ignore=shutil.ignore_patterns("__pycache__"))
    with open(folder / "longcat_lab" / "training" / "loss.py", "a") as file:
        file.write("# edited\n")
    provenance.PACKAGE = folder / "longcat_lab"


def test_processes_with_different_code(tmp_path):
    codes, said, _ = train(tmp_path, both(tmp_path), setups={1: functools.partial(other_code, tmp_path / "other")})
    assert codes == [2, 2]
    assert len(said[0]) == 1 and "Process 1 has another data or code than process 0" in said[0][0] and said[1] == []


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_finds_nobody(tmp_path, rank):
    codes, said, _ = train(tmp_path, both(tmp_path, "parallel.timeout=2"), ranks=[rank])
    assert codes == [2]
    assert len(said[0]) == 1 and f"Process {rank} of 2 cannot reach the others at 127.0.0.1:" in said[0][0]
    assert not (tmp_path / "run").exists()


def little_room():
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


@pytest.mark.parametrize("rank, asynchronous", [(0, False), (1, True)])
def test_a_disk_that_is_full_while_saving(tmp_path, rank, asynchronous):
    flag = f"parallel.checkpoint_async={'always' if asynchronous else 'never'}"
    codes, said, _ = train(tmp_path, both(tmp_path, flag), setups={rank: little_room})
    assert codes == [2, 2]
    assert len(said[0]) == 1 and "No space left while writing" in said[0][0] and "checkpoint-" in said[0][0] and said[1] == []
    record = read_json(tmp_path / "run" / "run.json")
    assert record["status"] == "failed" and record["reason"] == said[0][0].removeprefix("longcat-lab: ")
    if rank == 0:
        return
    codes, said, _ = train(tmp_path, both(tmp_path, flag))  # with room again
    assert codes == [0, 0] and read_json(tmp_path / "run" / "run.json")["status"] == "finished"


def test_a_process_that_raises_in_the_middle_of_a_step(tmp_path):
    (tmp_path / "rule.py").write_text(BREAKS)
    more = [f"plugins=[{tmp_path / 'rule.py'}]", *SPARSE, "model.attention.selection.kind=breaks"]
    codes, said, _ = train(tmp_path, both(tmp_path, *more))
    assert codes == [2, 2] and len(said[0]) == 1 and said[1] == []
    assert "Process 1 failed at step" in said[0][0] and "(ValueError: a rule that breaks)" in said[0][0]
    assert read_json(tmp_path / "run" / "run.json")["reason"] == said[0][0].removeprefix("longcat-lab: ")
    assert "in rank" in (tmp_path / "run" / "process-1.txt").read_text()


def test_a_process_whose_launcher_died_while_it_imported_ends_too():
    """The launcher dies after its process has begun, and before that one looks for it."""
    child = "import longcat_lab, sys; print('begun', flush=True); sys.stdin.readline(); from longcat_lab.parallel import faults"
    child += "; faults.end_with_parent(); print('there', flush=True); import time; time.sleep(600)"
    launcher = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(600)"
    dies = subprocess.Popen([sys.executable, "-c", launcher], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert dies.stdout.readline() == "begun\n"
    [process] = psutil.Process(dies.pid).children()
    dies.kill()
    dies.wait()
    dies.stdin.write("\n")
    dies.stdin.flush()
    assert dies.stdout.read() in ("", "there\n"), "until it closes what it says that into, which is when it ends"
    until(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE, 30)
