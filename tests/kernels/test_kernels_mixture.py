"""The compiled mixture against the equation in float64: values, gradients, bits."""

import multiprocessing

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint

import longcat_kernels
from longcat_kernels import mixture
from longcat_lab.blocks.moe.experts_op import experts, experts_reference

pytestmark = pytest.mark.skipif(not longcat_kernels.available(), reason=longcat_kernels.why_not())


def problem(tokens, hidden, inner, n_routed, zero, topk, dtype=torch.float64, seed=None):
    """Leaves (u, weights, gate_up, down) and slots; a token's picks differ where there are slots enough."""
    if seed is not None:
        torch.manual_seed(seed)
    slots = torch.rand(tokens, max(n_routed + zero, topk)).topk(topk).indices % (n_routed + zero)
    shapes = (tokens, hidden), (tokens, topk), (n_routed, 2 * inner, hidden), (n_routed, hidden, inner)
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes], slots


def truth(u, slots, weights, gate_up, down):
    return experts_reference(u, slots, weights, gate_up, down, "drop")


def with_gradients(op, leaves, slots, d_out=None, dtype=None):
    leaves = [leaf.detach().to(dtype or leaf.dtype).requires_grad_() for leaf in leaves]
    out = op(leaves[0], slots, *leaves[1:])
    if d_out is None:
        d_out = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
    out.backward(d_out.to(out.dtype))
    return [out.detach(), *(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves)]


def agree(found, expected, bound):
    for ours, true in zip(found, expected, strict=True):
        assert ours.shape == true.shape
        if true.numel():
            assert (ours.double() - true).abs().max() <= bound * max(float(true.abs().max()), 1e-3)


@settings(max_examples=60)
@given(
    tokens=st.integers(0, 70),
    hidden=st.integers(1, 40),
    inner=st.integers(1, 40),
    n_routed=st.integers(1, 7),
    zero=st.integers(0, 4),
    topk=st.integers(1, 4),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    threads=st.sampled_from([1, 2]),
    seed=st.integers(0, 2**31),
)
def test_values_and_gradients_are_those_of_the_equation(tokens, hidden, inner, n_routed, zero, topk, dtype, threads, seed):
    leaves, slots = problem(tokens, hidden, inner, n_routed, zero, topk, dtype, seed)
    torch.set_num_threads(threads)
    bound = 1e-12 if dtype == torch.float64 else 2e-5
    agree(with_gradients(mixture, leaves, slots), with_gradients(truth, leaves, slots, dtype=torch.float64), bound)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", ["no real pick", "all to one expert", "negative slots", "several tiles and waves"])
def test_extreme_routings(case, dtype):
    sizes = (1500, 48, 40, 3, 1, 2) if case == "several tiles and waves" else (600, 24, 17, 4, 2, 3)
    leaves, slots = problem(*sizes, dtype)
    if case != "several tiles and waves":
        slots = {"no real pick": slots % 2 + 4, "all to one expert": torch.full_like(slots, 2), "negative slots": slots - 2}[case]
    for threads in (1, 2):
        torch.set_num_threads(threads)
        bound = 1e-12 if dtype == torch.float64 else 2e-5
        agree(with_gradients(mixture, leaves, slots), with_gradients(truth, leaves, slots, dtype=torch.float64), bound)


def test_gradcheck():
    leaves, slots = problem(5, 4, 3, 3, 1, 2)
    assert gradcheck(lambda u, w, g, d: mixture(u, slots, w, g, d), leaves)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_same_bits_each_time_and_for_any_number_of_threads(dtype):
    leaves, slots = problem(700, 65, 37, 9, 3, 4, dtype)
    first = with_gradients(mixture, leaves, slots)
    for threads in (1, 2, 2, 3):
        torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(first, with_gradients(mixture, leaves, slots), strict=True))


def test_large_and_strange_pre_activations():
    """Saturated SiLU gives 0 or the input, not a NaN; a NaN in a token stays in that token."""
    for scale in (30.0, 300.0):
        leaves, slots = problem(20, 8, 16, 3, 0, 2, torch.float32)
        leaves[0] = leaves[0].detach() * scale
        agree(with_gradients(mixture, leaves, slots), with_gradients(truth, leaves, slots, dtype=torch.float64), 1e-4)
    u = leaves[0].detach().clone()
    u[3, 2] = torch.nan
    out = mixture(u, slots, *(leaf.detach() for leaf in leaves[1:]))
    assert out[3].isnan().all() and not out[[t for t in range(20) if t != 3]].isnan().any()


