"""The compiled attention against the equation in float64: values, gradients, bits, and when it is taken."""

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint

import longcat_kernels
from longcat_kernels import attention
from longcat_lab.blocks.mla.op import attention as dispatched
from longcat_lab.blocks.mla.op import attention_reference, causal_document_mask

pytestmark = pytest.mark.skipif(not longcat_kernels.available(), reason=longcat_kernels.why_not())
BOUND = {torch.float64: 1e-12, torch.float32: 1e-5}


def leaves(batch, heads, queries, keys, width, value_width, dtype=torch.float64):
    """q, k, v; v as a view of [B, S, heads, d_v], as a projection leaves it."""
    q, k = torch.randn(batch, heads, queries, width, dtype=dtype), torch.randn(batch, heads, keys, width, dtype=dtype)
    return [q, k, torch.randn(batch, keys, heads, value_width, dtype=dtype).transpose(1, 2)]


def masked(kind, batch, heads, queries, keys):
    """None, or bool [B or 1, heads or 1, T, S] with a visible key in each row."""
    if kind == "causal":
        return None
    if kind == "documents":
        ids = torch.randint(0, 2, (batch, keys)).cumsum(1) // int(torch.randint(1, 40, ()))
        return causal_document_mask(ids)[:, :, keys - queries :]
    shape = (batch, heads, queries, keys) if kind == "each head's own" else (1, 1, queries, keys)
    return (torch.rand(shape) < torch.rand(())).scatter(-1, torch.randint(0, keys, (*shape[:3], 1)), True)


def with_gradients(op, inputs, mask, scale=None, dtype=None, d_out=None):
    inputs = [t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs]
    out = op(*inputs, mask, scale)
    if d_out is None:
        d_out = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
    out.backward(d_out.to(out.dtype))
    return [out.detach(), *(t.grad for t in inputs)]


def truth(inputs, mask, scale=None):
    return with_gradients(attention_reference, inputs, mask, scale, torch.float64)


def agree(found, expected, bound):
    """Within `bound` of the largest entry; of 0.3 where all are small, since they are differences of numbers near 1 (one key: 0)."""
    for ours, true in zip(found, expected, strict=True):
        assert ours.shape == true.shape
        if true.numel():
            assert (ours.double() - true).abs().max() <= bound * max(float(true.abs().max()), 0.3)


