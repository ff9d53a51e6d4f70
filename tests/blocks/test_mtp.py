"""Multi-token prediction: labels, the published equation, one repeated block, and what it must leave alone."""

import pytest
import torch
import torch.nn.functional as F

from longcat_lab.blocks import ForwardContext
from longcat_lab.blocks.mtp.module import step_labels
from longcat_lab.config import ConfigError, load
from longcat_lab.data import Batch
from longcat_lab.model import build
from longcat_lab.training.loss import StepPlan, plan_step, step_loss

NGRAM = "model.embedding.ngram.order=3"


def config(*overrides, steps=3):
    return load("tiny", f"model.mtp.num_nextn_predict_layers={steps}", *overrides)


def batch(rows=2, length=24, documents=None):
    tokens = torch.randint(0, 512, (rows, length + 1))
    ids = torch.zeros(rows, length + 1, dtype=torch.int64) if documents is None else torch.tensor(documents)
    labels = tokens[:, 1:].masked_fill(ids[:, 1:] != ids[:, :-1], -100)
    return Batch(tokens[:, :-1], labels, ids[:, :-1])


def loss(model, found, run, plan=None):
    return step_loss(model, found.tokens, found.labels, found.document_ids, run, plan or plan_step(found, run, 0), 1.0)


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("step", [0, 1, 2, 5, 12, 20])
def test_labels_move_by_the_step_and_end_with_the_row_and_the_document(step):
    documents = torch.randint(0, 2, (3, 12)).cumsum(1)
    tokens = torch.randint(0, 512, (3, 13))
    following = torch.cat((documents, documents[:, -1:]), 1)
    labels = tokens[:, 1:].masked_fill(following[:, 1:] != following[:, :-1], -100)
    found = step_labels(labels, documents, step)
    for row in range(3):
        for i in range(12):
            inside = i + step < 12 and documents[row, i + step] == documents[row, i]
            assert int(found[row, i]) == (int(labels[row, i + step]) if inside else -100)
    one = step_labels(tokens[:, 1:], None, step)
    assert one.tolist() == [row[1 + step :] + [-100] * min(step, 12) for row in tokens.tolist()]


def test_one_step_is_deepseeks_equation():
    """h' = M [norm(E(t_{i+1})) ; norm(h_i)], one dense layer, P_{i+2} = head(norm(h'')); lambda times its mean loss is added."""
    run = config("model.mtp.loss_weight=0.3", steps=1)
    model, found = build(run).double().train(), batch(documents=[[0] * 9 + [1] * 16, [0] * 25])
    block = model.mtp.layers[0]
    h = model.hidden(found.tokens, found.document_ids)
    ahead = torch.cat((found.tokens[:, 1:], torch.zeros(2, 1, dtype=torch.int64)), 1)
    parts = torch.cat((block.enorm(F.embedding(ahead, model.embed_tokens.weight)), block.hnorm(h)), -1)
    x, context = parts @ block.eh_proj.weight.T, model.context(h, found.document_ids)
    layer = block.layer
    a = x + layer.self_attn(layer.input_layernorm(x), context)
    y = a + layer.mlp(layer.post_attention_layernorm(a))
    (state,) = model.ahead(h, found.tokens, found.document_ids)
    torch.testing.assert_close(state, block.norm(y))

    scored = [(i, r) for r in range(2) for i in range(24) if i + 1 < 24 and found.document_ids[r, i] == found.document_ids[r, i + 1]]
    scored = [(i, r) for i, r in scored if found.labels[r, i + 1] != -100]
    log_p = (block.norm(y) @ model.lm_head.weight.T).log_softmax(-1)
    expected = -sum(log_p[r, i, found.labels[r, i + 1]] for i, r in scored) / len(scored)
    total, told = loss(model, found, run)
    assert told["mtp/mtp_loss_1"] == pytest.approx(float(expected.detach()), rel=1e-9)
    assert float(total.detach()) == pytest.approx(told["loss"] + 0.3 * float(expected.detach()), rel=1e-9)


def test_the_loss_is_the_mean_over_the_steps_times_lambda():
    run = config("model.mtp.loss_weight=0.6")
    total, told = loss(build(run).double(), batch(), run)
    mean = sum(told[f"mtp/mtp_loss_{k}"] for k in (1, 2, 3)) / 3
    assert float(total.detach()) == pytest.approx(told["loss"] + 0.6 * mean, rel=1e-9)


