"""One word in a question file: what it becomes, and that what it becomes holds in real runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import fake_rooms
import pytest
import yaml
from worded import ROOMS

from longcat_lab.ablation import plan, read, solve
from longcat_lab.ablation.measured import clocks
from longcat_lab.ablation.quantities import FOUR, Clock
from longcat_lab.ablation.spec import Ablation
from longcat_lab.errors import LabError

WIDE: dict[str, Any] = {"plain": {"model.width": 512}, "deep": {"model.width": 512, "model.depth": 3}, "many": {"model.experts": 900}}
FREE = {"deep": "model.width", "many": "model.width"}


def question(variants: dict[str, Any] = WIDE, **more: Any) -> Ablation:
    return read(fake_rooms.question(variants, **more))


# ---- match


@pytest.mark.parametrize(
    ("word", "free"),
    [
        ("active_params", FREE),
        ("active_params", "model.width"),
        ("flops", "training.steps"),
        ("flops", {"deep": "training.steps", "many": "model.width"}),
        ("total_params", {"deep": "model.experts", "many": "model.experts"}),
    ],
)
def test_a_word_is_solved_to_one_per_cent_and_shows_the_others(word: str, free: Any) -> None:
    wide = {**WIDE, "many": {"model.width": 512, "model.experts": 90}, "deep": {"model.width": 344, "model.depth": 3}}
    a = question(wide, set={"training.steps": 200}, match=word, free=free)
    assert [(rule.quantity, rule.reference, rule.tolerance) for rule in a.match] == [(word, "plain", 0.01)]
    found = solve(a, ROOMS)
    base = found.quantities["plain"]
    for name in ("deep", "many"):
        assert found.quantities[name][word] == pytest.approx(base[word], rel=0.01)
        key = free if isinstance(free, str) else free[name]
        assert list(found.moved[name]) == [key] and found.moved["plain"] == {}
        assert {*FOUR} <= found.quantities[name].keys()
    assert base["flops"] == 3 * base["flops_per_token"] * 200 * 4 * 8 and base["wall_clock"] is None
    settled = {name: {**values, **found.moved[name]} for name, values in wide.items()}
    again = solve(question(settled, set={"training.steps": 200}, match=[rule.to_dict() for rule in a.match]), ROOMS)
    assert again.quantities == found.quantities, "what is written into the folder is its own solution"


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"match": "flop"}, "'match' knows no 'flop', did you mean 'flops'"),
        ({"match": "flops", "free": {"plain": "model.width"}}, "the baseline, which stays as it is"),
        ({"match": "flops", "free": {"depe": "model.width"}}, "'free' names 'depe', which is not a variant, did you mean 'deep'"),
        ({"match": "flops", "free": 3}, "write one setting for all variants"),
        ({"match": [], "free": "model.width"}, "'free' goes with one word"),
    ],
)
def test_words_that_cannot_be(more: dict[str, Any], sentence: str) -> None:
    with pytest.raises(LabError, match=sentence) as error:
        question(**more)
    assert "\n" not in str(error.value)


def test_time_is_held_on_measured_steps_and_measured_once() -> None:
    count = []
    rooms = dataclasses.replace(ROOMS, measure=lambda config, threads, processes: count.append(threads) or ROOMS.measure(config, threads))
    a = question(set={"training.steps": 200}, match="wall_clock", free={"deep": "model.width", "many": "training.steps"})
    with pytest.raises(LabError, match="wall_clock of 'plain', but no steps of it have been measured: longcat-lab run measures them"):
        solve(a, rooms)
    told = clocks(a, rooms, 2, {}, lambda line: None)
    assert {*count} == {2} and {*told} == {"plain", "deep", "many"}
    found = solve(a.model_copy(update={"measured": told}), rooms)
    target = ROOMS.measure(found.configs["plain"], 1).step * 200
    for name in ("deep", "many"):
        real = ROOMS.measure(found.configs[name], 1).step * found.configs[name].training.steps
        assert real == pytest.approx(target, rel=0.01), "the machine itself, not the line through its points"
        assert found.quantities[name]["wall_clock"] == pytest.approx(target, rel=0.01)
    assert found.configs["deep"].model.width < 512 and found.configs["many"].training.steps > 200
    before = len(count)
    assert clocks(a, rooms, 2, told, lambda line: None) == told and len(count) == before, "a sweep that goes on measures nothing anew"
    other = question({**WIDE, "many": {"model.experts": 901}}, set={"training.steps": 200}, match="wall_clock", free="training.steps")
    assert clocks(other, rooms, 2, told, lambda line: None)["plain"] == told["plain"] and len(count) > before


def test_a_clock_is_a_line_through_its_points() -> None:
    assert Clock("model.width", ((8.0, 1.0), (16.0, 2.0))).at(12) == pytest.approx(1.5)
    assert Clock(None, ((0.0, 0.25),)).at(None) == 0.25


# ---- controls


def test_controls_become_arms_and_stay_when_the_question_is_read_again() -> None:
    a = question(control=["a_a", "feature_off", "shuffled_tokens"], switch_off={"deep": {"model.depth": 2}, "many": None})
    assert a.controls == {"a_a": "a_a", "deep_off": "feature_off"} and a.vanishes.metric == "shuffled_bpb"
    assert a.variants["a_a"] == a.variants["plain"] and a.variants["deep_off"] == {"model.width": 512, "model.depth": 2}
    again = read(a.model_copy(update={"solved": {"plain": {}}}).to_dict())
    assert again.variants == a.variants and again.controls == a.controls
    inside = question({**WIDE, "many": {}, "deep": {**WIDE["deep"], "switch_off": {"model.depth": 2}}}, control="feature_off",
                      switch_off={"many": None})  # fmt: skip
    assert inside.variants["deep_off"] == a.variants["deep_off"] and inside.variants["deep"] == WIDE["deep"]
    matched = question(match="active_params", free="model.width", control="a_a")
    assert matched.match[0].free.keys() == {"deep", "many"} and matched.held_by(matched.match[0]) == ["deep", "many"]


def test_controls_move_with_the_baseline() -> None:
    """A rule that moves it moves what should equal it; what a rule moves in a variant is not the feature-off arm's."""
    arms = {"plain": {}, "deep": {"model.depth": 3}}
    rule = {"quantity": "active_params", "reference": "deep", "tolerance": 0.05, "free": {"plain": "model.width"}}
    a = question(arms, match=[rule], control=["a_a", "feature_off"], switch_off={"deep": {"model.depth": 2}})
    found = solve(a, ROOMS)
    width = found.moved["plain"]["model.width"]
    assert width > 64 and found.moved == {"plain": {"model.width": width}, "deep": {}, "a_a": {"model.width": width},
                                          "deep_off": {"model.width": width}}  # fmt: skip
    assert found.configs["plain"] == found.configs["a_a"] == found.configs["deep_off"]
    again = solve(
        read({**a.to_dict(), "variants": {n: {**o, **found.moved[n]} for n, o in a.variants.items()}, "solved": {"plain": {}}}), ROOMS
    )
    assert again.configs == found.configs, "as it is written into the folder"
    arms = {"plain": {"model.width": 512}, "deep": {"model.width": 512, "model.depth": 3}}
    other = question(arms, match="active_params", free="model.width", control="feature_off", switch_off={"deep": {"model.depth": 2}})
    found = solve(other, ROOMS)
    assert found.moved["deep"] and not found.moved["deep_off"] and found.configs["deep_off"] == found.configs["plain"]


