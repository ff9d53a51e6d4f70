"""Counts of hashed n-grams against Python sets, sizes against what they do to text, advice against published settings."""

import math
from collections import Counter
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longcat_lab.blocks.ngram_embedding import advise
from longcat_lab.blocks.ngram_embedding.advise import better_ratio, warnings
from longcat_lab.blocks.ngram_embedding.analyse import analyse, hit_rates, recommend
from longcat_lab.blocks.ngram_embedding.config import NgramEmbeddingConfig
from longcat_lab.blocks.ngram_embedding.counting import expected_collisions
from longcat_lab.blocks.ngram_embedding.hash_op import ngram_rows_reference, predecessors
from longcat_lab.blocks.ngram_embedding.numbers import (
    evenness,
    is_prime,
    least_product,
    nearest_fraction,
    shortest_vector,
    spread,
)
from longcat_lab.errors import LabError

FAMILIES = ("polynomial", "prime_base", "random_base", "multiplicative_xor", "permuted")
LITE, TWO, NARROW = (131072, 4, 78.0), (163840, 5, 100.567), (163840, 5, 59.604)  # vocabulary, order, ratio


def of(**more):
    return NgramEmbeddingConfig(**more)


def zipf(vocab, tokens=819_200, exponent=1.05):
    """Tokens drawn one by one, ids in order of frequency."""
    share = np.arange(1, vocab + 1.0) ** -exponent
    return np.searchsorted(np.cumsum(share / share.sum()), np.random.default_rng(0).random(tokens)).clip(max=vocab - 1)


@st.composite
def streams(draw):
    """Settings, tokens, document ids (rising) or None, and V."""
    vocab, length = draw(st.integers(2, 12)), draw(st.integers(1, 60))
    tokens = draw(st.lists(st.integers(0, vocab - 1), min_size=length, max_size=length))
    documents = draw(st.none() | st.lists(st.integers(0, 3), min_size=length, max_size=length).map(sorted))
    boundary, pad = draw(st.sampled_from(["documents", "eos", "none"])), draw(st.sampled_from(["zero", "reserved", "eos"]))
    node = of(
        order=draw(st.integers(2, 5)),
        splits=draw(st.integers(1, 3)),
        table_rows=draw(st.integers(1, 30)),
        hash=draw(st.sampled_from(FAMILIES)),
        boundary=boundary,
        pad=pad,
        eos_token_id=1,
    )
    return node, tokens, documents, vocab


@settings(max_examples=60, deadline=None)
@given(streams())
def test_counts_equal_those_of_python_sets(drawn):
    node, tokens, documents, vocab = drawn
    found, plan = analyse(node, np.array(tokens), documents and np.array(documents), vocab), node.plan(vocab)
    inputs = torch.tensor([tokens]), torch.tensor([documents]) if documents else None
    lags = torch.stack(predecessors(*inputs, plan), -1)[0].tolist()
    rows = ngram_rows_reference(*inputs, plan)[0].tolist()
    for count in found.tables:
        ngrams = [tuple(lag[: count.order]) for lag in lags]
        guests, taken = {}, [row[count.table] for row in rows]
        for ngram, row in zip(ngrams, taken, strict=True):
            guests.setdefault(row, set()).add(ngram)
        assert count.order == count.table // node.splits + 2 and count.split == count.table % node.splits
        assert (count.ngrams, count.rows_used, count.rows) == (len(set(ngrams)), len(guests), plan.moduli[count.table])
        assert count.colliding == len(set(ngrams)) - len(guests)
        assert count.pairs == sum(math.comb(len(own), 2) for own in guests.values())
        assert count.sharing == pytest.approx(sum(len(guests[row]) > 1 for row in taken) / len(tokens))
    for count in found.order_counts:
        own, first = [row[(count.order - 2) * node.splits :][: node.splits] for row in rows], (count.order - 2) * node.splits
        assert count.addresses == tuple(len({tuple(row[: k + 1]) for row in own}) for k in range(node.splits))
        assert count.ngrams == len({tuple(lag[: count.order]) for lag in lags})
        joint = math.lcm(*plan.moduli[first : first + node.splits])
        assert count.covers == (plan.base is not None and joint >= plan.base**count.order)
        if count.covers:  # the promise, kept on whatever text
            assert count.addresses[-1] == count.ngrams