@pytest.mark.parametrize("kind", ["dense", "layer"])
def test_a_repeated_block_has_the_sum_of_its_steps_gradients(kind):
    """Against a model of three blocks that hold copies of the one: same loss, and the trunk cannot tell them apart."""
    settings = ("model.mtp.loss_weight=0.9", f"model.mtp.block={kind}")
    one, three = config(*settings), config(*settings, "model.mtp.repeat_block=false")
    repeated, separate, found = build(one).double(), build(three).double(), batch(documents=[[0] * 9 + [1] * 16, [0] * 25])
    trunk = {name: value for name, value in repeated.state_dict().items() if not name.startswith("mtp.")}
    block = {name.removeprefix("mtp.layers.0."): value for name, value in repeated.state_dict().items() if name.startswith("mtp.")}
    copies = {f"mtp.layers.{k}.{name}": value for k in range(3) for name, value in block.items()}
    separate.load_state_dict({**trunk, **copies})
    results = []
    for model, run in ((repeated, one), (separate, three)):
        total, told = loss(model, found, run)
        total.backward()
        results.append((total.detach(), told))
    torch.testing.assert_close(results[0][0], results[1][0])
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-12)
    ours, theirs = gradients(repeated), gradients(separate)
    assert {name for name in ours if name.startswith("mtp.")} == {f"mtp.layers.0.{n}" for n, _ in repeated.mtp.layers[0].named_parameters()}
    for name, value in ours.items():
        if name.startswith("mtp."):
            each = [theirs[f"mtp.layers.{k}.{name.removeprefix('mtp.layers.0.')}"] for k in range(3)]
            assert all(g.abs().max() > 0 for g in each)
            torch.testing.assert_close(value, sum(each), rtol=1e-9, atol=1e-12)
        else:
            torch.testing.assert_close(value, theirs[name], rtol=1e-9, atol=1e-12)


def test_without_weight_the_trunk_has_the_bits_it_has_without_prediction_steps():
    found, results = batch(), []
    for run in (load("tiny"), config("model.mtp.loss_weight=0"), config("model.mtp.loss_weight=0", "model.mtp.block=layer")):
        model = build(run).train()
        total, told = loss(model, found, run)
        total.backward()
        results.append((total.detach(), told, gradients(model)))
    for total, told, grads in results[1:]:
        assert torch.equal(total, results[0][0]) and told == results[0][1] and grads.keys() == results[0][2].keys()
        assert all(torch.equal(value, results[0][2][name]) for name, value in grads.items())


def test_prediction_steps_leave_the_next_tokens_loss_to_the_bit():
    found, run = batch(), config("model.mtp.loss_weight=0.7")
    alone, with_steps = (loss(build(each).train(), found, each)[1]["loss"] for each in (load("tiny"), run))
    assert alone == with_steps


@pytest.mark.parametrize("hidden", ["raw", "normed"])
@pytest.mark.parametrize("kind", ["dense", "layer"])
def test_detached_steps_train_their_blocks_and_nothing_else(hidden, kind):
    """The trunk's gradients have the bits they have without prediction steps; also the final norm's, the embedding's, the head's."""
    found, results = batch(), []
    for weight in (0.0, 0.9):
        run = config(f"model.mtp.loss_weight={weight}", "model.mtp.detach=true", f"model.mtp.hidden={hidden}", f"model.mtp.block={kind}")
        model = build(run).train()
        loss(model, found, run)[0].backward()
        results.append(gradients(model))
    trunk = {name: value for name, value in results[1].items() if not name.startswith("mtp.")}
    assert trunk.keys() == results[0].keys() and all(torch.equal(value, results[0][name]) for name, value in trunk.items())
    assert {name for name in results[1] if name not in trunk} == {name for name, _ in model.named_parameters() if name.startswith("mtp.")}


