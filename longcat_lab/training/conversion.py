"""From dense to sparse in one run: train dense, teach the indexers alone, go on sparse.

DeepSeek-V3.2's recipe, and LongCat's (arXiv 2608.01662, section 4): a dense model's indexers are warmed up while everything else is
frozen, against the whole of its attention; then all is trained, sparse. Without `training.conversion` a sparse model is sparse, and its
indexers learn, from the first step.

The warm-up reads batches of its own, and the learning rate's schedule stands still meanwhile: arms with and without a warm-up train the
language model on the same batches in the same order at the same rates.
"""

from __future__ import annotations

from torch import nn

from longcat_lab.blocks.sparse_attention.module import SparseAttention
from longcat_lab.config import RunConfig
from longcat_lab.errors import LabError
from longcat_lab.training.optimizer import roles


def check(config: RunConfig) -> None:
    """Raises LabError where the model has nothing to convert."""
    plan, attention = config.training.conversion, config.model.attention
    if plan is None:
        return
    if not hasattr(attention, "selection") or not attention.selection.selects:
        raise LabError("training.conversion: model.attention is dense to the end; set model.attention.kind to dsa or lsa, or leave it out.")
    if plan.warmup_steps and not (attention.selection.uses_indexer and attention.distill.weight):
        raise LabError(
            "training.conversion.warmup_steps: there is no indexer that learns; set it to 0, or model.attention.selection.kind to indexer "
            "and model.attention.distill.weight above 0."
        )


def stage_at(config: RunConfig, step: int) -> str:
    """`dense`, `warmup` or `sparse` for optimizer step `step` (0 ... steps - 1)."""
    plan = config.training.conversion
    if plan is None or step >= plan.dense_steps + plan.warmup_steps:
        return "sparse"
    return "dense" if step < plan.dense_steps else "warmup"


def schedule_clock(config: RunConfig, step: int) -> tuple[int, int]:
    """Step and number of steps for the learning rate's schedule, in which the warm-up does not count."""
    plan = config.training.conversion
    if plan is None:
        return step, config.training.steps
    return step - min(max(step - plan.dense_steps, 0), plan.warmup_steps), config.training.steps - plan.warmup_steps


def enter(model: nn.Module, stage: str) -> None:
    """Makes `model` train as the stage has it: in the warm-up nothing but the indexers learns, counts or moves."""
    for module in model.modules():
        if isinstance(module, SparseAttention):
            module.stage = stage
    if not any(isinstance(module, SparseAttention) for module in model.modules()):
        return
    frozen = stage == "warmup"
    known = roles(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not frozen or known[name] == "indexer")
    model.train(not frozen)
    for module in model.modules():
        if isinstance(module, SparseAttention):
            module.training = True
