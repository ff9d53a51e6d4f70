"""The budget table and the architecture's picture: true numbers, all that the configuration has, what differs, and any kind."""

import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from typing import Literal

import pytest
import torch

import longcat_lab as lab
from longcat_lab.blocks import SwiGLUConfig
from longcat_lab.blocks.interface import Budget, forget, kinds
from longcat_lab.budget import totals
from longcat_lab.notebook.panel.budget_view import budget_html, human, parts, parts_html, training_memory
from longcat_lab.notebook.panel.knobs import turn, turn_all
from longcat_lab.notebook.panel.picture import architecture_svg
from longcat_lab.training.optimizer import make_optimizer

ACCENT = "#D55E00"
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def nano():
    return lab.load("nano")


def words(svg):
    """The lines of text in a picture."""
    return [text.text for text in ET.fromstring(svg).iter(f"{SVG}text")]


def outlines(svg):
    """Thick accent strokes; one more than parts that differ, which is the legend's."""
    return [rect for rect in ET.fromstring(svg).iter(f"{SVG}rect") if rect.get("stroke") == ACCENT and rect.get("stroke-width") == "2.5"]


def text_of(page):
    return re.sub(r"(<[^>]+>)+", "|", re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL))


# Budget ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", sorted(lab.presets()))
def test_parts_add_up_to_the_budget(preset):
    config = lab.load(preset)
    found, total = sum((part.cost for part in parts(config)), Budget()), totals(config)
    assert found.params == total["total_params"] and found.active_params == total["active_params"]
    assert found.state_bytes_per_token == total["state_bytes_per_token"]
    assert found.flops_per_token == pytest.approx(total["flops_per_token"], rel=1e-12)
    for part in parts(config):
        assert not part.places or sum(part.places, Budget()) == part.cost


@pytest.mark.parametrize("optimizer", ["kind=adamw", "kind=muon", "table_optimizer=row_wise"])
def test_training_memory_is_what_training_holds(optimizer):
    config = lab.load("tiny", "model.embedding.ngram.order=3", f"training.optimizer.{optimizer}")
    model = lab.build(config)
    made = make_optimizer(model, config.training.optimizer)
    model(torch.randint(0, 512, (2, 16))).square().mean().backward()
    gradients = sum(p.nbytes for p in model.parameters() if p.grad is None or not p.grad.is_sparse)
    made.step()
    optimizers = made.parts.values() if hasattr(made, "parts") else [made]
    state = [tensor for each in optimizers for kept in each.state.values() for tensor in kept.values() if isinstance(tensor, torch.Tensor)]
    held = sum(t.nbytes for t in [*model.parameters(), *model.buffers(), *state]) + gradients
    assert training_memory(config) == pytest.approx(held, rel=0.01)  # beside a step counter for each tensor


def test_the_table_says_what_is_and_how_it_differs(nano):
    assert "difference" not in budget_html(nano, nano) and "costs the same" in budget_html(nano, nano)
    config = turn_all(nano, {"model.moe.n_routed_experts": 32, "model.embedding.ngram.kind": "ngram_embedding", "training.steps": 600})
    page, before, now = text_of(budget_html(config, nano)), totals(nano), totals(config)
    for key in ("total_params", "active_params"):
        assert f"|{human(now[key])}|" in page and f"|{human(before[key])}|" in page
    gap = now["total_params"] - before["total_params"]
    assert f"|+{human(gap)}|" in page and f"|+{gap / before['total_params']:.1%}|" in page
    tokens = 600 * 4 * 256
    assert human(tokens) in page and "600 × 1,024" in page
    assert human(3 * now["flops_per_token"] * tokens, "FLOP") in page
    inner = text_of(parts_html(config, nano))
    assert "|n-gram tables|" in inner and "|new|" in inner
    assert "part by part" in budget_html(config, nano) and "part by part" not in budget_html(config, nano, by_part=False)
    gone = text_of(parts_html(nano, config))
    assert "|n-gram tables|" in gone and "−100.0%" in gone


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0, "B", "0"),
        (7, "", "7"),
        (1.5, "", "1.50"),
        (999, "", "999"),
        (999.6, "", "1.00 k"),
        (9_064_000, "", "9.06 M"),
        (12.34e9, "FLOP", "12.3 GFLOP"),
        (3e9, "", "3.00 B"),
        (1_775_560_491_136, "", "1.78 T"),
        (-117e3, "FLOP", "−117 kFLOP"),
        (None, "B", "–"),
    ],
)
def test_numbers_are_for_people(value, unit, text):
    assert human(value, unit) == text


