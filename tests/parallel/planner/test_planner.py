"""The planner's arithmetic against closed forms, its data files, its search and its command."""

import json
import subprocess
import sys
from itertools import pairwise

import pytest

import longcat_lab as lab
from longcat_lab.budget import totals
from longcat_lab.parallel.planner import (
    Fabric,
    Setup,
    assumptions,
    card,
    check_setup,
    estimate,
    network,
    plain,
    plan,
    settings,
    take_apart,
    told,
)
from longcat_lab.parallel.planner.activations import ffn_kept
from longcat_lab.parallel.planner.hardware import Card, Network, folder
from longcat_lab.parallel.planner.links import added, gather, near, reduce, to_all
from longcat_lab.parallel.planner.overlap import exposed, shortcut
from longcat_lab.parallel.planner.parts import idle_parameters, model_parts
from longcat_lab.parallel.planner.pipeline import bubble, limit_of, play
from longcat_lab.parallel.planner.report import figures


@pytest.mark.parametrize("preset", ["longcat-2.0", "longcat-flash", "longcat-flash-lite-sparse", "deepseek-v3.2", "nano"])
def test_parts_add_up_to_the_model(preset):
    """Parameters (with the routers' selection biases and what idles) and FLOPs are those that the blocks answer."""
    config = lab.load(preset)
    parts, found = model_parts(config), totals(config)
    biases = config.model.moe.n_routed_experts + config.model.moe.zero_expert_num
    mixtures = sum(part.mixtures for part in parts)
    if config.model.mtp is not None and config.model.mtp.block == "layer":
        mixtures += config.model.mtp.blocks
    assert sum(part.count() for part in parts) + idle_parameters(config) + mixtures * biases == found["total_params"]
    assert sum(part.work for part in parts) == pytest.approx(found["flops_per_token"], rel=1e-9)


@pytest.mark.parametrize(("stages", "micros"), [(2, 4), (4, 8), (8, 40), (3, 7)])
def test_bubbles_are_the_textbooks(stages, micros):
    """(p - 1) / m for GPipe and 1F1B, half of it with two chunks; activations: m, p - r, and p (1 + (p - 1) / 2 p) interleaved."""
    assert play("gpipe", stages, micros).bubble == pytest.approx((stages - 1) / micros)
    assert play("1f1b", stages, micros).bubble == pytest.approx((stages - 1) / micros)
    assert play("gpipe", stages, micros).held == (micros,) * stages
    assert play("1f1b", stages, micros).held == tuple(min(stages - stage, micros) for stage in range(stages))
    if micros % stages == 0:
        assert play("interleaved", stages, micros).bubble == pytest.approx((stages - 1) / micros / 2)
        assert max(play("interleaved", stages, micros).held) == stages + (stages - 1) / 2


@pytest.mark.parametrize("schedule", ["v-half", "v-zb"])
@pytest.mark.parametrize(("stages", "micros"), [(2, 4), (4, 12), (7, 28)])
def test_v_schedules_keep_their_limit_and_their_order(schedule, stages, micros):
    played = play(schedule, stages, micros)
    assert max(played.held) * 2 <= limit_of(schedule, stages)
    assert played.bubble < play("1f1b", stages, micros).bubble
    ends = {(event.what, event.chunk, event.micro): event.end for event in played.events}
    assert len(ends) == len(played.events) == 6 * stages * micros
    for event in played.events:
        before = {
            "F": ("F", event.chunk - 1, event.micro),
            "B": ("B", event.chunk + 1, event.micro) if event.chunk < 2 * stages - 1 else ("F", event.chunk, event.micro),
            "W": ("B", event.chunk, event.micro),
        }[event.what]
        assert before[1] < 0 or ends[before] <= event.start
    lanes = [sorted((e.start, e.end) for e in played.events if e.stage == stage) for stage in range(stages)]
    assert all(first[1] <= second[0] for lane in lanes for first, second in pairwise(lane))


def test_long_steps_are_extended_by_their_middle():
    for schedule in ("1f1b", "v-half"):
        assert bubble(schedule, 4, 40) == pytest.approx(play(schedule, 4, 40).bubble, rel=0.05)


