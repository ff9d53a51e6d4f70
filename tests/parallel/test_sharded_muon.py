"""Muon over four processes: the steps of one process to the bit, each matrix orthogonalised once, each momentum kept where
its weight lies (what the tensor axis does not cut lies on all of its ranks)."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from longcat_lab.parallel.locally import local
from longcat_lab.training import sharded_muon
from longcat_lab.training.muon import StackedMuon
from longcat_lab.training.sharded_muon import ShardedMuon
from tests.parallel.processes import dist_run

KNOBS = {"lr": 0.02, "eps": 1e-7, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "ns_steps": 5, "adjust_lr_fn": "match_rms_adamw"}
SHAPES = {"columns": (12, 8), "rows": (10, 6), "plain": (7, 9), "experts": (4, 6, 10), "uneven": (5, 3)}
STACKS = {"experts": 2}
STEPS = 3


def tensors(seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def groups(parameters):
    return [{"params": [parameter], "stack": STACKS.get(name, 1)} for name, parameter in parameters.items()]


def expected():
    parameters = {name: nn.Parameter(tensor) for name, tensor in tensors(0).items()}
    optimizer = StackedMuon(groups(parameters), **KNOBS)
    for step in range(STEPS):
        for name, gradient in tensors(1 + step).items():
            parameters[name].grad = gradient
        optimizer.step()
    return {name: parameter.detach() for name, parameter in parameters.items()}


def over_four():
    """FSDP2 over two, and over the other two: tensor parts for two matrices, experts for a stack, copies for the others."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "tensor"))
    model = nn.Module()
    for name, tensor in tensors(0).items():
        dim = {"columns": 0, "rows": 1, "experts": 0}.get(name)
        model.register_parameter(name, nn.Parameter(tensor if dim is None else distribute_tensor(tensor, mesh["tensor"], [Shard(dim)])))
    fully_shard(model, mesh=mesh["shard"], shard_placement_fn=lambda p: Shard(1 if p.shape == SHAPES["experts"] else 0))
    parameters = dict(model.named_parameters())
    optimizer, done = ShardedMuon(groups(parameters), group=dist.group.WORLD, **KNOBS), []

    def counting(matrices, *rest, plain=sharded_muon.orthogonalise):
        done.append(len(matrices))
        return plain(matrices, *rest)

    sharded_muon.orthogonalise = counting
    for step in range(STEPS):
        for name, gradient in tensors(1 + step).items():
            parameter = parameters[name]
            whole = parameter.detach().clone()
            parameter.grad = distribute_like(gradient, whole)
        optimizer.step()
    kept = sum(local(optimizer.state[p]["momentum_buffer"]).numel() for p in parameters.values())
    return {name: p.full_tensor().detach() for name, p in parameters.items()}, sum(done), kept


def distribute_like(gradient, parameter):
    """This process's part of a whole gradient, placed as the parameter is."""
    first, end = zip(*sharded_muon._box(parameter), strict=True)
    box = [slice(a, b) for a, b in zip(first, end, strict=True)][3 - gradient.ndim if gradient.ndim == 3 else 1 :]
    found = parameter.clone()
    local(found).copy_(gradient[tuple(box)])
    return found


def test_four_processes_step_as_one_and_share_the_work():
    results, one = dist_run(over_four, 4), expected()
    for found, _, _ in results:
        for name, value in one.items():
            assert torch.equal(found[name], value), name
    matrices = sum((shape[0] if len(shape) == 3 else 1) * STACKS.get(name, 1) for name, shape in SHAPES.items())
    assert sum(done for _, done, _ in results) == STEPS * matrices
    divided = {"columns", "rows", "experts"}  # the others lie on two of the four processes twice
    sizes = {name: torch.Size(shape).numel() for name, shape in SHAPES.items()}
    assert sum(kept for *_, kept in results) == sum(size * (1 if name in divided else 2) for name, size in sizes.items())