def test_without_detaching_the_trunk_learns_from_the_steps():
    run, found = config("model.mtp.loss_weight=0.9"), batch()
    model = build(run).double()
    loss(model, found, run)[0].backward()
    with_steps = gradients(model)
    model.zero_grad()
    loss(model, found, run, StepPlan(plan_step(found, run, 0).labels, 0.0))[0].backward()
    for name in ("embed_tokens.weight", "lm_head.weight", "layers.0.self_attn.0.o_proj.weight"):
        assert not torch.allclose(with_steps[name], gradients(model)[name], rtol=1e-3)


def test_weight_follows_its_schedule():
    run = config("model.mtp.loss_weight=0.3", "model.mtp.loss_weight_schedule=[[0.25, 0.2], [0.7, 0.0]]", "training.steps=20")
    found = batch()
    assert [plan_step(found, run, step).mtp_weight for step in range(20)] == [0.3] * 5 + [0.2] * 9 + [0.0] * 6
    assert len(plan_step(found, run, 19).labels) == 1 and len(plan_step(found, run, 0).labels) == 4
    with pytest.raises(ConfigError, match="must rise"):
        config("model.mtp.loss_weight_schedule=[[0.5, 0.1], [0.2, 0.1]]")
    with pytest.raises(ConfigError, match="negative"):
        config("model.mtp.loss_weight_schedule=[[0.5, -0.1]]")


@pytest.mark.parametrize("settings", [(), ("model.mtp.block=layer",), ("model.mtp.repeat_block=false", NGRAM)], ids=["one", "layer", "own"])
def test_no_step_sees_further_ahead_than_it_may(settings):
    """Step k at position i reads tokens up to i + k; what it predicts is token i + k + 1."""
    model, tokens = build(config(*settings)).double().eval(), torch.randint(0, 512, (1, 20))
    hidden = model.hidden(tokens)
    states = model.ahead(hidden, tokens)
    changed = tokens.clone()
    changed[:, 11:] = (changed[:, 11:] + 1 + torch.randint(0, 510, (1, 9))) % 512
    moved = model.ahead(model.hidden(changed), changed)
    for k, (a, b) in enumerate(zip(states, moved, strict=True), 1):
        torch.testing.assert_close(a[:, : 11 - k], b[:, : 11 - k], rtol=1e-9, atol=1e-9)
        assert (a[:, 11 - k] - b[:, 11 - k]).abs().max() > 1e-4  # the token at 11 is what step k reads there


def test_ngram_tables_take_no_part_in_the_steps():
    """Their input is the token's own row, neither scaled nor mixed with tables."""
    run = config(NGRAM, "model.mtp.loss_weight=0.9", steps=2)
    model, found = build(run).double(), batch()
    hidden = model.hidden(found.tokens).detach()
    sum(state.square().sum() for state in model.ahead(hidden, found.tokens)).backward()
    assert model.embed_tokens.tables.weight.grad is None and model.embed_tokens.projection.weight.grad is None
    assert model.embed_tokens.weight.grad.abs().max() > 0
    assert torch.equal(model.mtp.embed(found.tokens, model.embed_tokens), model.embed_tokens.weight[found.tokens])


def test_packed_documents_have_the_losses_of_separate_ones():
    run = config(NGRAM, "model.mtp.block=layer")
    model, tokens = build(run).double(), torch.randint(0, 512, (1, 22))
    ids = torch.tensor([[0] * 9 + [1] * 13])
    labels = torch.cat((tokens[:, 1:], tokens[:, :1]), 1).masked_fill(torch.tensor([[i in (8, 21) for i in range(22)]]), -100)
    packed = loss(model, Batch(tokens, labels, ids), run)[1]
    pieces = [slice(0, 9), slice(9, 22)]
    for k in range(4):
        nats, count = 0.0, 0
        for piece in pieces:
            one = Batch(tokens[:, piece], labels[:, piece], torch.zeros_like(tokens[:, piece]))
            plan = plan_step(one, run, 0)
            told = loss(model, one, run, plan)[1]
            nats, count = nats + plan.labels[k] * told["loss" if k == 0 else f"mtp/mtp_loss_{k}"], count + plan.labels[k]
        assert packed["loss" if k == 0 else f"mtp/mtp_loss_{k}"] == pytest.approx(nats / count, rel=1e-9)
        assert count == 20 - 2 * k