def test_bytes_over_links_add_up():
    """Whatever the levels: (g - 1) slices for a gather, 2 (g - 1) / g of a reduction, what does not stay for an all-to-all."""
    fabric = Fabric(16, 768, (3.0, 2.0, 1.0), (0.0, 0.0, 0.0))
    for stride, degree in ((1, 8), (1, 32), (1, 768), (8, 96), (1, 1536), (768, 128), (384, 8), (5, 12), (1, 99_840)):
        assert sum(gather(1.0, stride, degree, fabric)) == pytest.approx(degree - 1)
        assert sum(reduce(1.0, stride, degree, fabric)) == pytest.approx(2 * (degree - 1) / degree)
        assert sum(to_all(1.0, stride, degree, fabric)) == pytest.approx((degree - 1) / degree)
    assert near(16, 768, 1, 512) == (16, 256)  # the second group of 512 lies half in one superpod, half in the next
    assert to_all(8.0, 1, 32, Fabric(8, 8, (1.0,) * 3, (0.0,) * 3)) == pytest.approx((8 * 7 / 32, 0, 8 * 24 / 32))
    assert added((1, 2, 3), (1, 1, 1)) == (2, 3, 4)


def test_overlap_on_two_lanes():
    """Nothing to hide is nothing shown; without arithmetic everything is; two chunks hide what one cannot."""
    dense = [("network 1", 2.0), ("attention 2", 1.0), ("network 2", 2.0)]
    assert exposed(0.0, 0.0, 1.0, dense, 2, 1) == 0
    assert exposed(3.0, 3.0, 0.0, [("network 1", 0.0)], 2, 1) == pytest.approx(6.0)
    one, two = (exposed(2.0, 2.0, 2.0, dense, chunks, 1) for chunks in (1, 2))
    assert one == pytest.approx(2.0) and two == pytest.approx(1.0)  # the last combine is all that stays in sight
    assert exposed(2.0, 2.0, 2.0, dense, 2, 2) == 0  # behind the whole branch
    lanes = [lane for lane in shortcut(2.0, 2.0, 2.0, dense, 2, 1) if lane.lane == "compute"]
    assert all(first.end <= second.start for first, second in pairwise(lanes))


def test_descriptions_say_where_figures_are_from(tmp_path):
    for name in folder("cards"):
        found = card(name)
        network(found.network)
        assert found.name == name
    assert all(value.note for _, value in assumptions())
    own = tmp_path / "mine.yaml"
    text = folder("cards")["h800"].read_text(encoding="utf-8")
    own.write_text(text.replace("name: h800", "name: mine").replace("80e9", "40e9"), encoding="utf-8")
    assert card(own).memory_bytes.value == 40e9 and isinstance(card(own), Card) and isinstance(network("cloudmatrix-384"), Network)
    own.write_text(text.replace("source: datasheet", "source: rumour"), encoding="utf-8")
    with pytest.raises(lab.LabError, match=r"mine.yaml.memory_bytes.source"):
        card(own)
    with pytest.raises(lab.LabError, match="did you mean 'ascend-910c'"):
        card("ascend-910d")


def test_kept_tensors_of_a_network():
    """Gate and up [F] each and their product, bf16."""
    assert sum(each.bytes for each in ffn_kept(100)) == 600


@pytest.fixture(scope="module")
def nano():
    return plan(lab.load("nano"), 8, "h800", batch=64)


def test_plans_are_sorted_fit_and_are_layouts_of_the_run(nano):
    assert nano.best and list(nano.best) == sorted(nano.best, key=lambda one: one.step)
    for one in nano.best:
        assert one.fits and one.setup.world <= nano.ranks
        assert check_setup(nano.model, one.setup).world == one.setup.world


def test_the_search_leaves_out_only_what_is_slower(nano):
    """The best of a search with a degree fixed is never faster than the best of all."""
    for fixed in ({"tensor": 2}, {"pipeline": 2}, {"recompute": "full"}, {"weights": "sharded"}):
        other = plan(lab.load("nano"), 8, "h800", batch=64, **fixed)
        assert other.best[0].step >= nano.best[0].step
        assert all(getattr(one.setup, name) == value for one in other.best for name, value in fixed.items())


