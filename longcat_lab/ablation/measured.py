"""What a job costs, found by running a few of its steps in a process like a job's: `python -m longcat_lab.ablation.measured`.

The process reads a configuration as JSON, trains some steps in a folder that goes away again, evaluates once, and prints what it took.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longcat_lab.ablation.quantities import STEPS, Clock, setting
from longcat_lab.errors import LabError

if TYPE_CHECKING:
    from longcat_lab.ablation.match import Solution
    from longcat_lab.ablation.rooms import Rooms
    from longcat_lab.ablation.spec import Ablation

MEASURED = 5  # steps, after one that is not counted: the first one allocates and compiles
ENOUGH = 60.0  # seconds of steps after which three measured ones will do
GUESSES = 4  # settings that are tried where one is free and time is held equal
NO_PART = ("seed", "tracking", "parallel")  # sections of a configuration that change no step's time here
SAYS = "measured: "


@dataclass(frozen=True)
class Measured:
    """Seconds of one configuration.

    Attributes:
        setup: from the start of the process to the first step: imports, data, model.
        steps: of each measured optimizer step.
        evaluation: of all that a job evaluates at its end.
        peak_memory: bytes of a process, None where it is not known.
        imports: the part of `setup` that a fork of a process which has imported everything does not have.
    """

    setup: float
    steps: tuple[float, ...]
    evaluation: float
    peak_memory: int | None = None
    imports: float = 0.0

    @property
    def step(self) -> float:
        return statistics.median(self.steps)

    @property
    def spread(self) -> float:
        """Distance from the fastest to the slowest measured step, over the median."""
        return (max(self.steps) - min(self.steps)) / self.step

    def job(self, steps: int, forked: bool = False) -> float:
        """Seconds of a whole job of so many steps."""
        return self.setup - forked * self.imports + steps * self.step + self.evaluation


def measure(config: Any, threads: int, processes: int = 1, steps: int = MEASURED) -> Measured:
    """Runs a few steps of `config` with the threads and processes of a job. Nothing else should run meanwhile. Many processes stop before
    they evaluate.

    Raises:
        LabError: it cannot be trained here, with the sentence of the process that tried.
    """
    from longcat_lab.training.environment import environment_for

    with tempfile.TemporaryDirectory(prefix="longcat-lab-measured-") as place:
        asked = {
            "config": config.to_dict(),
            "folder": str(Path(place) / "run"),
            "steps": steps,
            "processes": processes,
            "began": time.time(),
        }
        done = subprocess.run(
            [sys.executable, "-m", __name__], input=json.dumps(asked), capture_output=True, text=True, env=environment_for(threads)
        )
    told = next((line.removeprefix(SAYS) for line in done.stdout.splitlines() if line.startswith(SAYS)), None)
    if told is None:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise LabError(f"Its steps cannot be measured here: {lines[-1]}")
    found = json.loads(told)
    return Measured(**{**found, "steps": tuple(found["steps"])})


def _main() -> None:
    from longcat_lab.config import apply, load
    from longcat_lab.data import prepare
    from longcat_lab.model import build
    from longcat_lab.training import device, evaluation_arms, fit
    from longcat_lab.training.evaluation import evaluate_all

    asked = json.load(sys.stdin)
    threading.Thread(target=_end_with_parent, args=(os.getppid(), Path(asked["folder"]).parent), daemon=True).start()
    imports = time.time() - asked["began"]
    quiet = {"tracking.wandb": "off", "training.keep_model": False, "training.checkpoint_every": 10**9}
    if asked["processes"] > 1:
        config = apply(load(asked["config"]), {**quiet, "training.log_every": 1})
        return _tell(**_together(config, Path(asked["folder"]), asked["steps"], asked["processes"], asked["began"]))
    config, ends = apply(load(asked["config"]), quiet), [time.time()]

    def enough() -> bool:
        ends.append(time.time())
        count = len(ends) - 2  # steps that count
        return count >= asked["steps"] or (count >= 3 and ends[-1] - ends[1] > ENOUGH)

    run = fit(config, asked["folder"], progress=False, stop=enough)
    timings, seconds = run.record["timings"], [b - a for a, b in itertools.pairwise(ends[1:])]
    if not seconds:  # of one or two steps nobody asks whether to stop in between
        seconds = [timings["training_seconds"] / timings["steps_done"]]
    corpus, place = prepare(config.data, config.model.vocab_size), device.choose(config.training.device)
    with device.deterministic(config.training.threads):
        model = build(config).to(place)
        began = time.perf_counter()
        evaluate_all(model, corpus, config)
        evaluation_arms.evaluate_arms(model, corpus, config)
        evaluation = time.perf_counter() - began
    first = (ends[1] - statistics.median(seconds)) if len(ends) > 1 else time.time() - evaluation - timings["training_seconds"]
    peak = timings.get("peak_memory_bytes")
    _tell(setup=first - asked["began"], steps=seconds, evaluation=evaluation, peak_memory=peak, imports=imports)


def _together(config: Any, folder: Path, steps: int, processes: int, began: float) -> dict[str, Any]:
    """What processes take that train together; they are stopped after so many steps, of which the first one does not count."""
    from longcat_lab.training import fit

    lines = folder / "metrics.jsonl"

    def enough() -> bool:
        return lines.is_file() and lines.read_bytes().count(b"\n") > steps

    run = fit(config, folder, nproc=processes, progress=False, stop=enough)
    timings, ends = run.record["timings"], [0.0, *run.metrics["seconds"]]
    spent = [b - a for a, b in itertools.pairwise(ends)]
    evaluation = timings.get("evaluation_seconds", 0.0)
    setup = time.time() - began - timings["training_seconds"] - evaluation
    return {"setup": setup, "steps": spent[1:] or spent, "evaluation": evaluation, "peak_memory": timings.get("peak_memory_bytes")}


def _end_with_parent(parent: int, place: Path) -> None:
    """Nobody waits for the answer any more, nor removes the folder."""
    while os.getppid() == parent:
        time.sleep(0.5)
    shutil.rmtree(place, ignore_errors=True)
    os._exit(1)


def _tell(**found: Any) -> None:
    print(f"{SAYS}{json.dumps(found)}", flush=True)


# ---- time held equal


def fingerprint(config: Any) -> str:
    """What tells configurations apart whose steps may take another time."""
    plain = {key: value for key, value in config.to_dict().items() if key not in NO_PART}
    plain["training"] = {key: value for key, value in (plain.get("training") or {}).items() if key != "steps"}
    if isinstance(plain.get("data"), dict):
        plain["data"] = {**plain["data"], "seed": None}
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()[:12]


def clocks(ablation: Ablation, rooms: Rooms, threads: int, before: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    """What the question keeps under `measured`: for each variant whose time a rule holds equal, seconds a step, at some values of the
    setting that is free.

    Args:
        before: what the sweep's folder has of this; where a variant is the same, it is taken over.

    Raises:
        LabError: a variant cannot be trained here.
    """
    rule = next((rule for rule in ablation.match if rule.quantity == "wall_clock"), None)
    if rule is None or ablation.measured:
        return ablation.measured
    from longcat_lab.ablation.match import nearest_value, solve

    others = [each for each in ablation.match if each is not rule]
    without = solve(ablation.model_copy(update={"match": others}), rooms)
    found: dict[str, Any] = {}

    def timed(name: str, config: Any) -> Measured:
        say(f"{name}: measuring some steps")
        try:
            rooms.prepare(config, lambda *said: None)
            return rooms.measure(config, threads, ablation.resources.together)
        except LabError as error:
            raise LabError(f"{ablation.at('variants', name)}Variant '{name}': {error}") from None

    for name in [rule.reference, *ablation.held_by(rule)]:
        config, key = without.configs[name], rule.free.get(name)
        key = None if key == STEPS else key
        mark = fingerprint(config)
        if (before.get(name) or {}).get("mark") == mark and before[name].get("setting") == key:
            found[name] = before[name]
            continue
        first = timed(name, config)
        start = setting(config, key) if key else 0
        if type(start) is not int:  # `solve` has the sentence
            key, start = None, 0
        points, spread = [(float(start), first.step)], first.spread
        reference = found.get(rule.reference)
        for _ in range(GUESSES if key and reference else 0):
            goal = Clock.of(reference).seconds(without.configs[rule.reference]) * setting(without.configs[rule.reference], STEPS)

            def total(value: int, name: str = name, key: str = key, config: Any = config, points: Any = points) -> float | None:
                try:
                    changed = rooms.apply(config, {key: value})
                    if len(points) > 1:
                        return Clock(key, tuple(points)).seconds(changed) * setting(changed, STEPS)
                    now, then = (rooms.totals(each)["flops_per_token"] for each in (changed, config))
                    return points[0][1] * now / then * setting(changed, STEPS)
                except LabError:
                    return None

            value = nearest_value(total, int(points[0][0]), goal)
            if value is None or value in [x for x, _ in points]:
                break
            more = timed(name, rooms.apply(config, {key: value}))
            points, spread = [*points, (float(value), more.step)], max(spread, more.spread)
        found[name] = {"mark": mark, "setting": key, "points": [list(point) for point in points], "spread": spread, "threads": threads}
    return found


def told(measured: dict[str, Any], solution: Solution) -> str:
    """What was measured, in a sentence."""
    parts = []
    for name, each in measured.items():
        step = Clock.of(each).seconds(solution.configs[name])
        parts.append(f"{name} {step:.3g} s a step (measured steps differ by {100 * each['spread']:.0f} %)")
    return f"wall_clock rests on measured steps: {', '.join(parts)}."


if __name__ == "__main__":
    try:
        _main()
    except LabError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
