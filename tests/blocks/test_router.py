"""The router: which slots, with what weights, where its gradient goes, and what padding takes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longcat_lab.blocks import ForwardContext, MoEConfig
from longcat_lab.blocks.moe.experts_op import experts, experts_reference
from longcat_lab.blocks.moe.router_op import pick, route_reference
from longcat_lab.config import load


def doubles(*shape, grad=False):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=grad)


def scores_loop(u, classifier, scoring):
    """Rows of probabilities in Python numbers."""
    rows = []
    for token in u.tolist():
        logits = [sum(a * b for a, b in zip(token, row, strict=True)) for row in classifier.tolist()]
        if scoring == "sigmoid":
            rows.append([1 / (1 + math.exp(-z)) for z in logits])
        else:
            rows.append([math.exp(z) / sum(math.exp(y) for y in logits) for z in logits])
    return rows


def pick_loop(choice, topk, groups, topk_groups):
    """One token's slots by sorting: the groups with the largest sum of their two best, then the best slots in those."""
    size = len(choice) // groups
    inside = [list(range(g * size, (g + 1) * size)) for g in range(groups)]
    best = sorted(inside, key=lambda slots: sum(sorted((choice[i] for i in slots), reverse=True)[:2]), reverse=True)
    allowed = [i for slots in (best[:topk_groups] if topk_groups < groups else inside) for i in slots]
    return set(sorted(allowed, key=lambda i: choice[i], reverse=True)[:topk])


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize(("groups", "topk_groups"), [(1, 1), (4, 2), (3, 3)])
def test_slots_and_weights_equal_a_loop_in_python_numbers(scoring, renormalise, groups, topk_groups):
    u, classifier, bias = doubles(13, 6), doubles(12, 6), 0.3 * doubles(12)
    slots, weights, p = route_reference(u, classifier, bias, 4, 2.5, scoring, renormalise, groups, topk_groups)
    rows = scores_loop(u, classifier, scoring)
    torch.testing.assert_close(p, torch.tensor(rows, dtype=torch.float64))
    for t, row in enumerate(rows):
        expected = pick_loop([a + b for a, b in zip(row, bias.tolist(), strict=True)], 4, groups, topk_groups)
        assert set(slots[t].tolist()) == expected
        total = sum(row[i] for i in expected) if renormalise else 1.0
        torch.testing.assert_close(weights[t], torch.tensor([2.5 * row[i] / total for i in slots[t].tolist()], dtype=torch.float64))


def test_a_group_is_judged_by_its_two_best_slots_and_not_by_its_best():
    choice = torch.tensor([[0.9, 0.0, 0.6, 0.5]])
    assert pick(choice, 2, groups=2, topk_groups=1).sort().values.tolist() == [[2, 3]]
    assert pick(choice, 2).sort().values.tolist() == [[0, 2]]


def test_bias_moves_the_selection_and_not_the_weights():
    u, classifier, bias = torch.randn(11, 6), torch.randn(7, 6), torch.zeros(7)
    bias[4] = 10.0
    slots, weights, _ = route_reference(u, classifier, bias, 1, 1.0)
    assert (slots == 4).all()
    torch.testing.assert_close(weights[:, 0], (u @ classifier.T).softmax(-1)[:, 4])


def test_without_bias_and_renormalisation_all_slots_together_weigh_the_scale():
    """Over real and zero-experts alike: what is not picked is lost, and the scale multiplies the zero-experts' weights too."""
    u, classifier = doubles(9, 5), doubles(7, 5)
    _, weights, p = route_reference(u, classifier, torch.zeros(7), 7, 6.0)
    torch.testing.assert_close(weights.sum(-1), torch.full((9,), 6.0, dtype=torch.float64))
    slots, weights, _ = route_reference(u, classifier, torch.zeros(7), 3, 6.0)
    torch.testing.assert_close(weights, 6.0 * p.gather(-1, slots))
    assert (weights.sum(-1) < 6.0).all()


