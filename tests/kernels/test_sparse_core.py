"""The compiled core of sparse attention against the equation in float64: values, gradients, bits, memory, and what it refuses."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint

import longcat_kernels
from longcat_kernels import sparse_attention
from longcat_lab.blocks.sparse_attention import op

pytestmark = pytest.mark.skipif(not longcat_kernels.available(), reason=longcat_kernels.why_not())
BOUND = {torch.float64: 1e-12, torch.float32: 1e-5}


def selection(batch, queries, keys, topk, window=0, documents=False):
    """A selection by random scores; where there are documents, queries see only from a first key on, which rises along the row."""
    first = None
    if documents:
        first = torch.minimum(torch.randint(0, keys, (batch, queries)).sort().values, torch.arange(keys - queries, keys))
    seen = op.visible_keys(first, queries, keys, torch.device("cpu")).expand(batch, -1, -1)
    return op.select(torch.rand(batch, queries, keys), seen, topk, 0, window)


def leaves(batch, queries, keys, heads, width, value_width, dtype=torch.float64):
    shapes = (batch, queries, heads, width), (batch, keys, width), (batch, keys, value_width)
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def with_gradients(call, inputs, dtype=None):
    """o, mass, and the gradients of the inputs."""
    inputs = [t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs]
    out, mass = call(*inputs)
    assert not mass.requires_grad
    d_out = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
    out.backward(d_out.to(out.dtype))
    return [out.detach(), mass, *(t.grad for t in inputs)]


def agree(found, expected, bound):
    """Within `bound` of the largest entry, or of 1 where all are smaller: they are sums and differences of numbers near 1."""
    for ours, true in zip(found, expected, strict=True):
        assert ours.shape == true.shape
        if true.numel():
            assert (ours.double() - true).abs().max() <= bound * max(float(true.abs().max()), 1.0)


@settings(max_examples=60)
@given(
    batch=st.integers(1, 3),
    queries=st.integers(1, 40),
    cached=st.integers(0, 40),
    heads=st.integers(1, 20),
    width=st.integers(1, 70),
    value_width=st.integers(1, 70),
    topk=st.integers(1, 60),
    window=st.integers(0, 60),
    documents=st.booleans(),
    view=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    threads=st.sampled_from([1, 2]),
    seed=st.integers(0, 2**31),
)
def test_values_and_gradients_are_those_of_the_equation(
    batch, queries, cached, heads, width, value_width, topk, window, documents, view, dtype, threads, seed
):
    """Rows with fewer keys than K (at the start, and of each document), decoding, any number of heads, odd widths."""
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    window = min(window, topk)
    indices = selection(batch, queries, queries + cached, topk, window, documents)
    inputs = leaves(batch, queries, queries + cached, heads, width, value_width, dtype)
    if view:
        inputs = inputs[:2]

    def by(core, *more):
        return lambda q, k, v=None: core(q, k, k[..., :value_width] if v is None else v, indices, 0.3, *more)

    expected = with_gradients(by(op.sparse_attention), inputs, torch.float64)
    agree(with_gradients(by(sparse_attention, window), inputs), expected, BOUND[dtype])


def test_gradcheck():
    indices = selection(2, 5, 7, 4)
    inputs = leaves(2, 5, 7, 3, 5, 3)
    assert gradcheck(lambda q, k, v: sparse_attention(q, k, v, indices, 0.4)[0], inputs)
    assert gradcheck(lambda q, k: sparse_attention(q, k * 1, (k * 1)[..., :3], indices, 0.4)[0], inputs[:2])
    assert gradcheck(lambda q, k: (lambda keys: sparse_attention(q, keys, keys[..., :3], indices, 0.4)[0])(k * 1), inputs[:2])


def test_everything_selected_is_dense_attention():
    indices = torch.arange(50).expand(2, 50, 50).masked_fill(torch.ones(50, 50).triu(1).bool(), -1).sort(-1).values.int()
    inputs = leaves(2, 50, 50, 8, 24, 16)

    def dense(q, k, v):
        k, v = (t[:, None].expand(-1, 8, -1, -1) for t in (k, v))
        return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, is_causal=True, scale=0.2).transpose(1, 2), torch.zeros(())

    found, expected = (with_gradients(call, inputs) for call in (lambda q, k, v: sparse_attention(q, k, v, indices, 0.2, 50), dense))
    agree(found[:1] + found[2:], expected[:1] + expected[2:], 1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_same_bits_each_time_for_any_number_of_threads_and_with_or_without_the_promise(dtype):
    inputs, indices = leaves(3, 150, 180, 8, 40, 24, dtype), selection(3, 150, 180, 32, 16)
    first = with_gradients(lambda *a: sparse_attention(*a, indices, 0.2), inputs)
    for threads, window in ((1, 16), (2, 0), (2, 16), (3, 0)):
        torch.set_num_threads(threads)
        again = with_gradients(lambda *a, window=window: sparse_attention(*a, indices, 0.2, window), inputs)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_masses_sum_to_one_and_what_is_not_selected_does_not_count():
    q, k, v = leaves(1, 60, 60, 8, 20, 12)
    indices = selection(1, 60, 60, 9)
    indices[0, 20] = -1  # no key at all: zeros
    out, mass = sparse_attention(q, k, v, indices, 0.5)
    dead = torch.arange(60) == 20
    torch.testing.assert_close(mass.sum(-1)[0], (~dead).double())
    assert (mass[indices < 0] == 0).all() and (out[0, 20] == 0).all() and not out.isnan().any()
    taken = torch.zeros(60, dtype=torch.bool).scatter(0, indices[0, 30:].flatten().long(), True)
    out[:, 30:].square().sum().backward()
    for t in (k, v):
        assert torch.equal((t.grad[0] != 0).any(-1), taken)
    assert (q.grad[0, :30] == 0).all()


def test_one_gradient_only_where_the_value_comes_from_this_very_key():
    q, base, _ = leaves(2, 30, 30, 8, 16, 1)
    indices, d_out = selection(2, 30, 30, 6), torch.randn(2, 30, 8, 5, dtype=torch.float64)

    def grads(core, make, at):
        leaf = base.detach().clone().requires_grad_()
        made = make(leaf)
        return torch.autograd.grad(core(q, made[0], made[1], indices, 0.3)[0], at(leaf, *made), d_out)

    apart = base.detach().clone().requires_grad_()
    for make, at in (
        (lambda x: (x, x[..., :5]), lambda x, k, v: (x,)),
        (lambda x: (x * 1, x[..., :5] * 1), lambda x, k, v: (x, k, v)),
        (lambda x: (x, x.detach()[..., :5]), lambda x, k, v: (x,)),  # the same memory, and no gradient
        (lambda x: (x[:, :], x[..., :5]), lambda x, k, v: (x, k, v)),  # two views of one tensor
        (lambda x: (x, apart.detach().set_(x.detach())[..., :5].requires_grad_()), lambda x, k, v: (x, v)),  # a leaf on the same memory
    ):
        for ours, true in zip(grads(sparse_attention, make, at), grads(op.sparse_attention, make, at), strict=True):
            torch.testing.assert_close(ours, true)


def test_only_the_gradients_asked_for_no_grad_strides_and_recompute():
    inputs, indices = leaves(2, 30, 30, 8, 16, 12), selection(2, 30, 30, 6)
    core = lambda *a: sparse_attention(*a, indices, 0.3)  # noqa: E731
    full = with_gradients(core, inputs)
    d_out = torch.linspace(-1, 1, full[0].numel(), dtype=torch.float64).view_as(full[0])
    for wanted in range(3):
        some = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(inputs)]
        core(*some)[0].backward(d_out)
        assert torch.equal(some[wanted].grad, full[2 + wanted])
    with torch.no_grad():
        assert torch.equal(core(*inputs)[0], full[0])
    spread = [t.detach().transpose(1, -1).contiguous().transpose(1, -1) for t in inputs]  # no dense rows
    assert all(torch.equal(a, b) for a, b in zip(full, with_gradients(core, spread), strict=True))
    by_head = [inputs[0].detach().transpose(1, 2).contiguous().transpose(1, 2), *inputs[1:]]  # as a batched product leaves it
    assert all(torch.equal(a, b) for a, b in zip(full, with_gradients(core, by_head), strict=True))
    recomputed = with_gradients(lambda *a: checkpoint(core, *a, use_reentrant=False), inputs)
    assert all(torch.equal(a, b) for a, b in zip(full, recomputed, strict=True))
    expanded = [t.detach().requires_grad_() for t in inputs]  # a gradient without memory of its own
    core(*expanded)[0].sum().backward()
    truth = torch.autograd.grad(op.sparse_attention(*inputs, indices, 0.3)[0].sum(), inputs)
    agree([t.grad for t in expanded], truth, 1e-12)


def test_large_scores_and_nothing():
    inputs, indices = leaves(1, 90, 90, 8, 16, 8, torch.float32), selection(1, 90, 90, 20)
    sharp = [inputs[0] * 1e3, *inputs[1:]]
    truth = op.sparse_attention(*(t.double() for t in sharp), indices, 1.0)
    agree([t.detach() for t in sparse_attention(*sharp, indices, 1.0)], [t.detach() for t in truth], 1e-4)
    for batch, queries in ((0, 5), (2, 0)):
        found = with_gradients(
            lambda *a, s=(batch, queries, 4): sparse_attention(*a, torch.zeros(s).int(), 1.0), leaves(batch, queries, 7, 3, 4, 2)
        )
        assert found[0].shape == (batch, queries, 3, 2) and all((grad == 0).all() for grad in found[2:])


def test_twice_differentiated_is_an_error():
    q, k, v = leaves(1, 4, 4, 2, 3, 2)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(sparse_attention(q, k, v, selection(1, 4, 4, 2), 1.0)[0].sum(), q, create_graph=True)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"q": torch.zeros(1, 5, 2, 4)}, "k is torch.float64"),
        ({"q": torch.zeros(5, 2, 4, dtype=torch.float64)}, r"q is \[5, 2, 4\], and must have 4"),
        ({"k": torch.zeros(1, 6, 3, dtype=torch.float64)}, r"k is \[1, 6, 3\]"),
        ({"v": torch.zeros(1, 5, 3, dtype=torch.float64)}, r"v is \[1, 5, 3\]"),
        ({"v": torch.zeros(1, 6, 0, dtype=torch.float64)}, "at least 1"),
        ({"v": torch.zeros(1, 6, 3, dtype=torch.float64, device="meta")}, "v is on meta"),
        ({"indices": torch.zeros(1, 5, 2)}, "indices is torch.float32"),
        ({"indices": torch.zeros(1, 4, 2, dtype=torch.int32)}, r"indices is \[1, 4, 2\]"),
        ({"indices": torch.tensor([[1, 1]]).expand(1, 5, 2).int()}, "rising key numbers"),
        ({"indices": torch.tensor([[0, -1]]).expand(1, 5, 2).int()}, "rising key numbers"),
        ({"indices": torch.tensor([[0, 2]]).expand(1, 5, 2).int()}, "may see"),
        ({"indices": torch.tensor([[0, 1000]]).expand(1, 5, 2).int()}, "may see"),
        ({"window": 2}, "window that was promised"),
        ({"window": -1}, "window is -1"),
        ({"k": torch.zeros(1, 4, 4, dtype=torch.float64), "v": torch.zeros(1, 4, 3, dtype=torch.float64)}, "5 queries and 4 keys"),
    ],
)
def test_what_does_not_fit_is_named(changed, named):
    given_ones = dict(zip(("q", "k", "v"), leaves(1, 5, 6, 2, 4, 3))) | {
        "indices": torch.tensor([[0, 1]]).expand(1, 5, 2).int(),
        "scale": 1.0,
    }
    sparse_attention(**given_ones)
    with pytest.raises(ValueError, match=named):
        sparse_attention(**given_ones | changed)


MEMORY = """
import torch
from benchmarks.harness import peak_memory
from longcat_kernels import sparse_attention
L, H, K = 8192, 2, 64
q, k = torch.randn(1, L, H, 48, requires_grad=True), torch.randn(1, L, 48, requires_grad=True)
indices = (torch.arange(L)[:, None] + torch.arange(1 - K, 1)).clamp(min=-1).int()[None]
call = lambda n: sparse_attention(q[:, :n], k[:, :n], k[:, :n, :32], indices[:, :n], 0.1, K)[0].sum().backward()
call(100)  # what loading the library takes
print(peak_memory(lambda: call(L)) / 2**20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_linear_in_the_length():
    """8192 queries and keys: a tensor of all pairs would be 256 MiB; result, masses and gradients are about 10."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", MEMORY], env=environment, cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert 2 < float(done.stdout) < 40
