"""What a run goes on from, in whatever layout."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from longcat_lab.blocks.table import Table
from longcat_lab.files import remove_temporary
from longcat_lab.parallel import placement
from longcat_lab.parallel.checkpoint import (
    Checkpoints,
    Restored,
    empty_optimizer_tensors,
    load_optimizer_tensors,
    model_tensors,
    optimizer_tensors,
)
from longcat_lab.parallel.world import World
from longcat_lab.training.optimizer import Optimizers
from longcat_lab.training.weights import WEIGHTS

RANDOM = "random"


def store(
    checkpoints: Checkpoints,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | Optimizers,
    world: World,
    state: dict[str, Any],
) -> None:
    """A checkpoint after `step` steps; `state`: plain data, taken from the first process."""
    placement.merge_marks(model, world)
    rows = table_rows(model, world)
    tensors = {**model_tensors(model, rows), **optimizer_tensors(model, optimizer, rows)}
    checkpoints.save(step, tensors, state, {RANDOM: torch.get_rng_state()})


def restore(checkpoints: Checkpoints, model: nn.Module, optimizer: torch.optim.Optimizer | Optimizers, world: World) -> Restored | None:
    """Puts the newest whole checkpoint into model and optimizer; None if there is none.

    Raises:
        LabError: all are damaged, or of another run.
    """
    rows, slots = table_rows(model, world), {}

    def make(saved: dict[str, Any]) -> dict[str, Tensor]:
        slots.update(empty_optimizer_tensors(model, optimizer, saved, rows))
        return {**model_tensors(model, rows), **slots}

    restored = checkpoints.load(make)
    if restored is not None:
        load_optimizer_tensors(model, optimizer, slots)
        torch.set_rng_state(restored.own[RANDOM])
    return restored


def table_rows(model: nn.Module, world: World) -> dict[str, tuple[DeviceMesh, int]]:
    """Tables, of which every process holds some rows as a plain tensor."""
    if world.embedding is None:
        return {}
    return {f"{name}.weight": (world.embedding_mesh, module.rows) for name, module in model.named_modules() if isinstance(module, Table)}


def remove_leftovers(folder: Path) -> None:
    """What a killed run was writing; the caller holds the folder's lock."""
    for path in folder.glob(".checkpoint-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)
    remove_temporary(folder, (WEIGHTS, "run.json", "progress.json", "metrics.*"))
