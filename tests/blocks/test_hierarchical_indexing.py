"""Hierarchical indexing in plain PyTorch against loops over single numbers, and what its rules promise."""

import pytest
import torch

from longcat_lab.blocks.sparse_attention.hierarchical_op import hierarchical_topk, kept_pages, pooled_keys
from longcat_lab.blocks.sparse_attention.op import index_topk
from longcat_lab.errors import LabError


def inputs(batch, queries, keys, heads=3, width=4):
    return [
        torch.randn(shape, dtype=torch.float64) for shape in ((batch, queries, heads, width), (batch, keys, width), (batch, queries, heads))
    ]


def by_hand(q, k, w, first, position, topk, sinks, window, page, block, pages, pooling):
    """One query's keys, in lists and loops. q [H_I, d_I], k [S, d_I], w [H_I]."""

    def product(query, keys):
        if pooling == "minmax" and len(keys) > 0:
            return sum(max(float(a * column.max()), float(a * column.min())) for a, column in zip(query, keys.T))
        return sum(float(a * column.mean()) for a, column in zip(query, keys.T))

    def score(keys):
        return sum(float(w[j]) * max(0.0, product(q[j], keys)) for j in range(len(w)))

    seen, own = list(range(first, position + 1)), position // page
    if len(seen) <= pages * page:
        kept = set(range(own + 1))
    else:
        ranks = {}
        for p in range(first // page, own):
            blocks = [s for s in range(p * page, (p + 1) * page, block) if s >= first]
            ranks[p] = sum(score(k[s : s + block]) for s in blocks)
        kept = {own, *sorted(ranks, key=lambda p: (-ranks[p], p))[: pages - 1]}
    fixed = {*seen[:sinks], *seen[max(len(seen) - window, 0) :]}
    others = [s for s in seen if s // page in kept and s not in fixed]
    tokens = {s: sum(float(w[j]) * max(0.0, float(q[j] @ k[s])) for j in range(len(w))) for s in others}
    return sorted([*fixed, *sorted(others, key=lambda s: (-tokens[s], s))[: topk - sinks - window]])


@pytest.mark.parametrize("pooling", ["mean", "minmax"])
@pytest.mark.parametrize("sinks, window", [(0, 0), (2, 3)])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("pages", [1, 2, 3])
def test_keys_are_those_of_loops_over_single_numbers(pages, packed, sinks, window, pooling):
    q, k, w = inputs(2, 37, 45)
    first = torch.where(torch.arange(8, 45) < 21, torch.tensor([[0], [9]]), 21) if packed else None
    sizes = {"page": 6, "block": 2, "pages": pages, "pooling": pooling}
    found = hierarchical_topk(q, k, w, first, 8, sinks, window, **sizes, chunk=10)
    for b in range(2):
        for t in range(37):
            begin = 0 if first is None else int(first[b, t])
            keys = by_hand(q[b, t], k[b], w[b, t], begin, t + 8, 8, sinks, window, **sizes)
            assert found[b, t].tolist() == [-1] * (8 - len(keys)) + keys


@pytest.mark.parametrize("pooling", ["mean", "minmax"])
def test_pages_that_hold_all_that_is_visible_are_no_restriction(pooling):
    q, k, w = inputs(2, 50, 70)
    first = torch.where(torch.arange(20, 70) < 45, 3, 45).expand(2, -1)
    for given, pages, page in ((None, 9, 8), (None, 1, 72), (first, 6, 8), (first, 42, 1)):
        found = hierarchical_topk(q, k, w, given, 12, 2, 4, page=page, block=1, pages=pages, pooling=pooling)
        assert torch.equal(found, index_topk(q, k, w, given, 12, 2, 4))


def test_with_sub_blocks_of_one_token_the_best_token_s_page_is_kept_where_pages_are_one_token():
    """Then the pages are the tokens, and two stages are one: the query's own key and the best others."""
    q, k, w = inputs(1, 30, 30)
    found = hierarchical_topk(q, k, w, None, 6, 0, 1, page=1, block=1, pages=6)
    assert torch.equal(found, index_topk(q, k, w, None, 6, 0, 1))


def test_token_by_token_with_a_cache_as_for_the_whole_sequence():
    """So a selection does not depend on later keys: the means of the page that is not yet full are not looked at."""
    q, k, w = inputs(2, 60, 60)
    first = torch.where(torch.arange(60) < 17, 0, 17).expand(2, -1)
    sizes = {"page": 8, "block": 4, "pages": 3}
    whole = hierarchical_topk(q, k, w, first, 10, 1, 2, **sizes)
    for t in range(10, 60):
        step = hierarchical_topk(q[:, t : t + 1], k[:, : t + 1], w[:, t : t + 1], first[:, t : t + 1], 10, 1, 2, **sizes)
        assert torch.equal(step[:, 0], whole[:, t])


def test_keys_of_other_documents_change_nothing():
    q, k, w = inputs(1, 80, 80)
    first = torch.full((1, 80), 21)
    other = torch.where(torch.arange(80)[:, None] < 21, k + 10, k)
    seen = slice(21, None)
    before, after = (hierarchical_topk(q, keys, w, first, 12, page=8, block=4, pages=4) for keys in (k, other))
    assert torch.equal(before[:, seen], after[:, seen])


def test_a_document_at_a_page_s_start_gets_alone_what_it_gets_packed():
    q, k, w = inputs(1, 90, 90)
    first = torch.where(torch.arange(90) < 24, 0, 24)[None]
    sizes = {"page": 8, "block": 2, "pages": 3}
    packed, alone = (
        hierarchical_topk(q, k, w, first, 10, **sizes)[:, 24:],
        hierarchical_topk(q[:, 24:], k[:, 24:], w[:, 24:], None, 10, **sizes),
    )
    assert torch.equal(packed, torch.where(alone < 0, -1, alone + 24))


def test_the_page_with_the_matching_keys_is_found_behind_many_others():
    """A page of keys along the query among pages of noise: its tokens are the selection, though it is one page of fifty."""
    k = 0.1 * torch.randn(1, 400, 16)
    q = torch.randn(1, 1, 2, 16)
    k[0, 136:144] = q[0, 0].sum(0) / 4
    q, w = q.sum(2, keepdim=True).expand(-1, -1, 2, -1), torch.ones(1, 1, 2)
    found = hierarchical_topk(q, k, w, None, 8, page=8, block=4, pages=2)
    assert found[0, 0].tolist() == list(range(136, 144))


def test_pages_are_few_and_the_own_one_is_among_them():
    q, k, w = inputs(1, 64, 64)
    seen = torch.ones(64, 64, dtype=torch.bool).tril()[None]
    kept = kept_pages(q, pooled_keys(k, 2), w, seen, torch.arange(64), 8, 2, 3)
    assert torch.equal(kept.sum(-1)[0], (torch.arange(64) // 8 + 1).clamp(max=3))
    assert kept[0, torch.arange(64), torch.arange(64) // 8].all()


def test_of_equal_pages_the_earlier_ones():
    q, k, w = (torch.zeros(shape) for shape in ((1, 1, 2, 4), (1, 64, 4), (1, 1, 2)))
    assert hierarchical_topk(q, k, w, None, 24, page=8, block=4, pages=3)[0, 0].tolist() == [*range(16), *range(56, 64)]


@pytest.mark.parametrize("changed", [{"block": 3}, {"page": 0}, {"pages": 0}, {"pooling": "max"}])
def test_sizes_that_do_not_fit_are_an_error_that_says_what_to_set(changed):
    with pytest.raises(LabError, match="set "):
        hierarchical_topk(*inputs(1, 4, 4), None, 2, **({"page": 8, "block": 4, "pages": 2} | changed))
