"""What a process sends for its weights in a step: FSDP2's gathers and sums, Muon's exchange."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from fnmatch import fnmatchcase

from torch import nn

from longcat_lab.blocks.moe.module import MoE
from longcat_lab.blocks.table import Table
from longcat_lab.parallel.collectives import gather_bytes, reduce_bytes
from longcat_lab.parallel.dealing import Box, box_size, deal
from longcat_lab.parallel.layout import Layout
from longcat_lab.parallel.planner.parts import read_parameters
from longcat_lab.parallel.planner.pipeline import fixed_order
from longcat_lab.parallel.planner.place import BF16, FP32, Place, Tally


@dataclasses.dataclass(frozen=True)
class Held:
    """How one parameter lies over the processes of a stage.

    divided: the dimension that tensor ranks (expert: False) or expert ranks (True) divide; None where all have it whole. ways, dim: how
    many FSDP2 shards what is left among, and along which dimension; 0: it is in no unit.
    """

    name: str
    shape: tuple[int, ...]
    divided: int | None
    expert: bool
    ways: int
    dim: int = 0

    def local(self, layout: Layout) -> tuple[int, ...]:
        """Its shape on one tensor or expert rank, the sharded dimension first."""
        shape = list(self.shape)
        if self.divided is not None:
            shape[self.divided] //= layout.expert if self.expert else layout.tensor
        return (shape[self.dim], *shape[: self.dim], *shape[self.dim + 1 :])

    def box(self, layout: Layout, rank: int) -> Box:
        """What `rank` has of it."""
        found, at = [(0, size) for size in self.shape], layout.coordinates(rank)
        if self.divided is not None:
            each = self.shape[self.divided] // (layout.expert if self.expert else layout.tensor)
            place = at["expert"] if self.expert else at["tensor"]
            found[self.divided] = each * place, each * (place + 1)
        if self.ways > 1:
            first, end = found[self.dim]
            place = at["expert_shard"] if self.expert and self.divided is not None else at["data_shard"] * layout.context + at["context"]
            size = -(-(end - first) // self.ways)
            found[self.dim] = min(end, first + place * size), min(end, first + (place + 1) * size)
        return (((0, 1),) if len(found) == 2 else ()) + tuple(found)


@dataclasses.dataclass(frozen=True)
class Unit:
    """What FSDP2 gathers at once. runs: forward (and backward) passes a micro-batch; root: it is gathered until the step ends."""

    held: tuple[Held, ...]
    runs: int
    root: bool = False


def units(here: Place) -> Iterator[Unit]:
    """As `placement.shard` makes them; what FSDP2 leaves alone is in a unit of one way."""
    layout, model = here.layout, here.model
    experts = layout.expert_shard if layout.expert_shard * layout.data_replicate > 1 else 0
    dense = here.dense_ways if here.dense_ways * layout.data_replicate > 1 else 0
    taken: set[nn.Parameter] = {m.weight for m in model.modules() if isinstance(m, Table)}
    names = {parameter: name for name, parameter in model.named_parameters()}
    parted = {each.name for each in read_parameters(model) if each.tensor_part}
    times = {module: 1 for module in here.layers}
    for run in here.passes():
        if run.step:
            times[run.module.layer] = times.get(run.module.layer, 0) + 1
    layers = [*here.layers, *(block.layer for block in here.blocks)]

    def own(parameter: nn.Parameter) -> Held:
        name = names[parameter]
        return _dense(name, tuple(parameter.shape), layout, dense, name in parted)

    def take(module: nn.Module) -> tuple[Held, ...]:
        found = []
        for parameter in module.parameters():
            if parameter not in taken:
                taken.add(parameter)
                found.append(own(parameter))
        return tuple(found)

    for layer in layers:
        for mixture in (m for m in layer.modules() if isinstance(m, MoE)) if layout.expert > 1 else ():
            stacks = [mixture.gate_up_proj, mixture.down_proj]
            taken |= set(stacks)
            if experts and dense:
                for inner in (mixture.router, mixture.shared_experts):
                    if inner is not None:
                        yield Unit(take(inner), times.get(layer, 0))
            yield Unit(tuple(_expert(names[p], tuple(p.shape), layout, experts) for p in stacks), times.get(layer, 0))
    for layer in layers:
        yield Unit(take(layer), times.get(layer, 0))
    root = [model.embed_tokens] if here.own_rows else []
    root += [model.norm, model.lm_head, *([model.mtp] if model.mtp is not None else [])] if here.last else []
    if here.first:
        yield Unit(tuple(held for each in root for held in take(each)), 1, True)
    else:
        rows = [own(model.embed_tokens.weight)] if here.own_rows else []  # without the rest of the embedding
        yield Unit((*rows, *(held for each in root if each is not model.embed_tokens for held in take(each))), 1, True)


def _dense(name: str, shape: tuple[int, ...], layout: Layout, ways: int, parted: bool) -> Held:
    divided = None
    if layout.tensor > 1 and parted:
        divided = 1 if name.split(".")[-2] in ("o_proj", "down_proj") else 0
    return Held(name, shape, divided, False, ways)


def _expert(name: str, shape: tuple[int, ...], layout: Layout, ways: int) -> Held:
    own = shape[0] // layout.expert
    return Held(name, shape, 0, True, ways, 0 if not ways or own % ways == 0 or shape[1] % ways else 1)


def put_sharding(here: Place, tally: Tally) -> None:
    """FSDP2: each unit's weights gathered for forward and for backward, gradients reduce-scattered once a step, then summed over copies."""
    layout = here.layout
    copies = layout.data_replicate
    for unit in units(here):
        ways = unit.held[0].ways if unit.held else 0
        if not ways or not unit.runs:
            continue
        own, learning = (
            sum(_shard(each.local(layout), ways) for each in held) * FP32
            for held in (unit.held, [each for each in unit.held if _learns(here, each.name)])
        )
        sums = _sums(here, unit) if learning else 0
        if ways > 1:
            tally.put("data", "all-gather", "weights", _gathers(here, unit), gather_bytes(own, ways))
            tally.put("data", "reduce-scatter", "gradients", sums, gather_bytes(learning, ways))
        if copies > 1:
            tally.put("data", "all-reduce", "gradients over copies", sums, reduce_bytes(learning, copies))


