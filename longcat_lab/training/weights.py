"""Finished weights as one safetensors file."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_model
from torch import nn

from longcat_lab.errors import LabError
from longcat_lab.files import save_tensors, write_whole

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
