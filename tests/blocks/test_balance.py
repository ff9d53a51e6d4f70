"""The device-level balance loss in closed form, how it joins the step's loss, and R_g, its gradient over the language model's."""

import pytest
import torch
from torch.autograd import gradcheck

from longcat_lab.blocks import ForwardContext
from longcat_lab.blocks.moe.balance_op import add_loss, balance_loss
from longcat_lab.blocks.moe.experts_op import experts
from longcat_lab.blocks.moe.router_op import pick, route_reference, weigh
from longcat_lab.config import load
from longcat_lab.data import Batch
from longcat_lab.model import build
from longcat_lab.training import mechanisms
from longcat_lab.training.loss import plan_step, step_loss


def doubles(*shape, grad=False):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=grad)


def moe(*overrides):
    found = load("tiny", *overrides).model.moe.build(load("tiny").model.shape()).double().train()
    for parameter in found.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return found


def report(p, slots, groups, real, n_routed):
    """The report's equation with its sums written out; f counts slots, so that both kinds of group are 1 at balance."""
    tokens, topk, size = len(p), slots.shape[1], n_routed // groups
    total = 0.0
    for j in range(groups):
        picks = sum(int(j * size <= slot < (j + 1) * size) for row in slots.tolist() for slot in row)
        total = total + groups / (real * tokens) * picks * p[:, j * size : (j + 1) * size].sum() / tokens
    picks = int((slots >= n_routed).sum())
    return total + (picks / ((topk - real) * tokens) * p[:, n_routed:].sum() / tokens if picks else 0.0)


@pytest.mark.parametrize(("groups", "zeros", "real"), [(1, 3, 2.0), (2, 3, 1.7), (6, 3, 2.2), (3, 0, 3.0)])
def test_loss_is_the_reports_equation_and_its_gradient_f_over_t(groups, zeros, real):
    p = doubles(17, 6 + zeros).softmax(-1).detach().requires_grad_()
    slots = pick(p.detach(), 3)
    counts = torch.bincount(slots.flatten(), minlength=6 + zeros)
    loss, f = balance_loss(p, counts, groups, real, 3, 6)
    torch.testing.assert_close(loss, report(p, slots, groups, real, 6))
    (by_p,) = torch.autograd.grad(loss, p)
    torch.testing.assert_close(by_p, (f / 17).expand(17, -1))
    assert gradcheck(lambda q: balance_loss(q, counts, groups, real, 3, 6)[0], p)
    assert (len(torch.unique(f[:6])) <= groups and (f[6:] == f[-1]).all()) or not zeros


@pytest.mark.parametrize(("zeros", "topk", "real"), [(4, 3, 2.0), (2, 4, 3.0), (0, 4, 4.0)])
def test_loss_is_one_at_balance_whatever_the_probabilities(zeros, topk, real):
    tokens = 40
    counts = torch.cat((torch.full((8,), int(real * tokens / 8)), torch.full((zeros,), int((topk - real) * tokens / max(zeros, 1)))))
    for groups in (1, 2, 8):
        loss, f = balance_loss(doubles(tokens, 8 + zeros).softmax(-1), counts, groups, real, topk, 8)
        torch.testing.assert_close(f, torch.ones_like(f))
        torch.testing.assert_close(loss, torch.ones_like(loss))


def test_all_picks_on_one_device_cost_as_many_times_more_as_there_are_devices():
    p = torch.zeros(10, 8, dtype=torch.float64)
    p[:, 0] = 1.0
    counts = torch.tensor([10, 10, 0, 0, 0, 0, 0, 0])
    assert float(balance_loss(p, counts, 4, 2.0, 2, 8)[0]) == pytest.approx(4.0)
    assert float(balance_loss(p, counts, 1, 2.0, 2, 8)[0]) == pytest.approx(1.0)


