"""What each arm cost: totals and measured times, the four ways to call a comparison equal, and which of them was chosen."""

from __future__ import annotations

import math
from statistics import median
from typing import Any

from longcat_lab.ablation.quantities import PASSES, Clock
from longcat_lab.ablation.report.judged import weights
from longcat_lab.ablation.report.parts import NONE, Cell, Lines, Part, figures, finite, number, short, table
from longcat_lab.ablation.spec import Ablation
from longcat_lab.ablation.store import Sweep

# The four conventions, the key of an arm's costs that each compares, and the quantities of a `match` rule that choose it.
CONVENTIONS = {
    "total parameters": ("total_params", ("total_params",)),
    "active parameters": ("active_params", ("active_params",)),
    "training FLOPs": ("training_flops", ("flops_per_token", "flops")),
    "wall-clock": ("seconds", ("wall_clock",)),
}
AXES = {"wall-clock": "seconds of training (wall-clock)"}  # what a figure calls them, where that is not the same
NEAR = 0.01  # of the baseline: called equal in fact


def costs(sweep: Sweep) -> dict[str, dict[str, float | None]]:
    """Arm -> its totals and the medians over its finished seeds of what was measured; None where nothing was.

    An arm that is evaluated from another one has totals alone.
    """
    a, found = sweep.ablation, {}
    for name in a.arms:
        own = sweep.results[(sweep.results["variant"] == name) & (sweep.results["status"] == "finished")]
        runs = [run for (variant, _), run in sorted(sweep.runs.items()) if variant == name and run.get("status") == "finished"]
        timings = [run.get("timings") or {} for run in runs]
        planned = (a.solved.get(name) or {}).get("totals") or {}

        def total(key: str, own: Any = own, planned: dict[str, Any] = planned) -> float | None:
            ran = finite(own[key].median()) if key in own and len(own) else None
            return finite(planned.get(key)) if ran is None else ran

        def measured(key: str, timings: list[dict[str, Any]] = timings) -> float | None:
            values = [value for each in timings if (value := finite(each.get(key))) is not None]
            return median(values) if values else None

        flops, tokens = total("flops_per_token"), total("tokens") if name in a.variants else None
        found[name] = {key: total(key) for key in ("total_params", "active_params", "epochs")} | {
            "flops_per_token": flops,
            "tokens": tokens,
            "training_flops": PASSES * flops * tokens if flops is not None and tokens is not None else None,
            "seconds": measured("training_seconds"),
            "tokens_per_second": measured("tokens_per_second"),
            "peak_memory": measured("peak_memory_bytes"),
        }
    return found


def held(ablation: Ablation) -> dict[str, str]:
    """The conventions that a `match` rule of the question holds: axis and column -> `held equal`, with the arms where not all are."""
    found: dict[str, set[str]] = {}
    for name, (_, quantities) in CONVENTIONS.items():
        for rule in ablation.match:
            if rule.quantity in quantities:
                found.setdefault(name, set()).update([rule.reference, *ablation.held_by(rule)])
    every = {*ablation.variants} - {*ablation.controls}
    words = {name: "held equal" if arms == every else f"held equal: {', '.join(sorted(arms))}" for name, arms in found.items()}
    return words


def parts(sweep: Sweep) -> dict[str, Part]:
    """The tables of cost and of the four matchings, and the words to them."""
    a, known = sweep.ablation, costs(sweep)
    rows = [
        {
            "variant": name,
            **weights(a, name),
            "parameters": number(c["total_params"], 0),
            "active": number(c["active_params"], 0),
            "FLOPs/token": number(c["flops_per_token"], 0),
            "tokens": number(c["tokens"], 0),
            "epochs": number(c["epochs"], 2),
            "training FLOPs": short(c["training_flops"]),
            "seconds of training": number(c["seconds"], 1),
            "tokens/s": number(c["tokens_per_second"], 0),
            "peak memory": short(c["peak_memory"], "B"),
        }
        for name, c in known.items()
    ]
    chosen, base = held(a), known[a.baseline]
    title = {name: f"{name} ({chosen[name]})" if name in chosen else name for name in CONVENTIONS}
    ratios = [
        {"variant": name, **{title[each]: ratio(c[key], base[key]) for each, (key, _) in CONVENTIONS.items()}} for name, c in known.items()
    ]
    found = {
        "cost-table": table(rows),
        "matching-table": table(ratios, tuple(title[name] for name in chosen)),
        "matching-words": Lines(tuple(_words(a, known, chosen)), "ul"),
    }
    return found | ({"tuning-table": table(_tuning(a))} if a.tuning else {})


def _tuning(a: Ablation) -> list[dict[str, Any]]:
    """A row an arm: what each value of the tuned setting reached on the tuning's seeds, and which was taken."""
    told = a.tuning
    values = sorted({value for curve in told["means"].values() for value, _ in curve})
    rows = []
    for name, curve in told["means"].items():
        means = dict(map(tuple, curve))
        row: dict[str, Any] = {f"tuned arm: {told['metric']}, mean of {len(told['seeds'])} other seeds": name}
        row |= {f"{told['setting']} {value:g}": number(means.get(value), 4) for value in values}
        rows.append(row | {"taken": figures(told["chosen"][name])})
    return rows


def _step(a: Ablation, name: str) -> float:
    clock = Clock.of(a.measured[name])
    return clock.at(((a.solved.get(name) or {}).get("moved") or {}).get(clock.key))


def ratio(value: float | None, base: float | None) -> Cell:
    """`1.25 ×` the baseline's."""
    if value is None or not base:
        return Cell(NONE)
    return Cell(f"{value / base:.2f} ×", value / base)


def _words(a: Ablation, known: dict[str, dict[str, float | None]], chosen: dict[str, str]) -> list[str]:
    said = []
    for rule in a.match:
        moved = "; ".join(f"{name}: {key}" for name, key in rule.free.items())
        said.append(
            f"{rule.quantity} of {', '.join(a.held_by(rule))} held within {100 * rule.tolerance:g} % of {rule.reference}"
            + (f" by moving {moved}" if moved else "")
        )
    if a.measured:
        steps = [f"{name} {_step(a, name):.3g}" for name in a.measured]
        said.append(f"wall_clock was held on seconds a step that were measured beforehand: {', '.join(steps)}")
    if not a.match:
        said.append("The question file holds none of the four equal by a rule")
    base, equal = known[a.baseline], []
    for name, (key, _) in CONVENTIONS.items():
        values = [known[arm][key] for arm in a.variants]
        if base[key] and all(v is not None and math.isclose(v, base[key], rel_tol=NEAR) for v in values) and name not in chosen:
            equal.append(name)
    if equal and len(a.variants) > 1:
        said.append(f"Equal within {100 * NEAR:g} % in all trained arms, without a rule: {', '.join(equal)}")
    said.append(
        f"Training FLOPs are counted as {PASSES} forward passes of every training token, without recomputation and "
        "the stages of a conversion; times and memory are medians over finished seeds, "
        "measured beside whatever else the machine did"
    )
    said.append(f"Tuned: {a.tuned.rstrip('.')}" if a.tuned else "The question file names nothing that was tuned")
    return [f"{line}." for line in said]
