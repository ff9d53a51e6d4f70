"""Knobs of real configurations: every field of every kind comes out, what they promise is what the schema holds to."""

from typing import Literal, get_args

import pytest
from pydantic import BaseModel, Field

import longcat_lab as lab
from longcat_lab.blocks.interface import forget, kinds, slot
from longcat_lab.config.data import DataConfig
from longcat_lab.node import Node
from longcat_lab.notebook.panel.knobs import MISSING, SECTIONS, changed, knobs, needed, put_back, turn, turn_all

RICH = (
    "model.embedding.ngram.order=3",
    "model.attention.kind=lsa",
    "model.attention.hierarchical.page=64",
    "model.mtp.num_nextn_predict_layers=2",
    "training.growth.at_step=50",
    "training.conversion.dense_steps=10",
    "data.probe.kind=recall",
)


@pytest.fixture(scope="module")
def nano():
    return lab.load("nano")


@pytest.fixture(scope="module")
def rich():
    return lab.load("nano", *RICH)


def by_path(config):
    return {knob.path: knob for knob in knobs(config)}


def written(config, path):
    node = config.to_dict()
    for part in path.split("."):
        node = node[part]
    return node


def refused(config, path, value):
    """Whether a knob does not take a value; the sentence is one line and names the fix or the place."""
    try:
        turn(config, path, value)
    except lab.ConfigError as error:
        assert "\n" not in str(error) and str(error).endswith((".", "?")), str(error)
        return True
    return False


@pytest.mark.parametrize("preset", sorted(lab.presets()))
def test_knobs_say_what_is_written_and_nothing_is_left_out(preset):
    config = lab.load(preset)
    found = by_path(config)
    assert len(found) == len(knobs(config))
    assert {knob.section for knob in found.values()} == set(SECTIONS)

    def leaves(node, where=""):
        for name, field in type(node).model_fields.items():
            value, path = getattr(node, name), f"{where}{name}"
            if isinstance(value, BaseModel):
                yield from leaves(value, f"{path}.")
            else:
                yield path if value is not None or not any(isinstance(a, type) and issubclass(a, Node) for a in nodes_in(field)) else ""

    for path in filter(None, leaves(config)):
        assert path in found, path
        assert found[path].value == written(config, path)


def nodes_in(field):
    """All types in an annotation, however deep."""
    todo, seen = [field.annotation], []
    while todo:
        each = todo.pop()
        seen.append(each)
        todo += get_args(each)
    return seen


def places():
    """(role, kind, overrides of nano under which it stands at `path`, path)"""
    for role, known in kinds().items():
        for kind in known:
            path = {"ngram": "model.embedding.ngram", "selection": "model.attention.selection"}.get(role, f"model.{role}")
            first = {"model.attention.kind": "dsa"} if role == "selection" else {}
            yield pytest.param(path, kind, first, id=f"{role}-{kind}")


@pytest.mark.parametrize(("path", "kind", "first"), list(places()))
def test_every_kind_can_be_chosen_and_all_its_fields_are_knobs(nano, path, kind, first):
    config = turn(turn_all(nano, first), f"{path}.kind", kind)
    node = config
    for part in path.split("."):
        node = getattr(node, part)
    assert node.kind == kind
    found = by_path(config)
    assert kind in found[f"{path}.kind"].choices
    for name in type(node).model_fields:
        inner = [knob for knob in found.values() if f"{knob.path}.".startswith(f"{path}.{name}.")]
        assert inner, name
        for knob in inner:
            assert knob.help, f"{knob.path} has no description"


def test_every_source_and_probe_can_be_chosen(nano):
    for place in ("source", "probe"):
        found = get_args(DataConfig.model_fields[place].annotation)
        for kind in (each for each in found if each is not type(None)):
            name, path = kind.model_fields["kind"].default, f"data.{place}.kind"
            rest = {knob.path: "x" for knob in needed(nano, path, name)}
            config = turn_all(nano, {path: name, **rest})
            assert getattr(config.data, place).kind == name
            fields = {f"data.{place}.{field}" for field in kind.model_fields}
            assert fields == {path for path in by_path(config) if path.startswith(f"data.{place}.")}


