"""What needs all parts of a model at once: the norm of its gradient, and a whole copy for what only a whole model can tell."""

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
from longcat_lab.parallel.collectives import add_traffic, reduce_bytes
from longcat_lab.parallel.locally import local
from longcat_lab.parallel.placement import WithoutMemory
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
    dist.all_reduce(sums)
    add_traffic(reduce_bytes(sums.nbytes, world.size), "norm")
    return sums.sqrt().float()


def pieces(parameter: nn.Parameter) -> int:
    """Into how many pieces it is divided over the processes of its stage."""
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        return math.prod(mesh.size(dim) for dim, placement in enumerate(parameter.placements) if not placement.is_replicate())
    return getattr(parameter, "pieces", 1)


# It warns of two gathers where there could be one: whole copies are for what cannot be found out otherwise.
logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)


def no_room(config: RunConfig, free: int) -> str | None:
    """A clause on why a whole copy of the model cannot be put together in `free` bytes; None where it can."""
    with torch.device("meta"), torch.no_grad():
        whole = LongcatLM(config.model)
    held = [*whole.parameters(), *whole.buffers()]
    need = sum(tensor.nbytes for tensor in held) + max(tensor.nbytes for tensor in held)  # the one that is being put together
    return None if need <= free else f"a whole copy of the model takes {need / 1e9:.3g} GB, and {max(free, 0) / 1e9:.3g} GB are free"


def gather_model(model: LongcatLM, config: RunConfig, world: World) -> LongcatLM | None:
    """A whole copy of the model on the first process, to look at; None on the others. All call it.

    Tensors come one by one: the others hold no more than one whole tensor at a time. What was whole already shares its memory.
    """
    leads = world.rank % world.layout.stage_size == 0
    tables = {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, Table)}
    held: dict[str, Tensor] = {}
    if leads and not world.first:
        named = [(name, _shape(tensor, tables.get(name)), tensor.dtype) for name, tensor in model.state_dict().items()]
        dist.send_object_list([named], dst=0, device=world.device)
    for name, tensor in model.state_dict().items():
        tensor = tensor.detach()
        if name in tables and world.embedding is not None:
            tensor = _whole_table(tensor, tables[name].rows, world)
        elif isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
        if world.first:
            held[name] = tensor
        elif leads:
            dist.send(tensor.contiguous(), dst=0)
    if not world.first:
        return None
    for stage in range(1, world.layout.pipeline):
        held.update(_receive(stage * world.layout.stage_size, world))
    with torch.no_grad(), WithoutMemory():
        whole = LongcatLM(config.model)
    whole.load_state_dict(held, assign=True)
    names = dict(whole.named_modules())
    for name, module in model.named_modules():
        if isinstance(module, Table) and name in names:
            names[name].touched, names[name]._last = module.touched, module._last
    return whole.to(world.device).train()


def _shape(tensor: Tensor, table: Table | None) -> tuple[int, ...]:
    """Of the whole."""
    return tuple(tensor.shape) if table is None else (table.rows, *tensor.shape[1:])


def _whole_table(weight: Tensor, rows: int, world: World) -> Tensor:
    longest = -(-rows // world.layout.embedding)
    padded = torch.cat((weight, weight.new_zeros(longest - len(weight), weight.shape[1])))
    parts = [torch.empty_like(padded) for _ in range(world.layout.embedding)]
    dist.all_gather(parts, padded, group=world.embedding)
    return torch.cat(parts)[:rows]


def _receive(source: int, world: World) -> dict[str, Tensor]:
    names: list = [None]
    dist.recv_object_list(names, src=source, device=world.device)
    found = {}
    for name, shape, kind in names[0]:
        found[name] = torch.empty(shape, dtype=kind, device=world.device)
        dist.recv(found[name], src=source)
    return found
