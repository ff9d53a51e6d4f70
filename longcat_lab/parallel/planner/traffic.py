"""What a rank of each stage sends in one step, by purpose and link class."""

from __future__ import annotations

import dataclasses

from longcat_lab.parallel.planner.activations import BF16, FP32, INT64
from longcat_lab.parallel.planner.hardware import Assumptions
from longcat_lab.parallel.planner.links import Bytes, Fabric, added, gather, reduce, scaled, send, to_all
from longcat_lab.parallel.planner.memory import local, local_rows, sharded_over
from longcat_lab.parallel.planner.parts import Part, kept_picks
from longcat_lab.parallel.planner.setup import Held, Model, Setup, stage_parts

Parts = list[tuple[Part, int]]  # what a stage holds, and how often


@dataclasses.dataclass(frozen=True)
class Flow:
    """Bytes that one rank sends to others in one step, and the collectives that it takes part in for it.

    purpose: `expert`, `embedding`, `context`, `tensor`, `data`, `pipeline` or `norm`; what: the collective and what it carries.
    """

    purpose: str
    what: str
    sent: Bytes
    calls: float


def stage_flows(model: Model, setup: Setup, fabric: Fabric, assumed: Assumptions) -> list[list[Flow]]:
    """Of a rank of each stage (even routing, K_e travelling picks a token)."""
    found = []
    for stage, held in enumerate(stage_parts(model, setup)):
        flows = [*part_flows(model, setup, held, fabric, assumed), *_pipeline(model, setup, stage, fabric)]
        flows.append(Flow("norm", "all-reduce of the gradient's norm", reduce(FP32, 1, setup.world, fabric), float(setup.world > 1)))
        found.append([flow for flow in flows if flow.calls])
    return found


def part_flows(model: Model, setup: Setup, held: Held, fabric: Fabric, assumed: Assumptions) -> list[Flow]:
    """Of a rank that holds these parts, but for the pipeline's and the norm's."""
    parts = [(model.parts[n], times) for n, times in held.items()]
    layers = [*_expert(model, setup, parts, fabric), *_context(setup, parts, fabric), *_tensor(model, setup, parts, fabric)]
    return [*layers, *_embedding(model, setup, parts, fabric, assumed), *_data(setup, parts, fabric)]


def forwards(setup: Setup) -> int:
    """Times that a layer's forward pass runs in a step."""
    return 2 if setup.recompute == "full" else 1


def dispatched(model: Model, setup: Setup, fabric: Fabric) -> Bytes:
    """What one dispatch (or one combine) of one mixture sends from one rank, for one micro-batch."""
    row = BF16 * model.config.model.hidden_size
    tokens = setup.tokens / setup.tensor  # tensor ranks have the same tokens and send different ones
    if setup.dispatch == "all-gather":
        return gather(tokens * row, 1, setup.expert, fabric)
    return to_all(tokens * kept_picks(model.config.model.moe) * row, 1, setup.expert, fabric)


def _expert(model: Model, setup: Setup, parts: Parts, fabric: Fabric) -> list[Flow]:
    mixtures = sum(times * part.mixtures for part, times in parts)
    if setup.expert == 1 or not mixtures:
        return []
    times = 2 * mixtures * (forwards(setup) + 1) * setup.micros  # dispatch and combine, forward and backward
    name = "all-to-all of tokens" if setup.dispatch == "all-to-all" else "all-gather and reduce-scatter of tokens"
    return [Flow("expert", name, scaled(dispatched(model, setup, fabric), times), times)]


def _context(setup: Setup, parts: Parts, fabric: Fabric) -> list[Flow]:
    """Latents and index keys are gathered before each attention; their gradient is reduce-scattered."""
    width = sum(times * sum(part.kept_gather) for part, times in parts)
    calls = sum(times * part.attentions for part, times in parts) * setup.micros
    if setup.context == 1 or not width:
        return []
    once = gather(setup.tokens * width, setup.tensor, setup.context, fabric)
    return [
        Flow("context", "all-gather of latents and index keys", scaled(once, forwards(setup) * setup.micros), forwards(setup) * calls),
        Flow("context", "reduce-scatter of their gradients", scaled(once, setup.micros), calls),
    ]