def test_renormalised_weights_sum_to_the_scale():
    _, weights, _ = route_reference(doubles(9, 5), doubles(7, 5), torch.zeros(7), 3, 2.5, "sigmoid", True)
    torch.testing.assert_close(weights.sum(-1), torch.full((9,), 2.5, dtype=torch.float64))


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_scores_are_fp32_for_a_bf16_input(scoring):
    u, classifier = torch.randn(5, 8).bfloat16(), torch.randn(4, 8)
    _, weights, p = route_reference(u, classifier, torch.zeros(4), 2, 1.0, scoring)
    assert weights.dtype == p.dtype == torch.float32
    assert torch.equal(p, route_reference(u.float(), classifier, torch.zeros(4), 2, 1.0, scoring)[2])


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_the_classifier_learns_through_picked_probabilities_alone(scoring):
    """dL/dp_i = scale * <what expert i returns, dL/dm> where picked, 0 elsewhere; a zero-expert returns the token itself."""
    tokens, hidden, n_routed, zeros, scale = 9, 6, 4, 3, 5.0
    u, upstream = doubles(tokens, hidden), doubles(tokens, hidden)
    classifier, gate_up, down = doubles(n_routed + zeros, hidden, grad=True), doubles(n_routed, 8, hidden), doubles(n_routed, hidden, 4)
    slots, weights, p = route_reference(u, classifier, 0.5 * doubles(n_routed + zeros), 3, scale, scoring)
    (experts(u, slots, weights, gate_up, down) * upstream).sum().backward()

    expected = torch.zeros_like(classifier)
    for t in range(tokens):
        by_p = torch.zeros(n_routed + zeros, dtype=torch.float64)
        for i in slots[t].tolist():
            one = torch.tensor([[i]])
            value = experts_reference(u[t : t + 1], one, torch.ones(1, 1, dtype=torch.float64), gate_up, down)[0] if i < n_routed else u[t]
            by_p[i] = scale * (value @ upstream[t])
        row = p[t].detach()
        by_logit = row * (by_p - row @ by_p) if scoring == "softmax" else row * (1 - row) * by_p
        expected += by_logit[:, None] * u[t]
    assert int((slots >= n_routed).sum()) > 3  # zero-experts took part
    torch.testing.assert_close(classifier.grad, expected, rtol=1e-10, atol=1e-12)


def test_a_sigmoid_slot_that_no_token_picked_has_no_gradient():
    u, classifier = doubles(4, 6), doubles(9, 6, grad=True)
    slots, weights, _ = route_reference(u, classifier, torch.zeros(9), 1, 1.0, "sigmoid")
    weights.sum().backward()
    unpicked = [i for i in range(9) if i not in slots]
    assert unpicked and classifier.grad[unpicked].abs().max() == 0 and classifier.grad[slots.flatten()].abs().min() > 0


@settings(max_examples=60)
@given(data=st.data())
def test_any_shape_of_mixture_keeps_its_invariants(data):
    """Slots are unique, weights sum to at most the scale, counts sum to K T, and the sum over picks is the one written token by token."""
    n_routed, zeros, tokens = (data.draw(st.integers(*bounds)) for bounds in ((1, 6), (0, 4), (0, 9)))
    topk = data.draw(st.integers(1, n_routed + zeros))
    kind = data.draw(st.sampled_from(["identity", "copy", "drop"]))
    scoring, renormalise = data.draw(st.sampled_from([("softmax", False), ("softmax", True), ("sigmoid", True)]))
    torch.manual_seed(data.draw(st.integers(0, 2**20)))
    config = MoEConfig(
        n_routed_experts=n_routed,
        zero_expert_num=zeros,
        moe_topk=topk,
        zero_expert_type=kind,
        expert_ffn_hidden_size=4,
        scoring_func=scoring,
        norm_topk_prob=renormalise,
        routed_scaling_factor=3.0,
    )
    module = config.build(load("tiny").model.shape()).double().train()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    module.router.e_score_correction_bias.normal_(std=0.2)
    u = doubles(tokens, 32)
    out = module(u)
    assert int(module.router.counts.sum()) == topk * tokens
    slots, weights = module.router.eval()(u)
    assert slots.shape == weights.shape == (tokens, topk) and out.shape == u.shape
    assert ((slots >= 0) & (slots < n_routed + zeros)).all()
    assert all(len(set(row)) == topk for row in slots.tolist())
    assert (weights.sum(-1) <= 3.0 * (1 + 1e-9)).all() and (weights >= 0).all()
    for t in range(tokens):
        expected = torch.zeros(32, dtype=torch.float64)
        for slot, weight in zip(slots[t].tolist(), weights[t], strict=True):
            if slot < n_routed:
                gate, up = (module.gate_up_proj[slot] @ u[t]).chunk(2)
                expected = expected + weight * (module.down_proj[slot] @ (gate * torch.sigmoid(gate) * up))
            elif kind != "drop":
                expected = expected + (weight if kind == "identity" else 1.0) * u[t]
        torch.testing.assert_close(out[t], expected)


