"""The configurations that a sweep's jobs ran with, an arm each, and whether the jobs of an arm had one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from longcat_lab.ablation import plugin_copies
from longcat_lab.ablation.report.parts import NONE
from longcat_lab.ablation.rooms import Rooms
from longcat_lab.ablation.store import Sweep
from longcat_lab.errors import LabError

OF_A_JOB = ("seed", "tracking", "parallel")  # settings in which the jobs of an arm may differ: seeds, and what decides no number
DRAWN = ("seed", "data.seed")  # what one job draws by and its pair in another arm too
FEW = 6  # settings that one sentence names


def configurations(sweep: Sweep) -> dict[str, dict[str, Any]]:
    """Arm -> configuration of one of its jobs; of an arm that is evaluated: its variant's with its own settings."""
    found: dict[str, dict[str, Any]] = {}
    for (variant, _), config in _settled(sweep):
        found.setdefault(variant, config)
    for name, arm in sweep.ablation.evaluate.items():
        if arm.of in found:
            own = found[arm.of]
            if own.get("plugins"):  # loading it would run code from the folder, which may be anybody's
                found[name] = _nested({**flat(own), **arm.set})
                continue
            try:
                rooms = Rooms()
                found[name] = rooms.apply(rooms.load(own), {**arm.set, "training.evaluations": {}}).to_dict()
            except LabError:  # made by a version that knew other settings: what the arm sets is known all the same
                found[name] = _nested({**flat(own), **arm.set})
    return {name: found[name] for name in sweep.ablation.arms if name in found}


def _settled(sweep: Sweep) -> list[tuple[tuple[str, int], dict[str, Any]]]:
    """((variant, seed), configuration) by seed; plugins by their place in the sweep's folder, wherever that lies."""
    found = []
    for cell, run in sorted(sweep.runs.items(), key=lambda pair: pair[0][1]):
        config = run["config"]
        if config.get("plugins"):
            config = {**config, "plugins": [f"{plugin_copies.HOME}/{Path(path).name}" for path in config["plugins"]]}
        found.append((cell, config))
    return found


def uneven(sweep: Sweep) -> list[str]:
    """A sentence for each job whose settings are not those of its variant's first job: an arm is one configuration and many seeds."""
    first: dict[str, tuple[int, dict[str, Any]]] = {}
    said = []
    for (variant, seed), config in _settled(sweep):
        own = {key: value for key, value in flat(config).items() if key.partition(".")[0] not in OF_A_JOB and key not in DRAWN}
        start, theirs = first.setdefault(variant, (seed, own))
        if odd := [key for key in sorted({*own, *theirs}) if own.get(key, NONE) != theirs.get(key, NONE)]:
            listed = ", ".join(f"{key} {own.get(key, NONE)} and not {theirs.get(key, NONE)}" for key in odd[:FEW])
            more = f" and {len(odd) - FEW} more" if len(odd) > FEW else ""
            said.append(f"{variant}/seed-{seed} was not run with the settings of {variant}/seed-{start}: it has {listed}{more}.")
    return said


def _nested(dotted: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in dotted.items():
        *parents, last = key.split(".")
        node = found
        for part in parents:
            node = node[part] if isinstance(node.get(part), dict) else node.setdefault(part, {})
        node[last] = value
    return found


def flat(data: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys."""
    if not isinstance(data, dict) or not data:
        return {prefix: data}
    return {key: value for name, inner in data.items() for key, value in flat(inner, f"{prefix}.{name}" if prefix else name).items()}