def _tensor(model: Model, setup: Setup, parts: Parts, fabric: Fabric) -> list[Flow]:
    """An all-reduce behind each attention and dense network (forward), before each (backward); mixtures' outputs are gathered."""
    if setup.tensor == 1:
        return []
    size = setup.tokens * BF16 * model.config.model.hidden_size
    places = sum(times * (part.attentions + part.ffns) for part, times in parts)
    times = places * (forwards(setup) + 1) * setup.micros
    mixtures = sum(times * part.mixtures for part, times in parts) * (forwards(setup) + 1) * setup.micros
    flows = [Flow("tensor", "all-reduce of attentions and networks", scaled(reduce(size, 1, setup.tensor, fabric), times), times)]
    if mixtures:
        sent = scaled(gather(size / setup.tensor, 1, setup.tensor, fabric), mixtures)
        flows.append(Flow("tensor", "all-gather of mixtures", sent, mixtures))
    return flows


def _embedding(model: Model, setup: Setup, parts: Parts, fabric: Fabric, assumed: Assumptions) -> list[Flow]:
    """Row numbers out, rows back, rows' gradients to their owner."""
    ngram = getattr(model.config.model.embedding, "ngram", None)
    if ngram is None or not any(part.tables for part, _ in parts) or setup.embedding == 1:
        return []
    rows = setup.tokens / setup.tensor * ngram.tables * assumed.rows_distinct.value * setup.micros
    width = ngram.width(model.config.model.shape())
    once = to_all(rows * width * BF16, 1, setup.embedding, fabric)
    return [
        Flow("embedding", "all-to-all of row numbers", to_all(rows * INT64, 1, setup.embedding, fabric), setup.micros),
        Flow("embedding", "all-to-all of rows", once, setup.micros),
        Flow("embedding", "all-to-all of rows' gradients", once, setup.micros),
    ]


def _data(setup: Setup, parts: Parts, fabric: Fabric) -> list[Flow]:
    flows: dict[str, tuple[Bytes, float]] = {}

    def put(what: str, sent: Bytes, calls: float) -> None:
        if any(sent):
            before, count = flows.get(what, ((0.0, 0.0, 0.0), 0.0))
            flows[what] = added(before, sent), count + calls

    counts: dict[str, float] = {}
    for part, times in parts:
        for group in part.groups:
            counts[group.kind] = counts.get(group.kind, 0.0) + times * local(group, setup)
        counts["table"] = counts.get("table", 0.0) + times * local_rows(part, setup)
    stage = setup.world // setup.pipeline
    units, replicas, inside = sum(times for _, times in parts), setup.data_replicate, setup.data_shard * setup.context * setup.tensor
    for kind, stride in (("dense", setup.tensor), ("expert", setup.expert)):
        count, shard = counts.get(kind, 0.0), sharded_over(kind, setup)
        if not count:
            continue
        if setup.weights == "zero1":
            copies = shard * replicas
            put(f"reduce-scatter of {kind} gradients", gather(FP32 * count / copies, stride, copies, fabric), 1)
            put(f"all-gather of {kind} weights", gather(BF16 * count / copies, stride, copies, fabric), 1)
            continue
        passes = 2 * setup.micros  # gathered for forward and again for backward
        put(f"all-gather of {kind} weights", scaled(gather(BF16 * count / shard, stride, shard, fabric), passes), passes * units)
        # Gradients of a step's micro-batches are added up where they are made, and summed over ranks once.
        put(f"reduce-scatter of {kind} gradients", gather(FP32 * count / shard, stride, shard, fabric), units)
        put(f"all-reduce of {kind} gradients", reduce(FP32 * count / shard, inside, replicas, fabric), units)
    if counts.get("table"):
        put("all-reduce of table gradients", reduce(FP32 * counts["table"], setup.embedding, stage // setup.embedding, fabric), 1)
    return [Flow("data", what, *each) for what, each in flows.items()]


def _pipeline(model: Model, setup: Setup, stage: int, fabric: Fabric) -> list[Flow]:
    """States forward to the next chunk's stage, gradients back. The two chunks at the turn of a V lie on one stage."""
    if setup.pipeline == 1:
        return []
    last, chunks = setup.pipeline - 1, setup.chunks
    if setup.schedule.startswith("v-"):
        forward = 2 - (stage == last) - (stage == 0)  # down: all but the last stage send on; up: all but the first
        backward = 2 - (stage == 0) - (stage == last)
    else:
        forward, backward = chunks - (stage == last), chunks - (stage == 0)
    times = (forward + backward) * setup.micros
    size = setup.tokens * BF16 * model.config.model.hidden_size
    distance = setup.world // setup.pipeline
    return [Flow("pipeline", "states and gradients to neighbouring stages", scaled(send(size, distance, fabric), times), times)]
