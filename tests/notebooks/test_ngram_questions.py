"""The questions about n-gram embeddings: arms that differ as they say, held equal as they say, tuned on seeds of their own."""

from pathlib import Path

import pytest
import torch

from longcat_lab.ablation import read, solve
from longcat_lab.model import build
from longcat_lab.training.optimizer import split
from longcat_lab.training.table_optimizer import once_hit_displacement

FOLDER = Path(__file__).resolve().parents[2] / "ablations"
TUNING = ["ngram_sgd_tuning", "ngram_variants_tuning"]
QUESTIONS = sorted(path.stem for path in FOLDER.glob("ngram_*.yaml") if path.stem not in TUNING)


def question(name):
    return read(FOLDER / f"{name}.yaml")


def test_every_question_of_the_list_is_there():
    named = ("amplification", "collisions", "orders_splits", "share", "table_optimizer", "table_size", "variants")
    assert [name.removeprefix("ngram_") for name in QUESTIONS] == list(named)


@pytest.mark.parametrize("name", QUESTIONS)
def test_questions_say_what_would_count_before_they_run(name):
    found = question(name)
    assert len(found.seeds) >= 3 and max(found.seeds) < 100 and found.claims and found.hypothesis
    assert found.tuned or found.vanishes  # the table optimizer's multipliers are its arms
    assert found.vanishes


@pytest.mark.parametrize("name", TUNING)
def test_rates_are_chosen_on_seeds_that_no_question_uses(name):
    assert question(name).seeds == [100] and not question(name).claims


@pytest.mark.parametrize("name", [*QUESTIONS, *TUNING])
def test_every_arm_can_be_built_and_matched(name):
    solution = solve(question(name))
    for variant, config in solution.configs.items():
        with torch.device("meta"):
            model = build(config)
        stored = sum(tensor.numel() for tensor in model.state_dict().values())
        assert stored == solution.totals[variant]["total_params"]


def test_parameters_are_equal_where_they_are_said_to_be():
    for name in ("ngram_orders_splits", "ngram_share", "ngram_collisions"):
        totals = [each["total_params"] for each in solve(question(name)).totals.values()]
        assert max(totals) / min(totals) < 1.02, name
    totals = {name: each["total_params"] for name, each in solve(question("ngram_variants")).totals.items() if name != "plain"}
    assert max(totals.values()) / min(totals.values()) < 1.01 and len(totals) == 6


def test_collisions_are_those_of_the_sizes_the_question_names():
    from longcat_lab.blocks.ngram_embedding.advise import warnings

    configs = solve(question("ngram_collisions")).configs
    spiked = {
        name: any("vocab_ratio" in each for each in warnings(c.model.embedding.ngram, c.model.vocab_size)) for name, c in configs.items()
    }
    assert spiked == {"k1_even": False, "k1_spiked": True, "k1_permuted": False, "k4_even": False, "k4_spiked": True}


def test_arms_of_the_amplification_start_as_loud_and_move_as_fast_as_the_file_says():
    """Loudness of the start and, under Adam, distance moved a step (scale times learning rate), both over the plain mean's."""
    loud, fast = {}, {}
    for variant, config in solve(question("ngram_amplification")).configs.items():
        if variant == "layer_norm":
            continue
        embedding = build(config).embed_tokens
        tokens = torch.arange(4096).view(16, 256)
        loud[variant] = float(embedding(tokens).square().mean().sqrt().detach())
        rates = {row.name: row.learning_rate for row in split(build(config), config.training.optimizer)}
        fast[variant] = embedding.scales[0] * rates["embed_tokens.weight"], embedding.scales[1] * rates["embed_tokens.tables.weight"]
    much = pytest.approx(128**0.5, rel=1e-3)
    same = pytest.approx(1.0, rel=1e-3)
    assert {name: value / loud["mean"] for name, value in loud.items()} == {
        "mean": same, "sqrt_hidden": much, "init": much, "scale": same, "rate": same
    }  # fmt: skip
    for part in (0, 1):
        assert {name: value[part] / fast["mean"][part] for name, value in fast.items()} == {
            "mean": same, "sqrt_hidden": much, "init": same, "scale": much, "rate": much
        }  # fmt: skip


def test_modes_that_are_compared_at_equal_displacement_have_about_that():
    configs = solve(question("ngram_table_optimizer")).configs
    moved = {
        name: c.training.optimizer.table_lr_multiplier * once_hit_displacement(c.training.optimizer)
        for name, c in configs.items()
        if name != "sgd"
    }
    assert moved["lazy_64"] / moved["adamw_4"] == pytest.approx(1, abs=0.3)
    assert moved["row_wise_4"] / moved["adamw_4"] == pytest.approx(1, abs=0.3)
    assert moved["adamw_4"] / moved["lazy_4"] == pytest.approx(13, abs=0.5)
