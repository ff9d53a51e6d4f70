"""A run's folder, read while it is written: what is new in its metrics, how far it is, how it ended."""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from longcat_lab.files import read_json

POINTS = 1400  # of a curve, at most: more than a small panel has pixels
# Curve to its title and unit, in the order of the panels. Other `…_bpb` columns follow.
TITLES = {
    "loss": ("training loss", "nats a token"),
    "train_bpb": ("bits per byte", "of training text"),
    "validation_bpb": ("validation", "bits per byte"),
    "learning_rate": ("learning rate", ""),
    "busiest_expert": ("busiest real expert", "times the mean"),
    "real_experts_per_token": ("real experts a token", ""),
    "index_kl": ("indexer KL", "nats"),
    "gradient_norm": ("gradient norm", "before clipping"),
}
# Curve to the one in whose panel it is drawn as points if any run has that one, and what the two are called there.
POINTS_OF = {"validation_bpb": "train_bpb"}
TOGETHER = {"train_bpb": "training", "validation_bpb": "validation"}
OF_THE_RUN = ("loss", "learning_rate", "gradient_norm")
TOLD = ("step", "steps", "tokens_per_second", "seconds_left", "loss")  # of progress.json
OF_BLOCKS = ("real_experts_per_token", "index_kl")


def title_of(curve: str) -> tuple[str, str]:
    """Title and unit of a curve."""
    return TITLES.get(curve) or (curve.removesuffix("_bpb").replace("_", " "), "bits per byte")


def panels_of(runs: Iterable[Mapping[str, Any]]) -> list[tuple[str, str, str, str]]:
    """The panels for the curves of these runs: curve, the one that is drawn as points beside it (or ""), title, unit."""
    names = list(dict.fromkeys(curve for each in runs for curve in each))
    names = [name for name in TITLES if name in names] + [name for name in names if name not in TITLES]
    beside = {POINTS_OF[name]: name for name in names if POINTS_OF.get(name) in names}
    found = []
    for name in (name for name in names if name not in beside.values()):
        title, unit = title_of(name)
        found.append((name, beside.get(name, ""), title, "" if name in beside else unit))  # two say in their legend what each is of
    return found