@pytest.mark.parametrize("tokens", [0, 1])
def test_no_token_and_one_token_pass_in_fp32(tokens):
    """fp32 takes other products than float64 does."""
    module = load("tiny").model.moe.build(load("tiny").model.shape())
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x = torch.randn(1, tokens, 32, requires_grad=True)
    out = module(x)
    out.sum().backward()
    assert out.shape == x.shape == x.grad.shape and int(module.router.counts.sum()) == 2 * tokens


PADDED = torch.tensor([[False] * 5 + [True] * 3, [False] * 7 + [True], [True] * 8])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"zero_expert_num": 0, "expected_real_experts": None},
        {"zero_expert_type": "copy"},
        {"scoring_func": "sigmoid", "norm_topk_prob": True, "n_shared_experts": 1},
        {"balance_loss_alpha": 0.1, "balance_groups": 2},
    ],
    ids=lambda found: next(iter(found), "plain"),
)
def test_padding_takes_no_real_expert_is_not_counted_and_changes_no_other_token(settings):
    shape = load("tiny").model.shape()
    module = load("tiny").model.moe.model_copy(update=settings).build(shape).train()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x = torch.randn(3, 8, 32, requires_grad=True)
    context = ForwardContext((torch.empty(0), torch.empty(0)), padding=PADDED)
    slots, _ = module.router.eval()(x.flatten(0, 1), context)
    assert (slots[PADDED.flatten()] >= module.config.n_routed_experts).all()
    out = module.train()(x, context)
    assert int(module.router.counts.sum()) == int((~PADDED).sum()) * module.config.moe_topk
    plain = module(x)
    torch.testing.assert_close(out[~PADDED], plain[~PADDED], rtol=1e-5, atol=1e-6)
    out.square().sum().backward()
    assert out.isfinite().all() and x.grad.isfinite().all() and module.router.classifier.weight.grad.isfinite().all()
    if module.config.zero_expert_type == "identity" and not module.config.n_shared_experts:
        assert out[PADDED].abs().max() == 0  # their weights are zero
    changed = torch.where(PADDED[..., None], 100 * torch.randn(3, 8, 32), x.detach())
    torch.testing.assert_close(module(changed, context)[~PADDED], out[~PADDED], rtol=1e-5, atol=1e-6)


def test_padding_may_be_routed_like_tokens_and_is_still_not_counted():
    module = load("tiny", "model.moe.padding_to_zero_experts=false").model.moe.build(load("tiny").model.shape()).train()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x, context = torch.randn(3, 8, 32), ForwardContext((torch.empty(0), torch.empty(0)), padding=PADDED)
    out = module(x, context)
    assert int(module.router.counts.sum()) == int((~PADDED).sum()) * 2
    torch.testing.assert_close(out, module(x))


def test_a_batch_of_nothing_but_padding_has_no_balance_loss():
    shape = load("tiny").model.shape()
    module = load("tiny", "model.moe.balance_loss_alpha=0.1").model.moe.build(shape).train()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    context = ForwardContext((torch.empty(0), torch.empty(0)), padding=torch.ones(1, 4, dtype=torch.bool))
    module(torch.randn(1, 4, 32), context).sum().backward()
    assert module.router.classifier.weight.grad.abs().max() == 0
    module.router.after_step()
    assert module.router.e_score_correction_bias.abs().max() == 0


def test_padding_in_the_model_changes_nothing_before_it():
    from longcat_lab.model import build

    for arm in ((), ("model.moe.zero_expert_num=0", "model.moe.expected_real_experts=null"), ("model.layer.kind=serial",)):
        model, tokens = build(load("tiny", *arm)).double().eval(), torch.randint(0, 512, (2, 12))
        padding = torch.arange(12) >= torch.tensor([[9], [12]])
        out = model(tokens, padding=padding)
        assert out.isfinite().all()
        torch.testing.assert_close(out[~padding], model(tokens)[~padding], rtol=1e-10, atol=1e-10)
