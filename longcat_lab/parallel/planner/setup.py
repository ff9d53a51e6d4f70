"""How a run is laid out and run, in the planner's words: degrees, schedule, who holds what, what is computed twice."""

from __future__ import annotations

import dataclasses
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from longcat_lab.blocks.interface import attentions_of
from longcat_lab.config import ParallelConfig, RunConfig
from longcat_lab.errors import LabError
from longcat_lab.node import Node
from longcat_lab.parallel.layout import Layout, make_layout
from longcat_lab.parallel.planner.activations import ACCELERATOR, Keeping, Kept, embedding_kept, head_kept, layer_kept, prediction_kept
from longcat_lab.parallel.planner.hardware import read_description
from longcat_lab.parallel.planner.parts import Part, model_parts
from longcat_lab.parallel.planner.pipeline import chunks_of, rank_of


class Setup(Node):
    """One way to lay out and run a model. Degrees as in `ParallelConfig`."""

    pipeline: int = Field(1, ge=1)
    data_replicate: int = Field(1, ge=1)
    data_shard: int = Field(1, ge=1)
    context: int = Field(1, ge=1)
    tensor: int = Field(1, ge=1)
    expert: int = Field(1, ge=1)
    embedding: int = Field(1, ge=1)
    schedule: Literal["gpipe", "1f1b", "interleaved", "v-half", "v-zb"] = Field("1f1b", description="order of micro-batches")
    weights: Literal["zero1", "sharded"] = Field(
        "zero1", description="zero1: weights and gradients whole on each rank, optimizer state divided; sharded: all divided (FSDP2)"
    )
    recompute: Literal["none", "selective", "selective+kv", "full"] = Field(
        "none", description="run again in backward: nothing; SwiGLU and norms; heads' keys and values too; layers"
    )
    fold: bool = Field(True, description="a pick's weight is multiplied in before the down projection, so that outputs are not kept")
    layers_per_stage: list[int] | None = Field(None, description="of schedules with one chunk; empty: as even as the work")
    optimizer: Literal["adamw", "muon"] = Field("adamw", description="of matrices; all else, tables too, has AdamW")
    dispatch: Literal["all-to-all", "all-gather"] = Field("all-to-all", description="how tokens come to experts")
    overlap: bool = Field(True, description="dispatch and combine behind the dense branch of a shortcut layer")
    sequence_length: int = Field(ge=2, description="tokens")
    batch: int = Field(ge=1, description="sequences of a step")
    micro_batch: int = Field(1, ge=1, description="sequences of a data rank in one pass")
    beside: dict[str, float] = Field(
        default_factory=dict, description="bytes a rank of what is not the language model or not explained by it, by name"
    )
    buffers: float | None = Field(None, ge=0, description="bytes a rank of communicators; empty: their number times the card's")

    @property
    def world(self) -> int:
        return self.pipeline * self.data_replicate * self.data_shard * self.context * self.tensor

    @property
    def chunks(self) -> int:
        return chunks_of(self.schedule, self.pipeline)

    @property
    def micros(self) -> int:
        """Micro-batches of a step in one pipeline."""
        return self.batch // (self.data_replicate * self.data_shard * self.micro_batch)

    @property
    def tokens(self) -> float:
        """Tokens of a micro-batch on one rank (all tensor ranks have the same ones)."""
        return self.micro_batch * self.sequence_length / self.context

    def told(self) -> str:
        axes = ("pipeline", "data_replicate", "data_shard", "context", "tensor", "expert", "embedding")
        said = [f"{axis} {getattr(self, axis)}" for axis in axes if getattr(self, axis) > 1]
        return f"{', '.join(said) or 'one rank'}; {self.schedule}, weights {self.weights}, recompute {self.recompute}, {self.optimizer}"


def read_setup(name: str | Path, **changes: object) -> Setup:
    """A setup that comes with the package, or one of a YAML file; `changes` to its fields."""
    found = read_description("setups", name, Setup)
    return Setup.model_validate({**found.to_dict(), **changes})


Held = dict[int, int]  # number of a part (of `Model.parts`) to how many like it a stage holds


@dataclasses.dataclass(frozen=True)
class Model:
    """A configuration taken apart once, for many setups of one sequence length.

    kept: what each layer keeps of a token, and nothing for other parts; beside: what these keep, and nothing for layers. keeping: by what
    operators. alike: for each part the number of the first one that is like it. rows: the token's rows, which the last of several stages
    holds too where prediction steps read them; None where they do not.
    """

    config: RunConfig
    parts: tuple[Part, ...]
    kept: tuple[tuple[Kept, ...], ...]
    beside: tuple[tuple[Kept, ...], ...]
    keeping: Keeping
    alike: tuple[int, ...]
    rows: Part | None
    known: dict[object, Any] = dataclasses.field(default_factory=dict, compare=False, repr=False)  # found once, by who asked and for what

    @property
    def layers(self) -> tuple[Part, ...]:
        return self.parts[1 : 1 + self.config.model.num_layers]

    @property
    def ends(self) -> tuple[Part, ...]:
        """Head and prediction steps, which lie behind the last layer."""
        return self.parts[1 + self.config.model.num_layers :]