def test_sequences_shorter_than_the_steps_have_nothing_to_predict_there():
    run = config()
    total, told = loss(build(run), batch(length=2), run)
    total.backward()
    assert told["mtp/mtp_loss_1"] > 0 and told["mtp/mtp_loss_2"] == told["mtp/mtp_loss_3"] == 0 and total.isfinite()


def test_raw_and_normed_steps_hand_on_states_before_and_after_their_norm():
    tokens, found = torch.randint(0, 512, (1, 12)), {}
    for kind in ("raw", "normed"):
        model = build(config(f"model.mtp.hidden={kind}", "model.mtp.repeat_block=false", steps=2)).double().eval()
        for norm in (model.norm, *(block.norm for block in model.mtp.layers)):
            torch.nn.init.uniform_(norm.weight, 0.5, 2.0)
        hidden = model.hidden(tokens)
        found[kind] = model.ahead(hidden, tokens)
        start = hidden if kind == "raw" else model.norm(hidden)
        for k, state in enumerate(found[kind], 1):
            embedded, block = model.mtp.embed(F.pad(tokens[:, k:], (0, k)), model.embed_tokens), model.mtp.block(k)
            start = block(start, embedded, model.context(hidden))
            torch.testing.assert_close(state, block.norm(start))
            start = start if kind == "raw" else block.norm(start)
    assert not torch.allclose(found["raw"][0], found["normed"][0], atol=1e-3)


@pytest.mark.parametrize("kind", ["dense", "layer"])
def test_blocks_that_run_again_in_backward_change_nothing_and_are_counted_once(kind):
    found, results = batch(), []
    for recompute in ("true", "false"):
        run = config(f"model.mtp.recompute={recompute}", f"model.mtp.block={kind}", "model.moe.balance_loss_alpha=0.1")
        model = build(run).train()
        total, told = loss(model, found, run)
        total.backward()
        routers = [module for name, module in model.named_modules() if name.endswith("router")]
        results.append((told, gradients(model), [(each.counts, *each.gradients) for each in routers]))
    (told, grads, counted), again = results
    assert told == again[0] and all(torch.equal(value, again[1][name]) for name, value in grads.items())
    assert [int(each[0].sum()) for each in counted] == [2 * 24 * 2] + ([(3 * 24 - 1 - 2 - 3) * 2 * 2] if kind == "layer" else [])
    assert all(torch.equal(a, b) for one, other in zip(counted, again[2], strict=True) for a, b in zip(one, other, strict=True))


def test_its_own_embedding_is_read_and_learns_in_place_of_the_trunks():
    run = config("model.mtp.own_embedding=true", "model.mtp.detach=true", "model.mtp.loss_weight=0.9")
    model, found = build(run).double(), batch()
    assert not torch.equal(model.mtp.embed_tokens.weight, model.embed_tokens.weight)
    sum(state.square().sum() for state in model.ahead(model.hidden(found.tokens), found.tokens)).backward()
    assert model.embed_tokens.weight.grad is None and model.mtp.embed_tokens.weight.grad.abs().max() > 0


def test_idle_tables_are_carried_and_never_read_or_trained():
    run = config(NGRAM, "model.mtp.own_embedding=true", "model.mtp.own_ngram_tables=true")
    model = build(run)
    assert model.mtp.embed_tokens.tables.weight.shape == model.embed_tokens.tables.weight.shape
    loss(model, batch(), run)[0].backward()
    assert model.mtp.embed_tokens.tables.weight.grad is None and model.mtp.embed_tokens.weight.grad is not None
    for settings, named in ((("model.mtp.own_ngram_tables=true",), "needs own_embedding"), (("model.mtp.own_embedding=true",), "ngram")):
        with pytest.raises(ConfigError, match=named):
            config(*settings, "model.mtp.own_ngram_tables=true")


def test_every_step_has_a_context_of_its_own_over_shared_notes():
    """One pass may leave a note (a selection) that the next one finds; caches, masks and positions are the trunk's."""
    model, tokens, seen = build(config()).eval(), torch.randint(0, 512, (1, 8)), []
    model.mtp.block(1).layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    model.ahead(model.hidden(tokens), tokens, share=0.25)
    assert len({id(each) for each in seen}) == 3 and len({id(each.shared) for each in seen}) == 1
    assert all(isinstance(each, ForwardContext) and each.share == 0.25 for each in seen)