# Picture -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", sorted(lab.presets()))
def test_the_picture_names_what_the_configuration_has(preset):
    config = lab.load(preset)
    svg, model = architecture_svg(config), config.model
    root = ET.fromstring(svg)
    assert root.get("role") == "img" and root.get("viewBox").startswith("0 0 720 ")
    assert root.get("aria-label").endswith(".") and f"{model.attention.kind} attention" in root.get("aria-label")
    said = " | ".join(words(svg))
    assert f"{model.num_layers} × " in said and f"width {model.hidden_size:,}" in said and f": {model.attention.kind}" in said
    assert f"{model.vocab_size:,} × {model.hidden_size:,}" in said and human(totals(config)["total_params"]) in said
    mixed = any(model.layer.mixtures(replace(model.shape(), layer_index=i)) for i in range(model.num_layers))
    assert (f"{model.moe.n_routed_experts:,} experts" in said) == mixed
    assert (f"{model.moe.zero_expert_num:,} zero-experts" in said) == (mixed and model.moe.zero_expert_num > 0)
    if model.embedding.ngram is not None:
        assert "2-grams" in said and f"{model.embedding.ngram.order}-grams" in said
    if model.mtp is not None:
        assert f"t+{model.mtp.num_nextn_predict_layers + 1}" in said and "mtp: " in said
    if hasattr(model.attention, "index_topk"):
        assert f"{model.attention.index_topk:,}" in said and "attentions have an index" in said
    assert not outlines(svg)


def test_all_of_it_is_inside_the_sheet_and_no_colour_is_black_or_white(nano):
    svg = architecture_svg(lab.load("longcat-2.0"), nano)
    wide, high = map(float, ET.fromstring(svg).get("viewBox").split()[2:])
    for rect in ET.fromstring(svg).iter(f"{SVG}rect"):
        x, y, w, h = (float(rect.get(name)) for name in ("x", "y", "width", "height"))
        assert x >= 0 and y >= 0 and x + w <= wide and y + h <= high
    for page in (svg, budget_html(nano, lab.load("tiny"))):
        assert not re.search(r"black|white(?!-space)|#000|#fff", page, re.IGNORECASE)


@pytest.mark.parametrize(
    ("path", "value", "drawn", "named"),
    [
        ("model.moe.moe_topk", 4, 1, "mixture"),
        ("model.attention.kind", "dsa", 2, "attention"),  # two in a layer
        ("model.num_layers", 3, 1, "layer"),
        ("model.vocab_size", 8192, 2, "head, token table"),
        ("model.embedding.ngram.kind", "engram", 1, "n-gram tables"),
        ("model.mtp.kind", "mtp", 1, "mtp"),
        ("data.sequence_length", 128, 1, "input"),
        ("model.norm.eps", 1e-6, 1, "final norm"),
    ],
)
def test_parts_that_differ_are_outlined_and_named(nano, path, value, drawn, named):
    svg = architecture_svg(turn(nano, path, value), nano)
    assert len(outlines(svg)) == drawn + 1
    assert f"Different from the pinned configuration: {named}." in ET.fromstring(svg).get("aria-label")


def test_what_is_not_drawn_outlines_nothing_and_what_is_gone_leaves_its_place(nano):
    assert not outlines(architecture_svg(nano, nano))
    assert not outlines(architecture_svg(turn(nano, "training.steps", 5000), nano))
    assert "in the pinned one alone" in words(architecture_svg(nano, turn(nano, "model.mtp.kind", "mtp")))


def test_the_picture_follows_the_order_of_a_layer(nano):
    titles = [line for line in words(architecture_svg(nano)) if line.startswith(("attention", "dense", "mixture:"))]
    assert titles[:5] == ["attention 1: mla", "dense 1: swiglu", "attention 2: mla", "dense 2: swiglu", "mixture: moe"]
    serial = architecture_svg(turn(nano, "model.layer.kind", "serial"))
    assert "2 × serial layer, width 128" in words(serial)
    top = {name: [float(t.get("y")) for t in ET.fromstring(svg).iter(f"{SVG}text") if t.text == "mixture: moe"] for name, svg in
           (("scmoe", architecture_svg(nano)), ("serial", serial))}  # fmt: skip
    assert top["serial"][0] > top["scmoe"][0] + 100  # beside the second dense network, not the first
    decoder = words(architecture_svg(turn_all(nano, {"model.layer.kind": "decoder", "model.layer.first_k_dense_replace": 1})))
    assert "in the first 1 of 2 layers" in decoder and "in the other 1" in decoder and "attention: mla" in decoder


