"""Packing in closed form; the same global batches for every number of ranks; resuming at the exact sample."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longcat_lab.data import IGNORED, Batch, Loader, TokenSplit, bits_per_byte, evaluation_batches, label_bytes, scored, shuffled
from longcat_lab.errors import LabError

EOS = 0


def packed(lengths, hash="h"):
    """Documents of the given lengths (end included); tokens count up from 1, the end is 0."""
    tokens, starts = [], []
    for length in lengths:
        starts.append(len(tokens))
        tokens += [*range(len(tokens) + 1, len(tokens) + length), EOS]
    return TokenSplit("train", np.array(tokens, dtype="<u2"), np.array(starts, dtype="<i8"), hash)


def global_batches(split, length, size, seed, world, count, state=None):
    """What all ranks read together, in rank order."""
    loaders = [Loader(split, length, size, seed, rank, world) for rank in range(world)]
    for loader in loaders if state else ():
        loader.load_state_dict(state)
    batches = [torch.cat([next(loader).tokens for loader in loaders]) for _ in range(count)]
    assert len({str(loader.state_dict()) for loader in loaders}) == 1
    return batches, loaders[0].state_dict()


def test_windows_labels_and_documents_in_closed_form(tmp_path):
    np.array([11, 12, EOS, 21, EOS, 31, 32, 33, EOS], dtype="<u2").tofile(tmp_path / "tokens")
    split = TokenSplit("train", np.memmap(tmp_path / "tokens", dtype="<u2", mode="r"), np.array([0, 3, 5], dtype="<i8"), "h")
    (batch,) = evaluation_batches(split, 4, batch_size=8)
    assert batch.tokens.tolist() == [[11, 12, EOS, 21], [EOS, 31, 32, 33]]
    assert batch.labels.tolist() == [[12, EOS, IGNORED, EOS], [IGNORED, 32, 33, EOS]]
    assert batch.document_ids.tolist() == [[0, 0, 0, 1], [0, 1, 1, 1]]
    assert {tensor.dtype for tensor in (batch.tokens, batch.labels, batch.document_ids)} == {torch.int64}


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=30), length=st.integers(1, 12))
def test_packing_against_a_loop(lengths, length):
    split = packed(lengths)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    if len(split) < length + 1:
        with pytest.raises(LabError, match="too few for one sequence"):
            evaluation_batches(split, length, 3)
        return
    rows = [row for b in evaluation_batches(split, length, 3) for row in zip(b.tokens, b.labels, b.document_ids, strict=True)]
    assert len(rows) == (len(split) - 1) // length
    for i, (tokens, labels, documents) in enumerate(rows):
        for t in range(length):
            at = i * length + t
            assert tokens[t] == split.tokens[at]
            assert labels[t] == (split.tokens[at + 1] if owner[at] == owner[at + 1] else IGNORED)
            assert documents[t] == owner[at] - owner[i * length]


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=6, max_size=40),
    length=st.integers(1, 6),
    share=st.integers(1, 3),
    seed=st.integers(0, 2**40),
)
def test_the_global_batch_does_not_depend_on_ranks(lengths, length, share, seed):
    split, size = packed([*lengths, 8]), 4 * share
    one, state = global_batches(split, length, size, seed, 1, 5)
    for world in (2, 4):
        many, other = global_batches(split, length, size, seed, world, 5)
        assert all(torch.equal(a, b) for a, b in zip(one, many, strict=True))
        assert other == state


def test_an_epoch_reads_every_window_once_and_each_epoch_in_another_order():
    split = packed([7] * 31)
    loader = Loader(split, 4, 6, seed=1)
    n = loader.windows
    assert n == (7 * 31 - 1) // 4 == 54
    epochs = [[tuple(row.tolist()) for _ in range(n // 6) for row in next(loader).tokens] for _ in range(3)]
    assert all(len(set(epoch)) == n for epoch in epochs)
    assert set(epochs[0]) == set(epochs[1])
    assert epochs[0] != epochs[1] != epochs[2]
    assert loader.epoch == 3
    other = Loader(split, 4, 6, seed=2)
    assert [tuple(row.tolist()) for _ in range(n // 6) for row in next(other).tokens] != epochs[0]


def test_a_batch_may_be_larger_than_an_epoch():
    loader = Loader(packed([5] * 3), 4, 8, seed=0)
    rows = [tuple(row.tolist()) for row in next(loader).tokens]
    assert loader.windows == 3
    assert len(set(rows[:3])) == len(set(rows[3:6])) == 3


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 4), (4, 2)])
def test_resuming_on_another_number_of_ranks(corpus, before, after):
    split = corpus.split("validation")
    whole, _ = global_batches(split, 48, 8, 5, 1, 80)
    assert 1.2 * Loader(split, 48, 8, 5).windows < 80 * 8  # over the end of an epoch, and stopped in the middle of one
    _, state = global_batches(split, 48, 8, 5, before, 37)
    rest, _ = global_batches(split, 48, 8, 5, after, 43, state)
    assert all(torch.equal(a, b) for a, b in zip(whole[37:], rest, strict=True))


def test_the_state_is_plain_and_small():
    import json

    loader = Loader(packed([5] * 9), 4, 2, seed=7)
    next(loader)
    assert json.loads(json.dumps(loader.state_dict())) == {"samples_seen": 2, "seed": 7, "sequence_length": 4, "split_hash": "h"}


def test_the_order_never_changes_between_versions():
    # Recorded once: a checkpoint written by one release must go on with the same samples in the next one.
    loader = Loader(packed([100]), 9, 11, seed=2**33 + 5)
    orders = [((next(loader).tokens[:, 0] - 1) // 9).tolist() for _ in range(2)]
    assert orders == RECORDED


RECORDED = [[7, 9, 1, 3, 4, 6, 2, 8, 5, 0, 10], [1, 9, 10, 5, 3, 4, 6, 7, 0, 8, 2]]


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        (Loader(packed([5] * 9, hash="g"), 4, 2, 7), "split_hash 'h', here 'g'"),
        (Loader(packed([5] * 9), 4, 2, 8), "seed 7, here 8"),
        (Loader(packed([5] * 9), 3, 2, 7), "sequence_length 4, here 3"),
    ],
)
def test_a_state_of_other_data_is_refused(other, sentence):
    with pytest.raises(LabError, match=rf"The checkpoint was reading other data \({sentence}\): resume with the data settings"):
        other.load_state_dict(Loader(packed([5] * 9), 4, 2, 7).state_dict())
    assert other.samples_seen == 0


def test_wrong_combinations_are_sentences():
    split = packed([5] * 9)
    with pytest.raises(LabError, match=r"data\.batch_size=6 cannot be shared equally by 4 ranks: make it a multiple of 4"):
        Loader(split, 4, 6, 0, world_size=4)
    with pytest.raises(LabError, match=r"Rank 2 is not one of 2 ranks"):
        Loader(split, 4, 6, 0, rank=2, world_size=2)
    with pytest.raises(LabError, match=r"The train split has 45 tokens, too few for one sequence of data\.sequence_length=45"):
        Loader(split, 45, 6, 0)
    assert Loader(split, 44, 6, 0).windows == 1


def test_evaluation_is_finite_and_in_order(corpus):
    split = corpus.split("validation")
    batches = list(evaluation_batches(split, 50, 7, max_sequences=17))
    assert [len(b.tokens) for b in batches] == [7, 7, 3]
    assert np.array_equal(torch.cat([b.tokens for b in batches]).flatten(), split.tokens[: 17 * 50])
    every = list(evaluation_batches(split, 50, 7))
    assert sum(len(b.tokens) for b in every) == (len(split) - 1) // 50


def test_shuffled_destroys_order_and_nothing_else(corpus):
    batch = next(evaluation_batches(corpus.split("validation"), 64, 8))
    mixed = shuffled(batch, 3)
    assert torch.equal(mixed.tokens.sort(dim=1).values, batch.tokens.sort(dim=1).values)
    assert (mixed.tokens != batch.tokens).float().mean() > 0.5
    assert torch.equal(mixed.labels[:, :-1], mixed.tokens[:, 1:])
    assert (mixed.labels[:, -1] == IGNORED).all()
    assert not mixed.document_ids.any()
    assert torch.equal(mixed.tokens, shuffled(batch, 3).tokens)
    assert not torch.equal(mixed.tokens, shuffled(batch, 4).tokens)
    assert not torch.equal(torch.argsort(mixed.tokens[0]), torch.argsort(mixed.tokens[1]))  # each row its own order


def test_bits_per_byte_of_a_known_distribution():
    token_bytes = np.array([0, 1, 3, 2])  # 0 ends a document
    labels = torch.tensor([[1, 2, 0, IGNORED], [3, 3, 2, 1]])
    assert label_bytes(labels, token_bytes) == 1 + 3 + 2 + 2 + 3 + 1
    mask = scored(labels, token_bytes)
    assert mask.tolist() == [[True, True, False, False], [True, True, True, True]]
    uniform = torch.full(labels.shape, math.log(8.0))  # 3 bits for each of 6 scored labels
    assert bits_per_byte(float(uniform[mask].sum()), label_bytes(labels, token_bytes)) == pytest.approx(18 / 12)
    with pytest.raises(LabError, match="at least one byte"):
        bits_per_byte(1.0, 0)


def test_a_uniform_byte_model_has_eight_bits_per_byte(corpus):
    nll, count = 0.0, 0
    for batch in evaluation_batches(corpus.split("out_of_distribution"), 128, 16):
        assert isinstance(batch, Batch)
        nll += math.log(256.0) * label_bytes(batch.labels, corpus.token_bytes)
        count += int(torch.from_numpy(corpus.token_bytes)[batch.labels[scored(batch.labels, corpus.token_bytes)]].sum())
    assert bits_per_byte(nll, count) == pytest.approx(8.0)
    assert count < corpus.manifest["splits"]["out_of_distribution"]["bytes"]  # a document's first token is predicted by nothing
    assert count > 0.98 * corpus.manifest["splits"]["out_of_distribution"]["bytes"]
