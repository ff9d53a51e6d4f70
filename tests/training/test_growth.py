"""Depth growth: what stacking copies, that the stacked model is the small one's layers twice, and that runs resume around it."""

import copy

import pytest
import torch

import longcat_lab as lab
from longcat_lab.config import load
from longcat_lab.errors import LabError
from longcat_lab.model import build
from longcat_lab.training import growth
from longcat_lab.training.optimizer import make_optimizer

GROW = ("model.num_layers=4", "training.growth.at_step=6", "training.growth.times=2")
SHORT = ("training.steps=9", "training.log_every=3", "training.evaluation_sequences=2", "training.checkpoint_every=3", "data.batch_size=2")
MORE = ("model.embedding.ngram.order=3", "model.mtp.num_nextn_predict_layers=1")


def grown(*overrides, steps=2):
    """A shallow model with a few optimizer steps behind it, and the stacked one."""
    config = load("tiny", *GROW, *overrides)
    small = build(growth.shallow(config), seed=1).train()
    before = make_optimizer(small, config.training.optimizer)
    for _ in range(steps):
        small(torch.randint(0, 512, (2, 16))).square().mean().backward()
        before.step(), before.zero_grad()
        for layer in small.layers:
            layer.mlp.router.after_step() if hasattr(layer.mlp, "router") else None
    large = build(config, seed=2).train()
    after = make_optimizer(large, config.training.optimizer)
    growth.stack(small, large)
    growth.stack_moments(small, before, large, after)
    return small, before, large, after


def states(model, optimizer):
    names = {parameter: name for name, parameter in model.named_parameters()}
    parts = getattr(optimizer, "parts", {"": optimizer}).values()
    return {names[parameter]: state for part in parts for parameter, state in part.state.items()}


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_layer_i_gets_weights_biases_counts_and_moments_of_layer_i_modulo_depth(kind):
    small, before, large, after = grown(f"training.optimizer.kind={kind}", *MORE)
    assert len(small.layers) == 2 and len(large.layers) == 4
    for i in range(4):
        source = small.layers[i % 2]
        for collect in ("named_parameters", "named_buffers"):
            expected = dict(getattr(source, collect)())
            assert all(torch.equal(value, expected[name]) for name, value in getattr(large.layers[i], collect)())
        assert large.layers[i].mlp.router.e_score_correction_bias.abs().max() > 0 and int(large.layers[i].mlp.router.steps) == 2
    for name in ("embed_tokens.tables.weight", "lm_head.weight", "mtp.layers.0.eh_proj.weight"):
        assert torch.equal(large.state_dict()[name], small.state_dict()[name])
    old, new = states(small, before), states(large, after)
    assert "layers.3.mlp.gate_up_proj" in new and "layers.0.mlp.router.classifier.weight" in new
    for name, state in new.items():
        source = old[growth.source_name(name, 2)]
        assert state.keys() == source.keys() and len(state) and all(torch.equal(state[key], source[key]) for key in state)
        assert all(state[key].data_ptr() != source[key].data_ptr() for key in state)  # copies that go their own way
    copied = [states(large, after)[f"layers.{i}.mlp.gate_up_proj"] for i in (0, 2)]
    assert all(copied[0][key].data_ptr() != copied[1][key].data_ptr() for key in copied[0])


def test_the_stacked_model_is_the_small_ones_layers_twice():
    small, _, large, _ = grown(*MORE)
    small, large, tokens = small.double().eval(), large.double().eval(), torch.randint(0, 512, (2, 16))
    x = small.embed_tokens(tokens)
    for _ in range(2):
        for layer in small.layers:
            x = layer(x, small.context(x))
    torch.testing.assert_close(large.hidden(tokens), x)
    torch.testing.assert_close(large(tokens), small.lm_head(small.norm(x)))


def test_stacked_layers_go_their_own_ways():
    _, _, large, after = grown()
    first, third = (large.layers[i].mlp.gate_up_proj for i in (0, 2))
    assert torch.equal(first, third)
    large(torch.randint(0, 512, (2, 16))).square().mean().backward()
    after.step()
    assert not torch.equal(first, third)


def test_growing_threefold_repeats_the_stack_in_order():
    config = load("tiny", "model.num_layers=6", "training.growth.at_step=6", "training.growth.times=3")
    small, large = build(growth.shallow(config), seed=1), build(config, seed=2)
    growth.stack(small, large)
    for i in range(6):
        assert torch.equal(large.layers[i].mlp.down_proj, small.layers[i % 2].mlp.down_proj)


def test_layers_that_differ_by_their_place_are_refused_and_nothing_is_copied():
    config = load("tiny", *GROW, "model.layer.kind=decoder", "model.layer.first_k_dense_replace=1")
    small, large = build(growth.shallow(config), seed=1), build(config, seed=2)
    before = copy.deepcopy(large.state_dict())
    with pytest.raises(LabError, match=r"training.growth: layer 2 has other parts than layer 0; layers must be alike") as caught:
        growth.stack(small, large)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in large.state_dict().items())


def test_alike_decoder_layers_are_stacked():
    for dense in (0, 4):
        config = load("tiny", *GROW, "model.layer.kind=decoder", f"model.layer.first_k_dense_replace={dense}")
        small, large = build(growth.shallow(config), seed=1), build(config, seed=2)
        growth.stack(small, large)
        assert torch.equal(large.layers[3].self_attn.o_proj.weight, small.layers[1].self_attn.o_proj.weight)