def test_known_switches() -> None:
    arms = {"plain": {}, "ngram": {"model.embedding.ngram.order": 3, "training.optimizer.table_lr_multiplier": 4.0},
            "mtp": {"model.mtp.num_nextn_predict_layers": 2}}  # fmt: skip
    a = question(arms, control="feature_off")
    off = {"model.embedding.ngram.table_init_ratio": 0.0, "training.optimizer.table_lr_multiplier": 0.0}
    assert a.variants["ngram_off"] == {"model.embedding.ngram.order": 3, **off}
    assert a.variants["mtp_off"] == {"model.mtp.num_nextn_predict_layers": 2, "model.mtp.loss_weight": 0.0}


@pytest.mark.parametrize(
    ("variants", "more", "sentence"),
    [
        (WIDE, {"control": "feature_off"}, "knows no switch for what model.width does in 'deep': name it .*or leave the variant out"),
        (WIDE, {"switch_off": {"deep": {}}}, "'switch_off' is for control: feature_off"),
        (WIDE, {"control": "feature_off", "switch_off": {"depe": {}}}, "'switch_off' names 'depe', .*did you mean 'deep'"),
        ({**WIDE, "a_a": {"model.width": 8}}, {"control": "a_a"}, "'a_a' is the name of the arm of control: a_a"),
        (WIDE, {"control": ["a_a", "a_a"]}, "'control' has one word twice"),
        (WIDE, {"control": "shuffled_tokens", "vanishes": {"where": "x", "metric": "y"}}, "two places where the effect should vanish"),
    ],
)
def test_controls_that_cannot_be(variants: dict[str, Any], more: dict[str, Any], sentence: str) -> None:
    with pytest.raises(LabError, match=sentence) as error:
        question(variants, **more)
    assert "\n" not in str(error.value)


# ---- seeds


