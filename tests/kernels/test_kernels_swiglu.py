"""The compiled SiLU(gate) * up against the equation in float64: values, gradients, bits, and when it is taken."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

import longcat_kernels
from longcat_kernels import silu_times
from longcat_lab.blocks.swiglu.op import swiglu, swiglu_reference

pytestmark = pytest.mark.skipif(not longcat_kernels.available(), reason=longcat_kernels.why_not())


def with_gradients(op, inputs, dtype=None):
    inputs = [t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs]
    out = op(*inputs)
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out).to(out.dtype))
    return [out.detach(), *(t.grad for t in inputs)]


def equation(gate, up):
    return F.silu(gate) * up


@settings(max_examples=50)
@given(
    shape=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    size=st.sampled_from([1.0, 30.0]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    seed=st.integers(0, 2**31),
)
def test_values_and_gradients_are_those_of_the_equation(shape, size, dtype, seed):
    torch.manual_seed(seed)
    inputs = [size * torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)]
    bound = 1e-13 if dtype == torch.float64 else 1e-6
    for ours, true in zip(with_gradients(silu_times, inputs), with_gradients(equation, inputs, torch.float64)):
        torch.testing.assert_close(ours.double(), true, rtol=bound, atol=bound * 3 * size)


def test_gradcheck():
    assert gradcheck(silu_times, [torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2)])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_same_bits_each_time_and_for_any_number_of_threads(dtype):
    inputs = [torch.randn(70003, dtype=dtype) for _ in range(2)]
    first = with_gradients(silu_times, inputs)
    for threads in (1, 2, 2, 3):
        torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(first, with_gradients(silu_times, inputs), strict=True))


def test_saturated_strange_and_strided():
    gate, up = torch.tensor([-1e4, -200.0, 0.0, 200.0, 1e4, torch.nan]), torch.full((6,), 2.0)
    expected = torch.tensor([0.0, 0.0, 0.0, 400.0, 2e4, torch.nan])
    torch.testing.assert_close(silu_times(gate, up), expected, equal_nan=True, atol=1e-30, rtol=1e-6)
    gate, up = torch.randn(7, 9).T, torch.randn(9, 14)[:, ::2]
    expected = equation(gate, up)
    torch.testing.assert_close(silu_times(gate, up), expected)
    gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
    silu_times(gate, up).sum().backward()
    found = gate.grad, up.grad
    torch.testing.assert_close(found, torch.autograd.grad(equation(gate, up).sum(), (gate, up)))


def test_twice_differentiated_is_an_error():
    gate, up = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(silu_times(gate, up).sum(), gate, create_graph=True)


@pytest.mark.parametrize(
    ("up", "named"),
    [
        (torch.zeros(3), r"gate is \[4\] and up \[3\]"),
        (torch.zeros(4, dtype=torch.float64), "up torch.float64"),
        (torch.zeros(4, device="meta"), "up on meta"),
    ],
)
def test_what_does_not_fit_is_named(up, named):
    with pytest.raises(ValueError, match=named):
        silu_times(torch.zeros(4), up)


def test_the_block_takes_it_where_it_can(monkeypatch):
    calls = []
    monkeypatch.setattr("longcat_kernels.silu_times", lambda *a: calls.append(a) or silu_times(*a))
    for dtype, taken in ((torch.float64, 1), (torch.float32, 1), (torch.bfloat16, 0)):
        arguments = [torch.randn(shape).to(dtype) for shape in ((2, 5, 6), (8, 6), (8, 6), (6, 8))]
        torch.testing.assert_close(swiglu(*arguments), swiglu_reference(*arguments), rtol=1e-4, atol=1e-4)
        assert len(calls) == taken
        calls.clear()
    assert swiglu(*(t.to("meta") for t in arguments)).shape == (2, 5, 6) and not calls
