"""Figures of attention, of models whose attention is known."""

import numpy as np
import pandas
import pytest
import torch

import longcat_lab as lab
from longcat_lab.data import Batch
from longcat_lab.notebook import (
    attention_likeness,
    fixed_share,
    index_divergence,
    likeness_by_distance,
    position_losses,
    probe_accuracy,
    selection_maps,
)
from longcat_lab.notebook.figures_attention import short
from longcat_lab.notebook.style import svg
from longcat_lab.training.attention_measures import attention_measures
from longcat_lab.training.attention_record import look

SPARSE = ["model.attention.kind=lsa", "model.attention.index_topk=12", "model.attention.index_local_tokens=4", "model.num_layers=2"]


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    return {"dense": lab.build(lab.load("tiny", "model.num_layers=2")), "LSA": lab.build(lab.load("tiny", *SPARSE))}


@pytest.fixture(scope="module")
def batch():
    tokens = torch.randint(0, 500, (2, 40), generator=torch.Generator().manual_seed(1))
    return Batch(tokens, torch.full_like(tokens, -100), (torch.arange(40) >= 15).long().expand(2, -1))


@pytest.fixture(scope="module")
def measured(models, batch):
    return {name: attention_measures(model, [batch], 12, 1, 4) for name, model in models.items()}


def metrics():
    nothing = [float("nan")] * 2
    rows = {
        "step": [4, 8, 12, 16],
        "layers.0.self_attn.0/index_kl": [*nothing, 1.0, 0.5],
        "layers.0.self_attn.1/index_kl": [*nothing, 1, 2],
    }
    return pandas.DataFrame({**rows, "layers.0.self_attn.0/selected_share": [*nothing, 0.5, 0.5], "loss": [1.0] * 4})


def test_every_figure_is_drawn(models, measured, batch):
    looks = {name: look(model, batch, 12, 1, 4)[-1] for name, model in models.items()}
    probe = {
        "probe_accuracy_length_64": 0.5,
        "probe_accuracy_length_128": 0.25,
        "probe_accuracy_depth_0": 0.1,
        "probe_accuracy_depth_3": 1.0,
    }
    figures = [
        selection_maps(looks),
        attention_likeness(measured["dense"]),
        likeness_by_distance(measured),
        fixed_share(measured),
        index_divergence({"LSA": metrics(), "dense": metrics()[["step", "loss"]]}, (8, 12)),
        index_divergence({"LSA": metrics()}),
        probe_accuracy({"one": probe, "other": {**probe, "loss": 3.0}, "none": {"loss": 2.0}}),
        position_losses({"one": {"loss_position_0": 3.0, "loss_position_1": 2.0}}),
    ]
    for figure in figures:
        drawn = svg(figure)
        assert drawn.startswith("<svg") and len(drawn) < 300_000
        assert figure.get_facecolor()[3] == 0  # nothing is painted behind it, so that it serves on white and on black


def test_a_map_shows_each_key_as_what_it_is(models, batch):
    each = look(models["LSA"], batch)[0]
    left, right = selection_maps({"LSA": each}).axes[:2]
    kind = left.get_images()[0].get_array()
    assert kind.shape == (40, 40) and (np.ma.getmaskarray(kind) == ~each.seen).all()
    assert kind[14, 0] == 3 and kind[30, 15] == 3  # each document's first token
    assert kind[30, 27:31].tolist() == [2] * 4
    assert ((kind == 0) == (each.seen & ~each.used)).filled(True).all()
    assert (kind == 1).sum() == (each.used & ~each.window & ~each.sinks).sum() > 0
    mass = right.get_images()[0].get_array()
    np.testing.assert_allclose(mass[39].compressed(), 25 * each.mass[39, 15:], rtol=1e-5)  # of 25 visible keys, none beyond the colours


def test_matrices_and_lines_are_the_measures(measured):
    dense = measured["dense"]
    left, right = attention_likeness(dense).axes[:2]
    assert (left.get_images()[0].get_array() == dense.overlap).all() and (right.get_images()[0].get_array() == dense.coverage).all()
    assert left.texts[1].get_text() == f"{dense.overlap[0, 1]:.0%}" and len(left.texts) == 16
    overlap, coverage = likeness_by_distance(measured).axes
    assert overlap.get_lines()[0].get_xdata().tolist() == [1, 2, 3] and coverage.get_lines()[0].get_xdata().tolist() == [0, 1, 2, 3]
    assert coverage.get_lines()[0].get_ydata()[1] == pytest.approx(1 - dense.summary["reuse_uncovered_distance_1"])
    drawn = fixed_share(measured).axes[0].get_lines()[0].get_ydata()
    told = dense.summary
    expected = [1 - told.get(f"fixed_uncovered_position_{i}", np.nan) for i in range(8)]
    np.testing.assert_allclose(drawn, expected)


def test_losses_are_compared_with_the_first():
    losses = {"dense": {"loss_position_0": 3.0, "loss_position_10": 1.0, "loss_position_2": 2.0}}
    losses["LSA"] = {key: value + 0.25 * value for key, value in losses["dense"].items()}
    left, right = position_losses(losses).axes
    assert left.get_lines()[0].get_ydata().tolist() == [3.0, 2.0, 1.0]
    assert right.get_lines()[1].get_ydata().tolist() == [0.75, 0.5, 0.25]


def test_large_matrices_have_no_numbers(measured):
    dense = measured["dense"]
    from dataclasses import replace

    many = replace(dense, names=[f"layers.{i}.self_attn" for i in range(9)], overlap=np.eye(9), coverage=np.eye(9))
    assert not attention_likeness(many).axes[0].texts


def test_an_attention_that_reuses_is_dashed():
    lines = index_divergence({"LSA": metrics()}).axes[0].get_lines()
    assert [(line.get_label(), line.get_linestyle()) for line in lines] == [("0.0", "-"), ("0.1", "--")]


def test_probe_points_are_in_order_of_number():
    found = {"probe_accuracy_length_512": 0.1, "probe_accuracy_length_64": 0.9, "probe_accuracy_length_1024": 0.0}
    (line,) = probe_accuracy({"one": found}).axes[0].get_lines()
    assert line.get_xdata().tolist() == [64, 512, 1024] and line.get_ydata().tolist() == [0.9, 0.1, 0.0]


def test_names():
    assert [short(name) for name in ("layers.0.self_attn.1", "layers.7.self_attn", "attention")] == ["0.1", "7", "attention"]
