"""What the notebooks draw: classes of tokens, real experts counted from real routing, drafts by fewer steps, and the figures of both."""

import numpy as np
import pandas
import pytest
import torch

import longcat_lab as lab
from longcat_lab.ablation.report.curves import POINTS, bands
from longcat_lab.notebook import (
    activated_range,
    after_real_text,
    class_experts,
    drafting,
    drafting_table,
    expert_load,
    experts_by_class,
    held_budget,
    mixture_measures,
    prompts,
    step_losses,
    step_quality,
    with_steps,
)
from longcat_lab.notebook.figures import band_curves, curves, quality_against_cost
from longcat_lab.notebook.routing import CLASSES, clustered_mean, real_experts, token_classes
from longcat_lab.notebook.style import svg

SOURCE = '''import os  # a comment, "not a string"
class Größe:
    """Doc 'string'
    # still the string"""
    def f(self, x=1.5e3):
        return rb'a\\'b' + b"" + self.names[0x1F]
'''


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config = lab.load("tiny", "training.log_every=1", "model.mtp.num_nextn_predict_layers=3", "model.moe.balance_loss_alpha=0.01")
    return lab.fit(config, tmp_path_factory.mktemp("run"), progress=False)


def labelled(run, text):
    """[(token's text, class)] without layout, neighbours of one class joined."""
    tokens = run.corpus.tokenizer.encode(text).ids
    joined = []
    for token, kind in zip(tokens, token_classes(np.array([tokens]), run.corpus)[0], strict=True):
        spelled = run.corpus.tokenizer.decode([token])
        if joined and joined[-1][1] == kind:
            joined[-1] = (joined[-1][0] + spelled, kind)
        else:
            joined.append((spelled, kind))
    return [(text.strip(), kind) for text, kind in joined if kind != "layout"]


def test_tokens_are_what_they_are_in_python(run):
    found = labelled(run, SOURCE)
    assert ("import", "keyword") in found and ("return", "keyword") in found
    assert ('# a comment, "not a string"', "comment") in found
    assert ("1.5e3", "number") in found and ("0x1F", "number") in found
    assert ("f", "name") in found and (":", "operator") in found
    assert [kind for _, kind in found].count("comment") == 1
    strings = "".join(text for text, kind in found if kind == "string")
    assert strings.startswith('"""Doc') and '#stillthestring"""' in strings.replace(" ", "") and "rb'a\\'b'" in strings
    assert {kind for _, kind in found} <= set(CLASSES)


