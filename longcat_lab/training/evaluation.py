"""Held-out bits per byte, and the negative control.

Of a model that is divided over processes the same numbers are found where its parts are. They are not the same bits as one process's:
sequences meet in other batches, whose matrix products sum in other orders; losses are summed by chunks in fp32; and parts are added up.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longcat_lab.blocks.context import taken
from longcat_lab.config import RunConfig
from longcat_lab.data import IGNORED, Batch, Corpus, bits_per_byte, evaluation_batches, label_bytes, scored, shuffled
from longcat_lab.model import LongcatLM
from longcat_lab.training.attention_measures import evaluate_attention
from longcat_lab.training.passes import Over, ends_here, over_whole, summed_nats
from longcat_lab.training.prediction import accepted_length, evaluate_steps
from longcat_lab.training.probe_evaluation import evaluate_probe

SHUFFLE_SEED = 0  # of the negative control; the same for all runs, so that arms are compared on the same text


def evaluate(model: LongcatLM, corpus: Corpus, config: RunConfig, split: str, control: bool = False, over: Over | None = None) -> float:
    """Bits per byte of `split`, on its first `training.evaluation_sequences` sequences.

    Args:
        control: the tokens of each sequence in a random order. What a model gains from the order of tokens must vanish here.
        over: `Steps.over`, where `model` is a part of a divided one; all processes call this then, and have the same number.
    """
    batches = evaluation_batches(
        corpus.split(split), config.data.sequence_length, config.data.batch_size, config.training.evaluation_sequences
    )
    batches = (shuffled(batch, SHUFFLE_SEED) for batch in batches) if control else batches
    measure = functools.partial(_text, token_bytes=corpus.token_bytes, divided=over is not None)
    nats, count = (over or over_whole(model))(batches, measure, config.training.precision)
    return bits_per_byte(nats, int(count))


def _text(model: LongcatLM, hidden: Tensor, batch: Batch, token_bytes: np.ndarray, divided: bool) -> list[float]:
    """Nats and bytes of the scored labels that are here."""
    if not ends_here(model):
        return [0.0, 0.0]
    labels = taken(batch.labels, model.part)
    counted = scored(labels, token_bytes)
    if divided:
        nats = summed_nats(model, model.norm(hidden), labels.masked_fill(~counted, IGNORED))
    else:
        logits = model.lm_head(model.norm(hidden))
        losses = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none").cpu()
        nats = float(losses[counted.flatten().cpu()].double().sum())
    return [nats, float(label_bytes(labels, token_bytes))]


def evaluate_in_place(model: LongcatLM, corpus: Corpus, config: RunConfig, over: Over | None = None) -> dict[str, float]:
    """Those of `evaluate_all` for which no process needs the whole model; `over` as in `evaluate`."""
    found = {
        "validation_bpb": evaluate(model, corpus, config, "validation", over=over),
        "shuffled_bpb": evaluate(model, corpus, config, "validation", control=True, over=over),
    }
    if "out_of_distribution" in corpus.splits:
        found["out_of_distribution_bpb"] = evaluate(model, corpus, config, "out_of_distribution", over=over)
    if config.model.mtp is not None:
        found.update(evaluate_steps(model, corpus, config, over=over))
    return found


def evaluate_whole(model: nn.Module, corpus: Corpus, config: RunConfig) -> dict[str, float]:
    """The others: drafting, probes and looks at attention take a whole model."""
    found: dict[str, float] = {}
    if config.model.mtp is not None:
        found.update(accepted_length(model, corpus, config))
    if config.data.probe is not None:
        found.update(evaluate_probe(model, corpus, config))
    if config.training.attention_measures:
        found.update(evaluate_attention(model, corpus, config))
    return found


def evaluate_all(model: nn.Module, corpus: Corpus, config: RunConfig) -> dict[str, float]:
    """validation_bpb, shuffled_bpb (validation text with its token order destroyed), out_of_distribution_bpb if there is such text, and
    the measures of `prediction.py` if the model predicts further ahead, those of `probe_evaluation.py` if it is trained on a probe,
    those of `attention_measures.py` if asked for; all bits per byte are of the trunk alone.
    """
    return {**evaluate_in_place(model, corpus, config), **evaluate_whole(model, corpus, config)}


def entry_measures(model: LongcatLM, batch: Batch, over: Over | None = None) -> dict[str, float]:
    """How loud the embedding is where it enters the residual stream, on one batch.

    Args:
        over: as in `evaluate`; `batch` is the whole one on all processes.

    Returns:
        embedding_rms: root mean square of the embedding's output; first_attention_ratio: L2 norm of the first attention's output
        over that of the branch it is added to (mean over tokens), about 10 where an n-gram mean is left unscaled
        (arXiv 2601.21204 section 3.2.4); only for layers with a `self_attn`.
    """
    seen: dict[str, Tensor] = {}
    layer = model.layers[0]
    attention = getattr(layer, "self_attn", None)
    first = attention[0] if isinstance(attention, nn.ModuleList) else attention
    hooks = [
        model.embed_tokens.register_forward_hook(lambda module, arguments, out: seen.update(embedded=out)),
        layer.register_forward_pre_hook(lambda module, arguments: seen.update(stream=arguments[0])),
    ]
    if first is not None:
        hooks.append(first.register_forward_hook(lambda module, arguments, out: seen.update(attention=out)))

    def means(*_: object) -> list[float]:
        """Number of passes, means over this one, number of ratios: all passes are of equally many tokens."""
        if "stream" not in seen:  # the first layer is on another pipeline stage
            return [0.0] * 4
        square, ratio = float(seen["embedded"].float().square().mean()), 0.0
        if "attention" in seen:
            norms = [seen[name].float().norm(dim=-1) for name in ("attention", "stream")]
            ratio = float((norms[0] / norms[1].clamp(min=1e-12)).mean())
        return [1.0, square, ratio, float("attention" in seen)]

    try:
        passes, square, ratio, ratios = (over or over_whole(model))([batch], means, "fp32")
    finally:
        for hook in hooks:
            hook.remove()
    found = {"embedding_rms": float(torch.tensor(square / passes, dtype=torch.float32).sqrt())}
    if ratios:
        found["first_attention_ratio"] = ratio / ratios
    return found