@settings(max_examples=50)
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    queries=st.integers(1, 150),
    cached=st.integers(0, 40),
    width=st.integers(1, 33),
    value_width=st.integers(1, 33),
    kind=st.sampled_from(["causal", "documents", "arbitrary", "each head's own"]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    threads=st.sampled_from([1, 2]),
    seed=st.integers(0, 2**31),
)
def test_values_and_gradients_are_those_of_the_equation(batch, heads, queries, cached, width, value_width, kind, dtype, threads, seed):
    torch.manual_seed(seed)
    inputs = leaves(batch, heads, queries, queries + cached, width, value_width, dtype)
    mask = masked(kind, batch, heads, queries, queries + cached)
    torch.set_num_threads(threads)
    scale = None if seed % 2 else 0.3
    agree(with_gradients(attention, inputs, mask, scale), truth(inputs, mask, scale), BOUND[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", ["causal", "documents", "arbitrary"])
def test_more_keys_than_one_chunk_holds(kind, dtype):
    """The running maximum: chunks of 512 keys; scores that grow along the keys make every chunk's maximum a new one."""
    inputs = leaves(1, 2, 70, 1300, 8, 5, dtype)
    inputs[1] = inputs[1] * torch.linspace(0.1, 3, 1300, dtype=dtype)[:, None]
    mask = masked(kind, 1, 2, 70, 1300)
    agree(with_gradients(attention, inputs, mask), truth(inputs, mask), BOUND[dtype])


@pytest.mark.parametrize("masks", [False, True])
def test_gradcheck(masks):
    inputs = [t.requires_grad_() for t in leaves(2, 2, 4, 6, 3, 2)]
    mask = masked("arbitrary", 2, 2, 4, 6) if masks else None
    assert gradcheck(lambda q, k, v: attention(q, k, v, mask), inputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", ["causal", "documents"])
def test_same_bits_each_time_and_for_any_number_of_threads(kind, dtype):
    inputs, mask = leaves(3, 3, 200, 230, 24, 17, dtype), masked(kind, 3, 3, 200, 230)
    first = with_gradients(attention, inputs, mask)
    for threads in (1, 2, 2, 3):
        torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(first, with_gradients(attention, inputs, mask), strict=True))


def test_what_is_not_visible_does_not_count():
    """Other documents' and later tokens' keys and values change no bit, and get no gradient."""
    inputs = leaves(1, 2, 150, 150, 8, 6, torch.float32)
    mask = causal_document_mask(torch.arange(150)[None] // 60)
    before = with_gradients(attention, inputs, mask)
    changed = [t.clone() for t in inputs]
    for t in changed[1:]:
        t[:, :, 120:] += 5.0
    assert torch.equal(attention(*changed, mask)[:, :, :120], before[0][:, :, :120])
    d_out = torch.zeros_like(before[0])
    d_out[:, :, 60:90] = 1
    for grad in with_gradients(attention, inputs, mask, d_out=d_out)[1:]:
        seen = (grad != 0).any(-1)[0].all(0)
        assert seen[61:90].all() and not seen[:60].any() and not seen[90:].any()


def test_a_query_that_sees_nothing_gets_zeros_and_passes_none_on():
    """As torch's own kernel has it; the reference divides 0 by 0. A whole block of such queries, and single ones."""
    inputs = leaves(2, 2, 150, 150, 8, 5)
    mask = torch.ones(2, 1, 150, 150, dtype=torch.bool).tril()
    mask[0, 0, :70], mask[1, 0, 3] = False, False
    dead = ~mask.any(-1)[:, :, :, None]
    found = with_gradients(attention, inputs, mask)
    assert (found[0].masked_select(dead) == 0).all() and (found[1].masked_select(dead) == 0).all()
    torch.testing.assert_close(found[0], torch.nn.functional.scaled_dot_product_attention(*inputs, attn_mask=mask))
    d_out = torch.linspace(-1, 1, found[0].numel(), dtype=torch.float64).view_as(found[0]).masked_fill(dead, 0)
    expected = with_gradients(attention_reference, inputs, mask | dead, d_out=d_out)
    agree(found[1:], expected[1:], 1e-12)


def test_large_scores_and_a_nan():
    """Scores of some thousands: one key takes all. A NaN in a query stays in that query."""
    inputs = leaves(1, 2, 90, 90, 8, 5, torch.float32)
    inputs[0] = inputs[0] * 1e3
    agree(with_gradients(attention, inputs, None)[:1], truth(inputs, None)[:1], 1e-4)
    inputs[0][0, 1, 40, 3] = torch.nan
    bad = attention(*inputs).isnan().all(-1)
    assert bad.sum() == 1 and bad[0, 1, 40]


def test_views_are_read_as_they_lie_and_others_copied():
    whole = torch.randn(2, 50, 3, 8 + 8 + 5, dtype=torch.float64, requires_grad=True)  # [B, T, heads, d + d + d_v]
    q, k, v = whole.transpose(1, 2).split((8, 8, 5), -1)
    upside = [t.detach().transpose(2, 3).contiguous().transpose(2, 3).requires_grad_() for t in (q, k, v)]
    assert not any(t.is_contiguous() for t in (q, k, v, *upside))
    expected = truth([q, k, v], None)
    agree(with_gradients(attention, [q, k, v], None), expected, 1e-12)
    out = attention(*upside)
    assert out.transpose(1, 2).is_contiguous()
    shared = attention(q, k[:, :1].expand_as(k), v)  # one head's keys for all
    torch.testing.assert_close(shared, attention_reference(q, k[:, :1].expand_as(k), v, None))
    (out.sum() + attention(q, k, v).sum()).backward()  # a gradient without memory of its own: expanded
    torch.testing.assert_close(torch.cat([t.grad for t in upside], -1).transpose(1, 2), whole.grad)
    spread = torch.ones(50, 50, dtype=torch.bool).triu().T  # keys of a row lie apart
    assert torch.equal(attention(*upside, spread), out)
    all_of_them = torch.ones(50, 50, dtype=torch.bool)
    assert torch.equal(attention(*upside, all_of_them[:1, :1]), attention(*upside, all_of_them))


def test_only_the_gradients_asked_for_no_grad_and_activation_recompute():
    inputs = leaves(2, 2, 30, 30, 8, 5)
    full = with_gradients(attention, inputs, None)
    d_out = torch.linspace(-1, 1, full[0].numel(), dtype=torch.float64).view_as(full[0])
    for wanted in range(3):
        some = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(inputs)]
        attention(*some).backward(d_out)
        assert torch.equal(some[wanted].grad, full[1 + wanted]) and [t.grad is not None for t in some] == [i == wanted for i in range(3)]
    with torch.no_grad():
        assert torch.equal(attention(*(t.requires_grad_() for t in inputs)), full[0])
    recomputed = with_gradients(lambda *a: checkpoint(attention, *a, use_reentrant=False), inputs, None)
    assert all(torch.equal(a, b) for a, b in zip(full, recomputed, strict=True))


def test_nothing_in_nothing_out():
    for shape in ((0, 2, 5, 5), (2, 0, 5, 5), (1, 2, 0, 5)):
        found = with_gradients(attention, leaves(*shape, 4, 3), None)
        assert found[0].shape == (*shape[:3], 3) and all((grad == 0).all() for grad in found[1:])


def test_twice_differentiated_is_an_error():
    q, k, v = (t.requires_grad_() for t in leaves(1, 1, 4, 4, 3, 2))
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(attention(q, k, v).sum(), q, create_graph=True)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"q": torch.zeros(1, 2, 5, 4)}, "k is torch.float64"),
        ({"v": torch.zeros(1, 2, 6, 3, dtype=torch.float64)}, r"v is \[1, 2, 6, 3\]"),
        ({"k": torch.zeros(1, 1, 5, 4, dtype=torch.float64)}, r"k is \[1, 1, 5, 4\]"),
        ({"k": torch.zeros(2, 5, 4, dtype=torch.float64)}, "must have batch"),
        ({"mask": torch.zeros(5, 5)}, "mask is torch.float32"),
        ({"mask": torch.zeros(5, 4, dtype=torch.bool)}, r"mask is \[5, 4\]"),
        ({"v": torch.zeros(1, 2, 5, 3, device="meta", dtype=torch.float64)}, "v is on meta"),
        ({"v": torch.zeros(1, 2, 5, 0, dtype=torch.float64)}, "at least 1"),
    ],
)
def test_what_does_not_fit_is_named(changed, named):
    given_ones = dict(zip(("q", "k", "v"), leaves(1, 2, 5, 5, 4, 3))) | changed
    with pytest.raises(ValueError, match=named):
        attention(**given_ones)


