"""The assembled model: causality, documents, paired initial weights, generation."""

import torch

from longcat_lab.config import load
from longcat_lab.model import build, generate
from longcat_lab.model.initialise import normal_rows

ARMS = [(), ("model.embedding.ngram.order=3",)]


def test_a_later_token_never_changes_an_earlier_logit():
    for arm in ARMS:
        model, tokens = build(load("tiny", *arm)).eval(), torch.randint(0, 512, (2, 20))
        changed = tokens.clone()
        changed[:, 11:] = torch.randint(0, 512, (2, 9))
        torch.testing.assert_close(model(tokens)[:, :11], model(changed)[:, :11], rtol=0, atol=1e-5)
        assert not torch.allclose(model(tokens)[:, 11:], model(changed)[:, 11:], atol=1e-3)


def test_packed_documents_equal_separate_documents():
    """Rotary positions are relative, so a document at position 9 sees what it would see at position 0."""
    for arm in ARMS:
        model, tokens = build(load("tiny", *arm)).eval(), torch.randint(0, 512, (1, 20))
        packed = model(tokens, torch.tensor([[0] * 9 + [1] * 11]))
        apart = torch.cat((model(tokens[:, :9]), model(tokens[:, 9:])), 1)
        torch.testing.assert_close(packed, apart, rtol=1e-4, atol=1e-4)


def test_arms_share_initial_values_where_names_and_shapes_agree():
    plain, more = build(load("tiny"), seed=3).state_dict(), build(load("tiny", "model.moe.n_routed_experts=9"), seed=3).state_dict()
    same = [name for name in plain if plain[name].shape == more[name].shape]
    assert len(same) > 10 and all(torch.equal(plain[name], more[name]) for name in same)
    other = build(load("tiny"), seed=4).state_dict()
    assert not torch.equal(plain["lm_head.weight"], other["lm_head.weight"])


def test_rows_are_drawn_in_blocks_that_do_not_depend_on_how_many_there_are():
    many, few = (normal_rows(torch.empty(rows, 3), 0.5, 7, "x") for rows in (3000, 1100))
    assert torch.equal(many[:1100], few)
    assert len(torch.unique(many)) > 8900  # no block repeats another
    assert abs(float(many.std()) - 0.5) < 0.02


def test_no_two_parameters_start_equal():
    state = build(load("tiny", "model.num_layers=2")).state_dict()
    first, second = state["layers.0.mlp.gate_up_proj"], state["layers.1.mlp.gate_up_proj"]
    assert not torch.equal(first, second)


def test_meta_builds_without_memory():
    with torch.device("meta"):
        model = build(load("micro", "model.moe.n_routed_experts=4096"))
    assert all(p.is_meta for p in model.parameters())


def test_greedy_generation_is_the_argmax_each_time_and_stops():
    model, prompt = build(load("tiny")).eval(), torch.randint(0, 512, (5,))
    out = generate(model, prompt, 6)
    for i in range(5, 11):
        assert out[i] == model(out[None, :i])[0, -1].argmax()
    stopped = generate(model, prompt, 6, stop=int(out[6]))
    assert stopped.tolist() == out[:7].tolist()


def test_sampled_generation_follows_its_seed_and_window():
    model, prompt = build(load("tiny")).train(), torch.randint(0, 512, (100,))  # longer than the 64 positions
    a, b, c = (generate(model, prompt, 8, temperature=1.0, seed=s).tolist() for s in (1, 1, 2))
    assert a == b != c
    assert model.training
