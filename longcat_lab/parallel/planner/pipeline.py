"""Pipeline schedules, played through: who does what when, how long ranks wait, how many micro-batches' activations they hold.

Stages' forward passes take one unit of time, backward passes two: the gradient of the input and the gradient of the weights, one each,
which the zero-bubble schedules do apart. With v chunks a rank a chunk's take 1/v of that.
Source: GPipe (arXiv 1811.06965), 1F1B (arXiv 2006.09503), interleaved 1F1B (arXiv 2104.04473); V-shaped schedules with half (V-Half) or
all (V-ZB) of 1F1B's activations: Qi et al., "Pipeline parallelism with controllable memory" (arXiv 2405.15362).
"""

from __future__ import annotations

import dataclasses
from functools import cache

SCHEDULES = ("gpipe", "1f1b", "interleaved", "v-half", "v-zb")


def chunks_of(schedule: str, stages: int) -> int:
    """Chunks of layers that a rank holds."""
    return 1 if stages == 1 or schedule in ("gpipe", "1f1b") else 2


def rank_of(schedule: str, stages: int, chunk: int) -> int:
    """The stage that holds `chunk` (0 ... chunks x stages - 1, in the model's order). V: down the stages and up again."""
    if schedule.startswith("v-") and chunk >= stages:
        return 2 * stages - 1 - chunk
    return chunk % stages


@dataclasses.dataclass(frozen=True)
class Event:
    """One operation: `what` is F, B (backward; of the V schedules the input's gradient alone) or W (the weights' gradient)."""

    stage: int
    chunk: int
    micro: int
    what: str
    start: float
    end: float


@dataclasses.dataclass(frozen=True)
class Played:
    """A schedule over one step.

    bubble: time that the stages wait, over the time that they work. held: most micro-batches whose activations each stage holds at a
    time; a chunk's count 1 / chunks.
    """

    events: tuple[Event, ...]
    bubble: float
    held: tuple[float, ...]


def limit_of(schedule: str, stages: int) -> int | None:
    """Chunks' activations that a rank of a V schedule may hold: V-ZB as much as 1F1B's first stage, V-Half one more than half of it."""
    return {"v-zb": 2 * stages, "v-half": stages + 2}.get(schedule)


@cache
def play(schedule: str, stages: int, micros: int) -> Played:
    """One step of `micros` micro-batches through `stages` stages."""
    chunks = chunks_of(schedule, stages)
    if stages == 1:
        events = []
        for micro in range(micros):
            events += [Event(0, 0, micro, "F", 3.0 * micro, 3.0 * micro + 1), Event(0, 0, micro, "B", 3.0 * micro + 1, 3.0 * micro + 3)]
        return Played(tuple(events), 0.0, (1.0,))
    events = _played_v(schedule, stages, micros) if schedule.startswith("v-") else _played_fixed(schedule, stages, micros, chunks)
    end = max(event.end for event in events)
    work = 3.0 * micros
    held = []
    for stage in range(stages):
        now, most, last = 0, 0, "W" if schedule.startswith("v-") else "B"
        for event in sorted((e for e in events if e.stage == stage), key=lambda e: e.start):
            now += (event.what == "F") - (event.what == last)
            most = max(most, now + (event.what == last))
        held.append(most / chunks)
    return Played(tuple(events), end / work - 1, tuple(held))


LONG = 4  # micro-batches a stage from which on a schedule only repeats its middle


@cache
def bubble(schedule: str, stages: int, micros: int) -> float:
    """`play(...).bubble`, of long steps by what one more round of micro-batches adds."""
    if micros <= LONG * stages:
        return play(schedule, stages, micros).bubble
    short, long = (LONG - 1) * stages, LONG * stages
    ends = [3 * each * (1 + play(schedule, stages, each).bubble) for each in (short, long)]
    return (ends[1] + (ends[1] - ends[0]) / (long - short) * (micros - long)) / (3 * micros) - 1


def held(schedule: str, stages: int, micros: int) -> tuple[float, ...]:
    """`play(...).held`, which does not grow with the micro-batches from some number on (GPipe: holds all)."""
    if schedule == "gpipe":
        return (1.0,) if stages == 1 else (float(micros),) * stages
    return play(schedule, stages, min(micros, LONG * stages)).held