def test_a_stream_counted_by_hand():
    """V = 10, 11 rows: 2-grams (previous, current) 00 03 31 10 03 in rows 0 3 9 10 3, and 10 * 2 + 2 shares row 0 with 00."""
    found = analyse(of(order=2, splits=1, table_rows=11), np.array([0, 3, 1, 0, 3, 0, 2, 2]), np.array([0] * 5 + [1] * 3), 10)
    (count,) = found.tables
    # Second document: (pad 0, 0) -> 0 again, (0, 2) -> 2, (2, 2) -> 22 mod 11 = 0.
    assert (count.ngrams, count.rows_used, count.colliding, count.pairs) == (6, 5, 1, 1)
    assert count.sharing == 3 / 8 and count.load == 6 / 11 and count.hit_rate == 5 / 11
    assert count.expected == pytest.approx(6 - 11 * (1 - (10 / 11) ** 6)) and count.relative == pytest.approx(1 / count.expected)
    assert found.orders.loc[2, "colliding"] == 1 and list(found.table["rows"]) == [11]


def test_rows_of_a_batch_do_not_see_each_other():
    tokens = np.array([[1, 2, 3], [4, 1, 2]])
    stacked = analyse(of(order=3), tokens, vocab_size=9)
    joined = analyse(of(order=3), tokens.ravel(), np.array([0, 0, 0, 1, 1, 1]), 9)
    assert stacked.tables == joined.tables
    assert analyse(of(order=3), torch.from_numpy(tokens.astype(np.int32)), vocab_size=9).order_counts == joined.order_counts
    assert analyse(of(order=3), tokens).vocab_size == 5


def test_hit_rates_are_those_of_prefixes():
    tokens, documents = zipf(64, 3000), np.arange(3000) // 200
    node = of(order=3, splits=2, vocab_ratio=3.567)
    for row in hit_rates(node, tokens, documents, [1, 250, 3000], 64).itertuples():
        own = analyse(node, tokens[: row.tokens], documents[: row.tokens], 64).table
        own = own[own["order"] == row.order]
        assert row.hit_rate == pytest.approx(own["hit_rate"].mean()) and row.ngrams == own["ngrams"].iloc[0]
        assert row.uniform == pytest.approx(((own["ngrams"] - own["expected"]) / own["rows"]).mean())
    counted = hit_rates(node, tokens, documents, 5, 64)
    assert counted["tokens"].iloc[0] == 100 and counted["tokens"].iloc[-1] == 3000
    assert (counted.groupby("order")["hit_rate"].diff().dropna() >= 0).all()


def test_wrong_inputs_are_named():
    with pytest.raises(LabError, match="no tokens"):
        analyse(of(), np.array([], dtype=int))
    with pytest.raises(LabError, match=r"shape \[1, 2\]"):
        analyse(of(), np.array([1, 2, 3]), np.array([0, 0]))
    with pytest.raises(LabError, match="outside 0 to vocab_size - 1 = 4"):
        analyse(of(), np.array([1, 5]), vocab_size=5)
    with pytest.raises(LabError, match="whole numbers"):
        analyse(of(), np.array([1.0, 2.0]))


def test_expected_collisions():
    """Exactly, for all ways to throw 3 n-grams into 4 rows; at 10^7 rows what the first term of the series says."""
    mean = np.mean([3 - len(set(ways)) for ways in product(range(4), repeat=3)])
    assert expected_collisions(3, 4) == pytest.approx(mean)
    assert expected_collisions(5, 1) == 4
    assert expected_collisions(1000, 10**9) == pytest.approx(1000 * 999 / 2e9, rel=1e-4)


# What sizes do to text


@pytest.fixture(scope="module")
def text():
    return {vocab: zipf(vocab) for vocab in (131072, 163840)}


@pytest.mark.parametrize(
    ("vocab", "ratio", "family", "low", "high"),
    [
        (131072, 30.0, "polynomial", 6.0, 7.0),
        (131072, 30.5, "polynomial", 4.6, 5.5),
        (131072, 30.1, "polynomial", 2.0, 2.4),
        (131072, 30.567, "polynomial", 0.84, 0.94),
        (131072, 78.0, "polynomial", 12.0, 14.0),
        (131072, 78.567, "polynomial", 0.75, 0.86),
        (163840, 100.567, "polynomial", 0.75, 0.9),
        (163840, 100.0, "polynomial", 16.5, 20.0),
        (131072, 78.0, "multiplicative_xor", 0.93, 1.07),
        (131072, 78.0, "permuted", 0.93, 1.07),
    ],
)
def test_collisions_by_size(text, vocab, ratio, family, low, high):
    """Sizes near simple multiples of the vocabulary make 2-grams collide; no two share their rows in both of two tables."""
    found = analyse(of(order=2, splits=2, vocab_ratio=ratio, hash=family), text[vocab], vocab_size=vocab)
    assert low < found.tables[0].relative < high
    assert found.order_counts[0].colliding == 0
    if ratio == 78.0 and family == "polynomial":
        assert 0.55 < found.tables[0].sharing < 0.7
    if ratio == 78.567:
        assert found.tables[0].sharing < 0.05


