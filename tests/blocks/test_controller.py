"""The rule that moves the selection bias: its forms, what it counts, which budgets it reaches, and that no split of a batch shows."""

import subprocess
import sys

import pytest
import torch

import longcat_lab as lab
from longcat_lab.blocks import MoEConfig
from longcat_lab.blocks.moe.balance_op import budget_error, controller_step, sign_step
from longcat_lab.blocks.moe.router_op import pick
from longcat_lab.config import load
from longcat_lab.data import Batch
from longcat_lab.model import build
from longcat_lab.training import mechanisms
from longcat_lab.training.loss import plan_step, step_loss


def router(**settings):
    """Of nano's shape, 16 + 8 slots and 3 picks, with a classifier that prefers some."""
    found = MoEConfig(**settings).build(load("nano").model.shape()).router.train()
    torch.nn.init.normal_(found.classifier.weight, std=0.1)
    return found


def steps(found, counts):
    """The bias after each optimizer step, where these were the counts."""
    biases = []
    for each in counts:
        found.counts.copy_(each)
        found.after_step()
        biases.append(found.e_score_correction_bias.double().clone())
    return biases


def random_counts(times, slots=24, tokens=1000, topk=3):
    return [torch.bincount(torch.rand(tokens, slots).topk(topk).indices.flatten(), minlength=slots) for _ in range(times)]


def test_bias_step_is_the_published_rule():
    counts = torch.tensor([10, 0, 30, 40])  # 2 real experts, 2 zero-experts; 40 tokens, 2 picks each
    error = budget_error(counts, tokens=40, topk=2, expected_real_experts=1.0, n_routed=2)
    step = controller_step(torch.stack((error, torch.zeros(4), torch.zeros(4))), 0.0, 0.5, 0.0)
    torch.testing.assert_close(step, torch.tensor([0.5 * (1 / 4 - 10 / 80), 0.5 * (1 / 4), 0.0, 0.0]).double())


def test_steps_add_up_to_the_positional_form():
    """b_t = k_p e_t + k_i sum e + k_d (e_t - e_{t-1}), from zeros."""
    errors, gains, bias = torch.randn(30, 7, dtype=torch.float64), (0.7, 0.2, 0.4), torch.zeros(7, dtype=torch.float64)
    padded = torch.cat((torch.zeros(2, 7, dtype=torch.float64), errors))
    for t in range(30):
        bias = bias + controller_step(padded[t : t + 3].flip(0), *gains)
        expected = gains[0] * errors[t] + gains[1] * errors[: t + 1].sum(0) + gains[2] * (errors[t] - padded[t + 1])
        torch.testing.assert_close(bias, expected)


def test_the_router_keeps_the_errors_that_its_gains_need():
    counts = random_counts(8)
    errors = torch.stack([budget_error(each, 1000, 3, 2.0, 16) for each in counts])
    found = router(expected_real_experts=2.0, bias_update_rate=0.2, bias_proportional_gain=0.7, bias_derivative_gain=0.4)
    for t, bias in enumerate(steps(found, counts)):
        before = errors[t - 1] if t else torch.zeros(24)
        torch.testing.assert_close(bias, 0.7 * errors[t] + 0.2 * errors[: t + 1].sum(0) + 0.4 * (errors[t] - before), rtol=1e-4, atol=1e-6)


def test_without_the_other_gains_the_router_takes_the_reports_rule():
    counts = random_counts(5)
    expected = sum(2.0 / (3 * 16) - each[:16].double() / 3000 for each in counts)
    bias = steps(router(expected_real_experts=2.0, bias_update_rate=0.3), counts)[-1]
    torch.testing.assert_close(bias[:16], 0.3 * expected, rtol=1e-4, atol=1e-7)
    assert bias[16:].abs().max() == 0


def test_bias_stands_still_exactly_at_its_target():
    counts = torch.tensor([20, 20, 20, 20])
    assert budget_error(counts, 40, 2, 1.0, 2).abs().max() == 0
    found = router(expected_real_experts=1.5, bias_proportional_gain=0.5, bias_derivative_gain=0.5)
    assert torch.stack(steps(found, [torch.tensor([48] * 16 + [96] * 8)] * 3)).abs().max() == 0  # of 512 tokens


def test_sign_rule_takes_fixed_steps_to_the_uniform_share():
    counts = torch.tensor([10, 20, 30, 20])
    assert sign_step(counts, 0.001).tolist() == [0.001, 0.0, -0.001, 0.0]
    assert sign_step(counts * 1000, 0.001).tolist() == [0.001, 0.0, -0.001, 0.0]
    found = router(bias_rule="sign", bias_update_rate=0.001)
    bias = steps(found, [torch.arange(24)] * 3)[-1]
    torch.testing.assert_close(bias, torch.tensor([0.003] * 12 + [-0.003] * 12, dtype=torch.float64), rtol=1e-5, atol=1e-9)


