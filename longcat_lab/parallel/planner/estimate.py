"""What one setup costs: memory by stage, traffic, time of a step. Every figure comes from the data files or from what blocks answer."""

from __future__ import annotations

import dataclasses

from longcat_lab.parallel.planner.activations import BF16, FP32
from longcat_lab.parallel.planner.hardware import Assumptions, Card
from longcat_lab.parallel.planner.links import Bytes, Fabric, added, scaled
from longcat_lab.parallel.planner.memory import StageMemory, layer_sizes, parameter_bytes, stage_memory
from longcat_lab.parallel.planner.overlap import exposed, exposed_alone
from longcat_lab.parallel.planner.parts import Part
from longcat_lab.parallel.planner.pipeline import bubble
from longcat_lab.parallel.planner.setup import Held, Model, Setup, stage_parts
from longcat_lab.parallel.planner.traffic import Flow, Parts, dispatched, forwards, part_flows, stage_flows

SECONDS_A_DAY = 86_400.0


@dataclasses.dataclass(frozen=True)
class StageTime:
    """Seconds of one rank of a stage. compute: arithmetic of one micro-batch, forward, backward and what runs again; `exposed`: by
    purpose, communication of a micro-batch that nothing hides; once: of a step (data, optimizer), by what; expert_alone: the mixtures'
    communication of a micro-batch, if nothing hid it."""

    compute: float
    exposed: dict[str, float]
    once: dict[str, float]
    expert_alone: float

    @property
    def micro(self) -> float:
        return self.compute + sum(self.exposed.values())


@dataclasses.dataclass(frozen=True)
class Estimate:
    """One setup. step: seconds; mfu: the model's own FLOPs (nothing run again) over what all ranks could do at their peak."""

    setup: Setup
    memory: tuple[StageMemory, ...]
    flows: tuple[tuple[Flow, ...], ...]
    times: tuple[StageTime, ...]
    capacity: float
    bubble: float
    step: float
    mfu: float

    @property
    def peak(self) -> float:
        return max(stage.total for stage in self.memory)

    @property
    def fits(self) -> bool:
        return self.peak <= self.capacity

    @property
    def tokens_per_day(self) -> float:
        return self.setup.batch * self.setup.sequence_length / self.step * SECONDS_A_DAY

    @property
    def bubble_seconds(self) -> float:
        return self.bubble * self.setup.micros * max(stage.micro for stage in self.times)

    def exposed_share(self, overlapped: bool = True) -> float:
        """Mixtures' communication that nothing hides, as a share of the step; `overlapped` False: if the shortcut hid none of it."""
        slowest = max(self.times, key=lambda stage: stage.micro)
        kept = slowest.exposed.get("expert", 0.0)
        alone = slowest.expert_alone
        grown = self.setup.micros * (1 + self.bubble)
        return kept * grown / self.step if overlapped else alone * grown / (self.step + (alone - kept) * grown)

    def traffic(self) -> dict[tuple[str, str], Bytes]:
        """(purpose, what) to bytes that a rank sends in a step by link class, in the mean over stages."""
        found: dict[tuple[str, str], Bytes] = {}
        for flow in (flow for stage in self.flows for flow in stage):
            before = found.get((flow.purpose, flow.what), (0.0, 0.0, 0.0))
            found[flow.purpose, flow.what] = added(before, scaled(flow.sent, 1 / len(self.flows)))
        return found


def estimate(model: Model, setup: Setup, card: Card, fabric: Fabric, assumed: Assumptions) -> Estimate:
    """`setup` on ranks of `card`. Nothing is checked here: see `check_setup`."""
    memory = stage_memory(model, setup, card, assumed)
    flows = stage_flows(model, setup, fabric, assumed)
    known: dict[tuple[tuple[int, int], ...], StageTime] = {}
    times = []
    for held, own in zip(stage_parts(model, setup), flows, strict=True):  # most stages hold the same
        key = tuple(held.items())
        if key not in known:
            known[key] = _stage_time(model, setup, held, own, card, fabric, assumed)
        times.append(known[key])
    waits = bubble(setup.schedule, setup.pipeline, setup.micros)
    slowest = max(stage.micro for stage in times)
    step = setup.micros * slowest * (1 + waits) + max(sum(stage.once.values()) for stage in times)
    step += 2 * setup.chunks * (setup.pipeline - 1) * _hop(flows, fabric, assumed)  # filling and draining: nothing to do meanwhile
    flops = sum(part.work for part in model.parts) / assumed.forward_share.value * setup.batch * setup.sequence_length
    mfu = flops / (setup.world * card.matmul_flops.value * step)
    capacity = card.memory_bytes.value * (1 - card.reserve.value)
    return Estimate(setup, tuple(memory), tuple(map(tuple, flows)), tuple(times), capacity, waits, step, mfu)


