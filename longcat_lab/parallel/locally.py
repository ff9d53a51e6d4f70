"""Distributed weights inside blocks that know nothing of them: while a module runs, its weights are plain tensors, the part held here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Shard

Weight = tuple[nn.Module, str]  # a module, and the name of one of its own parameters


def run_locally(module: nn.Module, weights: Sequence[Weight], method: str = "forward") -> None:
    """From now on `module.forward` sees the local part of `weights` (DTensors of itself or of modules inside it) as plain tensors.

    Gradients go to the DTensors. Custom operators, and products of parts with parts, take no DTensors.

    Args:
        method: in place of `forward`.
    """
    inner = getattr(module, method)

    def locally(*args: Any, **kwargs: Any) -> Any:
        with _local(weights):
            return inner(*args, **kwargs)

    setattr(module, method, locally)


@contextlib.contextmanager
def _local(weights: Sequence[Weight]) -> Iterator[None]:
    kept = []
    try:
        for owner, name in weights:
            parameter = owner._parameters[name]
            if isinstance(parameter, DTensor):
                kept.append((owner, name, owner._parameters.pop(name)))
                owner.__dict__[name] = parameter.to_local()
        yield
    finally:
        for owner, name, parameter in kept:
            del owner.__dict__[name]
            owner._parameters[name] = parameter


def local(tensor: Tensor) -> Tensor:
    """What this process holds of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def placed(tensor: Tensor) -> tuple[DeviceMesh, tuple[Placement, ...]] | None:
    """How it lies over the processes; None for a plain tensor. Alike for tensors that one fused operation takes together."""
    return (tensor.device_mesh, tuple(tensor.placements)) if isinstance(tensor, DTensor) else None


@contextlib.contextmanager
def whole_weights(module: nn.Module) -> Iterator[None]:
    """Inside, the weights of `module` and of modules in it are whole, for what only looks at them. All that hold a part come here."""
    kept = []
    for owner in module.modules():
        for name, parameter in list(owner._parameters.items()):
            if isinstance(parameter, DTensor):
                kept.append((owner, name, owner._parameters.pop(name)))
                owner.__dict__[name] = parameter.full_tensor()
    try:
        yield
    finally:
        for owner, name, parameter in kept:
            del owner.__dict__[name]
            owner._parameters[name] = parameter


def distribute(owner: nn.Module, name: str, mesh: DeviceMesh, dim: int, whole: Sequence[int]) -> None:
    """Makes the parameter, of which this process holds its part, a DTensor of the shape `whole` that is sharded in `dim` over `mesh`."""
    local = owner._parameters[name].data
    stride = [1]
    for size in reversed(whole[1:]):
        stride.insert(0, stride[0] * size)
    shared = DTensor.from_local(local, mesh, [Shard(dim)], run_check=False, shape=tuple(whole), stride=tuple(stride))
    owner._parameters[name] = nn.Parameter(shared)
