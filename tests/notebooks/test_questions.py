"""The questions about mixtures and prediction steps: arms that differ as they say, matched as they say, and a page that answers."""

import subprocess
import sys
from pathlib import Path

import pandas
import pytest

from longcat_lab.ablation import read, solve
from longcat_lab.blocks.moe.config import MoEConfig
from longcat_lab.errors import LabError

ROOT = Path(__file__).resolve().parents[2]
MOE, MTP = "model.moe.", "model.mtp."


def flat(data, prefix=""):
    if not isinstance(data, dict):
        return {prefix: data}
    return {key: value for name, inner in data.items() for key, value in flat(inner, f"{prefix}.{name}" if prefix else name).items()}


def solved(name):
    question = read(ROOT / "ablations" / f"{name}.yaml")
    return question, solve(question)


def changed(solution, variant, baseline):
    """Dotted setting to its value in `variant`, where it is another than in `baseline`."""
    ours, theirs = (flat(solution.configs[each].to_dict()) for each in (variant, baseline))
    return {key: value for key, value in ours.items() if theirs.get(key) != value}


ARMS = {
    "zero_experts": {
        "with": {"zero_expert_num": 8, "moe_topk": 3, "routed_scaling_factor": 9.0},
        "three_real": {"moe_topk": 3, "expected_real_experts": 3.0},
    },
    "controller": {"sign": {"bias_rule": "sign", "bias_update_rate": 0.003}, "off": {"bias_update_rate": 0.0}},
    "shortcut": {"silent": {"routed_scaling_factor": 1e-6}},
}


@pytest.mark.parametrize("name", ARMS)
def test_arms_differ_in_nothing_else(name):
    question, solution = solved(name)
    for variant, settings in ARMS[name].items():
        assert changed(solution, variant, question.baseline) == {f"{MOE}{key}": value for key, value in settings.items()}


@pytest.mark.parametrize("name", [*ARMS, "mtp_blocks"])
def test_questions_can_be_answered(name):
    """Enough pairs, nothing tuned on them, and words about tuning and about a control or about reading the verdict."""
    question, _ = solved(name)
    assert len(question.seeds) >= 3 and max(question.seeds) < 100  # tuning and pilots take seeds from 100 on
    assert question.claims and question.tuned
    text = (ROOT / "ablations" / f"{name}.yaml").read_text()
    assert "control" in text or "How to read" in text


def test_zero_experts_at_equal_cost():
    _, solution = solved("zero_experts")
    moe = {name: config.model.moe for name, config in solution.configs.items()}
    assert {name: each.real_experts for name, each in moe.items()} == {name: 3.0 if name == "three_real" else 2.0 for name in moe}
    # A real pick weighs the same at the start, where the softmax is uniform; `without_9` alone has the other arm's scaling.
    weights = {name: each.routed_scaling_factor / (each.n_routed_experts + each.zero_expert_num) for name, each in moe.items()}
    assert weights.pop("without_9") > weights["with"] and len(set(weights.values())) == 1
    flops = {name: each["flops_per_token"] for name, each in solution.totals.items()}
    assert flops.pop("three_real") == pytest.approx(1.12 * flops["without"], rel=0.01)
    assert all(each == pytest.approx(flops["without"], rel=0.002) for each in flops.values())


def test_controller_asks_for_what_every_rule_can_hold():
    _, solution = solved("controller")
    for config in solution.configs.values():
        moe: MoEConfig = config.model.moe
        assert moe.real_experts == moe.moe_topk * moe.n_routed_experts / (moe.n_routed_experts + moe.zero_expert_num)


def test_shortcut_has_the_same_parts():
    _, solution = solved("shortcut")
    assert changed(solution, "serial", "scmoe") == {"model.layer.kind": "serial"}
    assert len({tuple(totals.values()) for totals in solution.totals.values()}) == 1


def test_blocks_of_their_own_cost_parameters_and_no_flops():
    _, solution = solved("mtp_blocks")
    assert changed(solution, "separate", "repeated") == {f"{MTP}repeat_block": False}
    assert solution.configs["none"].model.mtp is None
    repeated, separate = (solution.totals[name] for name in ("repeated", "separate"))
    assert separate["flops_per_token"] == repeated["flops_per_token"]
    assert separate["total_params"] == pytest.approx(1.2 * repeated["total_params"], rel=0.01)
    assert separate["total_params_without_mtp"] == repeated["total_params_without_mtp"] == solution.totals["none"]["total_params"]


def test_a_wrong_match_is_refused():
    """The three_real arm really costs more: holding it to the others' FLOPs is no longer possible."""
    question = read(ROOT / "ablations" / "zero_experts.yaml")
    rule = question.match[0].model_copy(update={"variants": ["with", "three_real"]})
    with pytest.raises(LabError, match="three_real"):
        solve(question.model_copy(update={"match": [rule]}))


@pytest.mark.slow
def test_an_arm_without_the_primary_metric_is_on_the_page(tmp_path):
    """`none` of mtp_blocks has no prediction steps: the page tells its bits per byte and judges the other two."""

    def command(*arguments):
        done = subprocess.run([sys.executable, "-m", "longcat_lab", *map(str, arguments)], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stdout + done.stderr

    small = ["ablation.base=tiny", "ablation.seeds=[0]", "training.steps=4", "model.vocab_size=512"]
    command("run", "ablations/mtp_blocks.yaml", "--out", tmp_path / "sweep", *small)
    results = pandas.read_parquet(tmp_path / "sweep" / "results.parquet").set_index("variant")
    assert set(results["status"]) == {"finished"}
    assert results["mtp_validation_loss"].notna().to_dict() == {"repeated": True, "separate": True, "none": False}
    assert results["validation_bpb"].notna().all() and results["accepted_length"].dropna().between(1, 4).all()
    command("report", tmp_path / "sweep")
    page = (tmp_path / "sweep" / "report.html").read_text(encoding="utf-8")
    assert "cannot be told from 1 pair" in page and "Do three prediction steps need three blocks" in page