def test_spread_sees_what_evenness_does_not(text):
    """A size whose shortest vector is long, and that still joins frequent bigrams: short in one direction."""
    vocab, rows = 131072, round(50.8148 * 131072) | 1
    low = min((m for m in range(rows - 40, rows + 40, 2)), key=lambda m: spread(vocab, m, vocab))
    assert spread(vocab, low, vocab) < 0.005 and evenness(vocab, low) > 0.45
    assert analyse(of(order=2, splits=1, table_rows=low), text[vocab], vocab_size=vocab).relative() > 1.5


def test_recommendation_is_measured(text):
    tokens = text[131072][:200_000]
    found = recommend(of(order=4, splits=2, vocab_ratio=78.0), tokens, vocab_size=131072)
    assert found.splits == 3 and abs(found.vocab_ratio - 78) < 0.2
    assert found.before.relative() > 5 and found.after.relative() < 1
    assert not warnings(found.settings, 131072)
    assert "splits: 3 (now 2)" in str(found) and f"{found.vocab_ratio:g} (now 78)" in str(found) and len(found.sentences) == 4
    kept = recommend(of(order=4, splits=2, vocab_ratio=78.0, hash="permuted"), tokens[:1000], vocab_size=131072)
    assert kept.vocab_ratio == 78.0


def test_advice_tells_full_tables_and_collisions_that_were_not_foreseen():
    tokens = zipf(512, 60_000)
    full = analyse(of(order=3, splits=3, vocab_ratio=1.567), tokens, vocab_size=512).advice()
    assert any("3-grams share" in sentence and "raise vocab_ratio" in sentence for sentence in full)
    assert analyse(of(order=2, splits=2, vocab_ratio=100.567), tokens, vocab_size=512).advice() == []
    # An exclusive or with the multipliers 1 and 1 has no lattice to warn of, and few values.
    poor = of(order=2, splits=2, vocab_ratio=100.567, hash="multiplicative_xor", multipliers=[1, 1])
    (sentence,) = analyse(poor, tokens, vocab_size=512).advice()
    assert "2-grams collide" in sentence and "times as many" in sentence


# Advice from arithmetic alone


def size_warnings(vocab, **more):
    return [sentence for sentence in warnings(of(**more), vocab) if ".splits: " not in sentence]


@pytest.mark.parametrize("vocab", [131072, 163840])
@pytest.mark.parametrize(
    ("ratio", "fraction"),
    [(78.0, "78/1"), (30.0, "30/1"), (30.5, "61/2"), (30.25, "121/4"), (30.1, "301/10"), (59.6, "298/5"), (100.0, "100/1")],
)
def test_sizes_near_simple_fractions_are_warned_of(vocab, ratio, fraction):
    (sentence,) = size_warnings(vocab, order=4, splits=4, vocab_ratio=ratio)
    assert f"model.embedding.ngram.vocab_ratio: {ratio} is {fraction}: " in sentence and "permuted or multiplicative_xor" in sentence
    better = better_ratio(of(order=4, splits=4, vocab_ratio=ratio), vocab)
    assert f"use {better:g}, or" in sentence and abs(better - ratio) < 0.1
    assert not size_warnings(vocab, order=4, splits=4, vocab_ratio=better)
    for family in ("multiplicative_xor", "permuted"):
        assert not size_warnings(vocab, order=4, splits=4, vocab_ratio=ratio, hash=family)


@pytest.mark.parametrize("order", [2, 3, 4, 5])
@pytest.mark.parametrize(
    ("vocab", "ratio"),
    [(v, r) for v in (131072, 163840) for r in (30.567, 78.567, 100.567, 59.604)] + [(4096, 12.567), (512, 12.567)],
)
def test_good_sizes_are_not(vocab, ratio, order):
    assert not size_warnings(vocab, order=order, splits=4, vocab_ratio=ratio)
    assert better_ratio(of(order=order, splits=4, vocab_ratio=ratio), vocab) == ratio


