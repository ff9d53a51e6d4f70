"""Held-out bits per byte, and the negative control."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from longcat_lab.config import RunConfig
from longcat_lab.data import Batch, Corpus, bits_per_byte, evaluation_batches, label_bytes, scored, shuffled
from longcat_lab.model.generate import evaluating
from longcat_lab.training.attention_measures import evaluate_attention
from longcat_lab.training.device import autocast
from longcat_lab.training.prediction import accepted_length, evaluate_steps
from longcat_lab.training.probe_evaluation import evaluate_probe

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
    the measures of `prediction.py` if the model predicts further ahead, those of `probe_evaluation.py` if it is trained on a probe,
    those of `attention_measures.py` if asked for; all bits per byte are of the trunk alone.
    """
    found = {
        "validation_bpb": evaluate(model, corpus, config, "validation"),
        "shuffled_bpb": evaluate(model, corpus, config, "validation", control=True),
    }
    if "out_of_distribution" in corpus.splits:
        found["out_of_distribution_bpb"] = evaluate(model, corpus, config, "out_of_distribution")
    if config.model.mtp is not None:
        found.update({**evaluate_steps(model, corpus, config), **accepted_length(model, corpus, config)})
    if config.data.probe is not None:
        found.update(evaluate_probe(model, corpus, config))
    if config.training.attention_measures:
        found.update(evaluate_attention(model, corpus, config))
    return found


@torch.no_grad()
def entry_measures(model: nn.Module, batch: Batch) -> dict[str, float]:
    """How loud the embedding is where it enters the residual stream, on one batch.

    Returns:
        embedding_rms: root mean square of the embedding's output; first_attention_ratio: L2 norm of the first attention's output
        over that of the branch it is added to (mean over tokens), about 10 where an n-gram mean is left unscaled
        (arXiv 2601.21204 section 3.2.4); only for layers with a `self_attn`.
    """
    seen: dict[str, torch.Tensor] = {}
    layer = model.layers[0]
    attention = getattr(layer, "self_attn", None)
    first = attention[0] if isinstance(attention, nn.ModuleList) else attention
    hooks = [layer.register_forward_pre_hook(lambda module, arguments: seen.update(stream=arguments[0]))]
    if first is not None:
        hooks.append(first.register_forward_hook(lambda module, arguments, out: seen.update(attention=out)))
    device = next(model.parameters()).device
    try:
        with evaluating(model):
            model.hidden(batch.tokens.to(device), batch.document_ids.to(device))
            embedded = model.embed_tokens(batch.tokens.to(device), batch.document_ids.to(device))
    finally:
        for hook in hooks:
            hook.remove()
    found = {"embedding_rms": float(embedded.float().square().mean().sqrt())}
    if "attention" in seen:
        norms = [seen[name].float().norm(dim=-1) for name in ("attention", "stream")]
        found["first_attention_ratio"] = float((norms[0] / norms[1].clamp(min=1e-12)).mean())
    return found
