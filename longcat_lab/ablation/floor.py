"""The noise floor: how far two arms differ that do not differ. A/A arms measure it; it is kept beside the sweeps, by preset and metric.

runs/noise.json: a list of {preset, metric, steps, n, sd, sweep, code}. A sweep that begins keeps what was known then in its own question
(`noise`), so that its page says the same wherever it is read.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longcat_lab.ablation import store, words
from longcat_lab.ablation.paired import FEWEST
from longcat_lab.ablation.quantities import STEPS
from longcat_lab.ablation.statistics import contrast
from longcat_lab.errors import LabError
from longcat_lab.files import read_json, write_json

if TYPE_CHECKING:
    from longcat_lab.ablation.spec import Ablation

NAME = "noise.json"


def place(folder: Path) -> Path:
    """The file that belongs to the sweep in `folder`: beside it, with those of the other sweeps."""
    return folder.resolve().parent / NAME


def preset(ablation: Ablation) -> str:
    """What a question's noise is filed under: the preset's name, or that of the configuration file."""
    return Path(ablation.base).stem if Path(ablation.base).suffix in (".yaml", ".yml") else ablation.base


def known(folder: Path, ablation: Ablation, metric: str | None = None) -> dict[str, Any]:
    """What is known of the noise of a question's preset and metric, from the most pairs; of equally many the latest. Empty: nothing."""
    entries = [e for e in _entries(place(folder)) if (e["preset"], e["metric"]) == (preset(ablation), metric or ablation.metric)]
    return max(reversed(entries), key=lambda entry: entry["n"], default={})


def keep(folder: Path) -> list[dict[str, Any]]:
    """Files the noise that a sweep's A/A arm has measured, in its primary and its secondary metrics; returns what was filed.

    Raises:
        LabError: there is no sweep in the folder, or the file cannot be written.
    """
    sweep = store.read_sweep(folder)
    a = sweep.ablation
    arm = next((name for name, kind in a.controls.items() if kind == words.A_A), None)
    if arm is None:
        return []
    run = next((run for (variant, _), run in sweep.runs.items() if variant == arm and run.get("status") == "finished"), {})
    found = []
    for metric in (a.metric, *a.also):
        c = contrast(sweep.results, arm, a.baseline, metric)
        if c.n >= FEWEST and c.sd > 0:
            steps = ((run.get("config") or {}).get("training") or {}).get(STEPS.rpartition(".")[2])
            code = (run.get("provenance") or {}).get("code")
            own = {"preset": preset(a), "metric": metric, "steps": steps, "n": c.n, "sd": c.sd, "sweep": a.name, "code": code}
            found.append(own)
    if found:
        path = place(folder)
        with _alone(path.parent):
            keys = {(e["preset"], e["metric"], e["sweep"]) for e in found}
            others = [e for e in _entries(path) if (e["preset"], e["metric"], e["sweep"]) not in keys]
            write_json(path, [*others, *found])
    return found


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Of several sweeps that end at once each files its own; nothing is left behind."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise LabError(f"Cannot write {folder / NAME}: {error.strerror}.") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _entries(path: Path) -> list[dict[str, Any]]:
    """What the file says, without what is no entry: it may have been edited."""
    found = read_json(path)
    return [each for each in found if _is_entry(each)] if isinstance(found, list) else []


def _is_entry(each: Any) -> bool:
    if not isinstance(each, dict) or not all(isinstance(each.get(key), str) for key in ("preset", "metric", "sweep")):
        return False
    n, sd = each.get("n"), each.get("sd")
    return type(n) is int and n > 1 and isinstance(sd, int | float) and math.isfinite(sd) and sd > 0


def said(entry: dict[str, Any]) -> str:
    """`sd 0.0042 of a pair's difference in validation_bpb (5 pairs of equal arms, 200 steps, sweep aa)`."""
    steps = f", {entry['steps']} steps" if entry.get("steps") else ""
    pairs = f"{entry['n']} pairs of equal arms{steps}, sweep {entry['sweep']}"
    return f"sd {entry['sd']:.3g} of a pair's difference in {entry['metric']} ({pairs})"


def lines(ablation: Ablation) -> list[str]:
    """What a page says: the floor that was known when the sweep began."""
    if not _is_entry(ablation.noise):
        return []
    return [f"The noise floor that was known of {ablation.noise['preset']} when this sweep began: {said(ablation.noise)}."]