def test_gains_halve_over_the_half_life_and_the_bias_keeps_what_it_has():
    counts = random_counts(1) * 9
    bias = steps(router(bias_update_rate=0.3, bias_rate_half_life=4.0), counts)
    moves = torch.stack([b - a for a, b in zip([torch.zeros(24).double(), *bias], bias, strict=False)])
    for t in (1, 4, 8):
        torch.testing.assert_close(moves[t], moves[0] * 0.5 ** (t / 4), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("settings", [{}, {"bias_rule": "sign"}, {"bias_proportional_gain": 0.5, "bias_derivative_gain": 0.2}])
def test_the_counts_of_a_period_make_one_update(settings):
    counts = random_counts(6)
    together = steps(router(**settings), [sum(counts[:3]), sum(counts[3:])])
    found = router(bias_update_period=3, **settings)
    apart = []
    for each in counts:
        found.counts += each
        found.after_step()
        apart.append(found.e_score_correction_bias.double().clone())
    assert apart[1].abs().max() == 0 and torch.equal(apart[3], apart[2])
    assert torch.equal(apart[2], together[0]) and torch.equal(apart[5], together[1])


def test_micro_batches_move_the_bias_exactly_as_the_whole_batch():
    whole, parts, x = router(bias_proportional_gain=0.5), router(bias_proportional_gain=0.5), torch.randn(96, 128)
    parts.load_state_dict(whole.state_dict())
    for _ in range(3):
        whole(x)
        for part in x.split(17):
            parts(part)
        whole.after_step(), parts.after_step()
        assert torch.equal(whole.e_score_correction_bias, parts.e_score_correction_bias)
        assert whole.e_score_correction_bias.abs().max() > 0 and whole.statistics() == parts.statistics()


def test_evaluation_and_passes_without_gradient_are_not_counted():
    found, x = router(), torch.randn(64, 128)
    found(x[:32]), found(x[32:])
    found.eval()(x)
    with torch.no_grad():
        found.train()(x)
    assert int(found.counts.sum()) == 64 * 3
    found.after_step()
    assert int(found.counts.sum()) == 0


@pytest.mark.parametrize("alpha", [0.0, 0.05])
@pytest.mark.parametrize("micro", [4, 2])
def test_layers_that_run_again_in_backward_are_counted_once(alpha, micro):
    """Same counts, biases, gradients and measures as without recomputation, bit for bit."""
    config = load("tiny", "model.num_layers=2", f"model.moe.balance_loss_alpha={alpha}", "model.moe.balance_groups=2")
    tokens = torch.randint(0, 512, (4, 33))
    batch, found = Batch(tokens[:, :-1], tokens[:, 1:], torch.zeros(4, 32, dtype=torch.int64)), []
    for recompute in (False, True):
        model = build(config).train()
        model.recompute = recompute
        plan = plan_step(batch, config, 0)
        for start in range(0, 4, micro):
            part = [t[start : start + micro] for t in (batch.tokens, batch.labels, batch.document_ids)]
            step_loss(model, *part, config, plan, micro / 4)[0].backward()
        counts = [layer.mlp.router.counts.clone() for layer in model.layers]
        mechanisms.after_step(model)
        found.append((counts, [p.grad for p in model.parameters()], model.state_dict(), mechanisms.statistics(model)))
    (counts, gradients, state, told), again = found
    assert [int(each.sum()) for each in counts] == [4 * 32 * 2] * 2
    assert all(torch.equal(a, b) for a, b in zip(counts, again[0], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(gradients, again[1], strict=True))
    assert all(torch.equal(state[name], again[2][name]) for name in state)
    assert told == again[3] and ("layers.0.mlp.router/router_gradient_ratio" in told) == bool(alpha)


PID = (
    "training.steps=12",
    "training.log_every=4",
    "training.evaluation_sequences=2",
    "data.batch_size=2",
    "model.moe.bias_proportional_gain=0.5",
    "model.moe.bias_derivative_gain=0.2",
    "model.moe.bias_update_period=3",
    "model.moe.bias_rate_half_life=10",
    "model.moe.balance_loss_alpha=0.01",
)


def test_a_run_stopped_inside_a_period_goes_on_with_the_same_bits(tmp_path):
    whole = lab.fit(load("tiny", *PID), tmp_path / "whole", progress=False)
    for at in (4, 8):
        asked = []
        lab.fit(load("tiny", *PID), tmp_path / f"{at}", progress=False, stop=lambda asked=asked, at=at: asked.append(1) or len(asked) == at)
        resumed = lab.fit(load("tiny", *PID), tmp_path / f"{at}", progress=False)
        for name, value in whole.model.state_dict().items():
            assert torch.equal(value, resumed.model.state_dict()[name]), name
        measures = [name for name in whole.metrics if "router/" in name]
        assert len(measures) > 5 and resumed.metrics[measures].astype(str).equals(whole.metrics[measures].astype(str))
    assert whole.model.layers[0].mlp.router.e_score_correction_bias.abs().max() > 0


def test_a_router_reaches_a_budget_that_a_uniform_rule_cannot():
    """16 + 8 slots, 3 picks: uniform would give 2.0 real experts; ask for 1.2 and for 2.6."""
    for target in (1.2, 2.6):
        found = router(expected_real_experts=target)
        for _ in range(250):
            found(torch.randn(512, 128))
            found.after_step()
        assert found.statistics()["real_experts_per_token"] == pytest.approx(target, abs=0.12)


def simulated(n_routed, zeros, rule, rate, updates, tokens=512, topk=12, target=8.0):
    """Real experts a token in the last 20 updates, for logits N(m_i, 1) with m_i ~ N(0, 0.5^2)."""
    slots = n_routed + zeros
    means, bias, found = 0.5 * torch.randn(slots), torch.zeros(slots, dtype=torch.float64), []
    for _ in range(updates):
        p = (means + torch.randn(tokens, slots)).softmax(-1)
        counts = torch.bincount(pick(p + bias.float(), topk).flatten(), minlength=slots)
        found.append(int(counts[:n_routed].sum()) / tokens)
        if rule == "budget":
            error = budget_error(counts, tokens, topk, target, n_routed)
            bias += controller_step(torch.stack((error, torch.zeros(slots), torch.zeros(slots))), 0.0, rate, 0.0)
        else:
            bias += sign_step(counts, rate)
    return sum(found[-20:]) / 20


def test_budget_of_flash_is_reached_within_one_percent():
    assert simulated(512, 256, "budget", 0.3, 110) == pytest.approx(8.0, rel=0.01)


def test_budget_of_longcat_2_is_reached_within_one_percent():
    """768 + 128 slots: the uniform share would be 10.29 real experts of 12 picks."""
    assert simulated(768, 128, "budget", 0.3, 160) == pytest.approx(8.0, rel=0.01)


@pytest.mark.parametrize("rate", [1e-3, 1e-4])
def test_the_sign_rule_ends_at_the_uniform_share_and_cannot_hold_that_budget(rate):
    found = simulated(768, 128, "sign", rate, 60)
    assert found > 10.0 and found == pytest.approx(12 * 768 / 896, abs=0.15)


RANK = """
import sys, torch
import torch.distributed as dist
from longcat_lab.blocks import MoEConfig
from longcat_lab.config import load
from longcat_lab.training import mechanisms

rank, store, inputs, out = int(sys.argv[1]), *sys.argv[2:]
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
x, found = torch.load(inputs), {}
for name, (settings, weight) in x.pop("cases").items():
    model = torch.nn.Sequential(MoEConfig(**settings).build(load("nano").model.shape()).router).train()
    model[0].classifier.weight.data.copy_(weight)
    for step in range(6):
        model(x[step].chunk(2)[rank] if rank < 2 else x[step])
        mechanisms.after_step(model, dist.all_reduce)
    found[name] = (model[0].e_score_correction_bias, model[0].statistics()["real_experts_per_token"])
torch.save(found, out)
dist.destroy_process_group()
"""


def test_two_processes_have_the_bias_of_one_that_sees_both_halves(tmp_path):
    """Real processes, each with half of every batch; also where several steps make an update."""
    kinds = {
        "every step": {"bias_proportional_gain": 0.3},
        "period": {"bias_update_period": 3, "bias_derivative_gain": 0.2},
        "sign": {"bias_rule": "sign", "bias_update_period": 2},
    }
    x = {step: torch.randn(60, 128) for step in range(6)}
    cases = {name: (settings, 0.1 * torch.randn(24, 128)) for name, settings in kinds.items()}
    torch.save({**x, "cases": cases}, tmp_path / "inputs.pt")
    paths = [tmp_path / f"out{rank}.pt" for rank in range(2)]
    processes = [
        subprocess.Popen([sys.executable, "-c", RANK, str(rank), str(tmp_path / "store"), str(tmp_path / "inputs.pt"), str(path)])
        for rank, path in enumerate(paths)
    ]
    try:
        assert [process.wait(timeout=200) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    both = [torch.load(path) for path in paths]
    for name, (settings, weight) in cases.items():
        alone = torch.nn.Sequential(router(**settings))
        alone[0].classifier.weight.data.copy_(weight)
        for step in range(6):
            alone(x[step])
            mechanisms.after_step(alone)
        for bias, real in (each[name] for each in both):
            assert torch.equal(bias, alone[0].e_score_correction_bias), name
            assert real == alone[0].statistics()["real_experts_per_token"]
