"""How good the prediction steps are: loss and accuracy of each on held-out text, and what they save in real decoding."""

from __future__ import annotations

import torch

from longcat_lab.blocks.loss_op import cross_entropy_reference
from longcat_lab.blocks.mtp.module import step_labels
from longcat_lab.config import RunConfig
from longcat_lab.data import IGNORED, Corpus, evaluation_batches
from longcat_lab.model import LongcatLM, speculate
from longcat_lab.model.generate import evaluating
from longcat_lab.training.device import autocast

PROMPTS = 8  # held-out texts that are continued by speculative decoding
LONGEST_PROMPT = 64
NEW_TOKENS = 48


@torch.no_grad()
def evaluate_steps(model: LongcatLM, corpus: Corpus, config: RunConfig, split: str = "validation") -> dict[str, float]:
    """`next_accuracy`, and for step k `mtp_validation_loss_K` (nats a label) and `mtp_accuracy_K`, with the true tokens up to i + k;
    `mtp_validation_loss` is the steps' mean.

    Accuracy is the share of labels that the step's most likely token hits: what speculative decoding accepts when all before was right.
    """
    device = next(model.parameters()).device
    steps = config.model.mtp.num_nextn_predict_layers
    nats, hits, counts = ([0.0] * (steps + 1) for _ in range(3))
    for batch in evaluation_batches(
        corpus.split(split), config.data.sequence_length, config.data.batch_size, config.training.evaluation_sequences
    ):
        tokens, labels, documents = (t.to(device) for t in (batch.tokens, batch.labels, batch.document_ids))
        with evaluating(model), autocast(device, config.training.precision):
            hidden = model.hidden(tokens, documents)
            for k, state in enumerate([model.norm(hidden), *model.ahead(hidden, tokens, documents)]):
                own = step_labels(labels, documents, k, IGNORED).flatten()
                state, own = state.flatten(0, 1)[own != IGNORED], own[own != IGNORED]
                nats[k] += float(cross_entropy_reference(state, model.lm_head.weight, own))
                hits[k] += int((model.lm_head(state).argmax(-1) == own).sum())
                counts[k] += len(own)
    found = {"next_accuracy": hits[0] / max(counts[0], 1)}
    for k in range(1, steps + 1):
        found[f"mtp_validation_loss_{k}"] = nats[k] / max(counts[k], 1)
        found[f"mtp_accuracy_{k}"] = hits[k] / max(counts[k], 1)
    found["mtp_validation_loss"] = sum(found[f"mtp_validation_loss_{k}"] for k in range(1, steps + 1)) / steps
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
