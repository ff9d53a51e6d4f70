"""Router, experts, zero-computation experts, and the rule that keeps the budget."""

import pytest
import torch
from torch.autograd import gradcheck

from longcat_lab.blocks import MoEConfig
from longcat_lab.blocks.moe.balance_op import budget_error, controller_step
from longcat_lab.blocks.moe.experts_op import experts, experts_grouped, experts_reference
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


def test_weights_are_scaled_probabilities_over_all_slots_without_renormalisation():
    u, classifier = torch.randn(11, 6, dtype=torch.float64), torch.randn(7, 6, dtype=torch.float64)
    slots, weights, _ = route_reference(u, classifier, torch.zeros(7), 3, 5.0)
    for t in range(11):
        p = torch.exp(classifier @ u[t]) / torch.exp(classifier @ u[t]).sum()
        assert sorted(slots[t].tolist()) == sorted(p.argsort(descending=True)[:3].tolist())
        torch.testing.assert_close(weights[t], 5.0 * p[slots[t]])


def test_bias_moves_the_selection_and_not_the_weights():
    u, classifier, bias = torch.randn(11, 6), torch.randn(7, 6), torch.zeros(7)
    bias[4] = 10.0
    slots, weights, _ = route_reference(u, classifier, bias, 1, 1.0)
    assert (slots == 4).all()
    torch.testing.assert_close(weights[:, 0], (u @ classifier.T).softmax(-1)[:, 4])


def test_scores_are_fp32_for_a_bf16_input():
    _, weights, _ = route_reference(torch.randn(5, 8).bfloat16(), torch.randn(4, 8), torch.zeros(4), 2, 1.0)
    assert weights.dtype == torch.float32


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
    """fp32, the narrowest type the grouped product takes on a CPU; the reference in float64 is the truth of both."""
    u, slots, _, gate_up, down = problem(dtype=torch.float32)
    if case != "mixed":
        slots = {"all zero": slots % 3 + 5, "all real": slots % 5, "one expert": torch.full_like(slots, 2)}[case]
    weights = torch.rand(slots.shape)
    out = []
    for op, dtype in ((experts_grouped, torch.float32), (experts_reference, torch.float64)):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (u, weights, gate_up, down)]
        value = op(leaves[0], slots, *leaves[1:])
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
    monkeypatch.setattr(
        "longcat_lab.blocks.moe.module.experts", lambda u, *rest: seen.append((u.dtype, rest[1].dtype)) or experts(u, *rest)
    )
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


def test_bias_step_is_the_published_rule():
    counts = torch.tensor([10, 0, 30, 40])  # 2 real experts, 2 zero-experts; 40 tokens, 2 picks each
    error = budget_error(counts, tokens=40, topk=2, expected_real_experts=1.0, n_routed=2)
    step = controller_step(torch.stack((error, torch.zeros(4), torch.zeros(4))), 0.0, 0.5, 0.0)
    torch.testing.assert_close(step, torch.tensor([0.5 * (1 / 4 - 10 / 80), 0.5 * (1 / 4), 0.0, 0.0]).double())


def test_bias_stands_still_exactly_at_its_target():
    counts = torch.tensor([20, 20, 20, 20])
    assert budget_error(counts, 40, 2, 1.0, 2).abs().max() == 0


def test_controller_reaches_a_budget_that_a_uniform_rule_cannot():
    """16 + 8 slots, 3 picks: uniform would give 2.0 real experts; ask for 1.2 and for 2.6."""
    torch.manual_seed(1)
    shape = load("nano").model.shape()
    for target in (1.2, 2.6):
        router = MoEConfig(expected_real_experts=target).build(shape).router.train()
        torch.nn.init.normal_(router.classifier.weight, std=0.1)
        for _ in range(300):
            router(torch.randn(512, shape.hidden_size))
            router.after_step()
        assert router.statistics()["real_experts_per_token"] == pytest.approx(target, abs=0.12)


def test_counts_add_over_micro_batches_and_leave_evaluation_out():
    shape = load("nano").model.shape()
    router = MoEConfig().build(shape).router.train()
    torch.nn.init.normal_(router.classifier.weight)
    x = torch.randn(64, shape.hidden_size)
    router(x[:32]), router(x[32:])
    router.eval()(x)
    with torch.no_grad():
        router.train()(x)
    assert int(router.counts.sum()) == 64 * 3
    router.after_step()
    assert int(router.counts.sum()) == 0


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