def test_every_knob_that_is_turned_to_its_own_value_changes_nothing(rich):
    for knob in knobs(rich):
        assert turn(rich, knob.path, knob.value) == rich, knob.path


def test_numbers_turned_to_a_neighbour_change_or_say_why(rich):
    taken = 0
    for knob in knobs(rich):
        if knob.type not in ("int", "float"):
            continue
        now = 1 if knob.value is None else knob.value
        for value in (now + 1, now - 1, now * 2) if knob.type == "int" else (now * 1.5, now * 0.5, now + 0.01):
            legal = (knob.lower is None or value > knob.lower or (value == knob.lower and not knob.lower_open)) and (
                knob.upper is None or value < knob.upper or (value == knob.upper and not knob.upper_open)
            )
            if refused(rich, knob.path, value):
                continue
            assert legal, f"{knob.path} took {value}, outside {knob.range}"
            assert by_path(turn(rich, knob.path, value))[knob.path].value == value
            taken += value != knob.value
    assert taken > 150


def test_bounds_are_the_schemas(rich):
    """A step beyond a bound is refused, and so is the bound itself where it is open; nothing else stands in the way of it there."""
    checked = 0
    for knob in knobs(rich):
        for bound, outward, is_open in ((knob.lower, -1, knob.lower_open), (knob.upper, 1, knob.upper_open)):
            if bound is not None:
                assert refused(rich, knob.path, bound + outward if knob.type == "int" else bound + outward * 1e-6), knob.path
                assert not is_open or refused(rich, knob.path, bound), knob.path
                checked += 1
    assert checked > 100
    knob = by_path(rich)["model.embedding.ngram.order"]
    assert (knob.lower, knob.upper, knob.range) == (2, 16, "from 2, up to 16")
    assert by_path(rich)["training.optimizer.beta1"].range == "from 0, below 1"


def test_choices_and_switches_are_taken_or_say_why(rich):
    for knob in knobs(rich):
        values = {"choice": knob.choices, "kind": knob.choices, "bool": (True, False), "optional": (True, False)}.get(knob.type, ())
        for value in values:
            if not refused(rich, knob.path, value):
                found = by_path(turn(rich, knob.path, value)).get(knob.path)
                assert found is not None and found.value == value
        if knob.type in ("choice", "kind"):
            assert refused(rich, knob.path, "no such thing")
        if not knob.nullable and knob.type != "list":
            assert refused(rich, knob.path, None), knob.path


def test_a_new_kind_has_its_own_defaults_and_keeps_what_was_set(nano):
    dsa = turn_all(turn(nano, "model.attention.kind", "dsa"), {"model.attention.index_topk": 48, "model.attention.index_n_heads": 4})
    lsa = turn(dsa, "model.attention.kind", "lsa").model.attention
    assert (lsa.index_init_tokens, lsa.index_local_tokens, lsa.cli_factor, lsa.index_k_norm_type) == (1, 32, 2, "rms")
    assert (lsa.index_topk, lsa.index_n_heads, lsa.q_lora_rank) == (48, 4, nano.model.attention.q_lora_rank)
    kept = turn(turn(dsa, "model.attention.cli_factor", 4), "model.attention.kind", "lsa").model.attention
    assert kept.cli_factor == 4
    back = turn(turn(dsa, "model.attention.kind", "mla"), "model.attention.kind", "dsa").model.attention
    assert back.index_topk == 64  # mla does not know it


