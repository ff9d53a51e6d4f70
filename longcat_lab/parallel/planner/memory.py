"""What a rank of each stage holds: weights, gradients, optimizer state, activations, and what comes on top."""

from __future__ import annotations

import dataclasses
import math

from longcat_lab.blocks.loss_op import CHUNK_ELEMENTS
from longcat_lab.parallel.planner.activations import ACCELERATOR, BF16, BYTE, FP32, Keeping, layer_bytes, layer_kept, widest
from longcat_lab.parallel.planner.hardware import Assumptions, Card
from longcat_lab.parallel.planner.parts import Group, Part
from longcat_lab.parallel.planner.pipeline import held
from longcat_lab.parallel.planner.setup import Held, Model, Setup, stage_parts

ADAM, MUON = 3 * FP32, 2 * FP32  # fp32 master weights with two moments, with one momentum


@dataclasses.dataclass(frozen=True)
class StageMemory:
    """Bytes of one rank of a stage (of the fullest one, where rows or experts do not divide evenly).

    work: what a pass lays out and drops again (`work_bytes`), and what a step of this library keeps beside the shards (`step_bytes`).
    beside: what the setup names. buffers: of communicators.
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
    return dense if kind == "dense" or setup.expert == 1 else dense * setup.tensor // setup.expert


@dataclasses.dataclass(frozen=True)
class Shards:
    """Elements of a part (without tables) on one rank, as FSDP2 lays them out: rows padded to a multiple of the ranks.

    muon, others: sharded; tensors: parameters that AdamW steps on; whole: while gathered; largest: of the largest parameter.
    """

    muon: int
    others: int
    tensors: int
    whole: int
    largest: int


def shards(part: Part, setup: Setup) -> Shards:
    key = "shards", setup.tensor, setup.expert, setup.optimizer, sharded_over("dense", setup), sharded_over("expert", setup)
    if key not in part.known:
        muon = others = tensors = whole = largest = 0
        for each in (p for p in part.parameters if p.kind != "table"):
            shape, ways = list(each.shape), sharded_over(each.kind, setup)
            cut = 1 if each.name.split(".")[-2:-1] in (["o_proj"], ["down_proj"]) else 0
            if each.kind == "expert":
                shape[0] = -(-shape[0] // setup.expert)
            elif each.tensor_part:
                shape[cut] = -(-shape[cut] // setup.tensor)
            rows = 1 if each.kind == "expert" and setup.expert > 1 and shape[0] % ways and shape[1] % ways == 0 else 0
            own = -(-shape[rows] // ways) * (math.prod(shape) // shape[rows])
            if setup.optimizer == "muon" and each.muon:
                muon += own
            else:
                others, tensors = others + own, tensors + 1
            whole, largest = whole + math.prod(shape), max(largest, math.prod(shape))
        part.known[key] = Shards(muon, others, tensors, whole, largest)
    return part.known[key]


def parameter_bytes(part: Part, setup: Setup, keeping: Keeping = ACCELERATOR) -> tuple[float, float, float, float]:
    """Weights, gradients, optimizer state of everything but tables, and tables with all of theirs.

    zero1: bf16 weights and fp32 gradients whole, fp32 master weights and moments divided over all copies. sharded: fp32 weights,
    gradients and moments divided within a copy (FSDP2; the weights are the master), and a step count for each tensor that AdamW has.
    Tables: 18 bytes a parameter (bf16, fp32 gradient, master, two moments; 16 where all is fp32) at the owner alone, in each copy of the
    tables.
    """
    weights = gradients = state = 0.0
    if setup.weights == "sharded":
        held = shards(part, setup)
        weights = gradients = float(FP32 * (held.muon + held.others))
        state = float((MUON - FP32) * held.muon + (ADAM - FP32) * held.others + FP32 * held.tensors)
    for group in part.groups if setup.weights == "zero1" else ():
        count, ways = local(group, setup), sharded_over(group.kind, setup)
        optimizer = MUON if setup.optimizer == "muon" and group.muon else ADAM
        weights += BF16 * count
        gradients += FP32 * count
        state += optimizer * count / (ways * setup.data_replicate)
    narrow = BF16 if keeping.element == BF16 else 0
    counts = FP32 * len(part.tables) if setup.weights == "sharded" else 0
    return weights, gradients, state, local_rows(part, setup) * (narrow + FP32 + ADAM) + counts


def activation_bytes(model: Model, setup: Setup, held: Held, in_flight: float) -> float:
    """Bytes kept by `in_flight` micro-batches in the parts `held`."""
    kept = 0.0
    dense = 0  # attentions over all keys
    for number, times in held.items():
        if model.kept[number]:
            kept += times * layer_sizes(model, number, setup)[0] * setup.tokens * in_flight
            dense += any(each.name == "keys" for each in model.kept[number])
        elif model.beside[number]:
            # A head's and a prediction step's backward pass comes right behind their forward pass, but where all go forward first.
            flying = in_flight if number == 0 or setup.schedule == "gpipe" else 1.0
            split = setup.tensor, setup.context, setup.expert > 1
            kept += times * layer_bytes(model.beside[number], 0.0, "none", setup.fold, *split) * setup.tokens * flying
    if dense and not model.keeping.fused:  # which keys a query sees, for all attentions of a pass
        kept += BYTE * setup.sequence_length * setup.tokens * in_flight
    return kept


def work_bytes(model: Model, setup: Setup, held: Held, assumed: Assumptions) -> float:
    """What one pass lays out and drops again, at the worst moment: with the logits; as a layer's backward pass begins (what runs again of
    it, its widest tensor's gradient beside its own); as it ends, without that layer's activations. Where weights are sharded, also the
    layer's weights twice (they, and the collective's own copy or those of the layer that comes), and in the end its gradients, in the form
    in which they are summed too.
    """
    sharded = setup.weights == "sharded" and sharded_over("dense", setup) * sharded_over("expert", setup) > 1
    moments = [0.0]
    for number in held:
        whole = model.keeping.element * shards(model.parts[number], setup).whole if sharded else 0
        if model.kept[number]:
            own, all_of_it, largest = layer_sizes(model, number, setup)
            moments.append((all_of_it - own + 2 * largest) * setup.tokens + 2 * whole)
            gradients = FP32 / model.keeping.element * whole * (2 if setup.micros == 1 else 1)
            moments.append(2 * whole + gradients - own * setup.tokens)
        elif model.beside[number] and number > 1 + model.config.model.num_layers:
            moments.append(_again(model, setup) * setup.tokens + 2 * whole)
    if 1 + model.config.model.num_layers in held:
        moments.append(head_bytes(model, setup, assumed))
    return max(moments)


def _again(model: Model, setup: Setup) -> float:
    """Bytes a token of what a prediction step's layer makes again, and of its widest tensor's gradients."""
    mtp = model.config.model.mtp
    key = "again", setup.tensor, setup.context, setup.expert > 1, setup.fold, setup.sequence_length
    if key not in model.known:
        layer, place = mtp.inner(dataclasses.replace(model.config.model.shape(), sequence_length=setup.sequence_length))
        kept, split = tuple(layer_kept(layer, place, model.keeping)), (setup.tensor, setup.context, setup.expert > 1)
        whole = layer_bytes(kept, 0.0, "none", setup.fold, *split) if mtp.recompute else 0.0
        model.known[key] = whole + 2 * widest(kept, *split)
    return model.known[key]


def layer_sizes(model: Model, number: int, setup: Setup) -> tuple[float, float, float]:
    """Bytes a token of layer `number`: what is kept, what would be without recomputation, the largest tensor."""
    key = "sizes", number, setup.recompute, setup.fold, setup.tensor, setup.context, setup.expert > 1
    if key not in model.known:
        kept, hidden = model.kept[number], model.keeping.element * model.config.model.hidden_size
        split = setup.tensor, setup.context, setup.expert > 1
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


def step_bytes(model: Model, setup: Setup, parts: list[tuple[Part, int]], neighbours: int) -> float:
    """What lies there through all of a step beside the shards, as a run of this library (FSDP2, torch's pipelining) has it: the weights of
    the model's ends, gathered; the gradients of all micro-batches but the last, whole, as they are summed with those of the last one
    (one parameter's beside the sum where nothing is sharded); of a pipeline a place for each micro-batch's state from each neighbour, fp32.
    """
    found = float(FP32 * neighbours * setup.micros * setup.tokens * model.config.model.hidden_size)
    held = [(part, times, shards(part, setup)) for part, times in parts]
    if sharded_over("dense", setup) * sharded_over("expert", setup) == 1:
        return found + (FP32 * max(each.largest for *_, each in held) if setup.micros > 1 else 0.0)
    found += model.keeping.element * sum(times * each.whole for part, times, each in held if not part.attentions)
    if setup.micros > 1:
        found += FP32 * sum(times * (each.whole - each.muon - each.others) for _, times, each in held)
    return found


def head_bytes(model: Model, setup: Setup, assumed: Assumptions) -> float:
    """Of a chunk of tokens logits and their logarithms, and the gradient of the states; and where weights are sharded the gradient of the
    head, which is made with the logits (else it is added to what is there).
    """
    c, sharded = model.config.model, setup.weights == "sharded"
    chunk = min(setup.tokens, max(1, CHUNK_ELEMENTS * setup.tensor // c.vocab_size) if sharded else assumed.loss_chunk_tokens.value)
    found = chunk * (2 * FP32 * c.vocab_size / setup.tensor + model.keeping.element * c.hidden_size)
    return found + (FP32 * c.vocab_size * c.hidden_size / setup.tensor if sharded else 0.0)


def stage_memory(model: Model, setup: Setup, card: Card | None, assumed: Assumptions) -> list[StageMemory]:
    """Of a rank of each stage. card: where the setup does not say what communicators take."""
    found = []
    in_flight = held(setup.schedule, setup.pipeline, setup.micros)
    buffers = communicators(setup) * card.buffer_bytes.value if setup.buffers is None else setup.buffers
    head = 1 + model.config.model.num_layers
    for stage, own in enumerate(stage_parts(model, setup)):
        parts = [(model.parts[n], times) for n, times in own.items()]
        if head in own and 0 not in own and model.rows is not None:
            parts.append((model.rows, 1))
        sums = [[times * each for each in parameter_bytes(part, setup, model.keeping)] for part, times in parts]
        weights, gradients, state, tables = map(sum, zip(*sums, strict=True))
        activations, work = activation_bytes(model, setup, own, in_flight[stage]), work_bytes(model, setup, own, assumed)
        if setup.weights == "sharded":
            neighbours = (2 * setup.chunks - (0 in own) - (head in own)) if setup.pipeline > 1 else 0
            work += step_bytes(model, setup, parts, neighbours)
        found.append(StageMemory(weights, gradients, state, tables, activations, work, buffers, sum(setup.beside.values())))
    return found
