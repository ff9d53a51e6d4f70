"""What one optimizer step minimises: next token, tokens further ahead, and the hidden z-loss."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from longcat_lab.blocks.context import taken
from longcat_lab.blocks.loss_op import Scored, cross_entropies, hidden_z_loss
from longcat_lab.blocks.mtp.module import step_labels
from longcat_lab.config import RunConfig
from longcat_lab.data import IGNORED, Batch, label_bytes
from longcat_lab.model import LongcatLM
from longcat_lab.parallel.world import World
from longcat_lab.training import device


@dataclass(frozen=True)
class StepPlan:
    """What a global batch needs to know before its parts are run.

    labels: scored labels in the whole batch for the next token, and for each prediction step.
    mtp_weight: lambda at this step; 0 leaves the prediction steps out.
    text: bytes of text that the labels of the next token stand for.
    """

    labels: list[int]
    mtp_weight: float
    text: int = 0

    def told(self, config: RunConfig) -> list[str]:
        """Names of what `step_loss` tells."""
        steps = [f"mtp/mtp_loss_{k}" for k in range(1, len(self.labels))]
        return ["loss", *steps, *(["trunk/z_loss", "trunk/hidden_max", "trunk/hidden_norm"] if config.training.z_loss_weight else [])]


def plan_step(batch: Batch, config: RunConfig, step: int, token_bytes: np.ndarray | None = None, world: World | None = None) -> StepPlan:
    """The plan of optimizer step `step` (0 ... steps - 1); `batch` is the global batch, or this process's sequences of it.

    token_bytes: int64 [vocab_size], for `text`.
    """
    mtp = config.model.mtp
    weight = mtp.weight_at(step / config.training.steps) if mtp else 0.0
    ahead = range(1, mtp.num_nextn_predict_layers + 1) if weight else ()
    labels = [batch.labels, *(step_labels(batch.labels, batch.document_ids, k) for k in ahead)]
    text = 0 if token_bytes is None else label_bytes(batch.labels, token_bytes)
    counts = torch.stack([(each != IGNORED).sum() for each in labels] + [torch.tensor(text)])
    if world is not None and world.batch is not None:  # whole rows are counted by every one of those that share them
        counts = world.sum(counts.to(world.device), world.batch) // world.layout.context
    *scored, text = counts.tolist()
    return StepPlan(scored, weight, text)


def step_loss(
    model: LongcatLM,
    tokens: Tensor,
    labels: Tensor,
    document_ids: Tensor,
    config: RunConfig,
    plan: StepPlan,
    share: float,
    x: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """The loss of a part of a global batch; summed over its parts it is the batch's.

        CE(next) + (lambda / D) sum_k CE(k ahead) + z_loss_weight * L_Z,   CE a mean over the batch's scored labels, in nats

    Args:
        tokens, labels, document_ids: int64 [B, T], whole rows; share: of the global batch's tokens that are here.
        x: what the pipeline stage before the last one returned; None where the model is whole.

    Returns:
        a scalar with gradient, and the parts' contributions to what the log calls `loss` (the next token's alone), `mtp/mtp_loss_K`,
        `trunk/z_loss`, `trunk/hidden_max` and `trunk/hidden_norm`.
    """
    training = config.training
    with device.autocast(tokens.device, training.precision):
        hidden = model.hidden(tokens, document_ids, share=share, x=x)
        scored = [Scored(model.norm(hidden), taken(labels, model.part), 1 / max(plan.labels[0], 1))]
        if plan.mtp_weight:
            detach = config.model.mtp.detach
            for k, state in enumerate(model.ahead(hidden, tokens, document_ids, share=share), 1):
                weight = plan.mtp_weight / config.model.mtp.num_nextn_predict_layers / max(plan.labels[k], 1)
                ahead = taken(step_labels(labels, document_ids, k, IGNORED), model.part)
                scored.append(Scored(state, ahead, weight, trains_head=not detach))
        total, sums = cross_entropies(scored, model.lm_head.weight, model.vocabulary)
    told = {"loss": float(sums[0]) / max(plan.labels[0], 1)}
    told.update({f"mtp/mtp_loss_{k}": float(each) / max(plan.labels[k], 1) for k, each in enumerate(sums[1:], 1)})
    if training.z_loss_weight:
        z_loss = hidden_z_loss(hidden)
        total = total + training.z_loss_weight * share * z_loss
        with torch.no_grad():
            wide = hidden.detach().float()
            told["trunk/z_loss"] = share * float(z_loss.detach())
            told["trunk/hidden_max"] = share * float(wide.abs().max())
            told["trunk/hidden_norm"] = share * float(wide.norm(dim=-1).mean())
    return total, told
