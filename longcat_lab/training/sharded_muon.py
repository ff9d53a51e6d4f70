"""Muon over the processes of a pipeline stage: every matrix is orthogonalised once, by one of those that hold a part of it.

A momentum lies where its weight lies. In a step the parts of a matrix's update go to its owner, which puts them together, orthogonalises,
and sends each holder its part of the result. A matrix that lies whole on one process (an expert) does not travel.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from longcat_lab.parallel.collectives import count_traffic
from longcat_lab.parallel.dealing import Box, Share, box_size, deal
from longcat_lab.parallel.exchange import exchange
from longcat_lab.parallel.locally import local
from longcat_lab.training.muon import orthogonalise, shape_factor


class ShardedMuon(torch.optim.Optimizer):
    """`StackedMuon` for parameters of which the processes of `group` hold parts (DTensors) or copies. Same knobs, same steps up to the
    order of sums; state: `momentum_buffer`, as the parameter lies. All of the group step together.
    """

    def __init__(self, params: Iterable[Any], group: dist.ProcessGroup, **knobs: Any) -> None:
        super().__init__(params, {**knobs, "stack": 1})
        self.group, self.place = group, dist.get_group_rank(group, dist.get_rank())
        self.members = [p for each in self.param_groups for p in each["params"]]
        self.settings = [each for each in self.param_groups for _ in each["params"]]
        boxes: list[list[Box]] = [None] * group.size()
        dist.all_gather_object(boxes, [_box(p) for p in self.members], group=group)
        self.boxes = boxes
        self.shares = deal([tuple(p.shape) for p in self.members], boxes)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        if not any(p.requires_grad for p in self.members):  # frozen, as in the warm-up of indexers
            return
        updates = [self._update(p, group) for p, group in zip(self.members, self.settings, strict=True)]
        with count_traffic("data"):
            found = self._orthogonalised(updates)
        for parameter, group, update in zip(self.members, self.settings, found, strict=True):
            rows, columns = parameter.shape[-2] // group["stack"], parameter.shape[-1]
            weight = local(parameter)
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            weight.add_(update.view(weight.shape), alpha=-group["lr"] * shape_factor(rows, columns, group["adjust_lr_fn"]))

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        """This process's part of what is orthogonalised, [matrices, rows, columns]."""
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        gradient = torch.zeros_like(local(parameter)) if parameter.grad is None else local(parameter.grad)
        buffer = local(state["momentum_buffer"]).lerp_(gradient, 1 - group["momentum"])
        return _three(gradient.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer)

    def _orthogonalised(self, updates: list[Tensor]) -> list[Tensor]:
        here = self.place
        going = [
            [self._cut(updates, s.parameter, box) for s in self.shares if s.owner == to for r, box in s.sources if r == here] for to in self
        ]
        coming = [[(s, box) for s in self.shares if s.owner == here for r, box in s.sources if r == source] for source in self]
        parts = iter(self._swap(going, [[box for _, box in each] for each in coming], updates[0].dtype))
        whole: dict[Share, Tensor] = {}
        for s in (each for source in coming for each, _ in source):
            if s not in whole:
                whole[s] = updates[0].new_empty(s.matrices[1] - s.matrices[0], *self.members[s.parameter].shape[-2:])
        for s, box in (each for source in coming for each in source):
            _inside(whole[s], box, s.matrices[0]).copy_(next(parts))
        for s, matrices in whole.items():
            group = self.settings[s.parameter]
            done = orthogonalise(matrices.unflatten(1, (group["stack"], -1)).flatten(0, 1), group["ns_steps"], group["eps"])
            whole[s] = done.reshape(matrices.shape)
        back = [
            [_inside(whole[s], box, s.matrices[0]) for s in self.shares if s.owner == here for r, box in s.holders if r == to]
            for to in self
        ]
        mine = [[(s, box) for s in self.shares if s.owner == owner for r, box in s.holders if r == here] for owner in self]
        parts = iter(self._swap(back, [[box for _, box in each] for each in mine], torch.bfloat16))
        found = [torch.empty_like(update) for update in updates]
        for s, box in (each for owner in mine for each in owner):
            self._cut(found, s.parameter, box).copy_(next(parts))
        return found

    def __iter__(self):
        return iter(range(self.group.size()))

    def _cut(self, tensors: list[Tensor], parameter: int, box: Box) -> Tensor:
        """The part `box` of what this process holds of a parameter."""
        own = self.boxes[self.place][parameter]
        return tensors[parameter][tuple(slice(a - o, b - o) for (a, b), (o, _) in zip(box, own, strict=True))]

    def _swap(self, going: list[list[Tensor]], coming: list[list[Box]], kind: torch.dtype) -> list[Tensor]:
        """Every process's parts to their places; what came, sender by sender, in order."""
        sizes = [[box_size(box) for box in each] for each in coming]
        flat = [part.to(kind).flatten() for each in going for part in each]
        device = self.members[0].device
        sent = torch.cat(flat) if flat else torch.empty(0, dtype=kind, device=device)
        got = exchange(sent, [sum(p.numel() for p in each) for each in going], [sum(each) for each in sizes], self.group)
        shapes = [tuple(b - a for a, b in box) for each in coming for box in each]
        return [part.view(shape) for part, shape in zip(got.split([n for each in sizes for n in each]), shapes, strict=True)]


def _three(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, *tensor.shape[-2:])


def _inside(matrices: Tensor, box: Box, first: int) -> Tensor:
    (a, b), rows, columns = box
    return matrices[a - first : b - first, slice(*rows), slice(*columns)]


def _box(parameter: Tensor) -> Box:
    """What this process holds of it."""
    shape, offset = tuple(parameter.shape), (0,) * parameter.ndim
    if isinstance(parameter, DTensor):
        shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    found = tuple((first, first + size) for first, size in zip(offset, shape, strict=True))
    return found if len(found) == 3 else ((0, 1), *found)
