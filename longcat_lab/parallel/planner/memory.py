"""What a rank of each stage holds: weights, gradients, optimizer state, activations, and what comes on top."""

from __future__ import annotations

import dataclasses

from longcat_lab.parallel.planner.activations import BF16, FP32, layer_bytes, widest
from longcat_lab.parallel.planner.hardware import Assumptions, Card
from longcat_lab.parallel.planner.parts import Group, Part
from longcat_lab.parallel.planner.pipeline import held
from longcat_lab.parallel.planner.setup import Held, Model, Setup, stage_parts

ADAM, MUON = 3 * FP32, 2 * FP32  # fp32 master weights with two moments, with one momentum


@dataclasses.dataclass(frozen=True)
class StageMemory:
    """Bytes of one rank of a stage (of the fullest one, where rows or experts do not divide evenly).

    work: what a pass lays out and drops again: weights gathered for a layer, the widest tensors of a layer's backward, logits of a chunk
    of tokens. beside: what the setup names. buffers: of communicators.
    """

    weights: float
    gradients: float
    state: float
    tables: float
    activations: float
    work: float
    buffers: float
    beside: float

    @property
    def static(self) -> float:
        return self.weights + self.gradients + self.state + self.tables

    @property
    def total(self) -> float:
        return self.static + self.activations + self.work + self.buffers + self.beside


def local(group: Group, setup: Setup) -> float:
    """Elements of `group` on one rank before anything is sharded over copies of it."""
    if group.kind == "expert":
        return group.count / setup.expert
    return group.count / (setup.tensor if group.tensor_part else 1)


def local_rows(part: Part, setup: Setup) -> int:
    """Elements of `part`'s tables on the rank that has most of them."""
    return sum(-(-rows // setup.embedding) * width for rows, width in part.tables)


def sharded_over(kind: str, setup: Setup) -> int:
    """Ranks of one copy of the model that hold the same part of a dense or an expert parameter."""
    dense = setup.data_shard * setup.context
    return dense if kind == "dense" else dense * setup.tensor // setup.expert


def parameter_bytes(part: Part, setup: Setup) -> tuple[float, float, float, float]:
    """Weights, gradients, optimizer state of everything but tables, and tables with all of theirs.

    zero1: bf16 weights and fp32 gradients whole, fp32 master weights and moments divided over all copies. sharded: fp32 weights,
    gradients and moments divided within a copy (FSDP2; the weights are the master). Tables: 18 bytes a parameter (bf16, fp32 gradient,
    master, two moments) at the owner alone, in each copy of the tables.
    """
    weights = gradients = state = 0.0
    for group in part.groups:
        count, shard = local(group, setup), sharded_over(group.kind, setup)
        optimizer = MUON if setup.optimizer == "muon" and group.muon else ADAM
        if setup.weights == "zero1":
            weights += BF16 * count
            gradients += FP32 * count
            state += optimizer * count / (shard * setup.data_replicate)
        else:
            weights += FP32 * count / shard
            gradients += FP32 * count / shard
            state += (optimizer - FP32) * count / shard
    return weights, gradients, state, local_rows(part, setup) * (BF16 + FP32 + ADAM)


def activation_bytes(model: Model, setup: Setup, held: Held, in_flight: float) -> tuple[float, float]:
    """Bytes kept by `in_flight` micro-batches in the parts `held`, and those that one pass lays out and drops again: what runs again of
    one layer, and its widest tensor's gradient beside its own."""
    kept = work = 0.0
    for number, times in held.items():
        if model.kept[number]:
            own, whole, largest = layer_sizes(model, number, setup)
            kept += times * own * setup.tokens * in_flight
            work = max(work, (whole - own + 2 * largest) * setup.tokens)
        elif number:  # the head's and each prediction step's input; the rest runs again
            kept += times * BF16 * model.config.model.hidden_size * setup.tokens
    return kept, work


def layer_sizes(model: Model, number: int, setup: Setup) -> tuple[float, float, float]:
    """Bytes a token of layer `number`: what is kept, what would be without recomputation, the largest tensor."""
    key = "sizes", number, setup.recompute, setup.fold, setup.tensor, setup.context
    if key not in model.known:
        kept, hidden, split = model.kept[number], model.config.model.hidden_size, (setup.tensor, setup.context)
        own, whole = (layer_bytes(kept, hidden, how, setup.fold, *split) for how in (setup.recompute, "none"))
        model.known[key] = own, whole, widest(kept, *split)
    return model.known[key]


def communicators(setup: Setup) -> int:
    """Groups of ranks that a rank is in: one for each axis above 1, the world, and the flattened ones of weights and of experts."""
    axes = ("pipeline", "data_replicate", "data_shard", "context", "tensor", "expert", "embedding")
    if setup.world == 1:
        return 0
    found = 1 + sum(getattr(setup, axis) > 1 for axis in axes)
    found += setup.data_shard > 1 and setup.context > 1
    return found + (sharded_over("expert", setup) * setup.data_replicate > 1)


def stage_memory(model: Model, setup: Setup, card: Card, assumed: Assumptions) -> list[StageMemory]:
    """Of a rank of each stage."""
    found = []
    in_flight = held(setup.schedule, setup.pipeline, setup.micros)
    buffers = communicators(setup) * card.buffer_bytes.value if setup.buffers is None else setup.buffers
    head = 1 + model.config.model.num_layers
    for stage, own in enumerate(stage_parts(model, setup)):
        sums = [[times * each for each in parameter_bytes(model.parts[n], setup)] for n, times in own.items()]
        weights, gradients, state, tables = map(sum, zip(*sums, strict=True))
        activations, work = activation_bytes(model, setup, own, in_flight[stage])
        if setup.weights == "sharded":  # two units gathered in bf16 (one runs, one comes), one unit's gradients
            units = [sum(local(group, setup) for group in model.parts[n].groups) for n in own]
            work += max(units) * (2 * BF16 + FP32)
        if head in own:
            logits = 2 * FP32 * model.config.model.vocab_size / setup.tensor
            work += min(setup.tokens, assumed.loss_chunk_tokens.value) * logits
        found.append(StageMemory(weights, gradients, state, tables, activations, work, buffers, sum(setup.beside.values())))
    return found
