"""The search: every layout that fits the cards, the model, the batch and the memory, the fastest ones first."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from longcat_lab.config import RunConfig
from longcat_lab.config.yaml import parse_yaml
from longcat_lab.errors import LabError
from longcat_lab.node import nearest, validate_node
from longcat_lab.parallel.planner.estimate import Estimate, estimate, least_step
from longcat_lab.parallel.planner.hardware import Assumptions, Card, Network, assumptions
from longcat_lab.parallel.planner.hardware import card as read_card
from longcat_lab.parallel.planner.hardware import network as read_network
from longcat_lab.parallel.planner.links import Fabric
from longcat_lab.parallel.planner.memory import stage_memory
from longcat_lab.parallel.planner.setup import Model, Setup, check_setup, take_apart

SEQUENCE, BATCH_TOKENS = 8192, 2**26  # of a step where nothing else is asked for: about 67 M tokens
IDLE = 0.2  # share of the cards that a layout may leave as spares
RECOMPUTE = ("none", "selective", "selective+kv", "full")  # cheapest first
LARGEST_TENSOR, LARGEST_CONTEXT, SMALLEST_PART = 16, 1024, 1024


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `plan` found. best: fastest first, empty where nothing fits (then `closest` misses by least). tried: setups that were compared
    by their arithmetic; looked_at: those whose memory was added up before the rest could not be faster any more.

    ranks: dies of all cards; those that a layout leaves out are spares.
    """

    name: str
    model: Model
    card: Card
    network: Network
    assumed: Assumptions
    cards: int
    best: tuple[Estimate, ...]
    tried: int
    looked_at: int
    closest: Estimate | None

    @property
    def ranks(self) -> int:
        return self.cards * self.card.dies


def plan(
    config: RunConfig,
    cards: int,
    card: str | Path | Card,
    network: str | Path | Network | None = None,
    sequence_length: int | None = None,
    batch: int | None = None,
    optimizer: str | None = None,
    top: int = 3,
    assumed: str | Path | Assumptions | None = None,
    name: str = "model",
    **fixed: object,
) -> Plan:
    """The `top` fastest layouts of `config` on `cards` cards.

    Args:
        card, network: names of what comes with the package, paths of YAML files, or descriptions; the card names its network.
        sequence_length: tokens; 8192, or what the model takes where that is less. batch: sequences a step; 2^26 tokens' worth.
        optimizer: `adamw` or `muon`; the configuration's own where left out.
        fixed: fields of `Setup` that are not searched, such as `pipeline=16` or `recompute="full"`.

    Raises:
        LabError: an unknown card, network or field; no layout has that many ranks and divides model and batch. (Where none fits the
            memory, `best` is empty and `closest` is the one that is nearest to it.)
    """
    described = card if isinstance(card, Card) else read_card(card)
    wires = network if isinstance(network, Network) else read_network(network or described.network)
    figures = assumed if isinstance(assumed, Assumptions) else assumptions(assumed)
    length = sequence_length or min(SEQUENCE, config.model.max_position_embeddings)
    unknown = set(fixed) - set(Setup.model_fields)
    if unknown:
        raise LabError(f"plan: there is no setting '{min(unknown)}' of a setup; there are {', '.join(Setup.model_fields)}.")
    if cards < 1:
        raise LabError(f"plan: {cards} cards are none: give at least 1.")
    batch = batch or default_batch(length, cards * described.dies)
    base = {"optimizer": optimizer or config.training.optimizer.kind, "sequence_length": length, "batch": batch, **fixed}
    model, fabric = take_apart(config, length), Fabric.of(wires, described.dies)
    found = list(candidates(model, cards * described.dies, fabric, base))
    if not found:
        raise LabError(
            f"plan: no layout of at least {math.ceil((1 - IDLE) * cards * described.dies)} of the {cards * described.dies} ranks divides "
            f"model and batch ({batch} sequences): change --cards or --batch."
        )
    search = _Search(model, described, fabric, figures, top)
    best = search.fastest(found)
    return Plan(
        name, model, described, wires, figures, cards, tuple(best), len(found), search.looked_at, None if best else search.closest()
    )


class _Search:
    """Setups by the least time that they can take, until what is left cannot be faster than the `top` found."""

    def __init__(self, model: Model, card: Card, fabric: Fabric, assumed: Assumptions, top: int) -> None:
        self.model, self.card, self.fabric, self.assumed, self.top = model, card, fabric, assumed, top
        self.looked_at, self.nearest = 0, (math.inf, None)

    def fastest(self, setups: list[Setup]) -> list[Estimate]:
        order = [(least_step(self.model, setup, self.card, self.fabric, self.assumed), number) for number, setup in enumerate(setups)]
        best: list[tuple[float, int, Estimate]] = []
        for bound, number in sorted(order):
            if len(best) == self.top and bound > best[-1][0]:
                break
            setup = setups[number]
            if not self._fits(setup):
                continue
            one = estimate(self.model, setup, self.card, self.fabric, self.assumed)
            best = sorted([*best, (one.step, number, one)], key=lambda entry: entry[:2])[: self.top]
        return [one for *_, one in best]

    def _fits(self, setup: Setup) -> bool:
        try:
            check_setup(self.model, setup)
        except LabError:
            return False
        self.looked_at += 1
        peak = max(stage.total for stage in stage_memory(self.model, setup, self.card, self.assumed))
        if peak < self.nearest[0]:
            self.nearest = peak, setup
        return peak <= self.card.memory_bytes.value * (1 - self.card.reserve.value)

    def closest(self) -> Estimate | None:
        """Of those that do not fit, the one that misses by least."""
        setup = self.nearest[1]
        return estimate(self.model, setup, self.card, self.fabric, self.assumed) if setup else None


