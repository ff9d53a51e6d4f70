"""Passes that only look: how sequences are dealt out to processes, and what a whole model's are."""

import math

import pytest
import torch
import torch.nn.functional as F

import longcat_lab as lab
from longcat_lab.data import IGNORED, Batch, evaluation_batches, prepare, scored
from longcat_lab.errors import LabError
from longcat_lab.training.evaluation import evaluate
from longcat_lab.training.passes import dealt, over_whole


def batches(*sizes):
    """Batches of so many sequences, each of which says its own number."""
    numbers = torch.arange(sum(sizes))[:, None] + torch.zeros(5, dtype=torch.int64)
    return [Batch(each, each + 1000, each + 2000) for each in numbers.split(sizes)]


@pytest.mark.parametrize("sizes", [(4, 4, 4), (4, 4, 1), (2,), (7, 1)])
@pytest.mark.parametrize(("size", "ways"), [(1, 1), (1, 3), (2, 2), (8, 2)])
def test_every_sequence_is_dealt_to_one_process_and_all_get_equally_many(sizes, size, ways):
    dealt_to = [list(dealt(batches(*sizes), size, place, ways)) for place in range(ways)]
    assert {len(parts) for parts in dealt_to} == {math.ceil(sum(sizes) / (size * ways))}
    everything = [part for parts in dealt_to for part in parts]
    assert {tuple(each.shape) for part in everything for each in (part.tokens, part.labels, part.document_ids)} == {(size, 5)}
    tokens, labels, documents = (torch.cat([getattr(part, name) for part in everything]) for name in ("tokens", "labels", "document_ids"))
    real = labels[:, 0] != IGNORED
    assert sorted(tokens[real, 0].tolist()) == list(range(sum(sizes)))
    assert torch.equal(labels[real], tokens[real] + 1000) and torch.equal(documents, tokens + 2000)
    assert (labels[~real] == IGNORED).all()


def test_bits_per_byte_of_a_whole_model_in_closed_form():
    config = lab.load("tiny", "training.evaluation_sequences=3", "data.batch_size=2")
    corpus, model = prepare(config.data, config.model.vocab_size), lab.build(config).train()
    nats, count = 0.0, 0
    with torch.no_grad():
        for batch in evaluation_batches(corpus.split("validation"), config.data.sequence_length, 1, 3):
            logits = model.eval()(batch.tokens, batch.document_ids).double()
            counted = scored(batch.labels, corpus.token_bytes)
            nats += float(F.cross_entropy(logits[counted], batch.labels[counted], reduction="sum"))
            count += int(torch.from_numpy(corpus.token_bytes)[batch.labels[counted]].sum())
    model.train()
    assert evaluate(model, corpus, config, "validation") == pytest.approx(nats / math.log(2) / count, rel=1e-6)
    assert model.training and all(parameter.grad is None for parameter in model.parameters())


def test_text_of_another_vocabulary_is_refused():
    config = lab.load("tiny")
    outside = torch.full((1, 4), config.model.vocab_size)
    with pytest.raises(LabError, match="is outside the vocabulary of"):
        over_whole(lab.build(config))([Batch(outside, outside, outside)], lambda *_: [0.0], "fp32")