def _speed(card: Card) -> float:
    return card.matmul_flops.value * card.matmul_efficiency.value


def _hop(flows: list[list[Flow]], fabric: Fabric, assumed: Assumptions) -> float:
    """Seconds of one state's way to the next stage."""
    found = [flow for stage in flows for flow in stage if flow.purpose == "pipeline"]
    return max((fabric.seconds(scaled(f.sent, 1 / f.calls), 1, assumed.latency_hidden.value) for f in found), default=0.0)


def work_seconds(part: Part, what: str, setup: Setup, card: Card) -> list[float]:
    """Forward seconds of one micro-batch on one rank, an entry each place. Tensor ranks divide networks, experts, the head and
    attentions (of which latents and indexer run on each rank: their weights are small, and counted as divided here)."""
    return [flops * setup.tokens / setup.tensor / _speed(card) for flops in part.flops.get(what, ())]


def _stage_time(model: Model, setup: Setup, held: Held, flows: list[Flow], card: Card, fabric: Fabric, assumed: Assumptions) -> StageTime:
    backward = 1 / assumed.forward_share.value - 1
    parts = [(model.parts[number], count) for number, count in held.items()]
    layers = [(part, count) for part, count in parts if part.attentions]

    def forward(chosen: Parts, *kinds: str) -> float:
        """Seconds of one forward pass of one micro-batch."""
        return sum(count * sum(work_seconds(part, what, setup, card)) for part, count in chosen for what in kinds or part.flops)

    compute = forward(parts) * (1 + backward) + forward(layers) * (forwards(setup) - 1)
    compute += sum(count * _on_top(model, number, setup, card, forwards(setup) + backward) for number, count in held.items())
    exposure: dict[str, float] = {}
    hidden = assumed.latency_hidden.value

    def seconds(purpose: str) -> float:
        return sum(fabric.seconds(f.sent, f.calls, hidden) for f in flows if f.purpose == purpose) / setup.micros

    def put(purpose: str, value: float) -> None:
        if value > 0:
            exposure[purpose] = value

    one = fabric.seconds(dispatched(model, setup, fabric), 1, hidden) if setup.expert > 1 else 0.0
    alone = shown = 0.0
    for part, count in layers:
        runs = [1.0] * forwards(setup) + [backward]
        alone += count * part.mixtures * exposed_alone(one, one) * len(runs)
        shown += sum(count * part.mixtures * _shown(part, setup, card, one, times, assumed) for times in runs)
    put("expert", shown if setup.overlap else alone)
    put("tensor", seconds("tensor"))
    attention = forward(layers, "attention") * (forwards(setup) + backward)
    put("context", seconds("context") - attention / 2)  # behind queries and the index; the core needs the keys
    put("embedding", seconds("embedding") - compute / 2)  # asked for and answered while other micro-batches run
    data = sum(fabric.seconds(f.sent, f.calls, hidden) for f in flows if f.purpose == "data")
    once = {"optimizer": _optimizer_seconds(model, setup, parts, card, assumed)}
    if setup.weights == "zero1":
        once["data"] = max(data - compute, 0.0)  # behind the last backward and the next first forward pass
    else:
        put("data", data / setup.micros - compute)
    return StageTime(compute, exposure, once, alone)


