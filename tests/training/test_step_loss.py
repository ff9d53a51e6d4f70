"""What a step minimises, and initial weights that follow the width."""

import math

import pytest
import torch
import torch.nn.functional as F

from longcat_lab.config import load
from longcat_lab.data import Batch
from longcat_lab.model import build
from longcat_lab.training.loss import plan_step, step_loss

ALL = (
    "model.mtp.num_nextn_predict_layers=2",
    "model.mtp.loss_weight=0.4",
    "training.z_loss_weight=0.01",
    "model.moe.balance_loss_alpha=0.2",
)


def batch(rows=4, length=20):
    tokens, documents = torch.randint(0, 512, (rows, length + 1)), torch.randint(0, 5, (rows, length + 1)).eq(0).cumsum(1)
    labels = tokens[:, 1:].masked_fill(documents[:, 1:] != documents[:, :-1], -100)
    return Batch(tokens[:, :-1], labels, documents[:, :-1])


def run(model, found, config, rows=slice(None), plan=None):
    parts = [t[rows] for t in (found.tokens, found.labels, found.document_ids)]
    return step_loss(model, *parts, config, plan or plan_step(found, config, 0), len(parts[0]) / len(found.tokens))


def test_the_loss_is_the_sum_of_its_parts_written_out():
    config, found = load("tiny", *ALL), batch()
    model = build(config).double()
    total, told = run(model, found, config)
    hidden = model.hidden(found.tokens, found.document_ids)
    logits = model.lm_head(model.norm(hidden))
    first = F.cross_entropy(logits.flatten(0, 1), found.labels.flatten())
    assert told["loss"] == pytest.approx(float(first.detach()), rel=1e-9)
    mtp, labels = 0.0, found.labels
    for k, state in enumerate(model.ahead(hidden, found.tokens, found.document_ids), 1):
        same = F.pad(found.document_ids[:, k:], (0, k), value=-1) == found.document_ids
        own = F.pad(labels[:, k:], (0, k), value=-100).masked_fill(~same, -100)
        each = F.cross_entropy(model.lm_head(state).flatten(0, 1), own.flatten())
        assert told[f"mtp/mtp_loss_{k}"] == pytest.approx(float(each.detach()), rel=1e-9)
        mtp = mtp + each / 2
    z = hidden.abs().logsumexp(-1).square().mean()
    torch.testing.assert_close(total, first + 0.4 * mtp + 0.01 * z)
    assert told["trunk/z_loss"] == pytest.approx(float(z.detach()))
    assert told["trunk/hidden_max"] == pytest.approx(float(hidden.detach().abs().max()))
    assert told["trunk/hidden_norm"] == pytest.approx(float(hidden.detach().norm(dim=-1).mean()))


@pytest.mark.parametrize("settings", [ALL[:3], ("training.recompute=true", *ALL[:3])], ids=["kept", "recomputed"])
def test_parts_of_a_batch_add_up_to_its_loss_and_its_gradient(settings):
    """Although the parts hold different numbers of scored labels. (The balance loss is each part's own and left out here.)"""
    config, found = load("tiny", *settings), batch()
    whole, parts = build(config).double().train(), build(config).double().train()
    parts.recompute = config.training.recompute
    total, told = run(whole, found, config)
    total.backward()
    plan, losses, sums = plan_step(found, config, 0), [], {}
    for rows in (slice(0, 1), slice(1, 4)):
        loss, each = run(parts, found, config, rows, plan)
        loss.backward()
        losses.append(loss.detach())
        sums = {key: sums.get(key, 0.0) + value for key, value in each.items()}
    torch.testing.assert_close(sum(losses), total.detach())
    for key in ("loss", "mtp/mtp_loss_1", "mtp/mtp_loss_2", "trunk/z_loss"):
        assert sums[key] == pytest.approx(told[key], rel=1e-9)
    for (name, a), b in zip(whole.named_parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-8, atol=1e-11, msg=name)


def test_an_auxiliary_loss_of_weight_zero_leaves_every_bit():
    found, results = batch(), []
    for settings in ((), ("training.z_loss_weight=0", "model.moe.balance_loss_alpha=0", "model.moe.balance_groups=2")):
        config = load("tiny", *settings)
        model = build(config).train()
        total, told = run(model, found, config)
        total.backward()
        results.append((total.detach(), told, [p.grad for p in model.parameters()]))
    assert torch.equal(results[0][0], results[1][0]) and results[0][1] == results[1][1] and set(results[0][1]) == {"loss"}
    assert all(torch.equal(a, b) for a, b in zip(results[0][2], results[1][2], strict=True))


def test_a_batch_without_a_scored_label_has_no_loss():
    config, found = load("tiny", *ALL[:2]), batch(2, 6)
    nothing = Batch(found.tokens, torch.full_like(found.labels, -100), found.document_ids)
    total, told = run(build(config), nothing, config)
    total.backward()
    assert float(total.detach()) == 0 and told == {"loss": 0.0, "mtp/mtp_loss_1": 0.0, "mtp/mtp_loss_2": 0.0}


def test_bf16_autocast_stays_close_to_fp32():
    found, losses = batch(), []
    for precision in ("fp32", "bf16"):
        config = load("tiny", *ALL, f"training.precision={precision}")
        model = build(config).train()
        total, told = run(model, found, config)
        total.backward()
        losses.append(told)
        assert total.dtype == torch.float32 and all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)
    assert losses[1] == pytest.approx(losses[0], rel=0.02) and losses[0]["loss"] != losses[1]["loss"]
    assert abs(losses[0]["loss"] - math.log(512)) < 1.0


def test_width_transfer_scales_hidden_matrices_and_head_and_keeps_embeddings():
    """s = 4: hidden matrices, router, prediction block and head start with half the deviation, on the same draws."""
    more = ("model.embedding.ngram.order=3", "model.mtp.num_nextn_predict_layers=1")
    plain, wide = build(load("tiny", *more)).state_dict(), build(load("tiny", *more, "model.base_hidden_size=8")).state_dict()
    kept = {name for name in plain if torch.equal(plain[name], wide[name])}
    assert {"embed_tokens.weight", "embed_tokens.tables.weight", "embed_tokens.projection.weight", "norm.weight"} <= kept
    halved = plain.keys() - kept
    assert {"lm_head.weight", "layers.0.mlp.gate_up_proj", "layers.0.mlp.router.classifier.weight", "mtp.layers.0.eh_proj.weight"} <= halved
    assert halved == {name for name, value in plain.items() if value.ndim > 1 and not name.startswith("embed_tokens.")}
    for name in halved:
        torch.testing.assert_close(wide[name], plain[name] / 2)
    assert abs(float(wide["lm_head.weight"].std()) / (0.05 / 2) - 1) < 0.05


@pytest.mark.parametrize("width", [64, 256])
def test_a_transferred_model_starts_with_the_logits_of_its_proxy(width):
    """The purpose of the rule: hidden sums of `width` terms keep their size as the model grows."""
    sizes = []
    for size in (32, width):
        wide = (f"model.hidden_size={size}", "model.base_hidden_size=32", "model.initializer_range=0.1", "model.attention.q_lora_rank=null")
        model = build(load("tiny", *wide)).eval()
        with torch.no_grad():
            sizes.append(float(model(torch.randint(0, 512, (4, 16))).std()))
    assert abs(sizes[1] / sizes[0] - 1) < 0.1
