"""The mixture: real experts, zero-computation experts, and how they are summed."""

import pytest
import torch
from torch.autograd import gradcheck

from longcat_lab.blocks import MoEConfig
from longcat_lab.blocks.moe.experts_op import experts, experts_grouped, experts_reference, zero_experts
from longcat_lab.blocks.moe.router_op import route_reference
from longcat_lab.config import ConfigError, load


def problem(tokens=37, hidden=16, n_routed=5, zero=3, topk=3, inner=8, dtype=torch.float64):
    u = torch.randn(tokens, hidden, dtype=dtype)
    slots, weights, _ = route_reference(u, torch.randn(n_routed + zero, hidden, dtype=dtype), torch.zeros(n_routed + zero), topk, 2.0)
    return (
        u,
        slots,
        weights.to(dtype),
        torch.randn(n_routed, 2 * inner, hidden, dtype=dtype),
        torch.randn(n_routed, hidden, inner, dtype=dtype),
    )


def grouped(u, slots, weights, gate_up, down, kind="identity"):
    """The real experts by the grouped product, whatever else this machine has, and the others beside it."""
    real, passed = experts_grouped(u, slots, weights, gate_up, down), zero_experts(u, slots, weights, len(gate_up), kind)
    return real if passed is None else real + passed


def test_reference_is_the_sum_written_token_by_token():
    u, slots, weights, gate_up, down = problem()
    out = experts_reference(u, slots, weights, gate_up, down)
    for t in range(len(u)):
        expected = torch.zeros_like(u[t])
        for slot, weight in zip(slots[t].tolist(), weights[t], strict=True):
            if slot < len(gate_up):
                gate, up = (gate_up[slot] @ u[t]).chunk(2)
                expected += weight * (down[slot] @ (gate * torch.sigmoid(gate) * up))
            else:
                expected += weight * u[t]
        torch.testing.assert_close(out[t], expected)


@pytest.mark.parametrize("case", ["mixed", "all zero", "all real", "one expert"])
def test_grouped_equals_reference_with_gradients(case):
    """The real experts' part in fp32, the narrowest type the grouped product takes on a CPU; the reference in float64 is the truth."""
    u, slots, _, gate_up, down = problem(dtype=torch.float32)
    if case != "mixed":
        slots = {"all zero": slots % 3 + 5, "all real": slots % 5, "one expert": torch.full_like(slots, 2)}[case]
    weights = torch.rand(slots.shape)
    out = []
    for op, dtype, rest in ((experts_grouped, torch.float32, ()), (experts_reference, torch.float64, ("drop",))):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (u, weights, gate_up, down)]
        value = op(leaves[0], slots, *leaves[1:], *rest) + leaves[0]  # so that there is a gradient without any real pick too
        value.square().sum().backward()
        out.append([value, *(leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for leaf in leaves)])
    for fast, truth in zip(*out, strict=True):
        torch.testing.assert_close(fast.double(), truth, rtol=1e-4, atol=1e-4 * float(truth.detach().abs().max()))


def test_experts_gradient():
    u, slots, weights, gate_up, down = problem(tokens=4, hidden=4, n_routed=3, zero=1, topk=2, inner=2)
    leaves = [t.detach().requires_grad_() for t in (u, weights, gate_up, down)]
    assert gradcheck(lambda a, w, g, d: experts(a, slots, w, g, d), leaves)


def test_a_width_the_grouped_product_cannot_take_falls_back():
    u, slots, weights, gate_up, down = problem(hidden=6, inner=3, dtype=torch.float32)
    torch.testing.assert_close(experts(u, slots, weights, gate_up, down), experts_reference(u, slots, weights, gate_up, down))


def test_fp32_and_bf16_take_the_grouped_product_and_float64_does_not():
    from longcat_lab.blocks.moe.experts_op import _has_grouped_product

    cpu = torch.device("cpu")
    assert _has_grouped_product(cpu, torch.float32) and not _has_grouped_product(cpu, torch.float64)


