"""One optimizer step's gradients, on however many processes: micro-batches, pipeline stages, and the sums that make them one batch's."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from longcat_lab.blocks import Block
from longcat_lab.config import RunConfig
from longcat_lab.data import Batch
from longcat_lab.model import LongcatLM
from longcat_lab.parallel import placement
from longcat_lab.parallel.gather import gather_model, total_norm
from longcat_lab.parallel.locally import whole_weights
from longcat_lab.parallel.stages import tied
from longcat_lab.parallel.world import World, others_wait
from longcat_lab.training import device, mechanisms
from longcat_lab.training.loss import StepPlan, step_loss


class Trainee(nn.Module):
    """What a step calls: all that runs here of the model and of its loss, in one forward pass.

    plan, share: of the step, set before it. told: what `step_loss` told of each micro-batch, on the last pipeline stage.
    """

    def __init__(self, model: LongcatLM, config: RunConfig) -> None:
        super().__init__()
        self.model, self.config = model, config
        self.plan, self.share, self.told = StepPlan([], 0.0), 1.0, []

    def forward(self, entering: Tensor, tokens: Tensor, labels: Tensor, document_ids: Tensor) -> Tensor:
        """entering: what the pipeline stage before returned (the first one ignores it). The step's loss as a scalar, or on an earlier
        stage what the next one takes.
        """
        model = self.model
        x = entering if model.stage.start else None
        if model.stage.stop < len(model.layers):
            with device.autocast(tokens.device, self.config.training.precision):
                return model.hidden(tokens, document_ids, share=self.share, x=x)
        total, told = step_loss(model, tokens, labels, document_ids, self.config, self.plan, self.share, x)
        self.told.append(told)
        return total


class Steps:
    """Gradients of global batches for `model`, of which `world` says what is here."""

    def __init__(self, model: LongcatLM, config: RunConfig, world: World) -> None:
        self.model, self.config, self.world = model, config, world
        self.trainee, self.pipeline = Trainee(model, config), None
        if world.size > 1:
            placement.shard(self.trainee, model, world)
        if world.pipeline is not None:
            from longcat_lab.parallel.pipeline import Pipeline

            self.pipeline = Pipeline(self.trainee, config, world)

    def gradients(self, batch: Batch, plan: StepPlan) -> dict[str, float]:
        """Leaves the gradients of the global batch, of which `batch` is this process's part; its losses, the same on all processes."""
        config, world = self.config, self.world
        sequences = len(batch.tokens)
        size = config.training.micro_batch_size or sequences
        share = 1 / world.layout.batch_ways / world.layout.context
        self.trainee.plan, self.trainee.told = plan, []
        self.trainee.share = share * size / sequences
        if self.pipeline is not None:
            self.pipeline.run(*(each.to(world.device) for each in (batch.tokens, batch.labels, batch.document_ids)), size)
        else:
            for start in range(0, sequences, size):
                part = [t[start : start + size].to(world.device) for t in (batch.tokens, batch.labels, batch.document_ids)]
                if self.world.size > 1:
                    placement.only_sum_last(self.trainee, start + size >= sequences)
                self.trainee(part[0], *part).backward()
        if world.size > 1:
            placement.finish_gradients(self.model, world)
        return self._told(plan)

    @property
    def norm(self) -> Callable[[list[nn.Parameter]], Tensor] | None:
        """Of the gradients of parameters of which others hold parts; None where nobody does."""
        return None if self.world.size == 1 else functools.partial(total_norm, world=self.world, skip=tied(self.model))

    @property
    def summed(self) -> Callable[[Tensor], Tensor] | None:
        """The sum over those that hold other parts of the batch, in place."""
        return None if self.world.batch is None else functools.partial(self.world.sum, group=self.world.batch)

    def statistics(self) -> dict[str, Any]:
        """`mechanisms.statistics` of all stages, on the first process. All call it."""
        if self.world.size == 1:
            return mechanisms.statistics(self.model)
        found = {}
        placement.merge_marks(self.model, self.world)
        for name, block in mechanisms.blocks(self.model).items():
            if type(block).statistics is not Block.statistics or type(block).distributions is not Block.distributions:
                with whole_weights(block):
                    found.update({f"{name}/{key}": value for key, value in {**block.statistics(), **block.distributions()}.items()})
        stages = self.world.gathered(found)[:: self.world.layout.stage_size]
        return {key: value for stage in stages for key, value in stage.items()}

    @contextlib.contextmanager
    def whole(self) -> Iterator[LongcatLM]:
        """The model for evaluation: itself, or a whole copy on the first of several processes, for which the others wait. All call it."""
        if self.world.size == 1:
            yield self.model
            return
        with others_wait():
            yield gather_model(self.model, self.config, self.world)

    def _told(self, plan: StepPlan) -> dict[str, float]:
        told: dict[str, float] = {}
        for each in self.trainee.told:
            told = {key: told.get(key, 0.0) + value for key, value in each.items()}
        if self.world.size == 1:
            return told
        keys = plan.told(self.config)
        values = torch.tensor([told.get(key, 0.0) for key in keys], dtype=torch.float64, device=self.world.device)
        self.world.sum(values, self.world.batch)
        self.world.sum(values, self.world.pipeline)  # of earlier stages: nothing
        return dict(zip(keys, values.tolist(), strict=True))
