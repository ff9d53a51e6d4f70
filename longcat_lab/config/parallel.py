"""Over how many processes a run is laid out, and how: six degrees that leave its numbers as they are."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from longcat_lab.node import Node


class ParallelConfig(Node):
    """Degrees of the six dimensions. processes = pipeline x data_replicate x data_shard x context x tensor; experts and embedding
    tables are laid out over the same processes in ways of their own.

    None of this is part of what a run *is*: the same run may be started on one card and go on on sixteen.
    """

    pipeline: int = Field(1, ge=1, description="stages that the layers are divided into")
    data_replicate: int = Field(1, ge=1, description="copies of the model, each with a part of the batch")
    data_shard: int | None = Field(
        None,
        ge=1,
        description="processes that share one copy's weights, gradients and optimizer state, each with a part of the batch (FSDP2); "
        "empty: what the number of processes leaves",
    )
    context: int = Field(1, ge=1, description="parts of a sequence; weights are sharded over them too")
    tensor: int = Field(1, ge=1, description="parts of attention heads, dense networks and the head")
    expert: int = Field(1, ge=1, description="parts of a mixture's experts, over data_shard x context x tensor")
    overlap: bool = Field(
        True,
        description="rows travel to their experts and back while the dense branch of a shortcut layer is computed, and gradients too; "
        "false: each exchange is waited for at once",
    )
    moe_chunks: Literal[1, 2] = Field(
        1, description="parts of a mixture's tokens, where experts are divided; 2: one part travels while the other is computed"
    )
    dispatch: Literal["pick", "process"] = Field(
        "pick",
        description="a token travels once for each pick of an expert elsewhere, or once to each process that holds any of its experts, "
        "and their sum comes back",
    )
    embedding: int = Field(1, ge=1, description="parts of the rows of n-gram tables, over all processes of a stage")
    schedule: Literal["GPipe", "1F1B"] = Field("1F1B", description="order of micro-batches in a pipeline")
    layers_per_stage: list[int] | None = Field(None, description="layers of each pipeline stage; empty: as equal as they can be")
    checkpoint_async: Literal["auto", "always", "never"] = Field(
        "auto", description="whether a checkpoint is written while training goes on; auto: where there are several processes"
    )
    timeout: int = Field(300, ge=1, description="seconds after which a process that waits for another one gives up")
