"""Forward passes over text that only look: of a whole model in one process. Those of a divided model are `Steps.over`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from longcat_lab.blocks.loss_op import CHUNK_ELEMENTS, Scored, cross_entropies
from longcat_lab.blocks.token_embedding.module import check_tokens
from longcat_lab.data import IGNORED, Batch
from longcat_lab.model import LongcatLM
from longcat_lab.model.generate import evaluating
from longcat_lab.training.device import autocast

# What is asked of one pass: the model, the hidden states [B, T, H] that leave the layers that are here (of a part of the rows, where one
# runs here), and the batch, on the model's device; its numbers are summed over all passes. Called under autocast and without gradient.
Measure = Callable[[LongcatLM, Tensor, Batch], list[float]]
# over(batches, measure, precision): the sums of what `measure` finds. precision: as `training.precision`.
Over = Callable[[Iterable[Batch], Measure, str], list[float]]


def over_whole(model: LongcatLM) -> Over:
    """A pass a batch."""
    place = next(model.parameters()).device

    @torch.no_grad()
    def over(batches: Iterable[Batch], measure: Measure, precision: str) -> list[float]:
        sums: list[float] = []
        for batch in batches:
            check_tokens(batch.tokens, model.config.vocab_size)
            here = Batch(batch.tokens.to(place), batch.labels.to(place), batch.document_ids.to(place))
            with evaluating(model), autocast(place, precision):
                found = measure(model, model.hidden(here.tokens, here.document_ids), here)
            sums = [a + b for a, b in zip(sums or [0.0] * len(found), found, strict=True)]
        return sums

    return over


def dealt(batches: Iterable[Batch], size: int, place: int, ways: int) -> Iterator[Batch]:
    """The sequences of `batches` dealt out to `ways` processes, `size` to each at a time; those of process `place`.

    All get equally many, of equal length: what is missing at the end is made up by sequences without a label.
    """
    whole, rows = size * ways, torch.empty(0)
    for batch in batches:
        new = torch.stack((batch.tokens, batch.labels, batch.document_ids))
        rows = torch.cat((rows, new), 1) if rows.numel() else new
        while rows.shape[1] >= whole:
            yield Batch(*rows[:, place * size : (place + 1) * size])
            rows = rows[:, whole:]
    if rows.numel():
        empty = rows[:, :1].clone()
        empty[1] = IGNORED
        rows = torch.cat((rows, empty.expand(-1, whole - rows.shape[1], -1)), 1)
        yield Batch(*rows[:, place * size : (place + 1) * size])


def ends_here(model: LongcatLM) -> bool:
    """Whether the head is here, and not on a later pipeline stage."""
    return model.stage.stop == len(model.layers)


def summed_nats(model: LongcatLM, state: Tensor, labels: Tensor) -> float:
    """Cross entropy of the labels [B, T] that are not -100, from normed states [B, T, H]: a chunk's logits at a time, of the rows of the
    head that are here.
    """
    _, (nats,) = cross_entropies([Scored(state, labels)], model.lm_head.weight, model.vocabulary)
    return float(nats)


def hits(model: LongcatLM, state: Tensor, labels: Tensor) -> int:
    """How many labels [B, T] that are not -100 are the most likely token; of equals the first one is. As `summed_nats` otherwise."""
    head, vocabulary = model.lm_head.weight, model.vocabulary
    state, labels, found = state.flatten(0, -2), labels.flatten(), 0
    rows = max(1, CHUNK_ELEMENTS // len(head))
    for start in range(0, len(state), rows):
        best, token = torch.nn.functional.linear(state[start : start + rows], head).max(-1)
        if vocabulary is not None:
            largest = vocabulary.largest(best.clone())
            token = torch.where(best == largest, token + vocabulary.first, model.config.vocab_size)
            token = -vocabulary.largest(-token)
        found += int((token == labels[start : start + rows]).sum())
    return found