@pytest.fixture(scope="module", params=["adamw", "muon"])
def whole(request, tmp_path_factory):
    overrides = (*GROW, *SHORT, f"training.optimizer.kind={request.param}")
    return overrides, lab.fit(load("tiny", *overrides), tmp_path_factory.mktemp("whole") / "run", progress=False)


@pytest.mark.parametrize("at", [4, 6, 7])
def test_a_run_stopped_before_at_and_after_growth_goes_on_with_the_same_bits(whole, tmp_path, at):
    overrides, finished = whole
    asked = []
    lab.fit(load("tiny", *overrides), tmp_path / "run", progress=False, stop=lambda: asked.append(1) or len(asked) == at)
    folder = next((tmp_path / "run").glob("checkpoint-*"))
    from safetensors.torch import load_file

    depth = {name.split(".")[1] for name in load_file(folder / "part-00000.safetensors") if name.startswith("model/layers.")}
    assert len(depth) == (4 if at > 6 else 2)  # at the step itself the layers are not yet stacked
    resumed = lab.fit(load("tiny", *overrides), tmp_path / "run", progress=False)
    for name, value in finished.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    assert resumed.metrics["loss"].tolist() == finished.metrics["loss"].tolist()
    assert resumed.record["final"] == finished.record["final"]


def test_up_to_growth_a_run_is_the_shallow_run_and_moments_make_a_difference(tmp_path):
    """Same data, same schedule: the first rows are those of the shallow model; after it, stacked and fresh moments part."""
    finished = lab.fit(load("tiny", *GROW, *SHORT), tmp_path / "stacked", progress=False)
    shallow = lab.fit(load("tiny", *SHORT, "model.num_layers=2"), tmp_path / "shallow", progress=False)
    fresh = lab.fit(load("tiny", *GROW, *SHORT, "training.growth.moments=fresh"), tmp_path / "fresh", progress=False)
    columns = ["step", "loss", "gradient_norm", "learning_rate", "tokens"]
    assert finished.metrics[columns][:2].equals(shallow.metrics[columns][:2]) and finished.metrics[columns][:2].equals(
        fresh.metrics[columns][:2]
    )
    assert finished.metrics["learning_rate"].equals(shallow.metrics["learning_rate"])
    assert finished.metrics["tokens"].equals(shallow.metrics["tokens"])
    losses = [each.metrics["loss"].iloc[2] for each in (finished, shallow, fresh)]
    assert len(set(losses)) == 3
    assert len(finished.model.layers) == 4 and len(shallow.model.layers) == 2


def test_growth_that_cannot_be_is_named():
    for settings, named in ((("model.num_layers=5",), "does not divide model.num_layers 5"), (("training.steps=6",), "not below steps")):
        with pytest.raises(lab.ConfigError, match=named):
            load("tiny", *GROW, *settings)


def test_the_copy_of_an_attention_that_owns_an_index_may_be_served_by_one():
    """One indexer for four attentions: the shallow model's two have one, and so has the grown model; nobody's indexer is lost silently."""
    kind = ("model.attention.kind=lsa", "model.layer.kind=decoder", "model.layer.first_k_dense_replace=4")
    config = load(
        "tiny", *GROW, *kind, "model.attention.cli_factor=4", "model.attention.index_topk=8", "model.attention.index_local_tokens=3"
    )
    small, large = build(growth.shallow(config), seed=1), build(config, seed=2)
    growth.stack(small, large)
    owners = [i for i, layer in enumerate(large.layers) if layer.self_attn.indexer is not None]
    assert owners == [0] and [i for i, layer in enumerate(small.layers) if layer.self_attn.indexer is not None] == [0]
    for name, value in large.layers[2].state_dict().items():
        assert torch.equal(value, small.layers[0].state_dict()[name])
    # The other way round a part would have to be made up.
    with pytest.raises(LabError, match="layer 1 has other parts than layer 1"):
        growth.stack(small, build(load(config, "model.attention.cli_factor=1"), seed=2))


FFN, NGRAM = "model.ffn", "model.embedding.ngram"
UNLIKE = {
    "other parts": ((f"{FFN}.kind=plne_swiglu", f"{FFN}.injection_layers=[0, 1]"), "layer 2 has other parts than layer 0"),
    "another hash": (
        (f"{FFN}.kind=plne_swiglu", f"{FFN}.hash=multiplicative_xor"),
        "layer 2 looks n-grams up by another hash than layer 0",
    ),
    "a layer too late": (
        (f"{NGRAM}.injection_layers=[0, 3]",),
        r"the shallow model, of 2 layers, cannot be built: .*injection_layers: \[0, 3\]",
    ),
}


@pytest.mark.parametrize("case", UNLIKE)
def test_layers_that_read_other_tables_are_not_stacked(case, tmp_path):
    settings, sentence = UNLIKE[case]
    with pytest.raises(LabError, match=f"training.growth: {sentence}") as error:
        lab.fit(load("tiny", *GROW, *SHORT, *settings), tmp_path, progress=False)
    assert "\n" not in str(error.value)


def test_a_grown_model_with_tables_in_its_networks_is_the_one_that_is_loaded_again(tmp_path):
    run = lab.fit(load("tiny", *GROW, *SHORT, f"{FFN}.kind=plne_swiglu"), tmp_path, progress=False)
    again = build(run.config)
    again.load_state_dict(run.model.state_dict())
    tokens = torch.randint(0, 512, (1, 20))
    assert torch.equal(again.eval()(tokens), run.model.eval()(tokens))
    plans = {layer.mlps[0].tables.addresses.plan for layer in run.model.layers}
    assert len(plans) == 1
