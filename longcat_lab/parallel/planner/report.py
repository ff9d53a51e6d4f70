"""A plan in words and as plain data."""

from __future__ import annotations

from typing import Any

from longcat_lab.budget import totals
from longcat_lab.parallel.planner.estimate import Estimate
from longcat_lab.parallel.planner.hardware import LEVELS, Figure
from longcat_lab.parallel.planner.memory import StageMemory
from longcat_lab.parallel.planner.parts import idle_parameters
from longcat_lab.parallel.planner.search import Plan

GB = 1e9
MEMORY = ("weights", "gradients", "state", "tables", "activations", "work", "buffers", "beside")
FIXED = (
    "routing is even, and K_e picks a token travel; a zero-expert's picks stay where they are",
    "collectives over several levels send each byte once over the outer level (hierarchical); other levels work beside it",
    "expert groups lie inside a superpod, tensor groups inside a server; ranks are numbered tensor, context, data, pipeline outwards",
    "zero1: bf16 weights and fp32 gradients on each rank, fp32 master and moments over all copies; sharded: fp32 all over one copy (FSDP2)",
    "sharded: the model's ends stay gathered through a step, and gradients of all micro-batches but the last are kept whole (FSDP2)",
    "tables: 18 bytes a parameter (bf16, fp32 gradient, master, two moments) at the owner; copies that are never read are not held",
    "zero1's reduce-scatter and all-gather hide behind one micro-batch's arithmetic, FSDP2's behind its own stage's",
    "context: the gather hides behind half of the attention's arithmetic; every rank makes keys and values of all gathered tokens",
    "no stragglers, no failures, no checkpoints, no input that is waited for",
    "longcat_lab itself runs GPipe and 1F1B, sharded weights, recompute none or full; other choices are of frameworks that have them "
    "(--setting schedule=1f1b --setting weights=sharded --setting recompute=full plans what it runs)",
    "schedules: all stages and micro-batches take alike long; V schedules are played greedily within their limit of activations",
)


def told(plan: Plan) -> str:
    """The plan for a terminal."""
    lines = [_head(plan)]
    if not plan.best:
        near = plan.closest
        lines.append(
            f"Nothing fits: the closest layout needs {near.peak / GB:.1f} GB of {near.capacity / GB:.1f} GB a rank ({near.setup.told()})."
            if near
            else "Nothing fits."
        )
    for number, one in enumerate(plan.best, 1):
        lines += ["", f"{number}. {one.setup.told()}", *_body(plan, one)]
    return "\n".join([*lines, "", "Assumptions", *("  " + line for line in assumption_lines(plan))])


def _head(plan: Plan) -> str:
    found, model = totals(plan.model.config), plan.model.config
    setup = plan.best[0].setup if plan.best else plan.closest.setup
    idle = idle_parameters(model)
    return (
        f"{plan.name}: {found['total_params']:,} parameters"
        + (f" ({idle:,} of them carried and never read)" if idle else "")
        + f", {found['flops_per_token'] / 1e9:.1f} GFLOP forward a token at {setup.sequence_length} tokens\n"
        f"{plan.cards:,} cards {plan.card.name} ({plan.card.dies} rank{'s' if plan.card.dies > 1 else ''} a card), network "
        f"{plan.network.name}; sequences of {setup.sequence_length} tokens, {setup.batch:,} a step "
        f"({setup.batch * setup.sequence_length / 1e6:.1f} M tokens), {setup.optimizer}\n"
        f"{plan.tried:,} layouts compared, memory of {plan.looked_at:,} added up; the rest cannot be faster"
    )