def test_a_string_ends_with_its_document(run):
    """An open triple quote reaches to the end of its own document, over row ends, and not into the next one."""
    inner, after = (run.corpus.tokenizer.encode(text).ids for text in ('x = """open a b c d e f', "import os"))
    tokens = np.array([*inner, run.corpus.eos_id, *after])
    found = token_classes(tokens[: len(tokens) // 2 * 2].reshape(2, -1), run.corpus).ravel()
    assert found[len(inner) - 1] == "string"
    assert list(found[len(inner) : len(inner) + 2]) == ["end of document", "keyword"]


def test_real_experts_are_those_of_the_routers(run):
    tokens, counts = real_experts(run.model, run.corpus, run.config)
    moe = run.config.model.moe
    assert list(counts) == ["layers.0.mlp"] and counts["layers.0.mlp"].shape == tokens.shape
    assert set(np.unique(counts["layers.0.mlp"])) <= set(range(moe.moe_topk + 1))
    assert not run.model.layers[0].mlp.router._forward_hooks  # taken off again
    table = experts_by_class(run.model, run.corpus, run.config)
    assert table["tokens"].sum() == tokens.size
    assert np.average(table["mean"], weights=table["tokens"]) == pytest.approx(counts["layers.0.mlp"].mean())
    # A router that is forced onto zero-experts is seen to be.
    forced = lab.build(run.config)
    forced.load_state_dict(run.model.state_dict())
    forced.layers[0].mlp.router.e_score_correction_bias[moe.n_routed_experts :] += 10
    assert real_experts(forced, run.corpus, run.config)[1]["layers.0.mlp"].max() == 0


def test_clustered_mean():
    """Clusters of one size: the ordinary standard error of their means; tokens that copy each other are not counted as more."""
    rng = np.random.default_rng(0)
    means = rng.normal(size=12)
    mean, error = clustered_mean(50 * means, np.full(12, 50))
    assert mean == pytest.approx(means.mean()) and error == pytest.approx(means.std(ddof=1) / np.sqrt(12))
    assert np.isnan(clustered_mean(np.array([3.0, 0.0]), np.array([4, 0]))[1])  # one cluster that has any


def test_drafts_by_fewer_steps(run):
    texts = prompts(run.corpus, run.config, 3, 16)
    table = drafting_table(run.model, texts, 16)
    assert list(table.index) == [0, 1, 2, 3] and table["same_text"].all()
    assert table["accepted_length"].iloc[0] == 1 and (table["accepted_length"] <= table.index + 1).all()
    assert (table["work"].iloc[1:] >= 1 - 1e-9).all()
    assert torch.equal(with_steps(run.model, 1).lm_head.weight, run.model.lm_head.weight)
    assert run.model.config.mtp.num_nextn_predict_layers == 3  # the model itself is as it was
    for wrong in (0, 4):
        with pytest.raises(lab.LabError, match="1 to 3"):
            with_steps(run.model, wrong)


def test_one_round_after_real_text_is_what_decoding_does(run):
    """One pass over the trunk's own choices accepts exactly the drafts that real speculative decoding accepts in its first round."""
    lengths = set()
    for scale in (0.3, 1.0, 3.0):  # of the prediction block's input: from drafts that mostly hold to drafts that mostly fail
        model = lab.build(run.config)
        model.load_state_dict(run.model.state_dict())
        with torch.no_grad():
            model.mtp.layers[0].eh_proj.weight.mul_(scale)
            model.embed_tokens.weight.mul_(3)
        for text in prompts(run.corpus, run.config, 6, 12):
            # With k + 2 tokens to come, k steps draft k tokens at once, and one round is enough exactly where all of them hold.
            hold = [lab.speculate(with_steps(model, k), text, k + 2).rounds == 1 for k in (1, 2, 3)]
            expected = 1 + [*hold, False].index(False)
            assert float(after_real_text(model, [text])["accepted_length"].iloc[-1]) == expected
            lengths.add(expected)
    assert len(lengths) > 1


def test_every_figure_is_drawn(run):
    other = lab.load("tiny").model.moe
    tables = {"one": run.metrics, "other": run.metrics.drop(columns=[c for c in run.metrics if "router_gradient_ratio" in c])}
    classes = experts_by_class(run.model, run.corpus, run.config)
    texts = prompts(run.corpus, run.config, 2, 16)
    figures = [
        held_budget(tables, other),
        expert_load(run.metrics, run.config.model.moe),
        mixture_measures(tables),
        class_experts(classes),
        activated_range({"tiny": lab.activated(run.config)}),
        step_losses(run.metrics),
        step_quality(run.summary),
        drafting({"real": after_real_text(run.model, texts), "long": drafting_table(run.model, texts, 8)}),
    ]
    for figure in figures:
        text = svg(figure)
        assert text.startswith("<svg") and len(text) < 300_000
        assert figure.get_facecolor()[3] == 0  # nothing is painted behind it, so that it serves on white and on black
    assert len(figures[2].axes) == 4  # R_g, because one of them has a balance loss


def test_expert_load_without_zero_experts(run):
    metrics = pandas.DataFrame({"step": [1, 2], "layers.0.mlp.router/expert_load": [[0.5] * 4, [0.25, 0.75, 0.5, 0.5]]})
    moe = lab.load("tiny", "model.moe.zero_expert_num=0", "model.moe.expected_real_experts=2").model.moe
    assert svg(expert_load(metrics, moe)).startswith("<svg")


def test_curves_are_means_and_ranges_of_what_all_seeds_logged():
    tables = [pandas.DataFrame({"tokens": range(100, 100 * n, 100), "loss": [value] * (n - 1)}) for n, value in ((1001, 2.0), (801, 4.0))]
    tables[1].loc[3, "loss"] = float("nan")
    (found,) = bands({"a": tables}, skip=0.1)
    assert found["n"] == 2 and len(found["x"]) == len(found["y"]) == POINTS
    assert found["x"][0] >= 0.1 * 80_000 and found["x"][-1] == 80_000 and found["x"] == sorted(found["x"])
    assert set(found["y"]) == {3.0} and set(found["low"]) == {2.0} and set(found["high"]) == {4.0}
    assert bands({"a": [tables[0].drop(columns="loss")], "b": []}) == []
    assert svg(curves({"a": tables})).startswith("<svg")


def test_figures_of_a_page_name_their_parts():
    """Ids by which the page's script finds lines and legends; as many corners in a line as there are points."""
    series = [{"arm": "a", "n": 2, "x": [1, 2, 3], "y": [3.0, 2.0, 1.0], "low": [2.0, 1.0, 0.5], "high": [4.0, 3.0, 2.0]}]
    series.append({"arm": "a", "seed": 3, "status": "failed", "n": 1, "x": [1, 2], "y": [3.0, 9.0], "low": [3.0, 9.0], "high": [3.0, 9.0]})
    text = svg(band_curves(series, "loss", "curve"))
    assert all(f'id="lab-curve-{part}"' in text for part in ("0", "0-band", "1", "legend-0"))
    line = text[text.index('id="lab-curve-0"') :]
    assert line[: line.index("/>")].count("L ") == 2
    points = [{"panel": panel, "arm": arm, "x": [5.0], "y": [1.0], "low": [0.9], "high": [1.1]} for panel in ("p", "q") for arm in "ab"]
    drawn = quality_against_cost(points, "bits", {"q": "held equal"}, "cost")
    assert [axes.get_title(loc="left") for axes in drawn.axes] == ["p", "q (held equal)"]
    text = svg(drawn)
    assert all(f'id="lab-cost-{part}"' in text for part in ("0", "3", "3-range", "legend-0", "legend-1"))
    assert "lab-" not in svg(band_curves(series, "loss"))
