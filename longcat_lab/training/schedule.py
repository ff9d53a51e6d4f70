"""Learning rate over the run."""

from __future__ import annotations

import math

from longcat_lab.config import ScheduleConfig


def learning_rate_factor(step: int, steps: int, schedule: ScheduleConfig) -> float:
    """The multiple of the peak learning rate that optimizer step `step` (0 ... steps - 1) takes.

    wsd: linear from 1/w to 1 over w warm-up steps, 1, then linear to `final_fraction` at the last step over the last
        `decay_fraction` of the steps.
    cosine: the same warm-up, then half a cosine to `final_fraction` at the last step.
    """
    warm, final = schedule.warmup_steps, schedule.final_fraction
    if step < warm:
        return (step + 1) / warm
    start = warm if schedule.kind == "cosine" else max(warm, steps - 1 - round(schedule.decay_fraction * steps))
    if step <= start or steps - 1 <= start:
        return 1.0
    done = (step - start) / (steps - 1 - start)
    shape = (1 + math.cos(math.pi * done)) / 2 if schedule.kind == "cosine" else 1 - done
    return final + (1 - final) * shape
