"""When a run is over because its loss is no number, or stays far above where it began. That is a result, and no crash."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from longcat_lab.errors import Diverged

ROWS = 5  # logged rows in a row
CURE = "lower training.optimizer.learning_rate or raise training.schedule.warmup_steps"


def check_number(loss: float, step: int) -> None:
    """Raises Diverged where the loss of a step is no finite number."""
    if not math.isfinite(loss):
        raise Diverged(f"The loss is {loss} at step {step}: {CURE}.")


def stays_above(rows: Sequence[Mapping[str, Any]], factor: float | None) -> bool:
    """Whether each of the last `ROWS` logged rows has a loss of more than `factor` times that of the first one."""
    return factor is not None and len(rows) > ROWS and min(row["loss"] for row in rows[-ROWS:]) > factor * rows[0]["loss"]


def too_high(loss: float, factor: float | None, step: int) -> Diverged:
    """What is told where it does."""
    return Diverged(f"The loss is {loss:.4g} at step {step}, and for {ROWS} rows above {factor:g} times the first one: {CURE}.")
