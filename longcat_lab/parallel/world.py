"""The processes of a run: who this one is, whom it shares what with, and the few things that all must agree on."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from longcat_lab.config import RunConfig
from longcat_lab.config.parallel import ParallelConfig
from longcat_lab.errors import Diverged, LabError
from longcat_lab.parallel import faults
from longcat_lab.parallel.layout import Layout, make_layout

Group = dist.ProcessGroup | None  # None: nobody to share with
_waits = itertools.count()


class World:
    """This process among those of the run.

    rank, size: of this process, and how many there are. at: its place on every axis of `layout`.
    tensor, context, expert, embedding, pipeline: the groups that it shares heads, sequences, experts, tables and layers with.
    batch: the group that holds other parts of the same batch (other sequences, or other parts of them) for the same weights; what is
        counted on tokens is summed over it. stage: the whole pipeline stage. ends: this process's like on the first and on the last
        stage; None in between.
    dense, experts: meshes over which weights are sharded (and replicated, if they have two dimensions); None where there is one process.
    """

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self.size = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self._same_settings(config)  # before anything that processes of other settings would do with other partners
        self.layout: Layout = make_layout(config, self.size)
        self.device, self.at = device, self.layout.coordinates(self.rank)
        self.tensor = self.context = self.expert = self.pipeline = self.batch = self.stage = self.ends = None
        self.embedding = self.embedding_replicate = None
        self.dense = self.experts = self.tensor_mesh = self.expert_mesh = self.embedding_mesh = None
        if self.size > 1:
            self._make_meshes()

    def _make_meshes(self) -> None:
        layout = self.layout
        root = init_device_mesh(self.device.type, (self.size,), mesh_dim_names=("world",))

        def view(**axes: int) -> DeviceMesh:
            return root._unflatten(0, tuple(axes.values()), tuple(axes))

        p, r, c, t = layout.pipeline, layout.data_replicate, layout.context, layout.tensor
        dense = view(pipeline=p, replicate=r, shard=layout.data_shard * c, tensor=t)
        sparse = view(pipeline=p, replicate=r, expert_shard=layout.expert_shard, expert=layout.expert)
        rows = view(pipeline=p, embedding_replicate=layout.embedding_replicate, embedding=layout.embedding)
        sequences = view(pipeline=p, data=layout.batch_ways, context=c, tensor=t)
        parts = view(pipeline=p, batch=layout.batch_ways * c, tensor=t)
        stages = view(pipeline=p, stage=layout.stage_size)

        def group(mesh: DeviceMesh, axis: str) -> Group:
            return mesh[axis].get_group() if mesh[axis].size() > 1 else None

        self.tensor, self.context, self.pipeline = group(dense, "tensor"), group(sequences, "context"), group(dense, "pipeline")
        self.expert, self.embedding = group(sparse, "expert"), group(rows, "embedding")
        self.embedding_replicate = group(rows, "embedding_replicate")
        self.batch, self.stage = group(parts, "batch"), group(stages, "stage")
        self.ends = self._first_and_last() if p > 1 else None
        self.tensor_mesh, self.expert_mesh, self.embedding_mesh = dense["tensor"], sparse["expert"], rows["embedding"]
        self.dense = dense["replicate", "shard"] if r > 1 else dense["shard"]
        self.experts = sparse["replicate", "expert_shard"] if r > 1 else sparse["expert_shard"]

    def _first_and_last(self) -> Group:
        size, found = self.layout.stage_size, None
        for place in range(size):  # every process takes part in making every group
            pair = [place, self.size - size + place]
            group = dist.new_group(pair)
            found = group if self.rank in pair else found
        return found

    @property
    def first(self) -> bool:
        """Whether this process writes the run's files and speaks to people."""
        return self.rank == 0

    @property
    def batch_place(self) -> int:
        """Which part of each batch's sequences this process reads."""
        return self.layout.batch_place(self.rank)

    @property
    def last_stage(self) -> bool:
        return self.at["pipeline"] == self.layout.pipeline - 1

    def sum(self, values: torch.Tensor, group: Group = None) -> torch.Tensor:
        """`values` summed over `group`, in place; as they are where there is nobody else."""
        if group is not None:
            dist.all_reduce(values, group=group)
        return values

    def any(self, flag: bool) -> bool:
        """Whether any process says so: the same answer everywhere."""
        if self.size == 1:
            return flag
        asked = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        return bool(asked)

    def from_first(self, value: Any) -> Any:
        """What process 0 has (plain data), on all."""
        if self.size == 1:
            return value
        held = [value]
        dist.broadcast_object_list(held, src=0)
        return held[0]

    def gathered(self, value: Any) -> list[Any]:
        """What every process has (plain data), by rank, on all."""
        if self.size == 1:
            return [value]
        held: list[Any] = [None] * self.size
        dist.all_gather_object(held, value)
        return held

    def first_of_all(self, action: Callable[[], Any]) -> Any:
        """`action` on the first process, whose answer (plain data), or LabError, all then have."""
        if self.size == 1:
            return action()
        answer, said, diverged = None, None, False
        with others_wait():
            if self.first:
                try:
                    answer = action()
                except LabError as error:
                    said, diverged = str(error), isinstance(error, Diverged)
        answer, said, diverged = self.from_first((answer, said, diverged))
        if said is not None:
            raise Diverged(said) if diverged else LabError(said)
        return answer

    def alike(self, what: str, value: str) -> None:
        """Raises LabError on all where a process has another `value` than the first one."""
        others = self.gathered(value)
        for rank, other in enumerate(others):
            if other != others[0]:
                raise LabError(f"Process {rank} has another {what} than process 0: start all of them from the same files and settings.")

    def _same_settings(self, config: RunConfig) -> None:
        if self.size == 1:
            return
        settings = _flat({key: value for key, value in config.to_dict().items() if key not in ("tracking", "plugins")})
        every = self.gathered(json.dumps(settings, sort_keys=True))
        for rank, other in enumerate(every):
            if other != every[0]:
                first, found = json.loads(every[0]), json.loads(other)
                key = next(key for key in sorted({*first, *found}) if first.get(key) != found.get(key))
                raise LabError(
                    f"Process {rank} has {key}={found.get(key)}, process 0 has {first.get(key)}: start all of them with the same "
                    "configuration and overrides."
                )