def _body(plan: Plan, one: Estimate) -> list[str]:
    setup = one.setup
    lines = [
        f"   {setup.world:,} of {plan.ranks:,} ranks, {plan.ranks - setup.world:,} spare; {setup.micros} micro-batches of "
        f"{setup.micro_batch} x {setup.sequence_length} tokens, {setup.tokens:,.0f} on a rank; {setup.chunks} chunk(s) of layers a stage",
        f"   step {one.step:.2f} s, {one.tokens_per_day / 1e12:.3f} T tokens a day, MFU {one.mfu:.1%} of {setup.world:,} ranks; "
        f"pipeline bubble {one.bubble:.1%} of the work ({one.bubble_seconds:.2f} s)",
        f"   dispatch and combine seen: {one.exposed_share(False):.1%} of the step, {one.exposed_share():.1%} with the shortcut's overlap",
        f"   {one.peak / GB:.1f} GB on the fullest rank, {one.capacity / GB:.1f} GB may be used",
    ]
    slowest = max(one.times, key=lambda stage: stage.micro)
    exposure = {**slowest.exposed, **{f"{what}, once a step": s for what, s in slowest.once.items() if s}}
    said = ", ".join(f"{what} {seconds * 1e3:.1f} ms" for what, seconds in exposure.items())
    lines.append(f"   in sight on the busiest stage, a micro-batch: {said or 'nothing'}")
    lines += ["   GB a rank of" + "".join(f"{name:>12}" for name in (*MEMORY, "total"))]
    for first, last, memory in _alike(one.memory):
        name = f"stage {first}" if first == last else f"stages {first}-{last}"
        values = [*(getattr(memory, key) for key in MEMORY), memory.total]
        lines.append(f"   {name:12}" + "".join(f"{value / GB:12.2f}" for value in values))
    lines.append(f"   GB a rank and step on the wire{'':38}" + "".join(f"{level:>12}" for level in LEVELS))
    for (purpose, what), sent in one.traffic().items():
        lines.append(f"   {purpose:10} {what:56} " + "".join(f"{value / GB:12.4g}" for value in sent))
    return lines


def _alike(memory: tuple[StageMemory, ...]) -> list[tuple[int, int, StageMemory]]:
    """Neighbouring stages that hold as much, to a percent, in one line (of the fuller one): (first, last, memory)."""
    found: list[tuple[int, int, StageMemory]] = []
    for stage, own in enumerate(memory):
        if found and abs(own.total - found[-1][2].total) <= 0.01 * own.total:
            first, _, before = found[-1]
            found[-1] = first, stage, max(before, own, key=lambda each: each.total)
        else:
            found.append((stage, stage, own))
    return found


def figures(plan: Plan) -> dict[str, Figure]:
    """Every figure of the data files that the plan rests on, by its name."""
    found = {f"{plan.card.name}.{name}": value for name, value in plan.card if isinstance(value, Figure)}
    for level in LEVELS:
        link = getattr(plan.network, level)
        found |= {f"{plan.network.name}.{level}.{name}": value for name, value in link if isinstance(value, Figure)}
    found[f"{plan.network.name}.efficiency"] = plan.network.efficiency
    return found | {name: value for name, value in plan.assumed if isinstance(value, Figure)}


def assumption_lines(plan: Plan) -> list[str]:
    """A line each: name, value, kind of source, note; then what holds for all plans."""
    rows = figures(plan)
    width = max(len(name) for name in rows)
    lines = [f"{name:{width}}  {value.value:<10.4g} {value.source:13} {value.note}" for name, value in rows.items()]
    nets = [f"{plan.network.name}: a server of {plan.network.server.cards} cards, a superpod of {plan.network.superpod.cards}"]
    return [*lines, *nets, *FIXED]


def plain(plan: Plan) -> dict[str, Any]:
    """The plan as JSON types; bytes and seconds."""
    return {
        "name": plan.name,
        "cards": plan.cards,
        "card": plan.card.to_dict(),
        "network": plan.network.to_dict(),
        "assumptions": {**plan.assumed.to_dict(), "fixed": list(FIXED)},
        "totals": totals(plan.model.config),
        "tried": plan.tried,
        "best": [_plain(one) for one in plan.best],
        "closest": _plain(plan.closest) if plan.closest else None,
    }


def _plain(one: Estimate) -> dict[str, Any]:
    return {
        "setup": one.setup.model_dump(mode="json"),
        "ranks": one.setup.world,
        "step_seconds": one.step,
        "tokens_per_day": one.tokens_per_day,
        "mfu": one.mfu,
        "bubble": one.bubble,
        "exposed_without_shortcut": one.exposed_share(False),
        "exposed_with_shortcut": one.exposed_share(),
        "fits": one.fits,
        "peak_bytes": one.peak,
        "memory_by_stage": [{**{name: getattr(stage, name) for name in MEMORY}, "total": stage.total} for stage in one.memory],
        "seconds_by_stage": [{"compute": t.compute, "exposed": t.exposed, "once": t.once} for t in one.times],
        "bytes_by_stage": [
            [{"purpose": f.purpose, "what": f.what, "calls": f.calls, **dict(zip(LEVELS, f.sent, strict=True))} for f in stage]
            for stage in one.flows
        ],
    }
