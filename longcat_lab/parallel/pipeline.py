"""The pipeline's schedule, torch's own, over stages that `stages.py` cut."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from longcat_lab.config import RunConfig
from longcat_lab.parallel.world import World

SCHEDULES = {"GPipe": ScheduleGPipe, "1F1B": Schedule1F1B}


class Pipeline:
    """Runs a step's micro-batches through all stages; `trainee` is what this process's stage calls."""

    def __init__(self, trainee: nn.Module, config: RunConfig, world: World) -> None:
        self.trainee, self.config, self.world = trainee, config, world
        self.stage = None

    def run(self, tokens: Tensor, labels: Tensor, document_ids: Tensor, size: int) -> None:
        """Forward and backward of all micro-batches of `size` sequences; every stage has the tokens. [B, T] each."""
        if self.stage is None:
            self._begin(tokens, size)
        rows = {"tokens": tokens, "labels": labels, "document_ids": document_ids}
        entering = (tokens,) if self.world.at["pipeline"] == 0 else ()
        target = labels if self.world.last_stage else None
        self.schedule.step(*entering, target=target, return_outputs=False, **rows)

    def looking(self, size: int, count: int) -> Callable[[Tensor, Tensor, Tensor, Tensor], None]:
        """Runs `count` micro-batches of `size` sequences through all stages, forward alone; arguments as those of `trainee`.

        It has buffers of its own, which go with it: those of training are made for its number of micro-batches.
        """
        schedule = ScheduleGPipe(self._stage(size, self.config.data.sequence_length, False), count)

        def run(entering: Tensor, tokens: Tensor, labels: Tensor, document_ids: Tensor) -> None:
            rows = {"tokens": tokens, "labels": labels, "document_ids": document_ids}
            schedule.step(*((entering,) if self.world.at["pipeline"] == 0 else ()), return_outputs=False, **rows)

        return run

    def _begin(self, tokens: Tensor, size: int) -> None:
        self.stage = self._stage(size, tokens.shape[1], True)
        self.schedule = SCHEDULES[self.config.parallel.schedule](
            self.stage, len(tokens) // size, loss_fn=lambda total, labels: total, scale_grads=False
        )

    def _stage(self, size: int, length: int, learns: bool) -> PipelineStage:
        layout, at = self.world.layout, self.world.at["pipeline"]
        kind = torch.float32  # what a residual stream is kept in, autocast or not
        between = torch.empty(
            size, length // layout.context, self.config.model.hidden_size, dtype=kind, device="meta", requires_grad=learns
        )
        entering = torch.empty(size, length, dtype=torch.int64, device="meta") if at == 0 else between
        leaving = torch.empty((), dtype=kind, device="meta", requires_grad=learns) if self.world.last_stage else between
        return PipelineStage(
            self.trainee, at, layout.pipeline, self.world.device, input_args=entering, output_args=leaving, group=self.world.pipeline
        )
