"""How good the prediction steps are: loss and accuracy of each on held-out text, and what they save in real decoding."""

from __future__ import annotations

import functools

from torch import Tensor

from longcat_lab.blocks.context import taken
from longcat_lab.blocks.loss_op import cross_entropy_reference
from longcat_lab.blocks.mtp.module import step_labels
from longcat_lab.config import RunConfig
from longcat_lab.data import IGNORED, Batch, Corpus, evaluation_batches
from longcat_lab.model import LongcatLM, speculate
from longcat_lab.training.passes import Over, ends_here, hits, over_whole, summed_nats

PROMPTS = 8  # held-out texts that are continued by speculative decoding
LONGEST_PROMPT = 64
NEW_TOKENS = 48


def evaluate_steps(
    model: LongcatLM, corpus: Corpus, config: RunConfig, split: str = "validation", over: Over | None = None
) -> dict[str, float]:
    """`next_accuracy`, and for step k `mtp_validation_loss_K` (nats a label) and `mtp_accuracy_K`, with the true tokens up to i + k;
    `mtp_validation_loss` is the steps' mean.

    Accuracy is the share of labels that the step's most likely token hits: what speculative decoding accepts when all before was right.

    over: `Steps.over`, where `model` is a part of a divided one; all processes call this then, and have the same numbers.
    """
    steps = config.model.mtp.num_nextn_predict_layers
    batches = evaluation_batches(
        corpus.split(split), config.data.sequence_length, config.data.batch_size, config.training.evaluation_sequences
    )
    measure = functools.partial(_steps, steps=steps, divided=over is not None)
    sums = (over or over_whole(model))(batches, measure, config.training.precision)
    nats, right, counts = (sums[place::3] for place in range(3))
    found = {"next_accuracy": right[0] / max(counts[0], 1)}
    for k in range(1, steps + 1):
        found[f"mtp_validation_loss_{k}"] = nats[k] / max(counts[k], 1)
        found[f"mtp_accuracy_{k}"] = right[k] / max(counts[k], 1)
    found["mtp_validation_loss"] = sum(found[f"mtp_validation_loss_{k}"] for k in range(1, steps + 1)) / steps
    return found


def _steps(model: LongcatLM, hidden: Tensor, batch: Batch, steps: int, divided: bool) -> list[float]:
    """Nats, hits and labels of the next token and of each prediction step."""
    if not ends_here(model):
        return [0.0] * (3 * (steps + 1))
    found: list[float] = []
    for k, state in enumerate([model.norm(hidden), *model.ahead(hidden, batch.tokens, batch.document_ids)]):
        own = taken(step_labels(batch.labels, batch.document_ids, k, IGNORED), model.part)
        if divided:
            found += [summed_nats(model, state, own), float(hits(model, state, own)), float((own != IGNORED).sum())]
            continue
        own = own.flatten()
        state, own = state.flatten(0, 1)[own != IGNORED], own[own != IGNORED]
        nats = float(cross_entropy_reference(state, model.lm_head.weight, own))
        found += [nats, float((model.lm_head(state).argmax(-1) == own).sum()), float(len(own))]
    return found


def accepted_length(model: LongcatLM, corpus: Corpus, config: RunConfig, split: str = "validation") -> dict[str, float]:
    """`accepted_length`: tokens gained by one pass of the trunk in greedy speculative decoding, 1 to D + 1; `speculation_rounds`, passes.

    The prompts are the starts of the first held-out sequences, always the same ones.
    """
    device, rounds, accepted = next(model.parameters()).device, 0, 0
    window = min(config.data.sequence_length, config.model.max_position_embeddings)
    prompt = min(LONGEST_PROMPT, max(1, window // 2))
    count = min(NEW_TOKENS, config.model.max_position_embeddings - prompt)
    for batch in evaluation_batches(corpus.split(split), config.data.sequence_length, 1, PROMPTS):
        found = speculate(model, batch.tokens[0, :prompt].to(device), count)
        rounds, accepted = rounds + found.rounds, accepted + sum(found.accepted)
    return {"accepted_length": 1 + accepted / max(rounds, 1), "speculation_rounds": float(rounds)}