def test_a_budget_of_all_picks_beside_zero_experts_is_refused_with_a_balance_loss():
    """The zero-experts' target would be no pick at all, and one pick an infinite loss."""
    from longcat_lab.config import ConfigError

    load("tiny", "model.moe.expected_real_experts=2.0")
    with pytest.raises(ConfigError, match="balance_loss_alpha"):
        load("tiny", "model.moe.expected_real_experts=2.0", "model.moe.balance_loss_alpha=0.01")


def test_an_added_loss_leaves_the_forward_pass_and_adds_its_gradient():
    x, w = doubles(4, 5, grad=True), doubles(5, grad=True)
    out = add_loss(x.sin(), (w * w).sum() * x.sum(), 0.3)
    assert torch.equal(out, x.sin())
    (out * 2).sum().backward()
    torch.testing.assert_close(w.grad, 0.3 * 2 * w.detach() * x.detach().sum())
    torch.testing.assert_close(x.grad, 2 * x.detach().cos() + 0.3 * (w.detach() ** 2).sum())


@pytest.mark.parametrize("upstream", [0.0, 1.0, 17.0])
def test_an_added_loss_does_not_follow_the_scale_of_what_it_rides_on(upstream):
    w = doubles(3, grad=True)
    (upstream * add_loss(torch.zeros(2, dtype=torch.float64, requires_grad=True), w.sum(), 0.5)).sum().backward()
    torch.testing.assert_close(w.grad, torch.full_like(w, 0.5))


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalise", [False, True])
def test_the_mixture_adds_exactly_alpha_times_its_loss(scoring, renormalise):
    """Forward bits as without; the classifier's gradient is the sum of both losses', each taken alone by autograd."""
    settings = (f"model.moe.scoring_func={scoring}", f"model.moe.norm_topk_prob={renormalise}")
    plain, found = moe(*settings), moe(*settings, "model.moe.balance_loss_alpha=0.3", "model.moe.balance_groups=2")
    found.load_state_dict(plain.state_dict())
    u, upstream = doubles(2, 9, 32), doubles(2, 9, 32)
    out, expected = found(u), plain(u)
    assert torch.equal(out, expected)
    (out * upstream).sum().backward(), (expected * upstream).sum().backward()
    w = plain.router.classifier.weight
    slots, _, p = route_reference(u.flatten(0, 1), w, torch.zeros(6), 2, 1.0, scoring)
    p = p / p.sum(-1, keepdim=True)
    (alone,) = torch.autograd.grad(0.3 * report(p, slots, 2, 1.5, 4), w)
    assert alone.norm() > 1e-4
    torch.testing.assert_close(found.router.classifier.weight.grad, w.grad + alone)
    torch.testing.assert_close(found.gate_up_proj.grad, plain.gate_up_proj.grad)
    assert found.router.measured["balance_loss"] == pytest.approx(float(report(p, slots, 2, 1.5, 4).detach()))


def test_padding_is_no_part_of_the_balance_loss():
    found, x = moe("model.moe.balance_loss_alpha=0.3"), doubles(1, 12, 32)
    padding = torch.arange(12)[None] >= 8
    context = ForwardContext((torch.empty(0), torch.empty(0)), padding=padding)
    found(x, context).backward(torch.zeros(1, 12, 32, dtype=torch.float64))
    padded = found.router.classifier.weight.grad.clone()
    found.zero_grad()
    found(x[:, :8]).backward(torch.zeros(1, 8, 32, dtype=torch.float64))
    torch.testing.assert_close(padded, found.router.classifier.weight.grad)
    assert padded.norm() > 1e-4


def test_the_shares_of_micro_batches_add_up_to_one_loss():
    """f is each micro-batch's own (the report's T is the micro-batch's), so the sum is the mean of their losses."""
    found, x = moe("model.moe.balance_loss_alpha=0.3", "model.moe.balance_groups=2"), doubles(4, 6, 32)
    nothing = torch.zeros(1, dtype=torch.float64)
    for part in (x[:1], x[1:]):
        context = ForwardContext((torch.empty(0), torch.empty(0)), share=len(part) / 4)
        (found(part, context) * nothing).sum().backward()
    w, expected = found.router.classifier.weight, 0.0
    for part in (x[:1], x[1:]):
        slots, _, p = route_reference(part.flatten(0, 1), w, torch.zeros(6), 2, 1.0)
        expected = expected + len(part) / 4 * 0.3 * report(p, slots, 2, 1.5, 4)
    torch.testing.assert_close(w.grad, torch.autograd.grad(expected, w)[0])