def test_memory_and_time_move_as_they_must(nano):
    """Sharding divides state, recomputation trades activations for time, embedding degrees divide tables."""
    config = lab.load("nano", "model.embedding.ngram.order=3")
    model, h800 = take_apart(config, 256), card("h800")
    fabric = Fabric.of(network(h800.network), 1)
    base = {"sequence_length": 256, "batch": 64, "data_shard": 8}

    def of(**changes):
        setup = Setup.model_validate({**base, **changes})
        check_setup(model, setup)
        return estimate(model, setup, h800, fabric, assumptions())

    whole, sharded = of().memory[0], of(weights="sharded").memory[0]
    assert whole.state == pytest.approx(sharded.state * 12 / 8, rel=1e-3)  # the master weights are the weights there; padding, step counts
    assert whole.weights / 2 == pytest.approx(sharded.weights / 4 * 8, rel=1e-3)
    assert of(recompute="full").memory[0].activations < of(recompute="selective").memory[0].activations < whole.activations
    assert of(recompute="full").step > of().step
    assert of(embedding=8).memory[0].tables == pytest.approx(whole.tables / 8, rel=0.01)
    muon = of(optimizer="muon").memory[0].state
    matrices = sum(group.count for part in model.parts for group in part.groups if group.muon)
    assert whole.state - muon == pytest.approx(matrices * 4 / 8)


def test_mfu_is_the_models_flops_over_the_peak(nano):
    one = nano.best[0]
    flops = 3 * totals(nano.model.config)["flops_per_token"] * one.setup.batch * one.setup.sequence_length
    assert one.mfu == pytest.approx(flops / (one.setup.world * 989e12 * one.step))
    assert one.tokens_per_day == pytest.approx(one.setup.batch * one.setup.sequence_length * 86400 / one.step)


def test_every_assumption_is_printed(nano):
    text = told(nano)
    for name, figure in figures(nano).items():
        assert name in text and figure.note in text
    assert json.loads(json.dumps(plain(nano)))["best"][0]["setup"]["batch"] == 64


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["longcat-flash", "--cards", "7", "--card", "h801"], "There is no card 'h801', did you mean 'h800'?"),
        (["nano", "--cards", "8", "--setting", "pipelines=2"], "write it as NAME=VALUE, did you mean 'pipeline'?"),
        (["nano", "--cards", "7", "--card", "h800", "--batch", "4"], "divides model and batch (4 sequences)"),
        (["nano", "--sequence", "512"], "above model.max_position_embeddings 256"),
    ],
)
def test_mistakes_are_one_sentence(arguments, sentence, capsys, monkeypatch):
    from longcat_lab.cli.main import main

    monkeypatch.setattr(sys, "argv", ["longcat-lab", "plan", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("longcat-lab: ") and sentence in said and said.count("\n") == 1


def test_what_does_not_fit_is_said(capsys, monkeypatch):
    """560 B parameters on 8 cards of 80 GB: no plan, the closest one and by how much, exit code 1."""
    found = plan(lab.load("longcat-flash"), 8, "h800", batch=64, recompute="full", weights="sharded")
    assert not found.best and found.closest.peak > 80e9
    assert "Nothing fits: the closest layout needs" in told(found)
    assert settings(["pipeline=4", "recompute=full"]) == {"pipeline": 4, "recompute": "full"}


@pytest.mark.slow
def test_the_command_plans_2_0_on_50_000_cards(tmp_path):
    out = tmp_path / "plan.json"
    command = [sys.executable, "-m", "longcat_lab", "plan", "longcat-2.0", "--cards", "50000", "--card", "ascend-910c", "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    best = json.loads(out.read_text(encoding="utf-8"))["best"]
    assert len(best) == 3 and all(one["fits"] for one in best)
    assert all(90_000 <= one["ranks"] <= 100_000 and one["tokens_per_day"] > 1e12 for one in best)
    assert sum(stage["tables"] > 0 for stage in best[0]["memory_by_stage"]) == 1