def _flat(data: Any, key: str = "") -> dict[str, Any]:
    if not isinstance(data, dict):
        return {key: data}
    return {name: value for inner, part in data.items() for name, value in _flat(part, f"{key}.{inner}" if key else inner).items()}


@contextlib.contextmanager
def others_wait() -> Iterator[None]:
    """The first process works in here for as long as it takes; the others wait at the end until it has left."""
    if not faults.several():
        yield
        return
    store, key = faults.store(), f"longcat_lab/waited/{next(_waits)}"
    if dist.get_rank() == 0:
        try:
            yield
        finally:
            store.set(key, "1")
        return
    yield
    pause = 0.02
    while not store.check([key]):  # not `wait`, which has a limit, and tells people when it is over
        if faults.told_by_another():
            raise faults.Lost(f"{faults.LOST} while this one waited for it.")
        time.sleep(pause)
        pause = min(1.0, 1.5 * pause)


def start(config: ParallelConfig, backend: str) -> None:
    """Joins the processes that a launcher started (torchrun sets RANK and WORLD_SIZE); nothing to do for one that was started alone.

    Raises:
        Unreachable: the others cannot be reached within parallel.timeout seconds.
    """
    if dist.is_initialized():
        return
    if "TORCHELASTIC_RUN_ID" in os.environ:  # also where it has started this one alone
        faults.end_with_parent()
        faults.end_slowly_when_asked()
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    wait = datetime.timedelta(seconds=config.timeout)
    try:
        dist.init_process_group(backend, timeout=wait, **_met(wait))
    except (RuntimeError, ValueError) as error:  # the store's errors are RuntimeErrors
        where = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
        raise faults.Unreachable(
            f"Process {os.environ.get('RANK', '?')} of {os.environ['WORLD_SIZE']} cannot reach the others at {where} "
            f"({str(error).splitlines()[0]}): check that all were started, and that the address can be reached from each."
        ) from None


def _met(wait: datetime.timedelta) -> dict[str, Any]:
    """torchrun (2.13) keeps one store while it starts workers again, and those would find the addresses of the dead in it."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or os.environ.get("GROUP_WORLD_SIZE") != "1":
        return {}  # launchers of several machines may count restarts differently: they need TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    store, rank, size = next(dist.rendezvous("env://", timeout=wait))
    return {"store": dist.PrefixStore(f"start-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store), "rank": rank, "world_size": size}


def is_first() -> bool:
    """Whether this process writes the run's files and speaks to people: process 0, or the only one."""
    return not dist.is_initialized() or dist.get_rank() == 0


def leave() -> None:
    """Ends this process's part, so that the others do not wait for it."""
    if dist.is_initialized():
        dist.destroy_process_group()
