"""What needs all parts of a model at once: the norm of its gradient, and a whole copy for evaluation."""

from __future__ import annotations

import logging
import math

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from longcat_lab.blocks.table import Table
from longcat_lab.config import RunConfig
from longcat_lab.model import LongcatLM
from longcat_lab.parallel.collectives import count_traffic
from longcat_lab.parallel.locally import local
from longcat_lab.parallel.world import World


def total_norm(parameters: list[nn.Parameter], world: World, skip: set[nn.Parameter]) -> Tensor:
    """The L2 norm of the whole model's gradients of `parameters`, the same on all processes: each square counts once, wherever it lies.

    Args:
        skip: copies whose gradient another stage has too.
    """
    sums = torch.zeros((), dtype=torch.float64, device=world.device)
    for parameter in parameters:
        if parameter in skip:
            continue
        gradient = parameter.grad
        part = gradient._values() if gradient.is_sparse else local(gradient)
        sums += part.double().square().sum() / (world.layout.stage_size // pieces(parameter))
    with count_traffic("norm"):
        dist.all_reduce(sums)
    return sums.sqrt().float()


def pieces(parameter: nn.Parameter) -> int:
    """Into how many pieces it is divided over the processes of its stage."""
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        return math.prod(mesh.size(dim) for dim, placement in enumerate(parameter.placements) if not placement.is_replicate())
    return getattr(parameter, "pieces", 1)


# It warns of two gathers where there could be one: whole copies are for evaluation alone.
logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)


def gather_model(model: LongcatLM, config: RunConfig, world: World) -> LongcatLM | None:
    """A whole copy of the model on the first process, None on the others. All call it."""
    held = _whole_state(model, world)
    if not world.first:
        _send(held, world)
        return None
    for stage in range(1, world.layout.pipeline):
        held.update(_receive(stage * world.layout.stage_size, world))
    whole = LongcatLM(config.model).to(world.device)
    whole.load_state_dict(held)
    for name, module in model.named_modules():
        if isinstance(module, Table) and name in (names := dict(whole.named_modules())):
            names[name].touched, names[name]._last = module.touched, module._last
    return whole.train()


def _whole_state(model: LongcatLM, world: World) -> dict[str, Tensor]:
    """Parameters and persistent buffers of this stage; all of it on the stage's first process, nothing on the others."""
    keeps, found = world.rank % world.layout.stage_size == 0, {}
    tables = {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, Table)}
    for name, tensor in model.state_dict().items():
        tensor = tensor.detach()
        if name in tables and world.embedding is not None:
            tensor = _whole_table(tensor, tables[name].rows, world)
        elif isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
        if keeps:
            found[name] = tensor.contiguous()
    return found


def _whole_table(weight: Tensor, rows: int, world: World) -> Tensor:
    longest = -(-rows // world.layout.embedding)
    padded = torch.cat((weight, weight.new_zeros(longest - len(weight), weight.shape[1])))
    parts = [torch.empty_like(padded) for _ in range(world.layout.embedding)]
    dist.all_gather(parts, padded, group=world.embedding)
    return torch.cat(parts)[:rows]


def _send(held: dict[str, Tensor], world: World) -> None:
    if world.rank % world.layout.stage_size or world.at["pipeline"] == 0:
        return
    dist.send_object_list([[(name, tuple(t.shape), t.dtype) for name, t in held.items()]], dst=0, device=world.device)
    for tensor in held.values():
        dist.send(tensor, dst=0)


def _receive(source: int, world: World) -> dict[str, Tensor]:
    names: list = [None]
    dist.recv_object_list(names, src=source, device=world.device)
    found = {}
    for name, shape, kind in names[0]:
        found[name] = torch.empty(shape, dtype=kind, device=world.device)
        dist.recv(found[name], src=source)
    return found
