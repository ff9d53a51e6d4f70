"""Who does what: ranks, axes and groups, as plain arithmetic that needs no process to be started.

Ranks are numbered with the tensor axis innermost, so that those that talk most lie next to one another:

    rank = (((pipeline * R + data_replicate) * S + data_shard) * C + context) * T + tensor

A stage's processes are seen in two more ways. Experts: data_shard x context x tensor as [expert_shard, expert], expert innermost.
Embedding tables: all processes of a stage as [embedding_replicate, embedding], embedding innermost.
"""

from __future__ import annotations

import dataclasses
import math

from longcat_lab.blocks.interface import attentions_of
from longcat_lab.config import RunConfig
from longcat_lab.errors import LabError

DENSE = ("pipeline", "data_replicate", "data_shard", "context", "tensor")


@dataclasses.dataclass(frozen=True)
class Layout:
    """Degrees of all axes, data_shard known. `world` processes; `stages`: (first, end) layer of each pipeline stage."""

    pipeline: int
    data_replicate: int
    data_shard: int
    context: int
    tensor: int
    expert: int
    embedding: int
    stages: tuple[tuple[int, int], ...]

    @property
    def world(self) -> int:
        return math.prod(getattr(self, axis) for axis in DENSE)

    @property
    def stage_size(self) -> int:
        """Processes of one pipeline stage."""
        return self.world // self.pipeline

    @property
    def batch_ways(self) -> int:
        """Parts that a global batch's sequences are divided into."""
        return self.data_replicate * self.data_shard

    @property
    def expert_shard(self) -> int:
        """Processes that hold the same experts of one copy, and share their weights between them."""
        return self.data_shard * self.context * self.tensor // self.expert

    @property
    def embedding_replicate(self) -> int:
        return self.stage_size // self.embedding

    def coordinates(self, rank: int) -> dict[str, int]:
        """Place of `rank` on every axis, those of experts and of embedding tables included."""
        left, found = rank, {}
        for axis in reversed(DENSE):
            left, found[axis] = divmod(left, getattr(self, axis))
        within = rank % (self.data_shard * self.context * self.tensor)
        found["expert_shard"], found["expert"] = divmod(within, self.expert)
        found["embedding_replicate"], found["embedding"] = divmod(rank % self.stage_size, self.embedding)
        return found

    def batch_place(self, rank: int) -> int:
        """Which part of a global batch's sequences `rank` reads."""
        at = self.coordinates(rank)
        return at["data_replicate"] * self.data_shard + at["data_shard"]

    def told(self) -> str:
        """The degrees that are more than one, for logs and errors."""
        axes = (*DENSE, "expert", "embedding")
        said = [f"{axis} {getattr(self, axis)}" for axis in axes if getattr(self, axis) > 1]
        return f"{self.world} process{'es' if self.world > 1 else ''}" + (f": {', '.join(said)}" if said else "")


def make_layout(config: RunConfig, world: int) -> Layout:
    """The layout of `config` over `world` processes.

    Raises:
        LabError: the degrees do not make up `world`, or one of them does not fit the model or the batch; the sentence names both sides.
    """
    wanted = config.parallel
    fixed = {axis: getattr(wanted, axis) for axis in DENSE if axis != "data_shard"}
    others = math.prod(fixed.values())
    product = " x ".join(f"{axis} {degree}" for axis, degree in fixed.items())
    if wanted.data_shard is None:
        if world % others:
            raise LabError(f"parallel: {product} = {others} does not divide the {world} processes: change a degree or their number.")
        shard = world // others
    else:
        shard = wanted.data_shard
        if others * shard != world:
            raise LabError(
                f"parallel: {product} x data_shard {shard} = {others * shard}, but there are {world} processes: "
                "change a degree or their number (an empty data_shard takes what is left)."
            )
    stages = _stages(config)
    layout = Layout(**fixed, data_shard=shard, expert=wanted.expert, embedding=wanted.embedding, stages=stages)
    _check_batch(config, layout)
    _check_model(config, layout)
    return layout


def _stages(config: RunConfig) -> tuple[tuple[int, int], ...]:
    count, layers, given = config.parallel.pipeline, config.model.num_layers, config.parallel.layers_per_stage
    if given is None:
        if layers < count:
            raise LabError(f"parallel.pipeline {count} is more stages than model.num_layers {layers}: lower it.")
        given = [layers // count + (stage < layers % count) for stage in range(count)]
    if len(given) != count or sum(given) != layers or min(given) < 1:
        raise LabError(
            f"parallel.layers_per_stage {given} must be {count} positive numbers (parallel.pipeline) that sum to model.num_layers {layers}."
        )
    ends = [sum(given[: stage + 1]) for stage in range(count)]
    return tuple(zip([0, *ends[:-1]], ends, strict=True))


def _check_batch(config: RunConfig, layout: Layout) -> None:
    batch, micro, length = config.data.batch_size, config.training.micro_batch_size, config.data.sequence_length
    _divides("parallel.data_replicate x data_shard", layout.batch_ways, "data.batch_size", batch)
    if micro:
        _divides("training.micro_batch_size", micro, "the sequences of one process", batch // layout.batch_ways)
    if layout.context > 1:  # two chunks each, one early and one late, so that all have alike many keys to look at
        _divides("twice parallel.context", 2 * layout.context, "data.sequence_length", length)


def _check_model(config: RunConfig, layout: Layout) -> None:
    model = config.model
    _divides("parallel.tensor", layout.tensor, "model.attention.num_attention_heads", getattr(model.attention, "num_attention_heads", None))
    _divides("parallel.tensor", layout.tensor, "model.vocab_size", model.vocab_size)
    _divides("parallel.tensor", layout.tensor, "model.ffn.ffn_hidden_size", getattr(model.ffn, "ffn_hidden_size", None))
    shared = model.moe.shared() if hasattr(model.moe, "shared") else None
    width = shared.ffn_hidden_size if shared else None
    _divides("parallel.tensor", layout.tensor, "model.moe.n_shared_experts x expert_ffn_hidden_size", width)
    stage = layout.data_shard * layout.context * layout.tensor
    _divides("parallel.expert", layout.expert, "data_shard x context x tensor", stage)
    _divides("parallel.expert", layout.expert, "model.moe.n_routed_experts", getattr(model.moe, "n_routed_experts", None))
    _divides("parallel.embedding", layout.embedding, "the processes of a pipeline stage", layout.stage_size)
    if layout.pipeline > 1:
        each = attentions_of(model.layer)
        check = getattr(model.attention, "check_stages", None)
        if check is not None:
            check([each * first for first, _ in layout.stages])


def _divides(what: str, degree: int, whole: str, size: int | None) -> None:
    if size is not None and size % degree:
        raise LabError(f"{what} {degree} does not divide {whole} {size}: change one of them.")
