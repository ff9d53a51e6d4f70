"""Everything that a process sends, counted at torch's own communication operators, whoever calls them: gradients' sums and gathered
weights of FSDP2, the pipeline's states, Muon's exchange, norms, counts.

    with wire.counted() as sent:
        ...                                   # a whole optimizer step
    sent.total, sent.by_kind(), sent.by_group()

`collectives.counted` says beside it what the traffic of the model's own collectives is for. What a collective costs is as in `collectives`;
broadcast, gather, scatter and reduce cost what goes from one process to another without relaying. What is met in a group of one process
costs nothing and is no call. Not seen: what goes through the store (rendezvous, waiting).
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode

from longcat_lab.parallel.collectives import gather_bytes, reduce_bytes

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "send", "broadcast", "gather", "scatter", "reduce")
Key = tuple[str, str]  # kind; the group as torch describes it: "mesh_AXIS" of a mesh, "default_pg" of all processes


@dataclasses.dataclass(frozen=True)
class Wire:
    """bytes, calls: that this process sent, and took part in, by kind and group."""

    bytes: Counter[Key] = dataclasses.field(default_factory=Counter)
    calls: Counter[Key] = dataclasses.field(default_factory=Counter)

    @property
    def total(self) -> int:
        return sum(self.bytes.values())

    def by_kind(self) -> dict[str, int]:
        return _summed(self.bytes, 0)

    def by_group(self) -> dict[str, int]:
        return _summed(self.bytes, 1)

    def calls_by_kind(self) -> dict[str, int]:
        return _summed(self.calls, 0)


def _summed(counts: Counter[Key], place: int) -> dict[str, int]:
    found: dict[str, int] = {}
    for key, count in counts.items():
        found[key[place]] = found.get(key[place], 0) + count
    return {key: count for key, count in sorted(found.items()) if count}


@contextmanager
def counted() -> Iterator[Wire]:
    """Counts what is sent in here by this thread, and by the backward passes that it starts.

    Raises:
        NotImplementedError: in here, on a communication operator that this does not know: nothing is left out silently.
    """
    sent = Wire()
    with _Watch(sent):
        yield sent


class _Watch(TorchDispatchMode):
    def __init__(self, sent: Wire) -> None:
        super().__init__()
        self.sent = sent

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if any(each.__torch_dispatch__ is not Tensor.__torch_dispatch__ and each is not FakeTensor for each in types):
            return NotImplemented  # a DTensor first takes its operations apart, into communication among others
        kwargs = kwargs or {}
        space, _, name = function.name().partition("::")
        if space in ("c10d", "_c10d_functional", "_c10d_functional_autograd", "_dtensor", "symm_mem"):
            self._count(space, name.partition(".")[0], function, args, kwargs)
        return function(*args, **kwargs)

    def _count(self, space: str, name: str, function: Any, args: tuple, kwargs: dict) -> None:
        if name in SILENT:
            return
        known = (OPERATORS if space == "c10d" else FUNCTIONAL if "functional" in space else {}).get(name)
        if known is None:
            raise NotImplementedError(f"wire.counted() does not know what {space}::{name} sends: add it to longcat_lab/parallel/wire.py.")
        names = [argument.name for argument in function._schema.arguments]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        group = _group(given.get("process_group", given.get("group_name")))
        if group.size() == 1:
            return
        kind, cost = known
        key = kind, group.group_desc
        self.sent.calls[key] += 1
        self.sent.bytes[key] += cost(given, group)


def _group(given: Any) -> ProcessGroup:
    if given is None:
        return dist.distributed_c10d._get_default_group()
    if isinstance(given, str):
        return dist.distributed_c10d._resolve_process_group(given)
    return given if isinstance(given, ProcessGroup) else ProcessGroup.unbox(given)


def _size(tensors: Any) -> int:
    return tensors.nbytes if isinstance(tensors, Tensor) else sum(map(_size, tensors))


def _of(name: str, cost: Callable[[int, int], int]) -> Callable[[dict, ProcessGroup], int]:
    """The cost by the size of the argument `name` and the number of processes."""
    return lambda given, group: cost(_size(given[name]), group.size())


def _slices(name: str) -> Callable[[dict, ProcessGroup], int]:
    """Of as many slices as there are processes all but the own one are sent (reduce-scatter, all-to-all without sizes)."""
    return lambda given, group: _size(given[name]) // group.size() * (group.size() - 1)


def _parted(name: str, sizes: str) -> Callable[[dict, ProcessGroup], int]:
    """All-to-all of rows: what goes to others."""

    def cost(given: dict, group: ProcessGroup) -> int:
        rows, tensor = given[sizes], given[name]
        if not rows:
            return _slices(name)(given, group)
        own = int(rows[group.rank()])
        return tensor.nbytes - own * (tensor.nbytes // len(tensor) if len(tensor) else 0)

    return cost


def _lists(given: dict, group: ProcessGroup) -> int:
    """All-to-all of a list of tensors: all but the own one."""
    return sum(each.nbytes for place, each in enumerate(given["input_tensors"]) if place != group.rank())


def _from_root(given: dict, group: ProcessGroup) -> int:
    return gather_bytes(_size(given["tensors"]), group.size()) if given["root_rank"] == group.rank() else 0


def _to_root(name: str) -> Callable[[dict, ProcessGroup], int]:
    return lambda given, group: 0 if given["root_rank"] == group.rank() else _size(given[name])


def _dealt(given: dict, group: ProcessGroup) -> int:
    """Scatter: the root's list without its own entry."""
    return sum(_size(list(each)) - _size(each[group.rank()]) for each in given["input_tensors"]) if given["input_tensors"] else 0