def _learns(here: Place, name: str) -> bool:
    """Whether it has a gradient in a step: only such are summed."""
    if name.startswith("mtp.") and not here.prediction_weight:
        return False
    if ".indexer." not in name:
        return True
    attention = here.config.model.attention
    return attention.distill.weight > 0 and here.config.data.sequence_length > attention.index_topk


def _shard(shape: tuple[int, ...], ways: int) -> int:
    """Elements of a shard in a collective: rows are padded to a multiple of the ranks."""
    return -(-shape[0] // ways) * math.prod(shape[1:])


def _gathers(here: Place, unit: Unit) -> int:
    """All-gathers in a step: a unit is freed behind its forward pass, the root is not; both behind their backward pass, in a pipeline
    only at the end of the step. A forward pass that runs again does so in a backward pass, which has gathered already.
    """
    if here.layout.pipeline == 1:
        return here.micros * (1 if unit.root else 2 * unit.runs)
    whole, gathers = False, 0
    for what, _, _ in fixed_order(here.config.parallel.schedule.lower(), here.layout.pipeline, here.micros, 1, here.at["pipeline"]):
        for _ in range(unit.runs):
            gathers += not whole
            whole = unit.root or what == "B"
    return gathers


def _sums(here: Place, unit: Unit) -> int:
    """Reduce-scatters in a step: after the last micro-batch's backward pass; of a unit that runs several times after each of its passes,
    but at the end of a pipeline's step, which torch does apart."""
    return unit.runs if here.layout.pipeline == 1 else 1


def put_muon(here: Place, tally: Tally) -> None:
    """Parts of updates to those who orthogonalise them (fp32), and parts of the results back (bf16)."""
    layout, config = here.layout, here.config.training.optimizer
    if config.kind != "muon" or layout.stage_size == 1:
        return
    first = here.at["pipeline"] * layout.stage_size
    members = _members(here)
    boxes = [[held.box(layout, first + place) for held in members] for place in range(layout.stage_size)]
    me, there, back = here.rank - first, 0, 0
    for share in deal([held.shape for held in members], boxes):
        if share.owner == me:
            back += sum(box_size(box) for rank, box in share.holders if rank != me)
        else:
            there += sum(box_size(box) for rank, box in share.sources if rank == me)
    tally.put("data", "all-to-all", "updates to those who orthogonalise them", 1, there * FP32)
    tally.put("data", "all-to-all", "orthogonalised updates", 1, back * BF16)


def _members(here: Place) -> list[Held]:
    """What Muon steps on, in the order of the optimizer's groups: single matrices first, then stacks; each by how they lie."""
    optimizer = here.config.training.optimizer
    declared = {p.name: p for p in read_parameters(here.model)}
    held = {each.name: each for unit in units(here) for each in unit.held}
    groups: dict[tuple, list[Held]] = {}
    for name, _ in here.model.named_parameters():  # in the model's order
        if name not in held or not declared[name].muon:
            continue
        clipped = not any(entry == "matrix" or fnmatchcase(name, entry) for entry in optimizer.clip_without)
        stack, each = declared[name].stack, held[name]
        stacked = stack > 1 or len(each.shape) > 2
        groups.setdefault((stacked, stack, clipped, each.divided, each.expert, each.ways, each.dim), []).append(each)
    return [each for key, members in sorted(groups.items(), key=lambda group: group[0][0]) for each in members]