def take_apart(config: RunConfig, sequence_length: int, keeping: Keeping = ACCELERATOR) -> Model:
    """`keeping`: of the operators that it is to run with.

    Raises:
        LabError: the model cannot take sequences of this length.
    """
    if sequence_length > config.model.max_position_embeddings:
        raise LabError(
            f"A sequence of {sequence_length} tokens is above model.max_position_embeddings {config.model.max_position_embeddings}: "
            "shorten it or raise that."
        )
    data = config.data.model_copy(update={"sequence_length": sequence_length})
    config = config.model_copy(update={"data": data})
    shape = dataclasses.replace(config.model.shape(), sequence_length=sequence_length)
    places = [dataclasses.replace(shape, layer_index=index) for index in range(config.model.num_layers)]
    parts = model_parts(config)
    layers = [tuple(layer_kept(config.model.layer, place, keeping)) for place in places]
    kept = ((), *layers, *((),) * (len(parts) - 1 - len(layers)))
    mtp, rows = config.model.mtp, None
    ends = [tuple(head_kept(shape.hidden_size, keeping))]
    if mtp is not None:
        ends.append(tuple(prediction_kept(mtp, shape, keeping)) if mtp.weight_at(0.0) else ())
        if not mtp.own_embedding:
            rows = Part("token rows", tuple(p for p in parts[0].parameters if p.role == "embedding"), {})
    beside = (tuple(embedding_kept(config.model.embedding, shape, keeping)), *((),) * len(layers), *ends)
    what = [(part.parameters, part.flops, part.kept_gather, part.mixtures, own) for part, own in zip(parts, kept, strict=True)]
    return Model(config, tuple(parts), kept, beside, keeping, tuple(what.index(each) for each in what), rows)


def check_setup(model: Model, setup: Setup) -> Layout:
    """The setup's layout, by the rules that a run is held to.

    Raises:
        LabError: the degrees do not fit each other, the model or the batch.
    """
    training = model.config.training.model_copy(update={"micro_batch_size": setup.micro_batch})
    data = model.config.data.model_copy(update={"batch_size": setup.batch})
    degrees = {axis: getattr(setup, axis) for axis in ParallelConfig.model_fields if axis in Setup.model_fields and axis != "schedule"}
    parallel = ParallelConfig.model_construct(**degrees)
    layout = make_layout(model.config.model_copy(update={"parallel": parallel, "data": data, "training": training}), setup.world)
    chunks, layers = setup.pipeline * setup.chunks, model.config.model.num_layers
    if chunks > layers:
        raise LabError(
            f"{setup.schedule} cuts the layers into {chunks} chunks, and model.num_layers is {layers}: lower the pipeline degree."
        )
    check = getattr(model.config.model.attention, "check_stages", None)
    if setup.pipeline > 1 and check is not None:
        each = attentions_of(model.config.model.layer)
        check([each * first for first, _ in divide(layers, chunks, setup.schedule, setup.pipeline, end_weight(model))])
    return layout


def end_weight(model: Model) -> float:
    """Work behind the last layer (head, prediction steps) in layers."""
    return round(sum(part.work for part in model.ends) / max(model.layers[-1].work, 1.0), 2)


@cache
def divide(layers: int, chunks: int, schedule: str, stages: int, behind: float) -> tuple[tuple[int, int], ...]:
    """(first, end) layer of each chunk in the model's order, such that the busiest stage has as little as can be.

    behind: work behind the last layer, in layers, which stands on the last chunk's stage.
    """
    counts, load = [1] * chunks, [0.0] * stages
    for chunk in range(chunks):
        load[rank_of(schedule, stages, chunk)] += 1
    load[rank_of(schedule, stages, chunks - 1)] += behind
    for _ in range(layers - chunks):
        best = min(range(chunks), key=lambda c: (load[rank_of(schedule, stages, c)], counts[c], c))
        counts[best] += 1
        load[rank_of(schedule, stages, best)] += 1
    ends = [sum(counts[: chunk + 1]) for chunk in range(chunks)]
    return tuple(zip([0, *ends[:-1]], ends, strict=True))


def stage_parts(model: Model, setup: Setup) -> list[Held]:
    """What each stage holds."""
    key = "parts", setup.pipeline, setup.schedule, tuple(setup.layers_per_stage or ())
    if key not in model.known:
        model.known[key] = _stage_parts(model, setup)
    return model.known[key]


def _stage_parts(model: Model, setup: Setup) -> list[Held]:
    layers, chunks = model.config.model.num_layers, setup.pipeline * setup.chunks
    held: list[list[int]] = [[] for _ in range(setup.pipeline)]
    cuts = divide(layers, chunks, setup.schedule, setup.pipeline, end_weight(model))
    if setup.layers_per_stage is not None:
        ends = [sum(setup.layers_per_stage[: stage + 1]) for stage in range(setup.pipeline)]
        cuts = tuple(zip([0, *ends[:-1]], ends, strict=True))
    for chunk, (first, end) in enumerate(cuts):
        held[rank_of(setup.schedule, setup.pipeline, chunk)] += range(1 + first, 1 + end)
    held[0].insert(0, 0)
    held[rank_of(setup.schedule, setup.pipeline, chunks - 1)] += range(1 + layers, len(model.parts))
    return [dict(Counter(model.alike[n] for n in numbers)) for numbers in held]