def test_seeds_and_data_seeds_are_separate(tmp_path: Path) -> None:
    def drawn(**more: Any) -> dict[str, tuple[int, int | None]]:
        a = question(**more)
        jobs = plan(a, solve(a, ROOMS), tmp_path, tmp_path / "n.ipynb", ROOMS)
        return {job.name: (job.config.seed, job.config.data.seed) for job in jobs}

    assert drawn(seeds=[5, 6])["deep/seed-6"] == (6, None), "nothing changes for a question without"
    assert drawn(seeds=[5, 6], data_seeds=[5, 9])["deep/seed-6"] == (6, 9)
    assert drawn(seeds=[5, 6], data_seeds=[5, 9])["deep/seed-5"] == (5, None)
    assert {pair[1] for pair in drawn(seeds=[5, 6], data_seeds=7).values()} == {7}
    again = drawn(seeds=[5, 6], control="a_a")
    assert again["a_a/seed-5"][1] == 5 and again["a_a/seed-5"][0] not in (5, 6), "other initial values on the same order of the data"
    assert again["plain/seed-5"] == (5, None) and again["a_a/seed-5"][0] != again["a_a/seed-6"][0]


@pytest.mark.parametrize("where", ["set", "variants", "base"])
def test_an_order_of_the_data_that_is_fixed_is_the_a_a_arms_too(tmp_path: Path, where: str) -> None:
    rooms, more = ROOMS, {"set": {"data.seed": 5}} if where == "set" else {}
    if where == "base":
        rooms = dataclasses.replace(ROOMS, load=lambda base: ROOMS.apply(ROOMS.load("small"), {"data.seed": 5}))
    arms = {"plain": {"data.seed": 5} if where == "variants" else {}, "deep": {"model.depth": 3}}

    def orders(**asked: Any) -> dict[str, list[int | None]]:
        a = question(arms, seeds=[0, 1, 2], control="a_a", **more, **asked)
        jobs = plan(a, solve(a, rooms), tmp_path, tmp_path / "n.ipynb", rooms)
        return {name: [job.config.data.seed for job in jobs if job.variant == name] for name in a.variants}

    found = orders()
    assert found["plain"] == found["a_a"] == [5, 5, 5] and found["deep"] == ([None] * 3 if where == "variants" else [5, 5, 5])
    if where == "base":  # the other two are refused
        assert {tuple(each) for each in orders(data_seeds=[5, 0, 7]).values()} == {(5, 0, 7)}


def test_pairs_share_batches_and_initial_values_bit_for_bit(tmp_path: Path) -> None:
    """At the level of a sweep, with real models and data: what two arms both have is the same at step 0, and they read the same batches."""
    import torch

    from longcat_lab import build
    from longcat_lab.data import prepare
    from longcat_lab.training.batches import training_loader

    arms = {"plain": {}, "ngram": {"model.embedding.ngram.order": 3}, "experts": {"model.moe.n_routed_experts": 6}}
    a = read({**fake_rooms.question(arms, control="a_a", seeds=[0, 1], data_seeds=[4, 0]), "base": "tiny"})
    cells = {(job.variant, job.seed): job.config for job in plan(a, solve(a), tmp_path, tmp_path / "n.ipynb")}
    weights = {cell: build(config).state_dict() for cell, config in cells.items()}
    corpus = prepare(cells["plain", 0].data, cells["plain", 0].model.vocab_size)
    loaders = {cell: training_loader(config, corpus) for cell, config in cells.items()}
    batches = {cell: torch.cat([next(loader).tokens for _ in range(3)]) for cell, loader in loaders.items()}
    for seed in a.seeds:
        plain, tables, experts, other = (weights[name, seed] for name in ("plain", "ngram", "experts", "a_a"))
        assert {*plain} < {*tables}
        for name, tensor in plain.items():
            assert torch.equal(tensor, tables[name]), name
            rows = experts[name][tuple(slice(0, n) for n in tensor.shape)]
            if tensor.shape == experts[name].shape:
                assert torch.equal(tensor, rows), name
        drawn = [name for name, tensor in plain.items() if tensor.is_floating_point() and tensor.unique().numel() > 2]
        assert drawn and not any(torch.equal(plain[name], other[name]) for name in drawn), "the A/A arm starts elsewhere"
        for name in arms:
            assert torch.equal(batches["plain", seed], batches[name, seed])
        assert torch.equal(batches["plain", seed], batches["a_a", seed])
    assert not torch.equal(batches["plain", 0], batches["plain", 1])
    # The order follows the data's seed alone: data seed 0 under seed 1 is the order of a run with seed 0 that says nothing.
    alone = read({**fake_rooms.question({"plain": {}}, seeds=[0]), "base": "tiny"})
    [job] = plan(alone, solve(alone), tmp_path, tmp_path / "n.ipynb")
    assert torch.equal(next(training_loader(job.config, corpus)).tokens, batches["plain", 1][:4])


def test_questions_of_the_repository_still_load() -> None:
    for path in sorted((Path(__file__).parents[2] / "ablations").glob("*.yaml")):
        a = read(path)
        written = yaml.safe_load(path.read_text())
        assert a.seeds == written["seeds"] and list(a.variants) == [str(name) for name in written["variants"]]
        assert not a.controls and not a.data_seeds