def _in_child(queue, inputs):
    torch.set_num_threads(2)
    queue.put([part.sum().item() for part in with_gradients(attention, inputs, None)])


def test_forked_processes():
    """A forked child of a process whose threads ran has none of them: it must not wait for them."""
    inputs = leaves(2, 2, 40, 40, 8, 5)
    torch.set_num_threads(2)
    expected = [part.sum().item() for part in with_gradients(attention, inputs, None)]
    torch.set_num_threads(1)  # for torch itself, whose own threads do not survive a fork either
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(queue, inputs))
    child.start()
    try:
        assert queue.get(timeout=60) == expected
    finally:
        child.join(10)
        child.kill()


def test_the_block_takes_it_where_it_can(monkeypatch):
    calls = []
    monkeypatch.setattr("longcat_kernels.attention", lambda *a: calls.append(a) or attention(*a))
    for dtype, taken in ((torch.float64, 1), (torch.float32, 1), (torch.bfloat16, 0)):
        q, k, v = (t.to(dtype) for t in leaves(1, 2, 70, 90, 8, 5))
        found, expected = dispatched(q, k, v, None, 0.2), attention_reference(q.double(), k.double(), v.double(), None, 0.2)
        torch.testing.assert_close(found.double(), expected, rtol=0.05, atol=0.05)
        assert len(calls) == taken
        calls.clear()
    on_meta = [t.to("meta") for t in leaves(1, 2, 70, 90, 8, 5)]
    assert dispatched(*on_meta, None).shape == (1, 2, 70, 5) and not calls
    assert dispatched(*leaves(1, 2, 20, 20, 8, 5), None).shape == (1, 2, 20, 5) and not calls  # not worth it
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    dispatched(*leaves(1, 2, 70, 90, 8, 5), None)
    assert not calls


FALLBACK = """
import torch, longcat_kernels
from longcat_lab.blocks.mla.op import attention, attention_reference
from longcat_lab.blocks.swiglu.op import swiglu, swiglu_reference
assert not longcat_kernels.available()
q, k, v = torch.randn(2, 3, 20, 8), torch.randn(2, 3, 33, 8), torch.randn(2, 3, 33, 5)
for mask in (None, torch.rand(2, 1, 20, 33) < 2):
    torch.testing.assert_close(attention(q, k, v, mask), attention_reference(q, k, v, mask))
arguments = [torch.randn(shape) for shape in ((2, 5, 6), (8, 6), (8, 6), (6, 8))]
assert torch.equal(swiglu(*arguments), swiglu_reference(*arguments))
print("same")
"""


def test_without_it_plain_torch_gives_the_same():
    environment = os.environ | {longcat_kernels.library.SWITCH: "off", "PYTHONPATH": os.pathsep.join(sys.path)}
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", FALLBACK], env=environment, cwd=root, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "same", done.stderr
