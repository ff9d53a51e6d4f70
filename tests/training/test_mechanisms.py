"""Mechanisms that took no part are said so, in the sentence, in run.json and in the run's summary."""

import re

import pytest

import longcat_lab as lab
from longcat_lab.config import load
from longcat_lab.files import read_json
from longcat_lab.model import build
from longcat_lab.training import mechanisms

ROUTER = "layers.0.mlp.router"
SHORT = ("training.steps=10", "training.log_every=2", "training.evaluation_sequences=2", "data.batch_size=2")


def said(*overrides, **measured):
    model = build(load("tiny", *overrides))
    return mechanisms.not_engaged(model, {f"{ROUTER}/{key}": value for key, value in measured.items()})


@pytest.mark.parametrize(
    ("overrides", "measured", "sentence"),
    [
        ((), {"real_experts_per_token": 1.6}, "1.6 real experts a token, not the 1.5"),
        ((), {"real_experts_per_token": 1.4}, "1.4 real experts a token, not the 1.5"),
        ((), {"real_experts_per_token": 2.0}, "its zero-experts were never picked"),
        ((), {"real_experts_per_token": 1.5, "load_entropy": 0.3}, r"few experts do all the work \(load entropy 0.30"),
        (("model.moe.balance_loss_alpha=0.1",), {"real_experts_per_token": 1.5}, "its balance loss had no gradient"),
        ((), {}, "its router made no step"),
        (("model.moe.bias_update_rate=0", "model.moe.bias_proportional_gain=0.1"), {"real_experts_per_token": 1.7}, "not the 1.5"),
    ],
)
def test_what_did_not_engage_is_named_with_its_block(overrides, measured, sentence):
    (found,) = said(*overrides, **measured)
    assert found.startswith(f"{ROUTER}: ") and re.search(sentence, found) and "\n" not in found


@pytest.mark.parametrize(
    ("overrides", "measured"),
    [
        ((), {"real_experts_per_token": 1.53, "load_entropy": 0.9}),
        (("model.moe.bias_update_rate=0",), {"real_experts_per_token": 1.7, "load_entropy": 0.9}),
        (("model.moe.bias_rule=sign",), {"real_experts_per_token": 1.7, "load_entropy": 0.9}),
        (("model.moe.zero_expert_num=0", "model.moe.expected_real_experts=null"), {"real_experts_per_token": 2.0, "load_entropy": 0.9}),
        (("model.moe.balance_loss_alpha=0.1",), {"real_experts_per_token": 1.5, "load_entropy": 0.9, "router_gradient_ratio": 0.01}),
    ],
)
def test_what_engaged_or_was_not_asked_for_is_not_named(overrides, measured):
    assert said(*overrides, **measured) == []


def test_measures_are_means_over_the_last_fifth_of_the_rows():
    rows = [{"loss": 1.0, "a/x": float(i), "b/x": 10.0, "a/list": [1, 2]} for i in range(20)]
    means = mechanisms.late_means(rows)
    assert means == {"a/x": 17.5, "b/x": 10.0} and mechanisms.over_blocks(means) == {"x": 13.75}
    assert mechanisms.late_means(rows[:3]) == {"a/x": 2.0, "b/x": 10.0}


def test_a_healthy_run_names_nothing(tmp_path):
    """A classifier that learns slowly, so that its bias can follow on so few tokens a step."""
    slow = ("training.steps=40", "training.log_every=1", "training.evaluation_sequences=2", "training.optimizer.learning_rate=1e-4")
    run = lab.fit(load("tiny", *slow, "model.moe.bias_update_rate=0.3", "model.moe.balance_loss_alpha=0.01"), tmp_path, progress=False)
    assert run.summary["not_engaged"] == read_json(tmp_path / "run.json")["not_engaged"] == []
    assert run.summary["real_experts_per_token"] == pytest.approx(1.5, rel=0.05)
    assert run.summary["router_gradient_ratio"] > 0 and run.summary["load_entropy"] > 0.5


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (("model.moe.expected_real_experts=0.3", "model.moe.bias_update_rate=1e-5"), "real experts a token, not the 0.3"),
        (("model.moe.expected_real_experts=2.0", "model.moe.bias_update_rate=50"), "its zero-experts were never picked"),
        (("model.moe.bias_update_period=100",), "its router made no step"),
        (("model.embedding.ngram.table_init_ratio=0", "training.optimizer.table_lr_multiplier=0"), "its tables are still empty"),
    ],
    ids=["budget", "no zero", "no update", "tables"],
)
def test_an_arm_that_did_not_engage_says_so_in_its_record_and_summary(tmp_path, overrides, sentence):
    run = lab.fit(load("tiny", *SHORT, *overrides), tmp_path, progress=False)
    assert run.record["status"] == "finished"
    assert any(sentence in each for each in run.summary["not_engaged"]), run.summary["not_engaged"]
    assert run.summary["not_engaged"] == read_json(tmp_path / "run.json")["not_engaged"]


def test_a_collapsed_router_says_so(tmp_path):
    """Steps of the bias so large and of the wrong size that one expert at a time has all tokens."""
    wild = ("model.moe.n_routed_experts=32", "model.moe.moe_topk=1", "model.moe.expected_real_experts=0.7", "model.moe.bias_update_rate=50")
    run = lab.fit(load("tiny", *SHORT, *wild), tmp_path, progress=False)
    assert any("few experts do all the work" in each for each in run.summary["not_engaged"]), run.summary["not_engaged"]


def test_prediction_steps_that_were_never_trained_are_flagged(tmp_path):
    common = ("model.mtp.num_nextn_predict_layers=1", "training.steps=6", "model.mtp.loss_weight=0")
    silent = lab.fit(load("tiny", *common), tmp_path / "silent", progress=False)
    late = lab.fit(load("tiny", *common, "model.mtp.loss_weight_schedule=[[0.5, 0.3]]"), tmp_path / "late", progress=False)
    assert any("no prediction step was trained" in each for each in silent.summary["not_engaged"])
    assert not any("no prediction step was trained" in each for each in late.summary["not_engaged"])
