"""From a configuration to this process's part of the model, with the initial values that the whole model would have.

Nothing is ever whole anywhere: parameters are made without memory, cut to what belongs here, and then drawn, by name and row. Blocks do not
know of it; what they call (a mixture's experts, a table's rows, an attention's keys) is replaced from here.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import Shard
from torch.overrides import TorchFunctionMode

from longcat_lab.blocks.moe.module import MoE
from longcat_lab.blocks.table import Table
from longcat_lab.config import RunConfig
from longcat_lab.model import LongcatLM, initialise
from longcat_lab.model.initialise import Slice
from longcat_lab.parallel import context, fitting, tensor
from longcat_lab.parallel.collectives import group_size, place_in
from longcat_lab.parallel.embedding_op import shard_size
from longcat_lab.parallel.experts import connect_experts, connect_table, sum_table_gradient
from longcat_lab.parallel.locally import distribute, run_locally
from longcat_lab.parallel.stages import keep_stage, sum_tied_gradient
from longcat_lab.parallel.world import World


class WithoutMemory(TorchFunctionMode):
    """Parameters, which blocks make with torch.empty, on the meta device; buffers as they are."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if function is torch.empty:
            kwargs["device"] = "meta"
        return function(*args, **kwargs)


def build_part(config: RunConfig, world: World) -> LongcatLM:
    """This process's part of the model, before its data-parallel sharding."""
    with torch.no_grad(), WithoutMemory():
        model = LongcatLM(config.model)
    fitting.check(model, world.layout)
    keep_stage(model, world)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    cut: dict[str, tuple[nn.Module, str, Any, int, Slice]] = {}  # by name: owner, own name, mesh (None: stays plain), dimension, slice

    def divide(owner: nn.Module, name: str, mesh: Any, dim: int, first: int, size: int) -> None:
        whole = owner._parameters[name]
        shape = tuple(whole.shape)
        cut[names[id(whole)]] = owner, name, mesh, dim, Slice(shape, dim, first)
        owner._parameters[name] = nn.Parameter(torch.empty(*shape[:dim], size, *shape[dim + 1 :], device="meta"))

    if world.tensor is not None:
        for (owner, name), dim in tensor.divided(model):
            divide(owner, name, world.tensor_mesh, dim, *tensor.columns(owner._parameters[name].shape, dim, world.tensor))
    for module in model.modules():
        if isinstance(module, MoE) and world.expert is not None:
            each = module.config.n_routed_experts // world.layout.expert
            for name in ("gate_up_proj", "down_proj"):
                divide(module, name, world.expert_mesh, 0, each * place_in(world.expert), each)
        elif isinstance(module, Table) and world.embedding is not None:
            total, ways, place = len(module.weight), group_size(world.embedding), place_in(world.embedding)
            divide(module, "weight", None, 0, min(total, place * -(-total // ways)), shard_size(total, ways, place))
    for owner in model.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                owner._parameters[name] = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype, device=world.device))
    parts = {name: part for name, (*_, part) in cut.items()}
    initialise(model, config.model.initializer_range, config.seed, config.model.width_scale, parts)
    for owner, name, mesh, dim, part in cut.values():
        if mesh is not None:
            distribute(owner, name, mesh, dim, part.whole)
    for name, buffer in model.named_buffers():
        owner = model.get_submodule(name.rpartition(".")[0])
        owner._buffers[name.rpartition(".")[2]] = buffer.to(world.device)
    _connect(config, model, world, parts)
    return model


def _connect(config: RunConfig, model: LongcatLM, world: World, parts: dict[str, Slice]) -> None:
    for name, module in model.named_modules():
        if isinstance(module, MoE) and world.expert is not None:
            connect_experts(module, world.expert, world.tensor, config.parallel)
        elif isinstance(module, Table):
            part = parts.get(f"{name}.weight")
            module.rows = part.whole[0] if part else len(module.weight)
            module.weight.pieces = world.layout.embedding if part else 1
            connect_table(module, module.rows, world.embedding, world.tensor)
    if world.tensor is not None:
        tensor.connect(model, world.tensor)
    if world.context is not None:
        context.connect(model, config.data.sequence_length, world.context)


def shard(trainee: nn.Module, model: LongcatLM, world: World) -> None:
    """FSDP2 over what holds other parts of the batch: dense weights over all of them, experts over those that hold the same experts.

    `trainee` is what is called: it has `model` inside, and its forward pass is a whole step's. Gradients are sums: every process's loss
    is its part of the global batch's mean already.
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method  # here: it takes seconds to load

    # Nothing writes into what blocks return, which the warning is about.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    if world.tensor is not None and isinstance(model.lm_head, nn.Linear):
        run_locally(trainee, [(model.lm_head, "weight")])
    tables = {module.weight for module in model.modules() if isinstance(module, Table)}
    ignored = set(tables)
    if world.expert is not None:
        for module in (each for each in model.modules() if isinstance(each, MoE)):
            held = {module.gate_up_proj, module.down_proj}
            if world.experts.size() == 1:
                ignored |= held
                continue
            if world.dense.size() > 1:
                for inner in (module.router, module.shared_experts):
                    if inner is not None:
                        fully_shard(inner, mesh=world.dense)
            ways = world.layout.expert_shard
            fully_shard(
                module,
                mesh=world.experts,
                shard_placement_fn=lambda p, ways=ways: Shard(0 if p.to_local().shape[0] % ways == 0 or p.shape[1] % ways else 1),
                ignored_params=None if world.dense.size() > 1 else {p for p in module.parameters() if p not in held},
            )
            register_fsdp_forward_method(module, "apart")
    if world.dense is not None and world.dense.size() > 1:
        inner = [each for each in model.layers if isinstance(each, nn.Module) and list(each.parameters())]
        inner += [block.layer for block in model.mtp.layers] if model.mtp is not None else []
        for layer in inner:
            fully_shard(layer, mesh=world.dense, ignored_params=ignored)
        fully_shard(trainee, mesh=world.dense, ignored_params=ignored)
    for module in trainee.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)


def divide_again(trainee: nn.Module) -> None:
    """Frees what a forward pass without a backward pass leaves gathered: the parts of which FSDP2 keeps for the latter."""
    from torch.distributed.fsdp import FSDPModule

    for module in trainee.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def only_sum_last(trainee: nn.Module, last: bool) -> None:
    """Gradients of all micro-batches of a step but the last one stay where they are."""
    if hasattr(trainee, "set_requires_gradient_sync"):  # an FSDP2 module
        trainee.set_requires_gradient_sync(last)


def finish_gradients(model: LongcatLM, world: World) -> None:
    """After the last backward pass of a step: sums that FSDP2 does not make."""
    for module in model.modules():
        if isinstance(module, Table) and not module.idle and module.weight.requires_grad:
            sum_table_gradient(module, world.embedding_replicate)
    sum_tied_gradient(model, world)


def merge_marks(model: LongcatLM, world: World) -> None:
    """What each process noted of the rows that it read becomes what the stage read."""
    if world.stage is not None:
        for module in (each for each in model.modules() if isinstance(each, Table) and not each.idle):
            marks = module.touched.to(torch.uint8)
            dist.all_reduce(marks, dist.ReduceOp.MAX, world.stage)
            module.touched = marks.bool()