def settings(pairs: Iterable[str]) -> dict[str, object]:
    """`name=value` pairs (values are YAML) as fields of a `Setup` that are not searched.

    Raises:
        LabError: no such field, or a value that it does not take.
    """
    found: dict[str, object] = {}
    for text in pairs:
        name, equals, value = text.partition("=")
        if not equals or name not in Setup.model_fields:
            raise LabError(f"--setting '{text}': write it as NAME=VALUE{nearest(name, list(Setup.model_fields))}")
        found[name] = parse_yaml(value, f"--setting '{text}'")
    validate_node(Setup, {"sequence_length": 2, "batch": 1, **found}, "--setting")
    return found


def default_batch(length: int, ranks: int) -> int:
    """Sequences of about 2^26 tokens, 15 x 2^k for the sake of its divisors; fewer where there are few ranks."""
    most = max(1, BATCH_TOKENS // length)
    wanted = min(most, 64 * ranks)
    return max(1, 15 * 2 ** max(0, round(math.log2(wanted / 15)))) if wanted >= 15 else wanted


def candidates(model: Model, ranks: int, fabric: Fabric, base: dict[str, object]) -> Iterator[Setup]:
    """Setups that use at least (1 - IDLE) of the ranks; what does not divide the model is sorted out later.

    Left out because others are never worse: GPipe (1F1B waits as long and holds less), larger data_shard under ZeRO-1 (state is divided
    over all copies anyhow), embedding degrees below the largest one that stays inside a superpod (rows cost as much from near as from
    far there). Tensor groups stay inside a server, expert groups inside a superpod, at least 1024 tokens on a rank.
    """
    config, length = model.config.model, int(base["sequence_length"])
    layers, experts, micro = config.num_layers, getattr(config.moe, "n_routed_experts", 1), int(base.get("micro_batch", 1))

    def choices(name: str, values: Iterable[object]) -> list[Any]:
        return [base[name]] if name in base else list(values)

    stages = sorted({n for n in (*_powers(layers), *_divisors(layers)) if n <= min(layers, ranks)})
    groups = [d for d in _divisors(experts) if d <= min(fabric.superpod, ranks) and (d == 1 or d >= min(8, experts))]
    tensors = [n for n in _powers(min(fabric.server, LARGEST_TENSOR)) if n <= ranks]
    contexts = [n for n in _powers(LARGEST_CONTEXT) if n == 1 or micro * length // n >= SMALLEST_PART]
    axes = (choices("pipeline", stages), choices("tensor", tensors), choices("context", contexts))
    for pipeline, tensor, context in itertools.product(*axes):
        data = base.get("data_shard", 0) * base.get("data_replicate", 1) or _data_ranks(
            ranks // (pipeline * tensor * context), int(base["batch"]) // micro
        )
        if not data or not (1 - IDLE) * ranks <= data * pipeline * tensor * context <= ranks:
            continue
        degrees = {"pipeline": pipeline, "tensor": tensor, "context": context}
        for expert in choices("expert", groups):
            yield from _variants(model, fabric, base, {**degrees, "expert": expert}, data)


def _variants(model: Model, fabric: Fabric, base: dict[str, Any], degrees: dict[str, int], data: int) -> Iterator[Setup]:
    """The setups of one set of degrees: who holds the weights, in which order, what runs again."""
    pipeline, expert = degrees["pipeline"], degrees["expert"]
    least = expert // math.gcd(expert, degrees["context"] * degrees["tensor"])
    shards = [d for d in _divisors(data) if d % least == 0]
    if not shards:
        return
    stage = data * degrees["context"] * degrees["tensor"]
    near = [d for d in _divisors(stage) if d <= fabric.superpod] if any(part.tables for part in model.parts) else [1]
    schedules = ("1f1b", "interleaved", "v-half", "v-zb") if pipeline > 1 else ("1f1b",)
    for weights in (base["weights"],) if "weights" in base else ("zero1", "sharded"):
        tried = shards[:1] if weights == "zero1" else [d for d in shards if d in (shards[0], 4 * shards[0], 16 * shards[0])]
        for shard in (base["data_shard"],) if "data_shard" in base else tried:
            own = {"weights": weights, "data_shard": shard, "data_replicate": data // shard, "embedding": near[-1]}
            for schedule in (base["schedule"],) if "schedule" in base else schedules:
                setup = Setup.model_construct(**{**_DEFAULTS, **degrees, **own, "schedule": schedule, **base})
                if pipeline * setup.chunks > model.config.model.num_layers or setup.micros < pipeline:
                    continue
                if schedule == "interleaved" and setup.micros % pipeline:
                    continue
                for recompute in (base["recompute"],) if "recompute" in base else RECOMPUTE:
                    yield setup.model_copy(update={"recompute": recompute})


_DEFAULTS = {name: field.get_default(call_default_factory=True) for name, field in Setup.model_fields.items() if not field.is_required()}


def _powers(most: int) -> list[int]:
    return [2**k for k in range(most.bit_length())]


def _divisors(number: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def _data_ranks(most: int, batch: int) -> int:
    """The largest number of data ranks, at most `most`, that divides the batch."""
    return max((d for d in _divisors(batch) if d <= most), default=0)