def test_settings_that_a_new_kind_must_have_are_named_and_taken_together(nano):
    with pytest.raises(
        lab.ConfigError, match=r"'data\.source\.kind' files needs 'data\.source\.path', which has no default: write it too\.$"
    ):
        turn(nano, "data.source.kind", "files")
    with pytest.raises(lab.ConfigError, match=r"'training\.growth' needs 'training\.growth\.at_step'"):
        turn(nano, "training.growth", True)
    assert [(k.path, k.default) for k in needed(nano, "data.source.kind", "files")] == [("data.source.path", MISSING)]
    assert needed(nano, "data.source.kind", "python_packages") == []
    config = turn_all(
        nano, {"data.source.path": "texts", "data.source.kind": "files", "training.growth": True, "training.growth.at_step": 9}
    )
    assert config.data.source.path == "texts" and config.training.growth.at_step == 9


def test_settings_that_fit_only_together_can_be_turned_together(nano):
    assert refused(nano, "data.sequence_length", 512)
    config = turn_all(nano, {"data.sequence_length": 512, "model.max_position_embeddings": 512})
    assert config.data.sequence_length == config.model.max_position_embeddings == 512


def test_an_unknown_knob_is_named_with_the_nearest(nano):
    with pytest.raises(lab.ConfigError, match="did you mean 'moe_topk'"):
        turn(nano, "model.moe.moe_top", 2)


def test_changes_are_all_that_differs_and_each_can_be_put_back(nano):
    assert changed(nano, nano) == {}
    wanted = {
        "model.attention.kind": "dsa",
        "model.attention.index_topk": 32,
        "model.embedding.ngram.kind": "ngram_embedding",
        "model.hidden_size": 64,
        "data.source.kind": "files",
        "data.source.path": "texts",
        "training.growth": True,
        "training.growth.at_step": 9,
    }
    config = turn_all(nano, wanted)
    found = changed(config, nano)
    assert {path: now for path, (_, now) in found.items()} == wanted
    assert found["model.attention.index_topk"] == (64, 32)  # the kind's own default
    assert found["data.source.path"] == (None, "texts")
    while found:
        config = put_back(config, next(iter(found)), nano)
        found = changed(config, nano)
    assert config == nano
    assert turn_all(turn(config, "model.attention.kind", "lsa"), {}) != nano


def test_putting_a_kind_back_brings_its_settings_back():
    lsa = lab.load("nano", "model.attention.kind=lsa", "model.attention.index_topk=48", "model.attention.distill.weight=0.5")
    assert put_back(turn(lsa, "model.attention.kind", "mla"), "model.attention.kind", lsa) == lsa
    grown = lab.load("nano", "training.growth.at_step=7")
    assert put_back(turn(grown, "training.growth", False), "training.growth", grown) == grown


def test_a_kind_of_ones_own_has_knobs(nano):
    class Inner(Node):
        depth: int = Field(2, ge=1, description="how deep")

    class Own(lab.BlockConfig):
        """A network that a person wrote in a cell."""

        kind: Literal["own_network"] = "own_network"
        power: float = Field(gt=0, le=4, multiple_of=0.5, description="no default")
        inner: Inner = Field(default_factory=Inner)
        selection: slot("selection") | None = Field(None, description="a place for another block")

        def budget(self, shape):
            return lab.Budget()

    lab.register("ffn")(Own)
    try:
        assert "own_network" in by_path(nano)["model.ffn.kind"].choices
        config = turn_all(nano, {"model.ffn.kind": "own_network", "model.ffn.power": 2.0})
        found = by_path(config)
        assert "A network that a person wrote" in found["model.ffn.kind"].help
        power, depth = found["model.ffn.power"], found["model.ffn.inner.depth"]
        assert (power.lower, power.lower_open, power.upper, power.multiple_of, power.default) == (0, True, 4, 0.5, MISSING)
        assert power.range == "above 0, up to 4, multiple of 0.5"
        assert (depth.section, depth.group, depth.default) == ("layers", "model.ffn.inner", 2)
        assert found["model.ffn.selection.kind"].choices == (None, *kinds("selection"))
    finally:
        forget("ffn", "own_network")
