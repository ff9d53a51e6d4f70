"""Checkpoints that are whole or not there: weights in safetensors, the rest loadable with weights_only."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model
from torch import nn

from longcat_lab.errors import LabError
from longcat_lab.files import read_json, save_tensors, write_folder, write_json, write_whole
from longcat_lab.training.optimizer import Optimizers

WEIGHTS = "model.safetensors"


def save_weights(model: nn.Module, path: Path) -> None:
    """Parameters and persistent buffers of `model` as one safetensors file."""
    tensors = {name: tensor.contiguous().cpu() for name, tensor in model.state_dict().items()}
    write_whole(path, lambda temporary: save_tensors(tensors, temporary))


def load_weights(model: nn.Module, path: Path) -> None:
    """Raises LabError where the file is missing, cut short, or of another model."""
    try:
        load_model(model, str(path))
    except Exception as error:
        why = str(error).splitlines()[0]
        raise LabError(f"{path}: these weights cannot be loaded into this model ({why}); delete their folder to train anew.") from None


def save(
    folder: Path, identity: str, step: int, model: nn.Module, optimizer: torch.optim.Optimizer | Optimizers, state: dict[str, Any]
) -> None:
    """Writes `folder/checkpoint-STEP` in one step, then removes older ones."""
    path = folder / f"checkpoint-{step:08d}"

    def write(temporary: Path) -> None:
        save_weights(model, temporary / WEIGHTS)
        rest = {"optimizer": optimizer.state_dict(), "random": torch.get_rng_state(), "buffers": _transient(model)}
        content = io.BytesIO()  # torch's writer hides the operating system's error (a full disk) in one of its own
        torch.save(rest, content)
        (temporary / "optimizer.pt").write_bytes(content.getbuffer())
        write_json(temporary / "state.json", {"identity": identity, "step": step, **state})

    if not path.exists():
        write_folder(path, write)
    for older in _all(folder)[:-1]:
        shutil.rmtree(older)


def latest_step(folder: Path) -> int:
    """Steps done in the newest checkpoint, 0 if there is none."""
    found = _all(folder)
    return int(found[-1].name.removeprefix("checkpoint-")) if found else 0


def load_latest(folder: Path, identity: str, model: nn.Module, optimizer: torch.optim.Optimizer | Optimizers) -> dict[str, Any] | None:
    """Puts the newest checkpoint into model and optimizer; its state (`step` and what was saved with it), or None if there is none.

    Raises:
        LabError: it is damaged, or of another run; nothing has been loaded then.
    """
    found = _all(folder)
    if not found:
        return None
    latest = found[-1]
    state = read_json(latest / "state.json")
    if not isinstance(state, dict) or "identity" not in state:
        raise LabError(f"{latest}: this checkpoint is damaged (state.json cannot be read); delete it to start the run anew.")
    if state["identity"] != identity:
        raise LabError(f"{latest} belongs to another run ({state['identity']}, this one is {identity}): give another folder or delete it.")
    try:
        rest = torch.load(latest / "optimizer.pt", weights_only=True, map_location="cpu")
    except Exception:  # whatever torch finds wrong with it
        raise LabError(f"{latest}: this checkpoint is damaged (optimizer.pt cannot be read); delete it to start the run anew.") from None
    optimizer.load_state_dict(rest["optimizer"])
    load_weights(model, latest / WEIGHTS)
    for name, buffer in _transient(model).items():
        buffer.copy_(rest["buffers"][name])
    torch.set_rng_state(rest["random"])
    return state


def remove_leftovers(folder: Path) -> None:
    """What a killed run was writing; the caller holds the folder's lock."""
    for path in folder.glob(".checkpoint-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(f".{WEIGHTS}.*.tmp"):
        path.unlink(missing_ok=True)


def remove_all(folder: Path) -> None:
    for path in _all(folder):
        shutil.rmtree(path)


def _transient(model: nn.Module) -> dict[str, torch.Tensor]:
    """Buffers that are no part of the model but of the run, such as what was counted so far."""
    kept = model.state_dict()
    return {name: buffer for name, buffer in model.named_buffers() if name not in kept}


def _all(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint-*"))