@pytest.mark.parametrize("parts", [1, 2])
def test_gradient_ratio_is_the_two_gradients_by_the_mean_probability(parts):
    """R_g from a mixture written out, in which p is a leaf."""
    found, u, upstream = moe("model.moe.balance_loss_alpha=0.3", "model.moe.balance_groups=2"), doubles(10, 32), doubles(10, 32)
    language, balance = 0.0, 0.0
    for part, by in zip(u.chunk(parts), upstream.chunk(parts), strict=True):
        context = ForwardContext((torch.empty(0), torch.empty(0)), share=1 / parts)
        (found(part, context) * by).sum().backward()
        slots, _, p = route_reference(part, found.router.classifier.weight, torch.zeros(6), 2, 2.0)
        leaf = p.detach().requires_grad_()
        mixed = experts(part, slots, weigh(leaf, slots, 2.0), found.gate_up_proj, found.down_proj)
        language = language + torch.autograd.grad((mixed * by).sum(), leaf)[0].sum(0)
        counts = torch.bincount(slots.flatten(), minlength=6)
        balance = balance + 0.3 / parts * balance_loss(p, counts, 2, 1.5, 2, 4)[1]
    found.router.after_step()
    assert found.router.statistics()["router_gradient_ratio"] == pytest.approx(float(balance.norm() / language.norm()), rel=1e-9)


def test_gradient_ratio_of_a_repeated_block_holds_all_of_its_passes():
    """Several passes of one router before any backward, as prediction steps make them."""
    found = moe("model.moe.balance_loss_alpha=0.3", "model.moe.bias_update_rate=0")
    inputs, upstream = doubles(3, 10, 32), doubles(3, 10, 32)
    sum((found(u) * by).sum() for u, by in zip(inputs, upstream, strict=True)).backward()
    together = [g.clone() for g in found.router.gradients]
    found.router.after_step()
    for u, by in zip(inputs, upstream, strict=True):
        (found(u) * by).sum().backward()
    for a, b in zip(together, found.router.gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_the_steps_loss_has_the_balance_loss_of_every_layer_once():
    """The whole model's gradient equals that of a loss to which the layers' balance losses are added by hand."""
    tokens = torch.randint(0, 512, (2, 17))
    batch, gradients = Batch(tokens[:, :-1], tokens[:, 1:], torch.zeros(2, 16, dtype=torch.int64)), []
    for alpha in (0.5, 0.0):
        config = load("tiny", "model.num_layers=2", f"model.moe.balance_loss_alpha={alpha}", "model.moe.balance_groups=2")
        model, seen = build(config).double().train(), []
        for layer in model.layers:
            layer.mlp.router.register_forward_pre_hook(lambda module, inputs, seen=seen: seen.append((module, inputs[0])))
        loss, told = step_loss(model, batch.tokens, batch.labels, batch.document_ids, config, plan_step(batch, config, 0), 1.0)
        if not alpha:
            for module, u in seen:
                slots, _, p = route_reference(u, module.classifier.weight, torch.zeros(6), 2, 1.0)
                loss = loss + 0.5 * report(p, slots, 2, 1.5, 4)
        loss.backward()
        gradients.append((told["loss"], {name: p.grad for name, p in model.named_parameters()}))
        mechanisms.after_step(model)
    assert gradients[0][0] == gradients[1][0]
    for name, value in gradients[0][1].items():
        torch.testing.assert_close(value, gradients[1][1][name], rtol=1e-9, atol=1e-12)
