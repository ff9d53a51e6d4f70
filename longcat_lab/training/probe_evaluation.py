"""How well a model answers its probe: by length, by depth, by distance; and the loss of text by its place in the sequence."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from longcat_lab.config import RunConfig
from longcat_lab.data import IGNORED, Batch, Corpus, Episode, evaluation_batches, evaluation_probes, scored
from longcat_lab.errors import LabError
from longcat_lab.model.generate import evaluating
from longcat_lab.training.device import autocast

DEPTH_BINS = 5


@dataclass
class _Answers:
    """One entry a question."""

    right: list[np.ndarray] = field(default_factory=list)  # bool: all tokens of the answer
    length: list[np.ndarray] = field(default_factory=list)  # of the sequence
    depth: list[np.ndarray] = field(default_factory=list)
    distance: list[np.ndarray] = field(default_factory=list)


@torch.no_grad()
def evaluate_probe(model: nn.Module, corpus: Corpus, config: RunConfig) -> dict[str, float]:
    """Answers to the fixed probes of `config.data.probe`, each token predicted from the true ones before it; a question that was asked
    and answered before in the same probe does not count.

    Returns:
        over the questions of all evaluation lengths together: `probe_accuracy` (all tokens of the answer are the most likely ones),
        `probe_error` (1 - accuracy), `probe_token_accuracy`, `probe_loss` (nats an answer token);
        `probe_accuracy_length_L` for each length; `probe_accuracy_depth_0` ... `_4` by where the answer was told, 0 the earliest and
        farthest from the question; `probe_error_far` of those told at least `probe.far` tokens before. Without a question in a bin
        its key is left out.

    Raises:
        LabError: a length is above model.max_position_embeddings, or the held-out text is shorter than one sequence.
    """
    probe, data = config.data.probe, config.data
    longest = config.model.max_position_embeddings
    for length in data.probe_lengths():
        if length > longest:
            raise LabError(
                f"data.probe.evaluation_lengths has {length}, above model.max_position_embeddings {longest}: make one fit the other."
            )
    seen, nats, hits, tokens = _Answers(), 0.0, 0, 0
    for length in data.probe_lengths():
        size = max(1, data.batch_size * data.sequence_length // length)
        for batch, episodes in evaluation_probes(corpus, probe, length, size):
            losses, right = _answered(model, batch, episodes, config.training.precision)
            nats, hits, tokens = nats + float(losses.double().sum()), hits + int(right.sum()), tokens + right.numel()
            seen.right.append(right.all(dim=-1).numpy())
            seen.length.append(np.full(len(right), length))
            seen.depth.append(np.concatenate([each.depths[each.counted] for each in episodes]))
            seen.distance.append(np.concatenate([each.distances[each.counted] for each in episodes]))
    right, lengths, depths, distances = (np.concatenate(each) for each in (seen.right, seen.length, seen.depth, seen.distance))
    groups = {f"probe_accuracy_length_{length}": lengths == length for length in data.probe_lengths()}
    bins = np.minimum((depths * DEPTH_BINS).astype(np.int64), DEPTH_BINS - 1)
    groups.update({f"probe_accuracy_depth_{i}": bins == i for i in range(DEPTH_BINS)})
    found = {"probe_accuracy": float(right.mean()), "probe_error": 1 - float(right.mean())}
    found.update({"probe_token_accuracy": hits / tokens, "probe_loss": nats / tokens})
    found.update({key: float(right[group].mean()) for key, group in groups.items() if group.any()})
    if probe.far is not None and (distances >= probe.far).any():
        found["probe_error_far"] = 1 - float(right[distances >= probe.far].mean())
    return found


def _answered(model: nn.Module, batch: Batch, episodes: list[Episode], precision: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Nats of each answer token, and whether it is the most likely one: both [questions that count, A]."""
    device = next(model.parameters()).device
    places = torch.from_numpy(np.concatenate([each.answers[each.counted] for each in episodes])) - 1  # where answers are predicted
    rows = torch.from_numpy(np.repeat(np.arange(len(episodes)), [each.counted.sum() for each in episodes]))[:, None]
    with evaluating(model), autocast(device, precision):
        hidden = model.hidden(batch.tokens.to(device), batch.document_ids.to(device))
        logits = model.lm_head(model.norm(hidden[rows.to(device), places.to(device)])).float().cpu()  # [questions, A, V]
    labels = batch.labels[rows, places]
    return F.cross_entropy(logits.movedim(-1, 1), labels, reduction="none"), logits.argmax(-1) == labels


@torch.no_grad()
def loss_by_position(model: nn.Module, corpus: Corpus, config: RunConfig, split: str = "validation", bins: int = 8) -> dict[str, float]:
    """`loss_position_0`, ...: nats per token of text in each of `bins` equal parts of the sequence, on the sequences of `evaluate`.

    What a model gains from distant context shows as the fall of the loss along the sequence.

    Raises:
        LabError: there are more bins than places, or nothing to score in one.
    """
    device, length = next(model.parameters()).device, config.data.sequence_length
    if not 1 <= bins <= length:
        raise LabError(f"loss_by_position: {bins} bins do not fit into data.sequence_length {length}: take 1 to {length}.")
    place = torch.arange(length) * bins // length
    nats, counts = torch.zeros(bins, dtype=torch.float64), torch.zeros(bins, dtype=torch.int64)
    for batch in evaluation_batches(corpus.split(split), length, config.data.batch_size, config.training.evaluation_sequences):
        with evaluating(model), autocast(device, config.training.precision):
            logits = model(batch.tokens.to(device), batch.document_ids.to(device))
        losses = F.cross_entropy(logits.flatten(0, 1).float(), batch.labels.flatten().to(device), reduction="none", ignore_index=IGNORED)
        counted = scored(batch.labels, corpus.token_bytes)
        where = place.expand_as(counted)[counted]
        nats.index_add_(0, where, losses.cpu().double().view_as(counted)[counted])
        counts += torch.bincount(where, minlength=bins)
    if not bool(counts.all()):
        raise LabError(f"loss_by_position: a bin has no text to score: lower bins (now {bins}) or raise training.evaluation_sequences.")
    return {f"loss_position_{i}": float(nats[i] / counts[i]) for i in range(bins)}