def fixed_order(schedule: str, stages: int, micros: int, chunks: int, stage: int) -> list[tuple[str, int, int]]:
    """The (what, chunk, micro) of one stage in order."""
    turns = sorted(
        ((micro, part) for micro in range(micros) for part in range(chunks)), key=lambda t: (t[0] // stages, t[1], t[0] % stages)
    )
    forward = [("F", part * stages + stage, micro) for micro, part in turns]
    backward = [("B", (chunks - 1 - part) * stages + stage, micro) for micro, part in turns]
    if schedule == "gpipe":
        return forward + backward
    ahead = stages - stage - 1 if chunks == 1 else 2 * (stages - stage - 1) + (chunks - 1) * stages
    ahead = min(ahead, len(forward))
    mixed = [each for pair in zip(forward[ahead:], backward, strict=False) for each in pair]
    return forward[:ahead] + mixed + backward[len(forward) - ahead :]


def _played_fixed(schedule: str, stages: int, micros: int, chunks: int) -> list[Event]:
    orders = [fixed_order(schedule, stages, micros, chunks, stage) for stage in range(stages)]
    at, free, done, events = [0] * stages, [0.0] * stages, {}, []
    last = stages * chunks - 1
    while any(at[stage] < len(orders[stage]) for stage in range(stages)):
        moved = False
        for stage in range(stages):
            while at[stage] < len(orders[stage]):
                what, chunk, micro = orders[stage][at[stage]]
                before = ("F", chunk - 1, micro) if what == "F" else ("B", chunk + 1, micro) if chunk < last else ("F", chunk, micro)
                if before[1] >= 0 and before not in done:
                    break
                start = max(free[stage], done.get(before, 0.0))
                free[stage] = done[what, chunk, micro] = start + (1 if what == "F" else 2) / chunks
                events.append(Event(stage, chunk, micro, what, start, free[stage]))
                at[stage] += 1
                moved = True
        if not moved:
            raise RuntimeError(f"The schedule {schedule} of {stages} stages and {micros} micro-batches stands still.")
    return events


def _played_v(schedule: str, stages: int, micros: int) -> list[Event]:
    """Greedy within the limit of activations: backward first, then the chunk nearer to the end, then a new micro-batch, else a weights'
    gradient. One chunk's place is kept for the way back up, so that no micro-batch waits for ever. All operations take half a unit, so
    that time goes in ticks.
    """
    limit, last = limit_of(schedule, stages), 2 * stages - 1
    done: dict[tuple[str, int, int], int] = {}
    nexts = [{"F0": 0, "F1": 0, "B0": 0, "B1": 0} for _ in range(stages)]
    waiting: list[list[tuple[int, int]]] = [[] for _ in range(stages)]
    held, events, tick, left = [0] * stages, [], 0, 6 * stages * micros

    def ready(what: str, chunk: int, micro: int) -> bool:
        if micro >= micros:
            return False
        if what == "F":
            return chunk == 0 or done.get(("F", chunk - 1, micro), tick + 1) <= tick
        return done.get(("F", chunk, micro) if chunk == last else ("B", chunk + 1, micro), tick + 1) <= tick

    while left:
        for stage in range(stages):
            first, second, turn = stage, last - stage, nexts[stage]
            chosen = None
            for key, what, chunk in (("B1", "B", second), ("B0", "B", first), ("F1", "F", second), ("F0", "F", first)):
                room = what == "B" or held[stage] < (limit if key == "F1" else limit - 1)
                if room and ready(what, chunk, turn[key]):
                    chosen = (what, chunk, turn[key])
                    turn[key] += 1
                    break
            if chosen is None and waiting[stage]:
                chosen = ("W", *waiting[stage].pop(0))
            if chosen is None:
                continue
            what, chunk, micro = chosen
            held[stage] += (what == "F") - (what == "W")
            if what == "B":
                waiting[stage].append((chunk, micro))
            done[chosen] = tick + 1
            left -= 1
            events.append(Event(stage, chunk, micro, what, tick / 2, (tick + 1) / 2))
        tick += 1
        if tick > 100 * (micros + stages) * 6:
            raise RuntimeError(f"The schedule {schedule} of {stages} stages and {micros} micro-batches stands still.")
    return events
