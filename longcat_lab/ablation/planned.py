"""What a sweep would be, before it is one: its jobs, what they cost, what is held equal, and what its seeds can tell apart."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longcat_lab.ablation import cores, evaluated, executors, match, measured, places, seeds, spec, store, sweep, tuning
from longcat_lab.ablation import jobs as job_plan
from longcat_lab.ablation.match import Solution
from longcat_lab.ablation.measured import Measured
from longcat_lab.ablation.quantities import FOUR, STEPS, WORDS, setting
from longcat_lab.ablation.rooms import Rooms
from longcat_lab.ablation.spec import Ablation
from longcat_lab.ablation.table import span
from longcat_lab.errors import LabError

DONE = ("finished", "diverged")


@dataclass(frozen=True)
class Forecast:
    """A sweep that has not begun, or not ended.

    Attributes:
        status: (variant, seed) -> what has become of the job so far; `to do` where it is to run.
        measured: variant -> what a few steps of it took; empty where nothing was measured.
        seconds: of the jobs that are to run, one after the other; None where nothing was measured.
        wall, core_hours: of the same, `slots` at a time.
        resolvable: smallest effect that the planned seeds find with 80 % power, at the noise known so far; NaN where none is known.
        seeds_needed: pairs that would find the smallest effect that matters; None where that is not known or out of reach.
        lines: all of it in words.
    """

    ablation: Ablation
    solution: Solution
    status: dict[tuple[str, int], str]
    measured: dict[str, Measured] = field(default_factory=dict)
    slots: int = 1
    seconds: float | None = None
    wall: float | None = None
    core_hours: float | None = None
    resolvable: float = math.nan
    seeds_needed: int | None = None
    lines: tuple[str, ...] = ()


def forecast(
    ablation_path: str | Path,
    out: str | Path | None = None,
    jobs: int | None = None,
    overrides: Iterable[str] = (),
    *,
    measure: bool = True,
    executor: str | executors.Executor = "local",
    rooms: Rooms | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Forecast:
    """What `run` with the same arguments would do. Starts no job and writes nothing in the sweep's folder.

    Args:
        measure: run a few steps of each variant to know the cost; here, wherever the jobs will run.
        say: told what is being measured.

    Raises:
        LabError: the question cannot be run as it is, or its steps cannot be measured.
    """
    rooms = rooms or Rooms()
    if jobs is not None and jobs < 1:
        raise LabError(f"--jobs must be at least 1, got {jobs}.")
    a = spec.read(ablation_path, overrides)
    files = places.check(a)
    notebook = job_plan.find_notebook(a, ablation_path)
    folder = Path(out) if out is not None else Path("runs") / a.name
    store.check_folder(folder, a.name)
    engine = executors.make(executor, a.resources, jobs, folder, rooms)
    a = sweep.before(a, folder, rooms, jobs, say, measure, engine)
    solution = match.solve(a, rooms)
    evaluated.check(a, solution, rooms)
    job_plan.check_processes(a, solution, notebook, rooms)
    cores.reserve(engine, a, solution)
    threads, slots = sweep.threads(a, jobs, folder, rooms, engine), int(getattr(engine, "slots", jobs or 1))
    head, status, tuned, settled = _jobs_of(a, solution, folder, notebook, rooms)
    todo = {cell: each for cell, each in status.items() if each not in DONE}
    known = _measured(a, solution, rooms, threads, say) if measure and (todo or tuned) else {}
    slots = max(1, min(slots, len(todo) + sum(tuned.values())))
    costs = _cost(a, solution, known, todo, tuned, slots, threads, getattr(engine, "forks", False))
    if executor != "local" and (known or a.measured):
        costs["lines"].append("Steps were measured on this machine: where the jobs run they may take another time.")
    told, found = seeds.told(a, folder, settled.configs[a.baseline], rooms)
    lines = (*head, *files, "", *_matching(a, solution, known), "", *costs.pop("lines"), "", *told)
    return Forecast(a, solution, status, known, slots, **costs, **found, lines=lines)


# ---- jobs


def _jobs_of(
    a: Ablation, solution: Solution, folder: Path, notebook: Path, rooms: Rooms
) -> tuple[list[str], dict[tuple[str, int], str], dict[str, int], Solution]:
    """The words, the fate of each job, how many jobs of the tuning are left for each arm, and the solution with what it chose."""
    tuned: dict[str, int] = {}
    if a.tune is not None:
        tuned, found = _tuning(a, folder)
        if found is not None:
            a = found
            solution = match.solve(a, rooms)
    for config in {rooms.data_key(config): config for config in solution.configs.values()}.values():
        rooms.prepare(config, lambda *said: None)
    status = {}
    for job in job_plan.plan(a, solution, folder, notebook, rooms):
        row = store.result_row(store.read_run(job.folder), job.variant, job.seed, job.identity)
        fate = str(row["status"])
        status[job.variant, job.seed] = "to do" if fate == "planned" else fate if fate in DONE else f"to do ({fate} before)"
    done = sum(each in DONE for each in status.values())
    count = f"{_many(len(a.variants), 'variant')} × {_many(len(a.seeds), 'seed')} = {_many(len(status), 'job')}"
    lines = [f"{a.name}: {count}: {done} done, {len(status) - done} to do, in {folder}."]
    if a.tune is not None:
        size = len(tuning.arms(a)) * len(a.tune.values) * len(a.tune.seeds)
        left = sum(tuned.values())
        after = "" if not left else f"; each arm's {a.tune.setting} is chosen by them, before the jobs above"
        lines.append(
            f"Tuning: {len(tuning.arms(a))} arms × {len(a.tune.values)} values × {len(a.tune.seeds)} seeds = {size} jobs: "
            f"{size - left} done, {left} to do, in {folder / tuning.HOME}{after}."
        )
        lines += tuning.lines(a)
    rows = []
    for name in a.variants:
        role = " (control)" if name in a.controls else " (baseline)" if name == a.baseline else ""
        rows.append([f"{name}{role}", *(status[name, seed] for seed in a.seeds)])
    own = setting(solution.configs[a.baseline], "data.seed")
    orders = {seed: a.drawn(a.baseline, seed, own).get("data.seed", seed if own is None else own) for seed in a.seeds}
    heads = ["variant", *(f"seed {seed}" + (f", data {order}" if order != seed else "") for seed, order in orders.items())]
    lines += _table(heads, rows)
    lines += [f"{name} is evaluated from {arm.of}, not trained." for name, arm in a.evaluate.items()]
    return lines, status, tuned, solution


def _tuning(a: Ablation, folder: Path) -> tuple[dict[str, int], Ablation | None]:
    """Arm -> jobs of the tuning that are left, and the question with what it chose once none is."""
    home, size = folder / tuning.HOME, len(a.tune.values) * len(a.tune.seeds)
    try:
        results = store.load_results(home)
    except LabError:
        return dict.fromkeys(tuning.arms(a), size), None
    left = {}
    for arm in tuning.arms(a):
        names = [tuning.variant(arm, i) for i in range(1, len(a.tune.values) + 1)]
        left[arm] = size - int((results["variant"].isin(names) & results["status"].isin(DONE)).sum())
    return left, None if any(left.values()) else tuning.chosen(a, tuning.curves(a, home))


# ---- what is held equal


def _matching(a: Ablation, solution: Solution, known: dict[str, Measured]) -> list[str]:
    if a.match:
        held = [
            f"{WORDS.get(rule.quantity, rule.quantity)} of {', '.join(a.held_by(rule)) or 'no variant'} within {100 * rule.tolerance:g} % "
            f"of {rule.reference}"
            for rule in a.match
        ]
        lines = [f"Held equal: {'; '.join(held)}."]
    else:
        lines = ["Held equal: nothing by a rule."]
    steps = {name: setting(config, STEPS) for name, config in solution.configs.items()}
    seconds = {name: each.step * steps[name] for name, each in known.items()} if not a.measured else {}
    found = {name: {**each, "wall_clock": seconds.get(name, each["wall_clock"])} for name, each in solution.quantities.items()}
    base, rows = found[a.baseline], []
    for name, each in found.items():
        cells = [_amount(each.get(key), base.get(key)) for key in FOUR]
        rows.append([name, *cells, ", ".join(f"{key}={value}" for key, value in solution.moved.get(name, {}).items())])
    lines += _table(["variant", *(WORDS[key] for key in FOUR), "moved"], rows)
    return [*lines, measured.told(a.measured, solution)] if a.measured else lines


def _amount(value: float | None, base: float | None) -> str:
    if value is None:
        return "not measured"
    shown = f"{value:,.0f}" if 1000 <= value < 1e9 else f"{value:.4g}"
    return f"{shown} ({value / base:.3f} ×)" if base else shown


# ---- cost


def _measured(a: Ablation, solution: Solution, rooms: Rooms, threads: int, say: Callable[[str], None]) -> dict[str, Measured]:
    """Variant -> its cost; those whose steps are the same are measured once."""
    found, by_mark = {}, {}
    for name, config in solution.configs.items():
        mark = measured.fingerprint(config)
        if mark not in by_mark:
            say(f"{name}: measuring some steps")
            try:
                by_mark[mark] = rooms.measure(config, threads, a.resources.together)
            except LabError as error:
                raise LabError(f"{a.at('variants', name)}Variant '{name}': {error}") from None
        found[name] = by_mark[mark]
    return found


def _cost(
    a: Ablation,
    solution: Solution,
    known: dict[str, Measured],
    todo: dict[tuple[str, int], str],
    tuned: dict[str, int],
    slots: int,
    threads: int,
    forked: bool,
) -> dict[str, Any]:
    if not known:
        why = "every job is done" if not todo and not sum(tuned.values()) else "nothing was measured"
        return {"lines": [f"Cost: {why}."]}
    steps = {name: setting(config, STEPS) for name, config in solution.configs.items()}
    rows = []
    for name, each in known.items():
        span_of = f"{min(each.steps):.3g} to {max(each.steps):.3g}"
        memory = "" if each.peak_memory is None else f"{each.peak_memory / 1e6:,.0f} MB"
        job = span(each.job(steps[name], forked))
        rows.append([name, f"{steps[name]}", f"{each.step:.3g}", span_of, f"{each.setup:.1f}", f"{each.evaluation:.1f}", job, memory])
    count = {len(each.steps) for each in known.values()}
    how_many = f"{min(count)}" if len(count) == 1 else f"{min(count)} to {max(count)}"
    together = a.resources.together
    size = f"{_many(threads, 'thread')} each" if together == 1 else f"{together} processes and {_many(threads, 'thread')} each"
    lines = [f"Cost, from {how_many} measured steps of each variant, one at a time, {size}:"]
    lines += _table(["variant", "steps", "s/step", "least to most", "set-up s", "evaluation s", "a job", "peak memory"], rows)
    first = [known[name].job(a.tune.steps or steps[name], forked) for name, left in tuned.items() for _ in range(left)] if a.tune else []
    then = [known[name].job(steps[name], forked) for name, _ in todo]
    shared = max(each.imports for each in known.values()) if forked else 0.0  # once, by the process of which the jobs are forks
    wall = shared + _side_by_side(first, slots) + _side_by_side(then, slots)  # the tuning ends before the rest begins
    seconds = shared + sum(first) + sum(then)
    hours = seconds * threads / 3600
    alone = "" if slots == 1 else f", if {slots} at a time run as fast as one alone"
    lines.append(
        f"All that is to do: {_many(len(first) + len(then), 'job')}, about {span(wall)} at --jobs {slots}, {hours:.2g} core-hours{alone}; "
        "the start of each job's notebook comes on top."
    )
    if forked:
        lines.append(f"Jobs are forks of one process: its imports ({shared:.1f} s of each set-up) count once.")
    if together > 1:
        lines.append("Processes that train together were stopped before they evaluate, which comes on top.")
    if any(setting(config, "training.growth") or setting(config, "training.conversion") for config in solution.configs.values()):
        lines.append("A variant changes while it trains (growth, conversion): its first steps alone were measured.")
    return {"lines": lines, "seconds": seconds, "wall": wall, "core_hours": hours}


def _side_by_side(lengths: Sequence[float], slots: int) -> float:
    ends = [0.0] * max(1, slots)
    for length in lengths:
        heapq.heapreplace(ends, ends[0] + length)
    return max(ends)


# ---- text


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as what is in them; an empty last column is left out."""
    if all(not row[-1] for row in rows):
        heads, rows = heads[:-1], [row[:-1] for row in rows]
    widths = [max(len(str(line[i])) for line in [heads, *rows]) for i in range(len(heads))]
    return ["  " + "  ".join(str(cell).ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in [heads, *rows]]