def _functional_broadcast(given: dict, group: ProcessGroup) -> int:
    return gather_bytes(_size(given["input"]), group.size()) if dist.get_global_rank(group, group.rank()) == given["src"] else 0


Cost = Callable[[dict, ProcessGroup], int]
OPERATORS: dict[str, tuple[str, Cost]] = {
    "allreduce_": ("all-reduce", _of("tensors", reduce_bytes)),
    "allreduce_coalesced_": ("all-reduce", _of("tensors", reduce_bytes)),
    "allgather_": ("all-gather", _of("input_tensors", gather_bytes)),
    "_allgather_base_": ("all-gather", _of("input_tensor", gather_bytes)),
    "allgather_coalesced_": ("all-gather", _of("input_list", gather_bytes)),
    "allgather_into_tensor_coalesced_": ("all-gather", _of("inputs", gather_bytes)),
    "reduce_scatter_": ("reduce-scatter", _slices("input_tensors")),
    "_reduce_scatter_base_": ("reduce-scatter", _slices("input_tensor")),
    "reduce_scatter_tensor_coalesced_": ("reduce-scatter", _slices("inputs")),
    "alltoall_base_": ("all-to-all", _parted("input", "input_split_sizes")),
    "alltoall_": ("all-to-all", _lists),
    "send": ("send", _of("tensors", lambda size, _: size)),
    "broadcast_": ("broadcast", _from_root),
    "gather_": ("gather", _to_root("input_tensors")),
    "scatter_": ("scatter", _dealt),
    "reduce_": ("reduce", _to_root("tensors")),
}
FUNCTIONAL: dict[str, tuple[str, Cost]] = {
    "all_reduce": ("all-reduce", _of("input", reduce_bytes)),
    "all_reduce_": ("all-reduce", _of("input", reduce_bytes)),
    "all_reduce_coalesced": ("all-reduce", _of("inputs", reduce_bytes)),
    "all_reduce_coalesced_": ("all-reduce", _of("inputs", reduce_bytes)),
    "all_gather_into_tensor": ("all-gather", _of("input", gather_bytes)),
    "all_gather_into_tensor_out": ("all-gather", _of("input", gather_bytes)),
    "all_gather_into_tensor_coalesced": ("all-gather", _of("inputs", gather_bytes)),
    "reduce_scatter_tensor": ("reduce-scatter", _slices("input")),
    "reduce_scatter_tensor_out": ("reduce-scatter", _slices("input")),
    "reduce_scatter_tensor_coalesced": ("reduce-scatter", _slices("inputs")),
    "all_to_all_single": ("all-to-all", _parted("input", "input_split_sizes")),
    "broadcast": ("broadcast", _functional_broadcast),
    "broadcast_": ("broadcast", _functional_broadcast),
    "isend": ("send", _of("tensor", lambda size, _: size)),
}
SILENT = (
    *("recv_", "recv_any_source_", "irecv", "barrier", "monitored_barrier_", "check_for_nan"),
    *("wait_tensor", "_wrap_tensor_autograd"),  # on what a functional collective returns
)
