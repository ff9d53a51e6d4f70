"""Passes of a model on however many processes: micro-batches, pipeline stages, and the sums that make them one batch's.

Those of a training step leave gradients; those of an evaluation only look, at the model as it lies: nothing of it is gathered but what a
training step gathers for a moment, layer by layer.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from longcat_lab.blocks import Block
from longcat_lab.config import RunConfig
from longcat_lab.data import Batch
from longcat_lab.model import LongcatLM
from longcat_lab.model.generate import evaluating
from longcat_lab.parallel import placement
from longcat_lab.parallel.gather import gather_model, no_room, total_norm
from longcat_lab.parallel.locally import whole_weights
from longcat_lab.parallel.stages import tied
from longcat_lab.parallel.world import World, others_wait
from longcat_lab.training import device, mechanisms
from longcat_lab.training.loss import StepPlan, step_loss
from longcat_lab.training.passes import Measure, Over, dealt, ends_here


class Trainee(nn.Module):
    """What a step calls: all that runs here of the model and of its loss, in one forward pass.

    plan, share: of the step, set before it. told: what `step_loss` told of each micro-batch, on the last pipeline stage.
    look: in place of a step's loss, what is asked of each pass, and its precision; told: what it found.
    """

    look: tuple[Measure, str] | None = None

    def __init__(self, model: LongcatLM, config: RunConfig) -> None:
        super().__init__()
        self.model, self.config = model, config
        self.plan, self.share = StepPlan([], 0.0), 1.0
        self.told: list[Any] = []

    def forward(self, entering: Tensor, tokens: Tensor, labels: Tensor, document_ids: Tensor) -> Tensor:
        """entering: what the pipeline stage before returned (the first one ignores it). The step's loss as a scalar, or on an earlier
        stage what the next one takes.
        """
        model = self.model
        x = entering if model.stage.start else None
        if self.look is not None:
            measure, precision = self.look
            with device.autocast(tokens.device, precision):
                hidden = model.hidden(tokens, document_ids, x=x)
                self.told.append(measure(model, hidden, Batch(tokens, labels, document_ids)))
            return hidden.new_zeros(()) if ends_here(model) else hidden
        if not ends_here(model):
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
        world = self.world
        sequences = len(batch.tokens)
        size = self._micro(sequences)
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

    def not_engaged(self, means: dict[str, float]) -> list[str]:
        """`mechanisms.not_engaged` of all stages; `means`: of the first process. All call it."""
        said = self.world.gathered(mechanisms.not_engaged(self.model, self.world.from_first(means)))
        return [each for stage in said[:: self.world.layout.stage_size] for each in stage]

    @property
    def over(self) -> Over | None:
        """Passes that only look, of the divided model, by all processes; None where there is one process."""
        return None if self.world.size == 1 else self._over

    @torch.no_grad()
    def _over(self, batches: Iterable[Batch], measure: Measure, precision: str) -> list[float]:
        """Each process takes as many sequences at a time as in training. The sums are the same on all, and in each run."""
        config, world = self.config, self.world
        size, together = self._micro(config.data.batch_size // world.layout.batch_ways), world.layout.pipeline
        run = self.trainee if self.pipeline is None else self.pipeline.looking(size, together)
        self.trainee.look, self.trainee.told = (measure, precision), []
        try:
            with evaluating(self.model):
                for part in dealt(batches, size * together, world.batch_place, world.layout.batch_ways):
                    tokens, labels, documents = (each.to(world.device) for each in (part.tokens, part.labels, part.document_ids))
                    run(tokens, tokens, labels, documents)
        finally:
            self.trainee.look = None
        placement.divide_again(self.trainee)
        sums = [sum(column) for column in zip(*self.trainee.told, strict=True)]
        self.trainee.told = []
        values = torch.tensor(sums, dtype=torch.float64, device=world.device)
        world.sum(values, world.batch)
        world.sum(values, world.pipeline)  # of other stages than the one that is asked: nothing
        return values.tolist()

    def no_room(self) -> str | None:
        """Why a whole copy of the model cannot be had on the first process, the same on all; None where it can. All call it."""
        free = device.free_bytes(self.world.device)
        return None if self.world.size == 1 else self.world.from_first(no_room(self.config, free) if self.world.first else None)

    @contextlib.contextmanager
    def whole(self) -> Iterator[LongcatLM | None]:
        """The model for what takes a whole one: itself, or a copy on the first of several processes, for which the others wait with None.
        All call it, after `no_room`.
        """
        if self.world.size == 1:
            yield self.model
            return
        with others_wait():
            yield gather_model(self.model, self.config, self.world)

    def _micro(self, sequences: int) -> int:
        return self.config.training.micro_batch_size or sequences

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
