"""Row addresses: literal vectors, published sizes, unbounded integers as the oracle, where n-grams end, 64 bits."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longcat_lab.blocks import NgramEmbeddingConfig
from longcat_lab.blocks.ngram_embedding.hash_op import ngram_rows_reference, table_moduli
from longcat_lab.blocks.ngram_embedding.numbers import is_prime
from longcat_lab.blocks.ngram_embedding.tables import NgramAddresses

LITE = {"order": 4, "splits": 4, "vocab_ratio": 78.0, "boundary": "eos", "eos_token_id": 2}
TWO = {"order": 5, "splits": 4, "vocab_ratio": 100.567, "boundary": "eos", "eos_token_id": 2}
FAMILIES = ["polynomial", "prime_base", "random_base", "multiplicative_xor", "permuted"]


def by_hand(tokens, documents, plan):
    """One row of text in Python's own integers, which never overflow, from the definition and not from the code's tensors."""
    order = plan.permutation().tolist() if plan.permutation_seed is not None else range(plan.vocab_size)
    hole = order[plan.hole] if 0 < plan.hole < plan.vocab_size else plan.hole
    rows = []
    for i, token in enumerate(tokens):
        kept = [order[token]]
        for j in range(1, len(plan.weights)):
            there = i - j >= 0
            if plan.boundary == "documents":
                there = there and documents[i - j] == documents[i]
            if plan.boundary == "eos":
                there = there and plan.eos_token_id not in tokens[i - j : i]
                there = there and (plan.eos_looks_back or token != plan.eos_token_id)
            kept.append(order[tokens[i - j]] if there else hole)
        row = []
        for table, m in enumerate(plan.moduli):
            total = 0
            for j in range(plan.orders[table]):
                term = kept[j] * plan.weights[j][table]
                total = total ^ term if plan.xor else total + term
            row.append(total % m)
        rows.append(row)
    return rows


def local(settings_, vocab, tokens, documents=None):
    """Addresses inside each table, of a row of text."""
    module = NgramAddresses(settings_, vocab)
    documents = None if documents is None else torch.tensor([documents])
    return (module(torch.tensor([tokens]), documents) - module.starts)[0].tolist()


@pytest.mark.parametrize(
    ("vocab", "ratio", "order", "splits", "first", "total"),
    [
        (131072, 78, 4, 4, 10_223_617, 122_683_536),
        (163840, 100.567, 5, 4, 16_476_898, 263_630_608),
        (163840, 59.604, 5, 4, 9_765_520, 156_248_560),
    ],
)
def test_published_moduli(vocab, ratio, order, splits, first, total):
    moduli = table_moduli(vocab, ratio, order, splits)
    assert moduli[0] == first and sum(moduli) == total < 2**31
    assert [b - a for a, b in itertools.pairwise(moduli)] == [2] * ((order - 1) * splits - 1)


def test_literal_addresses():
    """V = 10, moduli 7 and 9 (orders 2 and 3): the current token has weight 1, the oldest V^2."""
    rows = local(NgramEmbeddingConfig(order=3, splits=1, table_rows=7), 10, [3, 5, 9])
    assert rows == [[3, 3], [(5 + 30) % 7, (5 + 30) % 9], [(9 + 50) % 7, (9 + 50 + 300) % 9]]


def test_literal_addresses_of_the_exclusive_or():
    """A published example: tokens 7, 9, 11, holes filled with 99, multipliers 3, 5, 7 and sizes 101 and 103."""
    settings_ = NgramEmbeddingConfig(
        order=3, splits=1, table_rows=100, hash="multiplicative_xor", multipliers=[3, 5, 7], pad="eos", eos_token_id=99
    )
    module = NgramAddresses(settings_, 100)
    assert module.plan.moduli == (101, 103)
    assert module(torch.tensor([[7, 9, 11]])).tolist() == [[[1, 124], [56, 136], [12, 162]]]


@pytest.mark.parametrize(("config", "vocab"), [(LITE, 131072), (TWO, 163840)])
def test_ends_of_sequences_in_the_published_models(config, vocab):
    """2 ends a segment: its own n-grams look back, those after it start anew, and a second one sees no further than the first."""
    n, tokens = config["order"], [100, 131071, 2, 70000, 5, 2, 2, 9, 131000, 2]
    rows, sizes = local(NgramEmbeddingConfig(**config), vocab, tokens), table_moduli(vocab, config["vocab_ratio"], n, 4)

    def expected(current, *before):
        kept = [current, *before]
        return [sum(t * vocab**j for j, t in enumerate(kept[: e // 4 + 2])) % m for e, m in enumerate(sizes)]

    assert rows[0] == expected(100)  # one token: the token's own id, in every table
    assert rows[0] == [100] * len(sizes)
    assert rows[2] == expected(2, 131071, 100)  # the end looks back
    assert rows[3] == expected(70000)  # and nothing looks across it
    assert rows[5] == expected(2, 5, 70000)
    assert rows[6] == expected(2)  # the second end in a row
    assert rows[8] == expected(131000, 9)
    assert rows[9] == expected(2, 131000, 9)  # at the very end of the text


def test_an_end_that_does_not_look_back():
    rows = local(NgramEmbeddingConfig(**{**LITE, "eos_looks_back": False}), 131072, [100, 7, 2, 5])
    assert rows[2] == [2] * 12 and rows[3] == [5] * 12 and rows[1] != [7] * 12


def test_without_a_boundary_everything_looks_back():
    tokens = [5, 2, 9]
    open_, documents = (NgramEmbeddingConfig(order=3, splits=1, table_rows=97, boundary=b) for b in ("none", "documents"))
    assert local(open_, 100, tokens, [0, 0, 1])[2] == [(9 + 200) % 97, (9 + 200 + 50000) % 99]
    assert local(documents, 100, tokens, [0, 0, 1])[2] == [9, 9]


def test_a_hole_with_an_id_of_its_own_is_not_token_0():
    zero, reserved = (NgramEmbeddingConfig(order=2, splits=1, table_rows=9973, pad=p) for p in ("zero", "reserved"))
    assert local(zero, 100, [4])[0] == local(zero, 100, [0, 4])[1]
    assert local(reserved, 100, [4])[0] == [(4 + 100 * 101) % 9973] and local(reserved, 100, [0, 4])[1] == [4]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_both_forms_equal_unbounded_integers(data):
    vocab, order, splits = data.draw(st.integers(2, 163840)), data.draw(st.integers(2, 5)), data.draw(st.integers(1, 3))
    end = data.draw(st.integers(0, vocab - 1))
    config = NgramEmbeddingConfig(
        order=order,
        splits=splits,
        vocab_ratio=data.draw(st.floats(1, 101)),
        hash=data.draw(st.sampled_from(FAMILIES)),
        hash_seed=data.draw(st.integers(0, 9)),
        prime_sizes=data.draw(st.booleans()),
        boundary=data.draw(st.sampled_from(["documents", "eos", "none"])),
        pad=data.draw(st.sampled_from(["zero", "reserved", "eos"])),
        eos_token_id=end,
        eos_looks_back=data.draw(st.booleans()),
    )
    length, any_token = data.draw(st.integers(1, 9)), st.one_of(st.just(end), st.integers(0, vocab - 1))
    tokens = data.draw(st.lists(any_token, min_size=length, max_size=length))
    documents = sorted(data.draw(st.lists(st.integers(0, 3), min_size=length, max_size=length)))
    plan = config.plan(vocab)
    expected = by_hand(tokens, documents, plan)
    assert ngram_rows_reference(torch.tensor([tokens]), torch.tensor([documents]), plan)[0].tolist() == expected
    assert local(config, vocab, tokens, documents) == expected
    assert all(0 <= row < m for rows in expected for row, m in zip(rows, plan.moduli, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("config", [LITE, TWO])
def test_32_bits_would_not_do_and_64_do(config, family):
    """The largest ids in every place of the published tables: beyond 2^31 on the way, and right; the plan proves it for all ids."""
    vocab = 163840
    settings_ = NgramEmbeddingConfig(**{**config, "hash": family})
    plan, tokens = settings_.plan(vocab), [vocab - 1] * 8
    assert 2**31 < plan.largest() < 2**63
    assert local(settings_, vocab, tokens) == by_hand(tokens, [0] * 8, plan)
    assert NgramAddresses(settings_, vocab)(torch.tensor([tokens], dtype=torch.int64)).dtype == torch.int64


def test_sizes_of_the_exclusive_or_are_the_next_primes():
    moduli = NgramEmbeddingConfig(order=3, splits=2, table_rows=100, hash="multiplicative_xor").moduli(50)
    assert moduli == [101, 103, 107, 109] and all(map(is_prime, moduli))


def test_a_layer_of_its_own_draws_a_hash_of_its_own():
    config = NgramEmbeddingConfig(hash="multiplicative_xor")
    one, same, other = (config.plan(512, salt) for salt in (1, 1, 2))
    assert one == same and one.weights != other.weights


def test_packed_documents_and_chunks_have_the_addresses_of_the_whole():
    module = NgramAddresses(NgramEmbeddingConfig(order=5, splits=1, table_rows=1009), 300)
    tokens = torch.randint(0, 300, (2, 24))
    whole = module(tokens)
    for start in (1, 2, 7, 23):
        assert torch.equal(module(tokens[:, start:], None, tokens[:, :start]), whole[:, start:])
    apart = torch.cat((module(tokens[:, :10]), module(tokens[:, 10:])), 1)
    assert torch.equal(module(tokens, torch.arange(24).ge(10).long().expand(2, -1)), apart)
    assert not torch.equal(apart, whole)