def test_warnings_of_other_settings(monkeypatch):
    (sentence,) = size_warnings(131072, table_rows=78 * 131072 + 1)
    assert "table_rows" in sentence and "78/1" in sentence and "vocab_ratio 77.9" in sentence
    unlucky = [s for seed in range(40) for s in size_warnings(131072, hash="random_base", hash_seed=seed)]
    assert unlucky and all("another hash_seed" in sentence for sentence in unlucky)
    assert not size_warnings(512, vocab_ratio=600.0)  # more rows than 2-grams
    monkeypatch.setattr(advise, "FARTHEST", 5)
    with pytest.raises(LabError, match=r"No vocab_ratio within 0\.005 of 78 "):
        better_ratio(of(vocab_ratio=78.0), 131072)
    assert "share rows (in table 0 those whose two ids differ by 1 and 78); use hash permuted" in size_warnings(131072, vocab_ratio=78.0)[0]


@pytest.mark.parametrize(
    ("release", "needed"), [(LITE, [2, 3, 3]), (TWO, [2, 3, 3, 4]), (NARROW, [2, 3, 4, 4])], ids=["lite", "2.0", "4096 wide"]
)
def test_tables_needed_by_the_releases(release, needed):
    vocab, order, ratio = release
    node = of(order=order, splits=4, vocab_ratio=ratio)
    found = analyse(node, np.arange(order), vocab_size=vocab)
    assert [count.needed for count in found.order_counts] == needed
    of_splits = [sentence for sentence in warnings(node, vocab) if ".splits: " in sentence]
    assert ["tell nothing more apart" in sentence for sentence in of_splits] == ([True] if max(needed) < 4 else [])
    short = warnings(node.model_copy(update={"splits": 2}), vocab)
    assert [f"order {n} needs {k} tables" in "".join(short) for n, k in enumerate(needed, 2)] == [k > 2 for k in needed]


def test_as_many_tables_as_needed_tell_all_ngrams_apart():
    """All of V^n, for a small vocabulary: none collides where the sizes' lcm covers V^n, and some where it is smaller."""
    for rows, splits in ((31, 2), (31, 3), (16, 3)):
        node = of(order=3, splits=splits, table_rows=rows, boundary="none")
        tokens = np.array(list(product(range(8), repeat=3)))
        third = analyse(node, tokens, vocab_size=8).order_counts[1]
        everything = len(set(map(tuple, tokens))) + len({(0, a, b) for a, b in product(range(8), repeat=2)} - set(map(tuple, tokens)))
        assert third.ngrams == everything == 512
        assert third.covers == (third.colliding == 0)


# Whole numbers


def test_primes_against_a_sieve():
    sieve = np.ones(20_000, dtype=bool)
    sieve[:2] = False
    for i in range(2, 142):
        sieve[i * i :: i] &= not sieve[i]
    assert [is_prime(n) for n in range(20_000)] == sieve.tolist()
    assert not is_prime(-7)
    assert is_prime(2**61 - 1) and not is_prime((2**31 - 1) * (2**31 + 11))
    assert not is_prime(3_215_031_751) and not is_prime(3_825_123_056_546_413_051)  # pseudoprimes of the first 4 and the first 9 bases


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 400), st.integers(0, 1000))
def test_shortest_vector_against_all(modulus, base):
    dt, dp = shortest_vector(base, modulus)
    reach = math.isqrt(2 * modulus) + 1
    everywhere = [(t, p) for p in range(-reach, reach + 1) for t in range(-reach, reach + 1) if (t + base * p) % modulus == 0 and (t or p)]
    assert (dt + base * dp) % modulus == 0 and (dt, dp) != (0, 0)
    assert dt * dt + dp * dp == min(t * t + p * p for t, p in everywhere)
    assert evenness(base, modulus) == pytest.approx(math.sqrt((dt * dt + dp * dp) / modulus))


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 400), st.integers(0, 1000), st.integers(2, 60))
def test_least_product_against_all(modulus, base, limit):
    """Exact below half of the modulus; without one below that, nothing is told."""
    products = Counter()
    for t, p in product(range(1 - limit, limit), repeat=2):
        if (t + base * p) % modulus == 0 and (t or p):
            products[max(1, abs(t)) * max(1, abs(p))] += 1
    least, (dt, dp) = min(products, default=modulus), least_product(base, modulus, limit)
    if 2 * least < modulus:
        assert max(1, abs(dt)) * max(1, abs(dp)) == least and (dt + base * dp) % modulus == 0 and max(abs(dt), abs(dp)) < limit
        assert spread(base, modulus, limit) == least / modulus
    else:
        assert (dt, dp) == (0, 0) and spread(base, modulus, limit) == 0.5


def test_nearest_fraction():
    for ratio, fraction in ((78.0, (78, 1)), (30.5, (61, 2)), (30.25, (121, 4)), (59.6, (298, 5))):
        rows = int(ratio * 131072) + 1
        assert nearest_fraction(131072, rows, least_product(131072, rows, 131072)) == fraction