def test_the_picture_says_who_owns_an_index_and_what_is_read(nano):
    lsa = turn_all(nano, {"model.num_layers": 3, "model.attention.kind": "lsa", "model.attention.index_local_tokens": 16})
    said = words(architecture_svg(lsa))
    assert {"own index: 2 heads × 32", "takes the index before it", "reads 64 of 256 keys:", "1 sink + 16 window + 47 by index"} <= {*said}
    assert "3 of 6 attentions have an index; hollow: takes the one before" in said
    uneven = words(architecture_svg(turn(lsa, "model.attention.cli_factor", 4)))
    assert "own index in 2 of 3 layers" in uneven and "2 of 6 attentions have an index; hollow: takes the one before" in uneven
    window = words(architecture_svg(turn(lsa, "model.attention.selection.kind", "window")))
    assert "1 sink + 16 window + 47 by window" in window and not any("have an index" in line for line in window)
    assert "reads all 256 keys" in words(architecture_svg(turn(lsa, "model.attention.selection.kind", "dense")))


def test_bars_show_the_shares_of_the_parameters(nano):
    svg = architecture_svg(nano)
    share = next(part.cost.params for part in parts(nano) if part.name == "mixture") / totals(nano)["total_params"]
    marks = [rect for rect in ET.fromstring(svg).iter(f"{SVG}rect") if rect.get("height") == "6.5"]
    assert (len(marks), sum(rect.get("fill-opacity") == "0" for rect in marks)) == (24, 8)  # experts, and those that cost nothing
    assert f"{share:.0%}" in words(svg) and f"mixture {share:.1%}" in words(svg)
    bar = [float(rect.get("width")) for rect in ET.fromstring(svg).iter(f"{SVG}rect") if rect.get("height") == "14"]
    assert sum(bar) == pytest.approx(708, abs=1) and max(bar) == pytest.approx(708 * share, rel=1e-3)


def every_kind():
    for role, known in kinds().items():
        path = {"ngram": "model.embedding.ngram", "selection": "model.attention.selection"}.get(role, f"model.{role}")
        for kind in known:
            yield pytest.param(path, kind, id=f"{role}-{kind}")


@pytest.mark.parametrize(("path", "kind"), list(every_kind()))
def test_every_kind_is_drawn_and_counted(nano, path, kind):
    first = turn(nano, "model.attention.kind", "dsa") if "selection" in path else nano
    config = turn(first, f"{path}.kind", kind)
    said = {"token": "token table", "indexer": "by index", "dense": "reads all"}.get(kind, kind)
    assert said in " ".join(words(architecture_svg(config, nano)))
    ET.fromstring(f"<p>{re.sub('<style>.*?</style>', '', budget_html(config, nano), flags=re.DOTALL)}</p>")


@pytest.mark.parametrize("role", ["attention", "embedding", "ffn", "layer", "moe", "mtp", "ngram"])
def test_a_kind_of_ones_own_is_a_plain_box_with_its_name(nano, role):
    name = f"my_<{role}>"

    class Own(lab.BlockConfig):
        kind: Literal[name] = name

        def budget(self, shape):
            return Budget.of_weights(1000)

    lab.register(role)(Own)
    try:
        config = turn(nano, {"ngram": "model.embedding.ngram.kind"}.get(role, f"model.{role}.kind"), name)
        svg = architecture_svg(config, nano)
        assert any(name in line for line in words(svg)) and "a kind of its own" in words(svg)
        assert len(outlines(svg)) >= 2
        count = sum((part.cost for part in parts(config)), Budget()).params
        # `lab.budget` asks a prediction module for its number of steps; this one has none to tell.
        assert role == "mtp" or count == totals(config)["total_params"]
        assert f"|{human(count)}|" in text_of(budget_html(config, nano))
        assert name not in parts_html(config, nano) and f"my_&lt;{role}&gt;" in parts_html(config, nano)
        assert training_memory(config) is None  # there is no module to build
    finally:
        forget(role, name)


def test_a_block_that_cannot_tell_its_cost_yet_is_told_of_and_nothing_breaks(nano):
    class Unfinished(lab.BlockConfig):
        kind: Literal["unfinished_network"] = "unfinished_network"

    lab.register("ffn")(Unfinished)
    try:
        config = turn(nano, "model.ffn.kind", "unfinished_network")
        assert "NotImplementedError" in budget_html(config, nano)
        assert "NotImplementedError" in " ".join(words(architecture_svg(config, nano)))
    finally:
        forget("ffn", "unfinished_network")


def test_a_kind_derived_from_a_known_one_is_drawn_like_it(nano):
    class Derived(SwiGLUConfig):
        kind: Literal["derived_network"] = "derived_network"

    lab.register("ffn")(Derived)
    try:
        said = words(architecture_svg(turn(nano, "model.ffn.kind", "derived_network")))
        assert "dense 1: derived_network" in said and "inner width 256" in said
    finally:
        forget("ffn", "derived_network")
