"""The questions about sparse attention: the list is whole, arms differ as they say, and what is evaluated can be."""

from pathlib import Path

import pytest
import torch

from longcat_lab.ablation import read, solve
from longcat_lab.config import load
from longcat_lab.model import build
from longcat_lab.training import conversion, evaluation_arms

FOLDER = Path(__file__).resolve().parents[2] / "ablations"
QUESTIONS = sorted(path.stem for path in FOLDER.glob("sparse_*.yaml"))


def question(name):
    return read(FOLDER / f"{name}.yaml")


def test_every_question_of_the_list_is_there():
    """R1 and R2 (dense_look), R3 (fixed_share), R4, R5 and (i) (cross_layer, recall_groups, recall_layers), R6 (kinds, recall), R7
    (kinds), R8 (hierarchical), R12 and (h) (mtp), R13 and (e) (conversion), (a) to (d) (distillation).
    """
    named = "conversion cross_layer dense_look distillation fixed_share hierarchical kinds mtp recall recall_groups recall_layers"
    assert [name.removeprefix("sparse_") for name in QUESTIONS] == named.split()


@pytest.mark.parametrize("name", QUESTIONS)
def test_questions_say_what_would_count_before_they_run(name):
    found = question(name)
    assert len(found.seeds) >= 3 and found.claims and found.hypothesis and found.tuned


@pytest.mark.parametrize("name", QUESTIONS)
def test_every_arm_can_be_built_converted_and_evaluated(name):
    solution, trained = solve(question(name)), set(question(name).variants)
    for variant, config in solution.configs.items():
        conversion.check(config)
        if variant in trained:
            evaluation_arms.check(config)
        with torch.device("meta"):
            stored = sum(tensor.numel() for tensor in build(config).state_dict().values())
        assert stored == solution.totals[variant]["total_params"]


@pytest.mark.parametrize("name", QUESTIONS)
def test_arms_train_the_language_model_on_as_many_steps(name):
    steps = set()
    for config in solve(question(name)).configs.values():
        plan = config.training.conversion
        steps.add(config.training.steps - (plan.warmup_steps if plan else 0))
    assert len(steps) == 1


@pytest.mark.parametrize("name", ["kinds", "recall"])
def test_the_arms_of_dsa_and_lsa_are_what_they_are_called(name):
    """An override of the kind alone keeps the other kind's settings where a preset has written them out."""
    arms = solve(question(f"sparse_{name}")).configs
    for kind in ("dsa", "lsa"):
        attention = arms[kind].model.attention
        assert attention.kind == kind
        for key in ("index_k_norm_type", "index_rope_layout", *(["cli_factor"] if name == "kinds" else [])):
            assert getattr(attention, key) == type(attention).model_fields[key].default, (kind, key)
    assert (arms["dsa"].model.attention.index_local_tokens, arms["dsa"].model.attention.index_init_tokens) == (0, 0)


def test_ratios_are_those_of_the_published_models_where_they_can_be():
    proxy, published = load("sparse-proxy").model.attention, load("longcat-2.0").model.attention
    for c in (proxy, published):
        fixed = c.index_init_tokens + c.index_local_tokens
        assert fixed / c.index_topk == pytest.approx(0.5, abs=0.01)
        assert c.num_attention_heads == 2 * c.index_n_heads and c.index_head_dim == 2 * c.qk_rope_head_dim
        assert c.cli_factor == 2 and c.dsa_mtp_cli
    assert load("sparse-proxy").data.sequence_length == 32 * proxy.index_topk
