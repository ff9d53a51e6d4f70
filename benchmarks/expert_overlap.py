"""A shortcut layer whose experts are divided over two processes: rows on their way behind the dense branch, or waited for at once.

gloo on one machine knows no slow link, and what it sends costs the processor's time. So two links are measured: gloo as it is, and gloo
behind a link of a stated speed, where an exchange is over when gloo is done with it, and not before its bytes have passed the link, one
exchange after the other (`_Link`: who waits for that sleeps). The speed is such that exchanges which are waited for at once take a stated
share of the step.
"""

from __future__ import annotations

import datetime
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch import Tensor, nn

from benchmarks.harness import Row, row_of
from longcat_lab.config import load
from longcat_lab.config.parallel import ParallelConfig
from longcat_lab.model import build

SHAPE = ("flash-proxy", "model.num_layers=1", "model.vocab_size=512")
ROWS, LENGTH, PAIRS = 1, 512, 15
WAYS = {"at once": ParallelConfig(overlap=False), "one chunk": ParallelConfig(), "two chunks": ParallelConfig(moe_chunks=2)}
SHARE = 0.253  # of a step, exposed without overlap: LongCat-Flash (arXiv 2509.01322) says 25.3 % without and 8.4 % with overlap


class _Link:
    """Stands in for torch's all-to-all while the benchmark runs: the real one, and a link with `speed` bytes a second (None: no limit)."""

    def __init__(self) -> None:
        self.real, self.speed = dist.all_to_all_single, None
        self.free = self.waited = 0.0
        self.sent = 0

    def __call__(self, out: Tensor, x: Tensor, receive: Any = None, send: Any = None, group: Any = None, async_op: bool = False) -> Any:
        work = self.real(out, x, receive, send, group=group, async_op=True)
        size = (sum(send) - send[group.rank()]) * (x.nbytes // max(len(x), 1))
        self.sent += size
        if self.speed is not None:
            self.free = max(self.free, time.perf_counter()) + size / self.speed
        return _Passing(self, work, self.free)


class _Passing:
    def __init__(self, link: _Link, work: Any, over: float) -> None:
        self.link, self.work, self.over = link, work, over

    def wait(self) -> None:
        started = time.perf_counter()
        self.work.wait()
        time.sleep(max(0.0, self.over - time.perf_counter()))
        self.link.waited += time.perf_counter() - started


class _Step:
    """Forward and backward of one layer on this process's rows, its experts divided over all."""

    def __init__(self, how: ParallelConfig) -> None:
        from longcat_lab.parallel.experts import connect_experts

        group = dist.group.WORLD
        self.model = build(load(*SHAPE)).train()
        self.layer = self.model.layers[0]
        for name in ("gate_up_proj", "down_proj"):
            whole = getattr(self.layer.mlp, name).detach()
            setattr(self.layer.mlp, name, nn.Parameter(whole.chunk(group.size())[group.rank()].clone()))
        connect_experts(self.layer.mlp, group, None, how)
        generator = torch.Generator().manual_seed(group.rank())
        self.x, self.d = (torch.randn(ROWS, LENGTH, self.model.config.hidden_size, generator=generator) for _ in range(2))

    def __call__(self) -> None:
        self.layer.zero_grad()
        x = self.x.clone().requires_grad_()
        (self.layer(x, self.model.context(x)) * self.d).sum().backward()


def _measure(rank: int, folder: str) -> None:
    """Writes {(link, way): [(seconds at once, seconds this way, waited at once, waited this way) of each pair]}."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60))
    dist.all_to_all_single = link = _Link()
    steps, found = {name: _Step(how) for name, how in WAYS.items()}, {}
    for step in steps.values():
        step()
    for name in ("gloo", "slow link"):
        if name == "slow link":
            link.speed = _speed(link, steps["at once"])
        for way in ("one chunk", "two chunks"):
            found[name, way] = [_timed(link, steps["at once"]) + _timed(link, steps[way]) for _ in range(PAIRS)]
    if rank == 0:
        torch.save((found, link.speed), Path(folder, "found"))
    dist.barrier()
    dist.destroy_process_group()


def _speed(link: _Link, step: _Step) -> float:
    """Bytes a second at which waiting takes `SHARE` of a step; the same on both processes."""
    alone = min(seconds - waited for seconds, waited in (_timed(link, step) for _ in range(5)))
    link.sent = 0
    step()
    speed = torch.tensor(link.sent * (1 - SHARE) / SHARE / alone, dtype=torch.float64)
    dist.broadcast(speed, 0)
    return float(speed)


def _timed(link: _Link, step: _Step) -> tuple[float, float]:
    dist.barrier()
    link.free = link.waited = 0.0
    started = time.perf_counter()
    step()
    return time.perf_counter() - started, link.waited


def expert_overlap() -> Iterator[Row]:
    """Forward and backward of one layer (hidden 256, 32 experts, 512 tokens a process): time of a step, and its share in waiting."""
    with tempfile.TemporaryDirectory() as folder:
        processes.start_processes(_measure, (folder,), nprocs=2, start_method="spawn")
        found, speed = torch.load(Path(folder, "found"))
    for (link, way), pairs in found.items():
        at = "gloo" if link == "gloo" else f"{speed / 1e6:.0f} MB/s"
        ours, peer = f"overlap, {way}", "waited for at once"
        yield row_of(f"expert_overlap/{at}", ours, peer, [(1e3 * pair[2], 1e3 * pair[0]) for pair in pairs], "ms")
        shares = [(100 * pair[3] / pair[2], 100 * pair[1] / pair[0]) for pair in pairs]
        yield row_of(f"expert_overlap/{at}/wait", ours, peer, shares, "%")
