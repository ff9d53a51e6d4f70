"""Runs a function in several processes that form a gloo group, and gives back what each of them returned, or the first error.

    def both(rank_base):                    # at the top of a test file; its module is loaded again in each process
        return rank_base + dist.get_rank()

    assert dist_run(both, 2, 10) == [10, 11]

Processes are forked from a server that has imported torch once: a call costs a fraction of a second, the first one of a session more.
"""

import datetime
import importlib.util
import inspect
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from multiprocessing.connection import wait
from pathlib import Path

import torch

# With what torch imports in a first backward pass, comparison or recomputation: seconds, in each of the processes.
PRELOADED = [
    "pytest",
    "longcat_lab",
    "torch.fx.experimental.symbolic_shapes",
    "torch._dynamo",
    "torch.distributed.tensor",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "torch.distributed.pipelining",
]
GRACE = 5.0  # seconds that the others have to say what they saw, once one has failed


class ProcessError(RuntimeError):
    """What the first process that failed said; `reports`: tracebacks of all that failed, by rank."""

    def __init__(self, message, reports):
        super().__init__(message)
        self.reports = reports


def dist_run(function, world, *args, timeout=60, deadline=240):
    """[function(*args) of each rank]; torch.distributed is up in there, its operations give up after `timeout` seconds.

    Args:
        function: at the top level of a file; args and what it returns: what torch.save takes.
        deadline: seconds for everything; then what still runs is ended.

    Raises:
        ProcessError: a process failed, died or did not end; says the traceback of the one that failed first.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)  # heeded by the first call of a session
    with tempfile.TemporaryDirectory() as folder:
        torch.save(args, Path(folder, "args"))
        where = (inspect.getsourcefile(function), function.__qualname__, folder, dict(os.environ), torch.initial_seed())
        processes = [context.Process(target=_main, args=(*where, rank, world, timeout), daemon=True) for rank in range(world)]
        end = time.monotonic() + deadline
        try:
            for process in processes:
                process.start()
            _wait(processes, end)
            late = [rank for rank, process in enumerate(processes) if process.is_alive()]
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()
        _raise_first(Path(folder), processes, late)
        return [torch.load(Path(folder, f"result-{rank}"), weights_only=False) for rank in range(world)]


def _wait(processes, end):
    """Until all have ended, or `GRACE` after the first failure, or `end`."""
    alive = list(processes)
    while alive and (left := end - time.monotonic()) > 0:
        wait([process.sentinel for process in alive], left)
        for process in [process for process in alive if not process.is_alive()]:
            alive.remove(process)
            if process.exitcode:
                end = min(end, time.monotonic() + GRACE)


def _raise_first(folder, processes, late):
    failed = [rank for rank, process in enumerate(processes) if process.exitcode]
    if not failed:
        return
    files = {rank: folder / f"error-{rank}" for rank in failed}
    reports = {rank: torch.load(file) for rank, file in files.items() if file.exists()}
    if reports:
        first = min(reports, key=lambda rank: reports[rank][0])
        message = f"rank {first} of {len(processes)} failed first:\n{reports[first][1]}"
    else:
        message = f"ended without a word, by rank: { ({rank: processes[rank].exitcode for rank in failed}) }"
    if late:
        message += f"\nstill ran and were ended: ranks {late}"
    raise ProcessError(message, {rank: text for rank, (_, text) in reports.items()})


def _main(file, name, folder, environment, seed, rank, world, timeout):
    os.environ.clear()
    os.environ.update(environment, RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    folder = Path(folder)
    try:
        torch.set_num_threads(1)
        torch.manual_seed(seed + rank)
        torch.distributed.init_process_group(
            "gloo",
            init_method=f"file://{folder / 'store'}",
            rank=rank,
            world_size=world,
            timeout=datetime.timedelta(seconds=timeout),
        )
        result = _load(file, name)(*torch.load(folder / "args", weights_only=False))
        torch.save(result, folder / f"result-{rank}")
        # The first one out would take the connections of the others with it.
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    except BaseException:
        report = (time.monotonic(), traceback.format_exc())
        torch.save(report, folder / f"unfinished-{rank}")
        os.replace(folder / f"unfinished-{rank}", folder / f"error-{rank}")
        os._exit(1)  # an ordinary exit may wait for connections


def _load(file, name):
    """By path: a test module has no name that a new process could import it by."""
    module_name = "loaded_" + Path(file).stem
    spec = importlib.util.spec_from_file_location(module_name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    spec.loader.exec_module(module)
    for part in name.split("."):
        module = getattr(module, part)
    return module