def thin(x: np.ndarray, y: np.ndarray, limit: int = POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most `limit` points of a curve as float32: the first, the last, and the lowest and the highest of each stretch between."""
    finite = np.isfinite(x) & np.isfinite(y)
    x, y = x[finite], y[finite]
    if len(y) > limit:
        inner = np.arange(1, len(y) - 1)
        size = -(-len(inner) // ((limit - 2) // 2))
        stretches = np.pad(inner, (0, -len(inner) % size), mode="edge").reshape(-1, size)
        rows = np.arange(len(stretches))
        ends = (stretches[rows, pick(y[stretches], axis=1)] for pick in (np.argmin, np.argmax))
        chosen = np.unique(np.concatenate([[0, len(y) - 1], *ends]))
        x, y = x[chosen], y[chosen]
    return x.astype(np.float32), y.astype(np.float32)


class Follower:
    """What is known of the run in `folder`; `refresh` reads what is new.

    Attributes:
        record: run.json. progress: progress.json, empty until this sitting has told of a step.
        load: of the last row, each slot's share of the tokens (real experts, then zero-experts), in the mixture whose busiest real
            expert is furthest above its mean: a mean over the mixtures would hide that one of them has collapsed.
        load_of: that mixture.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.record: dict[str, Any] = {}
        self.progress: dict[str, Any] = {}
        self._seen: dict[str, Any] = {}
        self._clear()

    def _clear(self) -> None:
        self._offset, self._inode = 0, -1
        self._values: dict[str, tuple[array[float], array[float]]] = {}
        self.load: list[float] = []
        self.load_of = ""
        self.last: dict[str, float] = {}

    def refresh(self) -> bool:
        """Reads what is new. True if anything is."""
        found = self._read_rows()
        for name, keep in (("run.json", self._keep_record), ("progress.json", self._keep_progress)):
            state = state_of(self.folder / name)
            if state != self._seen.get(name):
                self._seen[name] = state
                keep(read_json(self.folder / name))
                found = True
        return found

    def _keep_record(self, record: Any) -> None:
        self.record = record if isinstance(record, dict) else {}
        self._seen.pop("progress.json", None)  # it counts only if it is newer than the record of this sitting

    def _keep_progress(self, progress: Any) -> None:
        record, written = state_of(self.folder / "run.json"), state_of(self.folder / "progress.json")
        old = record and written and written[1] < record[1] and self.record.get("status") == "running"
        told = isinstance(progress, dict) and all(_is_number(progress.get(name)) for name in TOLD)
        self.progress = progress if told and not old else {}

    def _read_rows(self) -> bool:
        try:
            with open(self.folder / "metrics.jsonl", "rb") as handle:
                # A resumed run writes the file anew, without the rows that were logged after its checkpoint.
                state = _stat(handle.fileno())
                if state[0] != self._inode or state[2] < self._offset:
                    self._clear()
                    self._inode = state[0]
                handle.seek(self._offset)
                new = handle.read()
        except OSError:
            return False
        end = new.rfind(b"\n") + 1  # half a line waits for its other half
        self._offset += end
        for line in new[:end].splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and _is_number(row.get("tokens")) and _is_number(row.get("step")):
                self._add(row)
        return end > 0

    def _add(self, row: dict[str, Any]) -> None:
        found = {name: row[name] for name in row if name in OF_THE_RUN or (name.endswith("_bpb") and "/" not in name)}
        for name in OF_BLOCKS:
            found[name] = _mean([row[key] for key in row if key.endswith(f"/{name}")])
        violations = [row[key] for key in row if key.endswith("/max_violation") and _is_number(row[key])]
        found["busiest_expert"] = 1 + max(violations) if violations else None
        loads = {key.removesuffix("/expert_load"): row[key] for key in row if key.endswith("/expert_load")}
        loads = {block: load for block, load in loads.items() if isinstance(load, list) and load and all(map(_is_number, load))}
        if loads:
            busiest = max(loads, key=lambda block: self._busiest(loads[block]))
            self.load, self.load_of = loads[busiest], busiest.removesuffix(".router").removesuffix(".mlp").replace("layers.", "layer ")
        for name, value in found.items():
            if _is_number(value):
                x, y = self._values.setdefault(name, (array("d"), array("d")))
                x.append(row["tokens"])
                y.append(value)
                self.last[name] = value
        self.last["tokens"], self.last["step"] = row["tokens"], row["step"]

    def curves(self, limit: int = POINTS) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Curve to tokens and values, thinned; in the order of the panels. A finished run's held-out loss is its last point."""
        values = {name: (np.array(x), np.array(y)) for name, (x, y) in self._values.items()}
        final = part(self.record, "final")
        if self.record.get("status") == "finished" and _is_number(final.get("validation_bpb")) and _is_number(final.get("tokens")):
            x, y = values.get("validation_bpb", (np.empty(0), np.empty(0)))
            if not len(x) or x[-1] < final["tokens"]:
                values["validation_bpb"] = np.append(x, final["tokens"]), np.append(y, final["validation_bpb"])
        known = [name for name in TITLES if name in values]
        return {name: thin(*values[name], limit) for name in [*known, *sorted(set(values) - set(known))]}

    def asked(self) -> dict[str, float]:
        """Curve to the value that the configuration asks for: real experts a token."""
        moe = part(self.record, "config", "model", "moe")
        wanted = moe.get("expected_real_experts")
        return {"real_experts_per_token": float(wanted)} if moe.get("zero_expert_num") and _is_number(wanted) else {}

    def real_experts(self) -> int:
        """How many of `load` are real experts; all of them where the run does not say."""
        return self._real(self.load)

    def _real(self, load: list[float]) -> int:
        told = part(self.record, "config", "model", "moe").get("n_routed_experts")
        return min(told, len(load)) if isinstance(told, int) and told > 0 else len(load)

    def _busiest(self, load: list[float]) -> float:
        """Load of the busiest real expert as a multiple of the mean of the real ones."""
        real = load[: self._real(load)]
        return max(real) * len(real) / sum(real) if sum(real) else 0.0


def part(record: Any, *names: str) -> dict[str, Any]:
    """The mapping at `names` in a record; empty where there is none, or something else in its place."""
    for name in names:
        record = record.get(name) if isinstance(record, dict) else None
    return record if isinstance(record, dict) else {}


def read_all(folders: Mapping[str, Path]) -> dict[str, Follower]:
    """Name to what is known of the run in its folder now."""
    found = {name: Follower(folder) for name, folder in folders.items()}
    for each in found.values():
        each.refresh()
    return found


def _mean(values: list[Any]) -> float | None:
    numbers = [value for value in values if _is_number(value)]
    return sum(numbers) / len(numbers) if numbers else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def state_of(path: Path) -> tuple[int, int, int] | None:
    """Another value after each write; None where there is no such file."""
    try:
        return _stat(path)
    except OSError:
        return None


def _stat(file: Path | int) -> tuple[int, int, int]:
    """Inode, time of the last change in nanoseconds, size: another one after each write."""
    found = os.stat(file)
    return found.st_ino, found.st_mtime_ns, found.st_size
