"""The form: controls that hold what the schema says, turns that are taken or wait, sections that are built when they are opened."""

import time

import ipywidgets
import pytest
from jupyter_client.manager import start_new_kernel

import longcat_lab as lab
from longcat_lab.notebook.panel.controls import read
from longcat_lab.notebook.panel.form import Form
from longcat_lab.notebook.panel.knobs import SECTIONS, changed, knobs

HEADS = "model.attention.num_attention_heads"


@pytest.fixture
def heard():
    return []


@pytest.fixture
def form(heard):
    return Form(lab.load("nano"), heard.append)


def opened(form, section):
    """The rows of a section, by path, after a person has opened it."""
    form.accordion.selected_index = list(SECTIONS).index(section)
    return {path: row for path, row in form._rows.items() if row.knob.section == section}


def shown(box):
    """Widgets in a box, however deep."""
    for child in getattr(box, "children", ()):
        yield child
        yield from shown(child)


def test_only_sections_that_are_opened_are_built(form):
    assert {row.knob.section for row in form._rows.values()} == {"model"}
    few = len(list(shown(form.widget)))
    assert set(opened(form, "optimizer")) == {knob.path for knob in knobs(form.config) if knob.section == "optimizer"}
    assert len(list(shown(form.widget))) > few
    assert not form.sections["moe"].children


@pytest.mark.parametrize("preset", ["nano", "sparse-proxy", "probe-recall", "longcat-2.0"])
def test_every_control_holds_its_knobs_value_within_the_schemas_bounds(preset):
    form = Form(lab.load(preset, "training.growth.at_step=1", "training.growth.times=2", "training.conversion=null"))
    for section in SECTIONS:
        opened(form, section)
    assert set(form._rows) == {knob.path for knob in knobs(form.config)}
    for path, row in form._rows.items():
        assert read(row.knob, row.control.value) == row.knob.value, path
        if isinstance(row.control, ipywidgets.BoundedIntText | ipywidgets.BoundedFloatText | ipywidgets.IntSlider):
            assert row.knob.lower is None or row.control.min == row.knob.lower, path
        assert not hasattr(row.control, "continuous_update") or row.control.continuous_update is False, path


def test_a_control_that_is_moved_turns_the_configuration(form, heard):
    rows = {**opened(form, "attention"), **opened(form, "data"), **opened(form, "moe"), **opened(form, "training")}
    rows[HEADS].control.value = 8
    assert form.config.model.attention.num_attention_heads == 8 and heard == [form.config]
    rows["data.source.packages"].control.value = "[stdlib, networkx]"
    assert form.config.data.source.packages == ["stdlib", "networkx"]
    rows["data.source.packages"].control.value = " "
    assert form.config.data.source.packages is None
    rows["model.moe.expected_real_experts"].control.value = "1"
    assert form.config.model.moe.expected_real_experts == 1.0
    rows["training.recompute"].control.value = True
    rows["training.evaluations"].control.value = "{dense: {model.attention.kind: mla}}"
    assert form.config.training.recompute and form.config.training.evaluations == {"dense": {"model.attention.kind": "mla"}}
    assert len(heard) == 6 and heard[-1] == form.config


def test_what_differs_is_marked_and_one_press_puts_it_back(form, heard):
    row = opened(form, "attention")[HEADS]
    row.control.value = 8
    assert "was 4" in row.name.value and "1" in form.accordion.titles[list(SECTIONS).index("attention")]
    assert "1 knob differs" in form.message.value
    row.widget.children[2].click()
    assert form.config == form.baseline == heard[-1] and row.control.value == 4
    assert "was" not in row.name.value and len(row.widget.children) == 2 and form.accordion.titles == tuple(SECTIONS)


def test_a_knob_that_does_not_fit_waits_and_the_configuration_stays(form, heard):
    before = form.config
    row = opened(form, "data")["data.sequence_length"]
    row.control.value = 512
    assert form.config is before and not heard and row.control.value == 512
    assert "max_position_embeddings" in form.waiting["data.sequence_length"]
    assert "max_position_embeddings" in form.message.value and "not taken" in row.name.value
    opened(form, "training")["training.steps"].control.value = 400  # others still turn
    assert form.config.training.steps == 400 and "data.sequence_length" in form.waiting
    opened(form, "model")["model.max_position_embeddings"].control.value = 512  # and now it fits
    assert form.config.data.sequence_length == 512 and form.waiting == {} and "not taken" not in row.name.value
    assert "alert" not in form.message.value


def test_a_waiting_knob_is_dropped_with_its_button_or_by_turning_it_right(form):
    row = opened(form, "moe")["model.moe.moe_topk"]
    row.control.value = 1
    assert form.waiting
    row.widget.children[2].click()
    assert form.waiting == {} and row.control.value == 3 and form.config == form.baseline
    row.control.value = 1
    row.control.value = 4
    assert form.waiting == {} and form.config.model.moe.moe_topk == 4


def test_text_that_is_no_yaml_stays_as_it_was_written_and_is_told(form):
    row = opened(form, "data")["data.source.validation"]
    row.control.value = "[networkx"
    assert row.control.value == "[networkx" and "not valid YAML" in form.waiting["data.source.validation"]
    form.turn("training.steps", 400)
    assert form.config.training.steps == 400 and "data.source.validation" in form.waiting
    row.control.value = "[networkx]"
    assert form.waiting == {} and form.config.data.source.validation == ["networkx"]