def _on_top(model: Model, number: int, setup: Setup, card: Card, passes: float) -> float:
    """Seconds of one part beyond its blocks' own count: heads' keys and values of other context ranks' tokens, and what selective
    recomputation runs again (element by element: three passes through memory; keys and values: their product once more)."""
    expansion = model.parts[number].expanded * setup.tokens / setup.tensor / _speed(card)
    seconds = expansion * (setup.context - 1) * passes
    if setup.recompute.startswith("selective") and model.kept[number]:
        own, whole, _ = layer_sizes(model, number, setup.model_copy(update={"recompute": "selective"}))
        seconds += 3 * (whole - own) * setup.tokens / card.memory_bandwidth.value
        seconds += expansion * setup.context * (setup.recompute == "selective+kv")
    return seconds


def _shown(part: Part, setup: Setup, card: Card, one: float, times: float, assumed: Assumptions) -> float:
    """Seconds of one mixture's communication that stay in sight, in a pass that takes `times` the forward pass's arithmetic."""
    experts = times * sum(work_seconds(part, "experts", setup, card))
    attentions, ffns = (work_seconds(part, what, setup, card) for what in ("attention", "ffn"))
    if len(ffns) < 2:  # no shortcut: nothing lies beside the mixture
        return exposed_alone(one, one)
    dense = [("network 1", times * ffns[0]), ("attention 2", times * attentions[-1]), ("network 2", times * ffns[1])]
    return exposed(one, one, experts, dense, int(assumed.overlap_chunks.value), int(assumed.overlap_window.value))


def _optimizer_seconds(model: Model, setup: Setup, parts: Parts, card: Card, assumed: Assumptions) -> float:
    """Its bytes through memory, and Muon's products, each matrix once in all copies."""
    found = [[count * each for each in parameter_bytes(part, setup)] for part, count in parts]
    weights, gradients, state, tables = map(sum, zip(*found, strict=True))
    if setup.weights == "zero1":  # a rank steps on its own part of the whole weights and gradients, and state is 12 or 8 bytes an element
        own = state / (FP32 * 3)
        weights, gradients = min(weights, BF16 * own), min(gradients, FP32 * own)
    seconds = assumed.optimizer_passes.value * (weights + gradients + state + tables) / card.memory_bandwidth.value
    if setup.optimizer == "muon":
        steps = int(assumed.newton_schulz_steps.value)
        flops = sum(count * part.products(steps) for part, count in parts)
        seconds += flops / (setup.world / setup.pipeline) / _speed(card)
    return seconds


def least_step(model: Model, setup: Setup, card: Card, fabric: Fabric, assumed: Assumptions) -> float:
    """Seconds that a step cannot be shorter than: arithmetic and what experts' and tensor ranks' collectives leave in sight on the
    busiest stage, and the pipeline's wait."""
    backward, again = 1 / assumed.forward_share.value - 1, forwards(setup)
    key = "stages", setup.pipeline, setup.schedule, again
    if key not in model.known:
        model.known[key] = []
        for held in stage_parts(model, setup):
            parts = [(model.parts[n], times) for n, times in held.items()]
            work = sum(times * part.work * (backward + (again if part.attentions else 1)) for part, times in parts)
            model.known[key].append((work, sum(times * bool(part.attentions) for part, times in parts)))
    seen = "layer", setup.tensor, setup.context, setup.expert, again, setup.micro_batch
    if seen not in model.known:
        model.known[seen] = _layer_in_sight(model, setup, card, fabric, assumed)
    rate, layer = setup.tokens / setup.tensor / _speed(card), model.known[seen]
    seconds = max(work * rate + layers * layer for work, layers in model.known[key]) * setup.micros
    return seconds * (1 + bubble(setup.schedule, setup.pipeline, setup.micros))


def _layer_in_sight(model: Model, setup: Setup, card: Card, fabric: Fabric, assumed: Assumptions) -> float:
    """Seconds of the last layer's collectives of experts and tensor ranks that nothing hides, in one micro-batch."""
    alone = setup.model_copy(
        update={"pipeline": 1, "schedule": "1f1b", "batch": setup.data_replicate * setup.data_shard * setup.micro_batch}
    )
    held = {model.alike[model.config.model.num_layers]: 1}
    flows = [flow for flow in part_flows(model, alone, held, fabric, assumed) if flow.purpose == "tensor"]
    found = _stage_time(model, alone, held, flows, card, fabric, assumed).exposed
    return found.get("expert", 0.0) + found.get("tensor", 0.0)
