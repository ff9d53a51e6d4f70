"""Checkpoints of several processes: any layout into any other to the bit, faults of one known to all, a process killed while saving."""

import os
import random
import resource
import signal
import threading
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from longcat_lab.errors import LabError
from longcat_lab.parallel.checkpoint import (
    Checkpoints,
    empty_optimizer_tensors,
    load_optimizer_tensors,
    model_tensors,
    optimizer_tensors,
)
from longcat_lab.training.muon import StackedMuon
from longcat_lab.training.optimizer import Optimizers
from longcat_lab.training.table_optimizer import TableOptimizer
from tests.parallel.processes import ProcessError, dist_run

TABLE = "table.weight"
ROWS = 10


class Dense(nn.Module):
    """Sizes that do not divide by 4: some processes hold nothing of a vector or of the experts."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 8, bias=False), nn.Linear(8, 6, bias=False)
        self.odd, self.norm = nn.Linear(6, 5), nn.Parameter(torch.randn(6))
        self.experts = nn.Parameter(torch.randn(3, 4, 6))
        self.register_buffer("counted", torch.randn(3), persistent=False)

    def forward(self, x):
        x = self.down(self.up(x * self.norm).relu())
        return self.odd(x).sum() + (x @ self.experts.flatten(0, 1).T).square().sum()


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense, self.table = Dense(), nn.Embedding(ROWS, 3)


def made(layout, seed):
    """(model, optimizers, which rows are held where) over all processes: fsdp, tensor (2 x 2), replicated (2 x 2) or one."""
    torch.manual_seed(seed)
    model, rows = Toy(), {}
    size = dist.get_world_size() if dist.is_initialized() else 1
    if layout == "tensor":
        mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("data", "tensor"))
        parallelize_module(model.dense, mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        fully_shard(model.dense, mesh=mesh["data"])
        placed = distribute_tensor(model.table.weight.detach(), mesh["tensor"], [Shard(0)])  # twice, with as many copies
        model.table.weight = nn.Parameter(placed)
    elif layout == "replicated":
        mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicate", "shard"))
        fully_shard(model.dense, mesh=mesh)
    elif layout == "fsdp":
        mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("shard",))
        fully_shard(model.dense, mesh=mesh)
        own = distribute_tensor(model.table.weight.detach(), mesh, [Shard(0)]).to_local()
        model.table.weight, rows = nn.Parameter(own), {TABLE: (mesh, ROWS)}  # a plain tensor of this process's rows
    muon = [model.dense.experts]
    optimizer = Optimizers(
        {
            "adamw": torch.optim.AdamW([p for p in model.dense.parameters() if p is not muon[0]], lr=0.1, fused=True),
            "stacked_muon": StackedMuon(muon, lr=0.1),
            "row_wise": TableOptimizer([model.table.weight], "row_wise", lr=0.1),
        }
    )
    optimizer.parts["stacked_muon"].local_state = layout == "fsdp"
    return model, optimizer, rows


def step(model, optimizer):
    """AdamW steps for real; what the others keep is made here, for their steps take whole matrices and plain tables."""
    model.dense(torch.linspace(-1, 1, 24).view(4, 6)).backward()
    optimizer.parts["adamw"].step()
    optimizer.zero_grad()
    experts, table = model.dense.experts, model.table.weight
    momentum = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(1))
    squares = torch.rand(ROWS, generator=torch.Generator().manual_seed(2))
    if isinstance(experts, DTensor):
        momentum = distribute_tensor(momentum, experts.device_mesh, experts.placements)
        if optimizer.parts["stacked_muon"].local_state:
            momentum = momentum.to_local()
    if isinstance(table, DTensor):
        squares = distribute_tensor(squares, table.device_mesh, table.placements)
    elif len(table) < ROWS:
        first = -(-ROWS // dist.get_world_size()) * dist.get_rank()
        squares = squares[first : first + len(table)].clone()
    optimizer.parts["stacked_muon"].state[experts]["momentum_buffer"] = momentum
    optimizer.parts["row_wise"].state[table].update(step=3, row_exp_avg_sq=squares)


def everything(model, optimizer, rows):
    return {**model_tensors(model, rows), **optimizer_tensors(model, optimizer, rows)}


def whole(tensors):
    return {name: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for name, t in tensors.items()}


def restore(folder, model, optimizer, rows):
    slots = {}

    def make(saved):
        slots.update(empty_optimizer_tensors(model, optimizer, saved, rows))
        return {**model_tensors(model, rows), **slots}

    restored = Checkpoints(folder, "run").load(make)
    load_optimizer_tensors(model, optimizer, slots)
    return restored


def saved(layout, folder, asynchronous):
    """Two steps, a checkpoint, two steps; what was saved, as whole tensors. Then the two steps once more, from the checkpoint."""
    run = made(layout, seed=1)
    for _ in range(2):
        step(*run[:2])
    checkpoints = Checkpoints(folder, "run", asynchronous=asynchronous)
    rank = torch.tensor(dist.get_rank())
    checkpoints.save(2, everything(*run), {"seconds": 1.5}, {"rank": rank})
    rank += 100
    expected = whole(everything(*run)) if not asynchronous else None
    for _ in range(2):
        step(*run[:2])
    checkpoints.wait()
    again = made(layout, seed=2)
    restored = restore(folder, *again)
    assert restored.own["rank"] == dist.get_rank() and restored.state == {"seconds": 1.5}
    expected = expected or whole(everything(*again))
    for _ in range(2):
        step(*again[:2])
    first, second = whole(everything(*run)), whole(everything(*again))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    return expected


def loaded(layout, folder):
    """What is found in another layout, as whole tensors, and whose own; every state is what its optimizer takes."""
    run = made(layout, seed=3)
    restored = restore(folder, *run)
    model, optimizer, _ = run
    momentum = optimizer.parts["stacked_muon"].state[model.dense.experts]["momentum_buffer"]
    assert isinstance(momentum, DTensor) == (layout in ("tensor", "replicated"))
    assert optimizer.parts["row_wise"].state[model.table.weight]["step"] == 3
    assert isinstance(optimizer.parts["row_wise"].state[model.table.weight]["row_exp_avg_sq"], DTensor) == (layout == "tensor")
    optimizer.parts["adamw"].zero_grad()
    found = whole(everything(*run))
    if layout != "one":
        step(model, optimizer)  # it trains
    return found, int(restored.own["rank"])


def same(expected, found):
    assert expected.keys() == found.keys() and len(expected) == 7 + 1 + 3 * 5 + 1 + 2
    return all(torch.equal(expected[name], found[name]) and expected[name].dtype == found[name].dtype for name in expected)


@pytest.mark.parametrize(("layout", "asynchronous"), [("fsdp", False), ("tensor", True)])
def test_any_layout_into_any_other_to_the_bit(tmp_path, layout, asynchronous):
    folder = str(tmp_path)
    runs = dist_run(saved, 4, layout, folder, asynchronous)
    expected = runs[0]
    assert all(same(expected, each) for each in runs)
    for other, world in (("fsdp", 2), ("replicated", 4), ("tensor" if layout == "fsdp" else "fsdp", 4)):
        found = dist_run(loaded, world, other, folder)
        assert all(same(expected, each) for each, _ in found) and [rank for _, rank in found] == list(range(world))
    alone, rank = loaded("one", folder)
    assert same(expected, alone) and rank == 0


def from_one(folder):
    found, _ = loaded("tensor", folder)
    restored = Checkpoints(folder, "run").load(lambda s: {n: torch.empty(e.size, dtype=e.properties.dtype) for n, e in s.items()})
    return found, int(restored.own["rank"])


def test_from_one_process_to_four(tmp_path):
    run = made("one", seed=1)
    step(*run[:2])
    Checkpoints(tmp_path, "run").save(1, everything(*run), {}, {"rank": torch.tensor(7)})
    for found, rank in dist_run(from_one, 4, str(tmp_path)):
        assert same(everything(*run), found) and rank == 7  # all take what there is


def staged(folder, load):
    """Two stages of a pipeline: each process has the names of its stage, and both have `tied`."""
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("pipeline", "shard"))
    stage = mesh.get_local_rank("pipeline")
    tensors = {name: torch.arange(35.0).view(7, 5) + number for number, name in ((stage, f"layer.{stage}"), (9, "tied"))}
    sharded = {name: distribute_tensor(torch.zeros_like(t) if load else t, mesh["shard"], [Shard(0)]) for name, t in tensors.items()}
    checkpoints = Checkpoints(folder, "run", asynchronous=True)
    if load:
        checkpoints.load(lambda _: sharded)
    else:
        checkpoints.save(1, sharded, {})
        checkpoints.wait()
    return all(torch.equal(sharded[name].full_tensor(), tensors[name]) for name in tensors)


def test_stages_of_a_pipeline_have_names_of_their_own(tmp_path):
    assert all(dist_run(staged, 4, str(tmp_path), False))
    found = {name: torch.zeros(7, 5) for name in ("layer.0", "layer.1", "tied")}
    Checkpoints(tmp_path, "run").load(lambda _: found)
    assert all((found[name] - number == torch.arange(35.0).view(7, 5)).all() for number, name in zip((0, 1, 9), found, strict=True))
    held = sum(tensor.numel() for path in tmp_path.rglob("*.safetensors") for tensor in load_file(path).values())
    assert held == 3 * 35  # `tied` is there once
    assert all(dist_run(staged, 2, str(tmp_path), True))


def refusal(action):
    with pytest.raises(LabError) as error:
        action()
    assert "\n" not in str(error.value)
    return str(error.value)


def faults(folder):
    """What each process is told of what happened on one of them."""
    rank, told = dist.get_rank(), {}
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    big = distribute_tensor(torch.zeros(4 * 2**14), mesh, [Shard(0)])

    def save(checkpoints, number):
        big.to_local().fill_(number)
        checkpoints.save(number, {"big": big, "number": torch.tensor(number)}, {})

    def load():
        found = {"big": distribute_tensor(torch.zeros(4 * 2**14), mesh, [Shard(0)]), "number": torch.tensor(0)}
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            restored = Checkpoints(folder, "run").load(lambda _: found)
        assert (found["big"].to_local() == restored.step).all() and found["number"] == restored.step
        assert len([w for w in warned if "damaged" in str(w.message)]) == (rank == 0 and restored.passed_over is not None)
        return restored

    for asynchronous in (False, True):
        checkpoints = Checkpoints(folder, "run", asynchronous=asynchronous, timeout=30)
        save(checkpoints, 1)
        save(checkpoints, 2)
        checkpoints.wait()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if rank == 2:  # its disk is full
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        if asynchronous:
            save(checkpoints, 3)
            told[f"full {asynchronous}"] = refusal(lambda: save(checkpoints, 4))  # noqa: B023
        else:
            told[f"full {asynchronous}"] = refusal(lambda: save(checkpoints, 3))  # noqa: B023
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert load().step == 2
        save(checkpoints, 4)  # and on it goes
        checkpoints.wait()
        assert load().step == 4
        told[f"left {asynchronous}"] = sorted(path.name for path in Path(folder).iterdir())
        dist.barrier()
        checkpoints.remove_all()
        dist.barrier()

    checkpoints = Checkpoints(folder, "run")
    told["other plain tensors"] = refusal(lambda: checkpoints.save(1, {"part": torch.zeros(rank + 1)}, {}))
    save(checkpoints, 1)
    save(checkpoints, 2)
    told["other shape"] = refusal(lambda: checkpoints.load(lambda _: {"big": big, "number": torch.zeros(1 + rank // 3)}))
    told["other run"] = refusal(lambda: Checkpoints(folder, "walk").load(lambda _: {}))
    told["not wanted"] = refusal(lambda: checkpoints.load(lambda _: {"big": big}))
    if rank == 0:
        path = Path(folder, "checkpoint-00000002", "part-00003.safetensors")
        path.write_bytes(path.read_bytes()[:-4])
    dist.barrier()
    restored = load()
    told["cut"] = restored.passed_over
    assert restored.step == Checkpoints(folder, "run").latest_step() == 1
    dist.barrier()
    if rank == 0:
        Path(folder, "checkpoint-00000001", "part-00001.safetensors").unlink()
    dist.barrier()
    told["none"] = refusal(load)
    return told


def test_what_goes_wrong_on_one_is_known_to_all(tmp_path):
    told = dist_run(faults, 4, str(tmp_path), timeout=30)
    assert all(each == told[0] for each in told)
    told = told[0]
    for asynchronous in (False, True):
        assert told[f"full {asynchronous}"].startswith(f"No space left while writing {tmp_path}/checkpoint-00000003: free some")
        assert told[f"left {asynchronous}"] == ["checkpoint-00000002", "checkpoint-00000004"]
    assert told["other plain tensors"].startswith("part cannot be saved: two processes hold different tensors by this name")
    assert "holds number as [] torch.int64, this run has [1] torch.float32" in told["other shape"]
    assert "belongs to another run (run, this one is walk)" in told["other run"]
    assert "holds number, which this run has not" in told["not wanted"]
    assert "checkpoint-00000002 is damaged (part-00003.safetensors has " in told["cut"] and "from checkpoint-00000001." in told["cut"]
    assert "no checkpoint is whole" in told["none"] and "part-00001.safetensors is missing" in told["none"]


def killed(folder, asynchronous, victim, delay):
    """Saves on and on; `victim` dies `delay` seconds into the third save."""
    checkpoints = Checkpoints(folder, "run", asynchronous=asynchronous)
    first = checkpoints.latest_step() + 1
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for number in range(first, first + 1000):
        if number == first + 2 and dist.get_rank() == victim:
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
        numbers = DTensor.from_local(torch.full((2**19,), float(number)), mesh, [Shard(0)], run_check=False)
        checkpoints.save(number, {"numbers": numbers}, {"n": number})


def kill_rounds(tmp_path, rounds, seed):
    drawn, before, hit = random.Random(seed), 0, 0
    for round_ in range(rounds):
        asynchronous, victim = bool(round_ % 2), drawn.randrange(2)
        with pytest.raises(ProcessError) as lost:
            dist_run(killed, 2, str(tmp_path), asynchronous, victim, drawn.random() * 0.1, timeout=20)
        assert "LabError: Another process was lost" in lost.value.reports[1 - victim]  # and it ended by itself
        found = torch.zeros(2**20)
        restored = Checkpoints(tmp_path, "run").load(lambda _: {"numbers": found})  # noqa: B023
        assert restored.passed_over is None and restored.step == restored.state["n"] >= before + 1
        assert (found == restored.step).all()
        before = restored.step
        hit += bool(list(tmp_path.glob(".checkpoint-*")))
        Checkpoints(tmp_path, "run").remove_leftovers()
    return hit


def test_a_killed_process_leaves_the_checkpoint_before_whole(tmp_path):
    kill_rounds(tmp_path, 4, seed=1)


@pytest.mark.slow
def test_many_killed_processes(tmp_path):
    assert kill_rounds(tmp_path, 60, seed=2) > 10
