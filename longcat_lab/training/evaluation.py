"""Held-out bits per byte, and the negative control."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from longcat_lab.config import RunConfig
from longcat_lab.data import Corpus, bits_per_byte, evaluation_batches, label_bytes, scored, shuffled
from longcat_lab.model.generate import evaluating
from longcat_lab.training.device import autocast
from longcat_lab.training.prediction import accepted_length, evaluate_steps

SHUFFLE_SEED = 0  # of the negative control; the same for all runs, so that arms are compared on the same text


@torch.no_grad()
def evaluate(model: nn.Module, corpus: Corpus, config: RunConfig, split: str, control: bool = False) -> float:
    """Bits per byte of `split`, on its first `training.evaluation_sequences` sequences.

    Args:
        control: the tokens of each sequence in a random order. What a model gains from the order of tokens must vanish here.
    """
    device = next(model.parameters()).device
    nats, count = 0.0, 0
    for batch in evaluation_batches(
        corpus.split(split), config.data.sequence_length, config.data.batch_size, config.training.evaluation_sequences
    ):
        batch = shuffled(batch, SHUFFLE_SEED) if control else batch
        with evaluating(model), autocast(device, config.training.precision):
            logits = model(batch.tokens.to(device), batch.document_ids.to(device))
        losses = F.cross_entropy(logits.flatten(0, 1).float(), batch.labels.flatten().to(device), reduction="none").cpu()
        nats += float(losses[scored(batch.labels.flatten(), corpus.token_bytes)].double().sum())
        count += label_bytes(batch.labels, corpus.token_bytes)
    return bits_per_byte(nats, count)


def evaluate_all(model: nn.Module, corpus: Corpus, config: RunConfig) -> dict[str, float]:
    """validation_bpb, shuffled_bpb (validation text with its token order destroyed), out_of_distribution_bpb if there is such text, and
    the measures of `prediction.py` if the model predicts further ahead; all bits per byte are of the trunk alone.
    """
    found = {
        "validation_bpb": evaluate(model, corpus, config, "validation"),
        "shuffled_bpb": evaluate(model, corpus, config, "validation", control=True),
    }
    if "out_of_distribution" in corpus.splits:
        found["out_of_distribution_bpb"] = evaluate(model, corpus, config, "out_of_distribution")
    if config.model.mtp is not None:
        found.update({**evaluate_steps(model, corpus, config), **accepted_length(model, corpus, config)})
    return found
