"""Training without the memory it needs: one sentence with the settings that decide how much is taken."""

from __future__ import annotations

import gc
import traceback

import torch

from longcat_lab.config import RunConfig
from longcat_lab.errors import LabError


def sentence(config: RunConfig, device: torch.device, step: int | None) -> LabError:
    """What to change, as an error to raise.

    Args:
        step: steps that are done; None while the run is set up.
    """
    data, training = config.data, config.training
    cures = [f"lower data.batch_size (now {data.batch_size}) or data.sequence_length (now {data.sequence_length})"]
    if step is None:
        where = "before the first step"
    elif step >= training.steps:
        where = "in the evaluation after the last step"
    else:
        where = f"at step {step + 1} of {training.steps}"
        size = training.micro_batch_size or data.batch_size
        smaller = next((part for part in range(size // 2, 0, -1) if data.batch_size % part == 0), None)
        same = [f"training.micro_batch_size={smaller}"] if smaller else []
        same += [] if training.recompute else ["training.recompute=true"]
        if same:
            cures.insert(0, f"set {' or '.join(same)}, which train the same in less")
    return LabError(f"Out of memory on {device} {where}: {'; or '.join(cures)}.")


def let_go(error: BaseException, device: torch.device) -> None:
    """Frees what the functions that `error` went through still hold, so that the same notebook can try again with less."""
    traceback.clear_frames(error.__traceback__)
    gc.collect()
    if device.type != "cpu":
        torch.accelerator.empty_cache()
