"""What can be held equal between variants: parameters, active parameters, FLOPs of the whole training, seconds of the whole training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

FOUR = ("total_params", "active_params", "flops", "wall_clock")  # the conventions, of which one is chosen and the others are shown
WORDS = {"total_params": "parameters", "active_params": "active parameters", "flops": "training FLOPs", "wall_clock": "seconds of training"}
PASSES = 3  # forward passes that a training step is counted as: itself, and twice as much going back
STEPS = "training.steps"


def setting(config: Any, key: str) -> Any:
    """The value of a dotted key; None where there is none."""
    value: Any = config.to_dict()
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def tokens(config: Any) -> int | None:
    """Tokens of the whole training; None for a configuration that has no steps."""
    parts = [setting(config, key) for key in (STEPS, "data.batch_size", "data.sequence_length")]
    return int(np.prod(parts, dtype=object)) if all(type(part) is int for part in parts) else None


@dataclass(frozen=True)
class Clock:
    """Seconds a step of one variant, as they were measured.

    Attributes:
        key: the setting that was varied while measuring; None where nothing was.
        points: (its value, median seconds a step). Between and beyond them a straight line is taken.
    """

    key: str | None
    points: tuple[tuple[float, float], ...]

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> Self:
        """From what a question holds under `measured`."""
        return cls(told.get("setting"), tuple((float(x), float(y)) for x, y in told["points"]))

    def seconds(self, config: Any) -> float:
        """Seconds a step of a configuration of this variant."""
        return self.at(setting(config, self.key) if self.key is not None else None)

    def at(self, value: float | None) -> float:
        """The same by the value of the setting that was varied."""
        if value is None or len(self.points) < 2:
            return self.points[-1][1]
        slope, offset = np.polyfit(*np.array(self.points).T, 1)
        return float(max(slope * value + offset, 1e-9))


def quantities(config: Any, totals: Mapping[str, float], clock: Clock | None = None) -> dict[str, float | None]:
    """The totals, and `flops` (of the whole training, PASSES forward passes of every token) and `wall_clock` (seconds of all steps, without
    set-up and evaluation); None where that is not known.
    """
    steps, count, forward = setting(config, STEPS), tokens(config), totals.get("flops_per_token")
    return {
        **totals,
        "flops": PASSES * forward * count if count is not None and forward is not None else None,
        "wall_clock": clock.seconds(config) * steps if clock is not None and type(steps) is int else None,
    }