def test_a_new_kind_rebuilds_its_section_alone(form):
    other = opened(form, "moe")["model.moe.moe_topk"].control
    rows = opened(form, "attention")
    rows["model.attention.kind"].control.value = "lsa"
    now = opened(form, "attention")
    assert now["model.attention.index_topk"].control.value == 64 and "model.attention.hierarchical" in now
    assert now[HEADS].control is rows[HEADS].control and form._rows["model.moe.moe_topk"].control is other
    assert now["model.attention.index_topk"].widget in form.sections["attention"].children
    gone = now["model.attention.index_topk"].control
    now["model.attention.kind"].control.value = "mla"
    assert "model.attention.index_topk" not in form._rows and gone.comm is None
    assert form.config == form.baseline


def test_a_turn_keeps_all_widgets(form):
    rows = opened(form, "moe")
    before = [id(widget) for widget in shown(form.sections["moe"])]
    rows["model.moe.n_routed_experts"].control.value = 32
    after = [id(widget) for widget in shown(form.sections["moe"])]
    assert [each for each in after if each in before] == before and len(after) == len(before) + 1  # the button that puts it back


def test_a_kind_that_must_have_a_setting_asks_for_it(form, heard):
    rows = opened(form, "data")
    rows["data.source.kind"].control.value = "files"
    assert form.config.data.source.kind == "python_packages" and "data.source.path" in form.waiting["data.source.kind"]
    asked = form._rows["data.source.path"]
    assert asked.widget in form.sections["data"].children
    asked.control.value = "texts"
    assert form.config.data.source.kind == "files" and form.config.data.source.path == "texts" and form.waiting == {}
    form.put_back("data.source.kind")
    assert form.config == form.baseline
    rows = opened(form, "training")
    rows["training.growth"].control.value = True
    form.put_back("training.growth")  # changed one's mind
    assert form.waiting == {} and "training.growth.at_step" not in form._rows and not rows["training.growth"].control.value


def test_search_finds_by_name_and_by_meaning_over_all_sections(form):
    form.search.value = "newton"
    found = [path for path, row in form._rows.items() if row.widget in form.found.children]
    assert found == ["training.optimizer.ns_steps"] and form.accordion.layout.display == "none"
    form.search.value = "LORA rank"
    found = {path for path, row in form._rows.items() if row.widget in form.found.children}
    assert {"model.attention.q_lora_rank", "model.attention.kv_lora_rank"} <= found and "training.optimizer.ns_steps" not in found
    form._rows["model.attention.kv_lora_rank"].control.value = 16
    assert form.config.model.attention.kv_lora_rank == 16
    form.search.value = ""
    assert form.accordion.layout.display != "none"
    assert opened(form, "attention")["model.attention.kv_lora_rank"].control.value == 16


def test_pin_set_and_all_back(form, heard):
    first = form.config
    form.turn("training.steps", 400)
    form.pin()
    assert form.baseline == form.config == heard[-1] and len(heard) == 2 and changed(form.config, form.baseline) == {}
    form.turn("training.steps", 0)
    form.set_config(first)
    assert form.config == first and form.waiting == {} and form.baseline.training.steps == 400 and len(heard) == 3
    assert opened(form, "training")["training.steps"].control.value == 300
    form.back_button.click()
    assert form.config == form.baseline and heard[-1] == form.baseline
    form.set_config(form.config)
    assert len(heard) == 4  # nothing new


def test_a_kind_registered_later_can_be_chosen(form):
    from typing import Literal

    from longcat_lab.blocks import SwiGLUConfig
    from longcat_lab.blocks.interface import forget

    opened(form, "layers")
    try:

        @lab.register("ffn")
        class Later(SwiGLUConfig):
            kind: Literal["later_network"] = "later_network"

        opened(form, "moe")
        row = opened(form, "layers")["model.ffn.kind"]
        assert "later_network" in row.control.options
        row.control.value = "later_network"
        assert type(form.config.model.ffn) is Later
    finally:
        forget("ffn", "later_network")


def test_a_browsers_message_turns_a_knob_in_a_real_kernel():
    manager, client = start_new_kernel(kernel_name="python3")
    try:

        def run(code):
            said = []
            reply = client.execute_interactive(
                code, timeout=120, output_hook=lambda message: said.append(message["content"].get("text", ""))
            )
            assert reply["content"]["status"] == "ok", reply["content"]
            return "".join(said).strip()

        run(
            "import longcat_lab as lab\nfrom longcat_lab.notebook.panel.form import Form\n"
            "heard = []\nform = Form(lab.load('nano'), heard.append)\nform.widget"
        )
        for path, value in (("model.num_layers", 4), ("model.base_hidden_size", "64")):
            comm = run(f"print(form._rows[{path!r}].control.comm.comm_id)")
            content = {"comm_id": comm, "data": {"method": "update", "state": {"value": value}, "buffer_paths": []}}
            client.shell_channel.send(client.session.msg("comm_msg", content))
        end = time.monotonic() + 60
        while (said := run("print(form.config.model.num_layers, form.config.model.base_hidden_size, len(heard))")) != "4 64 2":
            assert time.monotonic() < end, said
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