def test_under_autocast_the_experts_run_in_bf16_and_the_router_does_not(monkeypatch):
    shape, seen = load("tiny").model.shape(), []
    module = load("tiny").model.moe.build(shape)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    monkeypatch.setattr(module, "compute", lambda u, *rest: seen.append((u.dtype, rest[1].dtype)) or experts(u, *rest))
    x = torch.randn(2, 8, shape.hidden_size)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(x)
    assert seen == [(torch.bfloat16, torch.float32)] and out.dtype == x.dtype
    torch.testing.assert_close(out, module(x), rtol=0.05, atol=0.05)


def test_identity_experts_do_not_make_the_grouped_product_longer(monkeypatch):
    """Rows that reach the product are the real picks, nothing else."""
    rows, product = [], torch.nn.functional.grouped_mm
    monkeypatch.setattr("torch.nn.functional.grouped_mm", lambda a, b, offs: rows.append(len(a)) or product(a, b, offs=offs))
    u, slots, weights, gate_up, down = problem(dtype=torch.float32)
    experts_grouped(u, slots, weights, gate_up, down)
    assert rows == [int((slots < 5).sum())] * 2


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["model.moe.moe_topk=9"], "moe_topk is 9"),
        (["model.moe.expected_real_experts=3.0"], "expected_real_experts"),
        (["model.moe.zero_expert_num=0"], "zero_expert_num"),
    ],
)
def test_impossible_mixtures_are_named(overrides, named):
    with pytest.raises(ConfigError, match=named):
        load("tiny", *overrides)


@pytest.mark.parametrize("op", [experts_reference, grouped, experts], ids=["reference", "grouped", "fast"])
@pytest.mark.parametrize("kind", ["identity", "copy", "drop"])
def test_a_token_that_picks_zero_experts_alone_is_added_once(op, kind):
    """Exactly (sum g) u, K u, or nothing."""
    u, slots, weights, gate_up, down = problem(dtype=torch.float32)
    slots = slots % 3 + 5
    share = {"identity": weights.sum(-1, keepdim=True), "copy": torch.full((37, 1), 3.0), "drop": torch.zeros(37, 1)}[kind]
    assert torch.equal(op(u, slots, weights, gate_up, down, kind), share * u)


def test_the_module_adds_identity_experts_once():
    module = MoEConfig(expected_real_experts=1.5).build(load("nano").model.shape()).eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    module.router.e_score_correction_bias[16:] = 10.0
    x = torch.randn(2, 5, 128)
    slots, weights = module.router(x.flatten(0, 1))
    assert (slots >= 16).all()
    assert torch.equal(module(x), (weights.sum(-1, keepdim=True) * x.flatten(0, 1)).view_as(x))


@pytest.mark.parametrize("op", [experts_reference, grouped, experts], ids=["reference", "grouped", "fast"])
def test_no_tokens_give_no_output(op):
    _, _, _, gate_up, down = problem(dtype=torch.float32)
    assert op(torch.zeros(0, 16), torch.zeros(0, 3, dtype=torch.int64), torch.zeros(0, 3), gate_up, down).shape == (0, 16)


def test_experts_split_finer_keep_their_variance_when_the_scale_is_the_number_of_parts():
    """N experts of width F into m N of width F / m with m times the picks: output variance falls to 1 / m^2, gamma = m restores it.

    Softmax dilution makes one factor m, the width the other. Spec: LongCat-Flash (arXiv 2509.01322) section 3.1.
    """
    tokens, hidden, variance = 1024, 256, {}
    u = torch.randn(tokens, hidden)
    for m in (1, 2, 4, 8):
        drawn = []
        for _ in range(2):
            classifier, inner = 0.02 * torch.randn(8 * m, hidden), 512 // m
            gate_up, down = 0.02 * torch.randn(8 * m, 2 * inner, hidden), 0.02 * torch.randn(8 * m, hidden, inner)
            slots, weights, _ = route_reference(u, classifier, torch.zeros(8 * m), 2 * m, 1.0)
            drawn.append(float(experts(u, slots, weights, gate_up, down).var()))
        variance[m] = sum(drawn) / 2
    for m in (2, 4, 8):
        assert variance[m] / variance[1] * m**2 == pytest.approx(1.0, abs=0.1), m
