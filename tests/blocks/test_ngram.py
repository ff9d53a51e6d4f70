"""N-gram embedding: literal addresses, published moduli, boundaries, scale at initialisation."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from longcat_lab.blocks.ngram_embedding.op import fuse_reference, ngram_rows_reference, table_moduli
from longcat_lab.config import ConfigError, load
from longcat_lab.model import build


def by_hand(tokens, documents, vocab, order, splits, moduli):
    """Unbounded Python integers, from the formula."""
    out = []
    for i in range(len(tokens)):
        row = []
        for table, m in enumerate(moduli):
            n = table // splits + 2
            kept = [tokens[i - j] if i >= j and documents[i - j] == documents[i] else 0 for j in range(n)]
            row.append(sum(t * vocab**j for j, t in enumerate(kept)) % m)
        out.append(row)
    return out


@pytest.mark.parametrize(
    ("vocab", "ratio", "order", "splits", "first"),
    [(131072, 78, 4, 4, 10_223_617), (163840, 100.567, 5, 4, 16_476_898), (163840, 59.604, 5, 4, 9_765_520)],
)
def test_published_moduli(vocab, ratio, order, splits, first):
    moduli = table_moduli(vocab, ratio, order, splits)
    assert moduli[0] == first
    assert [b - a for a, b in itertools.pairwise(moduli)] == [2] * ((order - 1) * splits - 1)


def test_literal_addresses():
    """V = 10, moduli 7 and 11 (orders 2 and 3): the current token has weight 1, the oldest V^2."""
    rows = ngram_rows_reference(torch.tensor([[3, 5, 9]]), None, 10, 3, 1, [7, 11])
    assert rows.tolist() == [[[3, 3], [(5 + 30) % 7, (5 + 30) % 11], [(9 + 50) % 7, (9 + 50 + 300) % 11]]]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_both_forms_equal_unbounded_integers(data):
    vocab, order, splits = data.draw(st.integers(2, 163840)), data.draw(st.integers(2, 5)), data.draw(st.integers(1, 3))
    length = data.draw(st.integers(1, 9))
    moduli = table_moduli(vocab, data.draw(st.floats(0.5, 101)), order, splits)
    tokens = data.draw(st.lists(st.integers(0, vocab - 1), min_size=length, max_size=length))
    documents = sorted(data.draw(st.lists(st.integers(0, 3), min_size=length, max_size=length)))
    expected = by_hand(tokens, documents, vocab, order, splits, moduli)
    t, d = torch.tensor([tokens]), torch.tensor([documents])
    assert ngram_rows_reference(t, d, vocab, order, splits, moduli)[0].tolist() == expected
    from longcat_lab.blocks.ngram_embedding.op import ngram_rows

    weights = [[pow(vocab, j, m) if j < e // splits + 2 else 0 for e, m in enumerate(moduli)] for j in range(order)]
    assert ngram_rows(t, d, torch.tensor(weights), torch.tensor(moduli))[0].tolist() == expected


def embedding(*overrides):
    return build(load("tiny", "model.embedding.ngram.order=3", *overrides)).embed_tokens.eval()


def test_packed_documents_equal_separate_documents():
    module, tokens = embedding(), torch.randint(0, 512, (1, 12))
    packed = module(tokens, torch.tensor([[0] * 5 + [1] * 7]))
    apart = torch.cat((module(tokens[:, :5]), module(tokens[:, 5:])), 1)
    torch.testing.assert_close(packed, apart, rtol=0, atol=0)


def test_rows_stay_inside_their_own_table():
    module = embedding()
    rows = module.rows(torch.randint(0, 512, (4, 64)), None)
    ends = module.hash_starts + module.hash_moduli
    assert (rows >= module.hash_starts).all() and (rows < ends).all() and int(ends[-1]) == len(module.tables)


def test_module_is_the_mean_of_its_branches():
    """Written out: (E_0 + sum_i W_i r_i) / (E + 1), times sqrt(E + 1) with normalised_init."""
    module, tokens = embedding(), torch.randint(0, 512, (1, 9))
    rows, width = module.rows(tokens, None), module.width
    count = rows.shape[-1]
    total = module.weight[tokens]
    for i in range(count):
        total = total + module.tables[rows[..., i]] @ module.projection.weight[:, i * width : (i + 1) * width].T
    torch.testing.assert_close(module(tokens), total / (count + 1) * (count + 1) ** 0.5, rtol=1e-5, atol=1e-6)


def test_fusion_gradient():
    leaves = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((1, 3, 4), (1, 3, 2, 2), (4, 4))]
    assert gradcheck(lambda t, r, w: fuse_reference(t, r, w, 1.7), leaves)


@pytest.mark.parametrize(
    ("normalised", "table", "ratio"),
    [("true", 1.0, 1.0), ("true", 0.0, 1.0), ("true", 0.3, 1.0), ("false", 1.0, 5**-0.5), ("false", 0.0, 1 / 5)],
)
def test_output_rms_at_initialisation_against_the_plain_embedding(normalised, table, ratio):
    tokens = torch.randint(0, 512, (16, 64))
    settings_ = ("model.hidden_size=128",)
    plain = build(load("tiny", *settings_)).embed_tokens(tokens).square().mean().sqrt()
    node = "model.embedding.ngram"
    ngram = build(load("tiny", *settings_, f"{node}.order=3", f"{node}.normalised_init={normalised}", f"{node}.table_init_ratio={table}"))
    rms = ngram.embed_tokens(tokens).square().mean().sqrt()
    assert float((rms / plain).detach()) == pytest.approx(ratio, rel=0.05)


def test_token_rows_start_equal_with_and_without_tables():
    plain, ngram = build(load("tiny"), seed=7), build(load("tiny", "model.embedding.ngram.order=3"), seed=7)
    assert torch.equal(ngram.embed_tokens.weight, plain.embed_tokens.weight)
    shared = set(plain.state_dict()) & set(ngram.state_dict())
    assert shared == set(plain.state_dict())
    assert all(torch.equal(plain.state_dict()[name], ngram.state_dict()[name]) for name in shared)


def test_only_rows_that_were_read_count_as_touched():
    module = embedding().train()
    tokens = torch.randint(0, 512, (2, 16))
    module(tokens)
    assert module.touched.nonzero().flatten().tolist() == sorted(set(module.rows(tokens, None).flatten().tolist()))


def test_tables_that_do_not_divide_the_width_are_named():
    with pytest.raises(ConfigError, match=r"6 tables .* do not divide hidden_size 32"):
        load("tiny", "model.embedding.ngram.order=4")
