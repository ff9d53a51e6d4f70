"""The noise floor: how far two arms differ that do not differ. A/A arms measure it; it is kept beside the sweeps, by preset and metric.

runs/noise.json: a list of {preset, metric, steps, n, sd, sweep, code, fingerprint}. A sweep that begins keeps what was known then in its
own question (`noise`), so that its page says the same wherever it is read, with how far it is about the same thing (`about`).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
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
SAME = "same"
ABOUT = {SAME: "", "code": "of other code", "other": "of another model or length"}  # from what is nearest on
UNKNOWN = "of an unknown model or length"  # older files say nothing of it
# What changes no number that a run of any seed may have, but how it is run, or how much of it is told.
NO_PART = ("seed", "tracking", "parallel", "plugins")
NO_PART_OF_TRAINING = ("evaluations", "keep_model", "checkpoint_every", "log_every", "threads", "device")


def place(folder: Path) -> Path:
    """The file that belongs to the sweep in `folder`: beside it, with those of the other sweeps."""
    return folder.resolve().parent / NAME


def preset(ablation: Ablation) -> str:
    """What a question's noise is filed under: the preset's name, or that of the configuration file."""
    return Path(ablation.base).stem if Path(ablation.base).suffix in (".yaml", ".yml") else ablation.base


def fingerprint(config: Mapping[str, Any]) -> str:
    """What tells baselines apart whose noise may be another: all that a configuration sets but its seeds and how it is run."""
    plain = {key: value for key, value in config.items() if key not in NO_PART}
    for part, without in (("training", NO_PART_OF_TRAINING), ("data", ("seed",))):
        if isinstance(plain.get(part), dict):
            plain[part] = {key: value for key, value in plain[part].items() if key not in without}
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()[:16]


def known(folder: Path, ablation: Ablation, baseline: Callable[[], Any], code: Callable[[], str]) -> dict[str, Any]:
    """What is known of the noise of a question's preset and metric, and in `about` of what (see ABOUT): of what is nearest, from the most
    pairs; of equally many the latest. Empty: nothing.

    Args:
        baseline: its configuration, where there is anything to compare with.
        code: what decides a run's numbers now (see `Rooms.code`).
    """
    entries = [e for e in _entries(place(folder)) if (e["preset"], e["metric"]) == (preset(ablation), ablation.metric)]
    if not entries:
        return {}
    own, words = fingerprint(baseline().to_dict()), [*ABOUT, "unknown"]

    def about(entry: dict[str, Any]) -> str:
        if not isinstance(entry.get("fingerprint"), str):
            return "unknown"
        return "other" if entry["fingerprint"] != own else SAME if entry.get("code") == code() else "code"

    told = [{**entry, "about": about(entry)} for entry in reversed(entries)]
    return max(told, key=lambda entry: (-words.index(entry["about"]), entry["n"]))


def about(entry: Mapping[str, Any]) -> str:
    """Of what else a floor is, in words; empty where it is of the same model, length and code."""
    word = entry.get("about")
    return ABOUT.get(word, UNKNOWN) if isinstance(word, str) else UNKNOWN


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
    run = next((run for (variant, _), run in sweep.runs.items() if variant == a.baseline and run.get("status") == "finished"), {})
    found = []
    for metric in (a.metric, *a.also):
        c = contrast(sweep.results, arm, a.baseline, metric)
        if c.n >= FEWEST and c.sd > 0:
            steps = ((run.get("config") or {}).get("training") or {}).get(STEPS.rpartition(".")[2])
            code = (run.get("provenance") or {}).get("code")
            own = {"preset": preset(a), "metric": metric, "steps": steps, "n": c.n, "sd": c.sd, "sweep": a.name, "code": code}
            found.append(own | {"fingerprint": fingerprint(run.get("config") or {})})
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
    other = about(ablation.noise)
    what = f"{ablation.noise['preset']} when this sweep began{f', {other}' if other else ''}"
    return [f"The noise floor that was known of {what}: {said(ablation.noise)}."]