def test_only_the_gradients_asked_for():
    leaves, slots = problem(30, 8, 6, 4, 1, 2)
    full = with_gradients(mixture, leaves, slots)
    for wanted in range(4):
        some = [leaf.detach().requires_grad_(i == wanted) for i, leaf in enumerate(leaves)]
        mixture(some[0], slots, *some[1:]).backward(torch.linspace(-1, 1, 240, dtype=torch.float64).view(30, 8))
        torch.testing.assert_close(some[wanted].grad, full[1 + wanted], rtol=0, atol=0)
        assert [leaf.grad is not None for leaf in some] == [i == wanted for i in range(4)]


def test_strided_inputs_no_grad_and_activation_recompute():
    leaves, slots = problem(30, 8, 6, 4, 1, 2)
    strided = [leaf.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_() for leaf in leaves]
    assert not any(leaf.is_contiguous() for leaf in strided)
    spread = slots.T.contiguous().T
    full = with_gradients(mixture, leaves, slots)
    out = mixture(strided[0], spread, *strided[1:])
    (out.expand(1, -1, -1).transpose(1, 2) * torch.ones(8, 30, dtype=out.dtype)).sum().backward()
    torch.testing.assert_close(strided[0].grad, with_gradients(mixture, leaves, slots, torch.ones_like(out))[1])
    with torch.no_grad():
        assert torch.equal(mixture(leaves[0], slots, *leaves[1:]), full[0])
    recomputed = with_gradients(lambda *a: checkpoint(mixture, *a, use_reentrant=False), leaves, slots)
    assert all(torch.equal(a, b) for a, b in zip(full, recomputed, strict=True))


def test_twice_differentiated_is_an_error():
    leaves, slots = problem(5, 4, 3, 3, 1, 2)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(mixture(leaves[0], slots, *leaves[1:]).sum(), leaves[0], create_graph=True)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"slots": torch.zeros(5, 2, dtype=torch.int32)}, "slots are torch.int32"),
        ({"weights": torch.zeros(5, 2)}, "weights is torch.float32"),
        ({"down": torch.zeros(3, 4, 2, dtype=torch.float64)}, r"down is \[3, 4, 2\]"),
        ({"weights": torch.zeros(5, 1, dtype=torch.float64)}, r"weights is \[5, 1\]"),
        ({"u": torch.zeros(5, 4, device="meta", dtype=torch.float64)}, "u is on meta"),
        ({"u": torch.zeros(4, dtype=torch.float64)}, r"u must be \[T, H\]"),
    ],
)
def test_what_does_not_fit_is_named(changed, named):
    leaves, slots = problem(5, 4, 3, 3, 1, 2)
    given_ones = {"u": leaves[0], "slots": slots, "weights": leaves[1], "gate_up": leaves[2], "down": leaves[3]} | changed
    with pytest.raises(ValueError, match=named):
        mixture(**given_ones)


def _in_child(queue, leaves, slots):
    torch.set_num_threads(2)
    queue.put([part.sum().item() for part in with_gradients(mixture, leaves, slots)])


def test_forked_processes():
    """A forked child of a process whose threads ran has none of them: it must not wait for them."""
    leaves, slots = problem(40, 8, 6, 4, 1, 2)
    leaves = [leaf.detach() for leaf in leaves]
    torch.set_num_threads(2)
    expected = [part.sum().item() for part in with_gradients(mixture, leaves, slots)]
    torch.set_num_threads(1)  # for torch itself, whose own threads do not survive a fork either
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(queue, leaves, slots))
    child.start()
    try:
        assert queue.get(timeout=60) == expected
    finally:
        child.join(10)
        child.kill()


@pytest.mark.parametrize("kind", ["identity", "copy", "drop"])
def test_the_block_takes_it_and_adds_the_zero_experts(kind, monkeypatch):
    calls = []
    monkeypatch.setattr("longcat_kernels.mixture", lambda *a: calls.append(a) or mixture(*a))
    leaves, slots = problem(30, 8, 6, 4, 3, 3)
    found = with_gradients(lambda *a: experts(*a, kind), leaves, slots)
    agree(found, with_gradients(lambda *a: experts_reference(*a, kind), leaves, slots), 1e-12)
    assert len(calls) == 1
