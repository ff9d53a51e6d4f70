"""A model's and its optimizer's tensors by names that are the same in every layout.

    model/NAME               parameters and buffers, NAME as in the model
    optimizer/NAME/KEY       what the optimizer keeps for the parameter NAME, such as exp_avg

Optimizers number their parameters; stages of a pipeline hold other ones, and a matrix may be stepped by another class where it is
sharded. Name and key are what stays.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Shard

from longcat_lab.errors import LabError

MODEL, OPTIMIZER = "model/", "optimizer/"

# For parameters that are plain tensors though this process holds only some rows of them, cut as Shard(0) cuts: the mesh that shares the
# rows, and how many there are in all. By name.
Rows = Mapping[str, tuple[DeviceMesh, int]]


def model_tensors(model: nn.Module, rows: Rows | None = None) -> dict[str, Tensor]:
    """Parameters and all buffers, those too that are no part of the model but of the run, such as what was counted so far.

    They share the memory of the model's: filled by `Checkpoints.load`, the model is loaded. Of FSDP2 modules the parameters must lie
    sharded, as they do after a step.
    """
    return {MODEL + name: _like(tensor, name, rows) for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def optimizer_tensors(model: nn.Module, optimizer: Any, rows: Rows | None = None) -> dict[str, Tensor]:
    """State of a torch optimizer, or of several with `parts`, for the parameters of `model`; {} before the first step.

    State of the parameter's shape is sharded as the parameter; state [rows] of a table [rows, width] as its rows, be it a DTensor
    already or this process's part as a plain tensor. Whole numbers (counters that are no tensors) become int64.

    Raises:
        LabError: something else is kept, or state by the row of a table whose columns are sharded.
    """
    found = {}
    for name, parameter, _, part in _steps(model, optimizer):
        like = _like(parameter, name, rows)
        for key, value in part.state.get(parameter, {}).items():
            found[f"{OPTIMIZER}{name}/{key}"] = _sharded(value, like, f"{name}/{key}")
    return found


def empty_optimizer_tensors(
    model: nn.Module, optimizer: Any, saved: Mapping[str, TensorStorageMetadata], rows: Rows | None = None
) -> dict[str, Tensor]:
    """Tensors to be filled with the optimizer's state that was saved for the parameters of `model`; the optimizer stays as it is.

    Sharded as `optimizer_tensors` would. Counters lie where torch's optimizers keep theirs.
    """
    found = {}
    keys: dict[str, list[str]] = {}
    for name in saved:
        if name.startswith(OPTIMIZER):
            of, key = name.removeprefix(OPTIMIZER).rsplit("/", 1)
            keys.setdefault(of, []).append(key)
    for name, parameter, group, _ in _steps(model, optimizer):
        like = _like(parameter, name, rows)
        for key in keys.get(name, []):
            entry = saved[f"{OPTIMIZER}{name}/{key}"]
            found[f"{OPTIMIZER}{name}/{key}"] = _empty(entry.size, entry.properties.dtype, like, group, f"{name}/{key}")
    return found


def load_optimizer_tensors(model: nn.Module, optimizer: Any, tensors: Mapping[str, Tensor]) -> None:
    """Gives the optimizer the state that `empty_optimizer_tensors` made and `Checkpoints.load` filled, in place of what it has.

    State of a DTensor is a DTensor, that of a plain tensor is plain; an optimizer with a true attribute `local_state` is given its
    process's parts as plain tensors always.
    """
    state: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        of, key = name.removeprefix(OPTIMIZER).rsplit("/", 1)
        state.setdefault(of, {})[key] = tensor
    for name, parameter, _, part in _steps(model, optimizer):
        part.state.pop(parameter, None)
        if name in state:
            local = getattr(part, "local_state", False) or not isinstance(parameter, DTensor)
            part.state[parameter] = {key: _kept(value, local) for key, value in state[name].items()}


def _steps(model: nn.Module, optimizer: Any) -> Iterator[tuple[str, Tensor, dict[str, Any], torch.optim.Optimizer]]:
    """(name, parameter, its group, the optimizer that steps it)."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for part in getattr(optimizer, "parts", {"": optimizer}).values():
        for group in part.param_groups:
            for parameter in group["params"]:
                yield names[id(parameter)], parameter, group, part


def _like(tensor: Tensor, name: str, rows: Rows | None) -> Tensor:
    """The whole of which `tensor` is what this process holds, in the same memory."""
    tensor = tensor.detach()
    if not rows or name not in rows:
        return tensor
    mesh, total = rows[name]
    return _as(tensor, mesh, [Shard(0)], torch.Size([total, *tensor.shape[1:]]))


def _sharded(value: Any, like: Tensor, name: str) -> Tensor:
    if isinstance(value, int):
        return torch.tensor(value, dtype=torch.int64)
    if not isinstance(value, Tensor):
        raise LabError(f"{name}: a checkpoint holds tensors and whole numbers, not {type(value).__name__}: keep it as one of these.")
    if isinstance(value, DTensor) or not isinstance(like, DTensor) or value.ndim == 0:
        return value
    local = like.to_local().shape
    if value.shape == local:
        return _as(value, like.device_mesh, like.placements, like.shape)
    if value.shape == local[:1]:
        return _as(value, like.device_mesh, _row_placements(like, name), like.shape[:1])
    return value


def _empty(shape: torch.Size, dtype: torch.dtype, like: Tensor, group: dict[str, Any], name: str) -> Tensor:
    if not shape:
        on_device = (group.get("fused") or group.get("capturable")) and dtype != torch.int64
        return torch.empty((), dtype=dtype, device=like.device if on_device else "cpu")
    if not isinstance(like, DTensor) or shape not in (like.shape, like.shape[:1]):
        return torch.empty(shape, dtype=dtype, device=like.device)
    local = like.to_local()
    if shape == like.shape:
        return _as(torch.empty_like(local, dtype=dtype), like.device_mesh, like.placements, shape)
    empty = torch.empty(local.shape[:1], dtype=dtype, device=local.device)
    return _as(empty, like.device_mesh, _row_placements(like, name), shape)


def _as(local: Tensor, mesh: DeviceMesh, placements: Sequence[Placement], shape: torch.Size) -> DTensor:
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)


def _row_placements(like: DTensor, name: str) -> Sequence[Placement]:
    if any(getattr(placement, "dim", 0) > 0 for placement in like.placements):
        raise LabError(f"{name}: one number a row cannot be kept of a table whose columns are sharded: shard its rows.")
    return like.placements


def _kept(value: Tensor, local: bool) -> Tensor | int:
    if value.ndim == 0 and value.dtype == torch.int64:
        return int(value)
    return value.to_local() if local and isinstance(value, DTensor) else value
