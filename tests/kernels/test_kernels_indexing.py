"""The compiled indexing against the plain form: the same keys, the same scores and gradients, the same bits for any number of threads."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

import longcat_kernels
from longcat_kernels import hierarchical_topk, index_topk, selected_scores
from longcat_lab.blocks.sparse_attention import hierarchical_op, op

pytestmark = pytest.mark.skipif(not longcat_kernels.available(), reason=longcat_kernels.why_not())


def inputs(batch, queries, keys, heads, width, dtype=torch.float64, whole=0, signs=0):
    """q, k, w. whole > 0: small integers, so that sums are exact and many scores equal; signs < 0: no positive weight."""

    def numbers(*shape):
        return torch.randint(-whole, whole + 1, shape).to(dtype) if whole else torch.randn(shape, dtype=dtype)

    q, k, w = numbers(batch, queries, heads, width), numbers(batch, keys, width), numbers(batch, queries, heads)
    return q, k, -w.abs() if signs < 0 else w


def documents(batch, queries, keys, length):
    """`first` of the last queries of rows cut at random into documents of about `length` tokens."""
    starts = torch.where(torch.rand(batch, keys) < 1 / length, torch.arange(keys), 0).cummax(1).values
    return starts[:, keys - queries :]


cases = {
    "batch": st.integers(1, 3),
    "queries": st.sampled_from([1, 2, 63, 64, 65, 150]),
    "cached": st.sampled_from([0, 1, 37, 450, 1100]),
    "heads": st.sampled_from([1, 2, 3, 4, 5, 8, 31]),
    "width": st.sampled_from([1, 4, 7, 32, 130]),
    "dtype": st.sampled_from([torch.float64, torch.float32]),
    "whole": st.integers(0, 3),
    "signs": st.sampled_from([-1, 1]),
    "length": st.sampled_from([None, 4, 60, 500]),
    "topk": st.sampled_from([1, 2, 7, 32, 100, 300, 4000]),
    "sinks": st.integers(0, 5),
    "window": st.integers(0, 40),
    "threads": st.sampled_from([1, 2]),
    "seed": st.integers(0, 2**31),
}


def a_case(batch, queries, cached, heads, width, dtype, whole, signs, length, topk, sinks, window, threads, seed):
    """Arguments up to `window`. Random fp32 scores may be nearly equal, and then round to another order: integers there."""
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    keys = queries + cached
    first = None if length is None else documents(batch, queries, keys, length)
    tensors = inputs(batch, queries, keys, heads, width, dtype, whole or int(dtype == torch.float32), signs)
    return (*tensors, first, max(topk, sinks + window), sinks, window)


@settings(max_examples=40)
@given(**cases)
def test_the_keys_are_those_of_the_plain_form(**case):
    arguments = a_case(**case)
    found = index_topk(*arguments)
    assert found.dtype == torch.int32 and torch.equal(found, op.index_topk(*arguments))


@settings(max_examples=40)
@given(
    **cases,
    block=st.sampled_from([1, 2, 8]),
    per_page=st.sampled_from([1, 2, 3, 16, 600]),
    pages=st.integers(1, 30),
    pooling=st.sampled_from(["mean", "minmax"]),
)
def test_two_stages_take_the_keys_of_the_plain_form(block, per_page, pages, pooling, **case):
    arguments, sizes = a_case(**case), {"page": block * per_page, "block": block, "pages": pages, "pooling": pooling}
    assert torch.equal(hierarchical_topk(*arguments, **sizes), hierarchical_op.hierarchical_topk(*arguments, **sizes))


def test_long_lists_and_many_rises_of_the_bar():
    """Scores that grow along the keys: every key beats those before, and the bar rises as often as it can. And falling, and all equal."""
    keys = 6000
    q, w = torch.ones(1, 2, 1, 1, dtype=torch.float64), torch.ones(1, 2, 1, dtype=torch.float64)
    ramp = torch.arange(1, keys + 1, dtype=torch.float64)[None, :, None]
    for k in (ramp, ramp.flip(1), torch.ones_like(ramp), ramp % 7, ramp**-40, torch.exp(ramp / 20), torch.randn_like(ramp).exp().exp()):
        for dtype in (torch.float64, torch.float32):
            arguments = (*(t.to(dtype).clamp(max=torch.finfo(dtype).max) for t in (q, k, w)), None)
            for topk in (1, 100, 999):
                assert torch.equal(index_topk(*arguments, topk), op.index_topk(*arguments, topk))


def test_of_equal_scores_the_earlier_key_in_every_place():
    """All scores 0: the best are the first ones after the sinks."""
    q, k, w = (torch.zeros(shape) for shape in ((1, 30, 2, 4), (1, 1030, 4), (1, 30, 2)))
    found = index_topk(q, k, w, torch.full((1, 30), 100), 12, 2, 3)
    end = torch.arange(1000, 1030)[:, None]
    expected = torch.cat((torch.arange(100, 109).expand(30, -1), end - 2 + torch.arange(3)), 1)
    assert torch.equal(found[0], expected.int())


def test_near_ties_in_fp32_are_all_that_may_differ():
    """What one form takes and the other does not has a score within rounding of the lowest that is taken."""
    q, k, w = inputs(2, 200, 1500, 4, 32, torch.float32)
    found, exact = index_topk(q, k, w, None, 50), op.index_scores(q.double(), k.double(), w.double())
    order = exact.masked_fill(~op.visible_keys(None, 200, 1500, q.device), -torch.inf).sort(-1, descending=True).values
    lowest = exact.gather(-1, found.long()).amin(-1)
    assert (found[..., 1:] > found[..., :-1]).all() and (lowest >= order[..., 49] - 1e-4).all()


def test_a_token_with_a_cache_gets_what_it_gets_in_the_whole_sequence():
    """Bit for bit also in fp32: a score does not depend on what is computed beside it."""
    q, k, w = inputs(1, 700, 700, 4, 16, torch.float32)
    sizes = {"page": 32, "block": 4, "pages": 5}
    flat, paged = index_topk(q, k, w, None, 40, 2, 8), hierarchical_topk(q, k, w, None, 40, 2, 8, **sizes)
    for t in (40, 163, 164, 511, 512, 699):
        part = q[:, t : t + 1], k[:, : t + 1], w[:, t : t + 1], None, 40, 2, 8
        assert torch.equal(index_topk(*part)[0, 0], flat[0, t]) and torch.equal(hierarchical_topk(*part, **sizes)[0, 0], paged[0, t])


def test_a_packed_document_gets_what_it_gets_alone():
    q, k, w = inputs(1, 900, 900, 3, 16, torch.float32)
    first = torch.where(torch.arange(900) < 333, 0, 333)[None]
    packed = index_topk(q, k, w, first, 50, 3, 9)[:, 333:]
    alone = index_topk(q[:, 333:], k[:, 333:], w[:, 333:], None, 50, 3, 9)
    assert torch.equal(packed, torch.where(alone < 0, -1, alone + 333))


def test_pages_enough_for_all_are_one_stage():
    q, k, w = inputs(2, 700, 900, 4, 16, torch.float32)
    first = documents(2, 700, 900, 300)
    for pages, page in ((29, 32), (1, 1024), (10**12, 8), (5, 2**40)):
        assert torch.equal(
            hierarchical_topk(q, k, w, first, 40, 2, 8, page=page, block=8, pages=pages), index_topk(q, k, w, first, 40, 2, 8)
        )


def test_more_queries_than_keys():
    """The first queries stand before key 0 and see nothing."""
    q, k, w = inputs(1, 9, 6, 2, 3)
    assert torch.equal(index_topk(q, k, w, None, 4), op.index_topk(q, k, w, None, 4))
    assert (index_topk(q, k, w, None, 4)[0, :3] == -1).all()


# --- scores of a selection ----------------------------------------------------------------------------------------------------


def a_selection(batch, queries, keys, topk):
    """Any key in any order, some twice, some missing."""
    return torch.randint(-1, keys, (batch, queries, topk), dtype=torch.int32)


def with_gradients(form, tensors, indices, d_out):
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = form(*leaves, indices)
    out.backward(d_out)
    return [out.detach(), *(t.grad for t in leaves)]


@settings(max_examples=25)
@given(
    **{name: cases[name] for name in ("batch", "queries", "heads", "dtype", "threads", "seed")},
    width=st.sampled_from([1, 7, 32]),
    topk=st.sampled_from([1, 5, 30, 600]),
)
def test_scores_and_gradients_are_those_of_the_plain_form(batch, queries, heads, width, dtype, topk, threads, seed):
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    keys = int(torch.randint(1, 80, ()))
    tensors, indices = inputs(batch, queries, keys, heads, width, dtype), a_selection(batch, queries, keys, topk)
    d_out = torch.randn(indices.shape, dtype=torch.float64)
    found = with_gradients(selected_scores, tensors, indices, d_out.to(dtype))
    expected = with_gradients(op.selected_scores, [t.double() for t in tensors], indices, d_out)
    assert torch.equal(found[0] == -torch.inf, indices < 0)
    bound = 1e-11 if dtype == torch.float64 else 2e-5
    for ours, true in zip(found, expected, strict=True):
        true = true.masked_fill(true == -torch.inf, 0)
        error = (ours.double().masked_fill(ours == -torch.inf, 0) - true).abs().max()
        assert error <= bound * max(float(true.abs().max()), 1)


def test_gradcheck():
    """Products at least 0.1 from 0, where ReLU bends."""
    q = torch.rand(1, 5, 3, 4, dtype=torch.float64) + 0.2
    k = (torch.rand(1, 6, 4, dtype=torch.float64) + 0.2) * torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0, 1.0])[:, None]
    w, indices = torch.randn(1, 5, 3, dtype=torch.float64), torch.randint(0, 6, (1, 5, 4), dtype=torch.int32)
    assert ((q @ k[:, None].transpose(2, 3)).abs() > 0.1).all()
    assert gradcheck(lambda *a: selected_scores(*a, indices), [t.requires_grad_() for t in (q, k, w)])


def test_what_comes_in_where_no_key_is_goes_nowhere():
    tensors, indices = inputs(2, 20, 30, 3, 8), a_selection(2, 20, 30, 12)
    indices[:, :7, :9] = -1
    clean = torch.randn(indices.shape, dtype=torch.float64)
    spoiled = clean.masked_fill(indices < 0, torch.nan)
    pairs = zip(with_gradients(selected_scores, tensors, indices, clean), with_gradients(selected_scores, tensors, indices, spoiled))
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_nan_is_passed_on():
    q, k, w = inputs(1, 4, 9, 2, 3)
    k[0, 5, 1] = torch.nan
    indices = torch.arange(9, dtype=torch.int32).expand(1, 4, 9)
    assert torch.equal(selected_scores(q, k, w, indices).isnan()[0], (torch.arange(9) == 5).expand(4, 9))


def test_only_the_gradients_asked_for():
    tensors, indices = inputs(2, 70, 90, 3, 8), a_selection(2, 70, 90, 12)
    d_out = torch.randn(indices.shape, dtype=torch.float64)
    full = with_gradients(selected_scores, tensors, indices, d_out)
    for wanted in range(3):
        some = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(tensors)]
        selected_scores(*some, indices).backward(d_out)
        assert torch.equal(some[wanted].grad, full[1 + wanted]) and [t.grad is not None for t in some] == [i == wanted for i in range(3)]
    with torch.no_grad():
        assert torch.equal(selected_scores(*(t.requires_grad_() for t in tensors), indices), full[0])
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(selected_scores(*tensors, indices).nan_to_num(neginf=0).sum(), tensors[0], create_graph=True)


# --- all of them --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_same_bits_each_time_and_for_any_number_of_threads(dtype):
    tensors, first = inputs(3, 600, 700, 4, 24, dtype), documents(3, 600, 700, 300)
    d_out = torch.randn(3, 600, 30, dtype=dtype)
    runs = []
    for threads in (1, 2, 2, 3):
        torch.set_num_threads(threads)
        flat = index_topk(*tensors, first, 30, 2, 5)
        paged = hierarchical_topk(*tensors, first, 30, 2, 5, page=16, block=4, pages=6)
        runs.append([flat, paged, *with_gradients(selected_scores, tensors, flat, d_out)])
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def test_views_give_what_dense_tensors_give():
    """q as a split of heads leaves it, k as a part of a cache or of a joint projection."""
    q, k, w = inputs(2, 40, 60, 3, 8)
    turned, wide, cache = q.transpose(1, 2).contiguous().transpose(1, 2), torch.randn(2, 60, 20, dtype=q.dtype), k.new_zeros(2, 100, 8)
    wide[..., 5:13], cache[:, :60] = k, k
    upside, weights = k.transpose(1, 2).contiguous().transpose(1, 2), w.transpose(1, 2).contiguous().transpose(1, 2)
    selection, first = index_topk(q, k, w, None, 9), documents(2, 40, 60, 9)
    indices, d_out = selection.transpose(1, 2).contiguous().transpose(1, 2), torch.randn(2, 40, 9, dtype=q.dtype).mT.contiguous().mT
    expected = with_gradients(selected_scores, (q, k, w), selection, d_out.contiguous())
    for view in (wide[..., 5:13], cache[:, :60], upside):
        assert torch.equal(index_topk(turned, view, weights, first.mT.contiguous().mT, 9), index_topk(q, k, w, first, 9))
        found = with_gradients(selected_scores, (turned, view, weights), indices, d_out)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_nothing_in_nothing_out():
    for batch, queries in ((0, 5), (2, 0)):
        tensors = inputs(batch, queries, 7, 2, 3)
        assert index_topk(*tensors, None, 4).shape == hierarchical_topk(*tensors, None, 4).shape == (batch, queries, 4)
        empty = a_selection(batch, queries, 7, 4)
        assert all((grad == 0).all() for grad in with_gradients(selected_scores, tensors, empty, torch.zeros(empty.shape).double())[1:])


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"q": torch.zeros(1, 5, 2, 4)}, "k is torch.float64"),
        ({"k": torch.zeros(1, 6, 3, dtype=torch.float64)}, r"k is \[1, 6, 3\]"),
        ({"k": torch.zeros(6, 4, dtype=torch.float64)}, "must have 3 dimensions"),
        ({"k": torch.zeros(1, 0, 4, dtype=torch.float64)}, "at least 1"),
        ({"w": torch.zeros(1, 5, 3, dtype=torch.float64)}, r"w is \[1, 5, 3\]"),
        ({"w": torch.zeros(1, 5, 2, dtype=torch.float64, device="meta")}, "w is on meta"),
        ({"first": torch.zeros(1, 6, dtype=torch.int64)}, r"first is \[1, 6\]"),
        ({"first": torch.zeros(1, 5, dtype=torch.int32)}, "first is .*int32"),
        ({"topk": 0}, "topk is 0"),
        ({"sinks": 3, "window": 2}, "topk is 4"),
        ({"window": -1}, "topk is 4"),
        ({"page": 12, "block": 8}, "block is 8"),
        ({"pages": 0}, "pages is 0"),
        ({"pooling": "max"}, "pooling is 'max'"),
    ],
)
def test_what_does_not_fit_is_named(changed, named):
    q, k, w = inputs(1, 5, 6, 2, 4)
    with pytest.raises(ValueError, match=named):
        hierarchical_topk(**({"q": q, "k": k, "w": w, "first": None, "topk": 4} | changed))


def test_a_selection_that_does_not_fit_is_named():
    q, k, w = inputs(1, 5, 6, 2, 4)
    for indices in (torch.full((1, 5, 3), 6), torch.full((1, 5, 3), -2)):
        with pytest.raises(ValueError, match="neither -1 nor those of the 6 keys"):
            selected_scores(q, k, w, indices.int())
    for indices in (torch.zeros(1, 5, 3), torch.zeros(1, 4, 3).int(), torch.zeros(5, 3).int()):
        with pytest.raises(ValueError, match="indices is"):
            selected_scores(q, k, w, indices)
