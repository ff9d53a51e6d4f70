"""Speculative decoding gives greedy decoding's text, with the drafts that the prediction steps really make."""

import pytest
import torch

import longcat_lab as lab
from longcat_lab.config import ConfigError, load
from longcat_lab.model import build, generate, speculate
from longcat_lab.model.drafts import AlignedDrafts, ChainedDrafts, newest
from longcat_lab.training.loss import plan_step, step_loss

ARMS = {
    "one block": (),
    "blocks of their own": ("model.mtp.repeat_block=false",),
    "layer": ("model.mtp.block=layer",),
    "normed": ("model.mtp.hidden=normed", "model.mtp.own_embedding=true"),
    "n-grams": ("model.embedding.ngram.order=3", "model.layer.kind=serial"),
    "decoder": ("model.layer.kind=decoder", "model.mtp.block=layer", "model.mtp.repeat_block=false"),
}


def model_of(arm, steps, *overrides):
    config = load("tiny", f"model.mtp.num_nextn_predict_layers={steps}", *ARMS[arm], "model.initializer_range=0.2", *overrides)
    return build(config).double().eval()


def repeating(model):
    """The same with four words left and another head each time: its drafts are right now and then, and not always."""
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[:4].normal_()
    return model


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("arm", ARMS)
def test_tokens_are_those_of_greedy_decoding(arm, steps):
    """With drafts that are always wrong, and with models whose drafts are sometimes right."""
    for model, length, count in [(model_of(arm, steps), 9, 11), *((repeating(model_of(arm, steps)), 1 + n, 16) for n in range(12))]:
        prompt = torch.randint(0, 512, (length,))
        found = speculate(model, prompt, count)
        assert torch.equal(found.tokens, generate(model, prompt, count))
        assert found.generated == count and len(found.drafted) == len(found.accepted) == steps
        gained = 1 + found.rounds + sum(found.accepted)  # the first token comes with the prompt; the last round may go beyond the end
        assert found.generated <= gained <= found.generated + len(found.drafted)
        assert all(0 <= a <= d <= found.rounds for a, d in zip(found.accepted, found.drafted, strict=True))
        assert found.accepted == sorted(found.accepted, reverse=True)
        if sum(found.accepted):
            break
    assert sum(found.accepted)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("steps", [1, 3])
def test_short_texts_have_exactly_the_tokens_asked_for(count, steps):
    model, prompt = repeating(model_of("one block", steps)), torch.randint(0, 512, (6,))
    found = speculate(model, prompt, count)
    assert torch.equal(found.tokens, generate(model, prompt, count)) and found.generated == count
    assert (found.rounds == 0) == (count < 2) and (count > 1 or found.accepted_length == 1.0)


def test_a_stop_token_ends_the_text_wherever_it_falls():
    """As the very first token, as a draft that was accepted, as the trunk's own choice after the drafts."""
    inside = 0
    for seed in range(6):
        torch.manual_seed(seed)
        model, prompt = repeating(model_of("one block", 3)), torch.randint(0, 512, (6,))
        text = generate(model, prompt, 24)
        for stop in sorted(set(text[6:].tolist())):
            found = speculate(model, prompt, 24, stop=stop)
            assert torch.equal(found.tokens, generate(model, prompt, 24, stop=stop))
            assert found.generated == len(found.tokens) - 6 == (1 + found.rounds + sum(found.accepted) - int(_ended_inside(found)))
            inside += _ended_inside(found)
    assert inside


def _ended_inside(found):
    """The last pass ended with an accepted draft, so the trunk's own token after it was not taken."""
    return found.generated < 1 + found.rounds + sum(found.accepted)


def test_the_window_may_be_filled_to_its_last_token():
    model, prompt = repeating(model_of("one block", 3)), torch.randint(0, 512, (40,))
    assert torch.equal(speculate(model, prompt, 24).tokens, generate(model, prompt, 24))


def test_speculation_leaves_the_models_mode_and_counts_alone():
    model = model_of("layer", 2).train()
    speculate(model, torch.randint(0, 512, (6,)), 8)
    assert model.training and int(model.mtp.layers[0].layer.mlp.router.counts.sum()) == 0


def test_what_cannot_be_done_is_said_in_one_sentence():
    for model, count, named in (
        (build(load("tiny")), 4, "has no prediction steps"),
        (model_of("one block", 1), 60, r"6 \+ 60 tokens are more than model.max_position_embeddings 64"),
    ):
        with pytest.raises(lab.LabError, match=named) as caught:
            speculate(model, torch.zeros(6, dtype=torch.int64), count)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("arm", ["one block", "blocks of their own", "layer", "normed"])
@pytest.mark.parametrize("steps", [1, 3])
def test_states_at_known_tokens_are_those_of_teacher_forcing(arm, steps):
    """However the text comes in, in jumps of 1 to steps + 1 as acceptance makes them, and however many drafts hung at its end."""
    model, text = model_of(arm, steps), torch.randint(0, 512, (40,))
    drafts = AlignedDrafts(model)
    with torch.no_grad():
        hidden, n = model.hidden(text[None]), 1
        while n < 38:
            drafts.propose(hidden[:, :n], text[: n + 1])
            true = model.ahead(hidden[:, : n + 1], text[None, : n + 1])
            for k in range(1, steps + 1):
                known = n + 1 - k  # positions whose token k ahead is in the text
                assert drafts.caches[k - 1].length == max(0, known)
                state = drafts.states[k - 1][:, : max(0, known)]
                state = state if arm == "normed" else model.mtp.block(k).norm(state)
                torch.testing.assert_close(state, true[k - 1][:, : max(0, known)], rtol=1e-9, atol=1e-9)
            n += int(torch.randint(1, steps + 2, ()))


@pytest.mark.parametrize("steps", [1, 3])
def test_a_draft_is_the_step_applied_to_the_drafts_before_it(steps):
    """Step k's draft reads the drafts of steps 1 ... k - 1 at the last position, without any cache."""
    model, text = model_of("blocks of their own", steps), torch.randint(0, 512, (12,))
    drafts = AlignedDrafts(model)
    with torch.no_grad():
        hidden = model.hidden(text[None, :-1])
        drafts.propose(hidden[:, :4], text[:5]), drafts.propose(hidden[:, :6], text[:7])
        proposal, known = drafts.propose(hidden, text), text
        for k in range(1, steps + 1):
            ahead, h = known, hidden
            for j in range(1, k + 1):
                embedded = model.mtp.embed(ahead[None, j : j + 11], model.embed_tokens)
                h = model.mtp.block(j)(h[:, : embedded.shape[1]], embedded, model.context(h[:, : embedded.shape[1]]))
            assert h.shape[1] == 11
            choice = model.lm_head(model.mtp.block(k).norm(h[:, -1:])).argmax()
            assert proposal[k - 1] == choice
            known = torch.cat((known, choice[None]))


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_drafts_that_are_always_right_gain_every_step(steps):
    """A model of one answer whatever it reads: each pass gains steps + 1 tokens."""
    model = model_of("one block", steps)
    torch.nn.init.zeros_(model.lm_head.weight)
    found = speculate(model, torch.randint(0, 512, (5,)), 1 + 6 * (steps + 1))
    assert found.accepted_length == steps + 1 and found.rounds == 6
    assert found.accepted == found.drafted == [6] * steps


def test_drafts_that_are_always_wrong_gain_nothing_and_change_nothing():
    """Blocks whose norm turns every state round choose the head's least likely token."""
    model, prompt = model_of("blocks of their own", 2), torch.randint(0, 512, (5,))
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[3], model.lm_head.weight[7] = 1.0, -1.0
        model.embed_tokens.weight.fill_(1.0)
        for layer in model.layers:
            for parameter in layer.parameters():
                parameter.zero_()
        for block in model.mtp.layers:
            for parameter in block.layer.parameters():
                parameter.zero_()
            block.eh_proj.weight.copy_(-torch.cat((torch.eye(32), torch.eye(32)), 1))
    found = speculate(model, prompt, 10)
    assert found.tokens[5:].tolist() == [3] * 10 and found.accepted == [0, 0] and found.rounds == 9


def test_a_model_trained_on_a_repeating_text_drafts_it():
    config = load("tiny", "model.mtp.num_nextn_predict_layers=2", "model.mtp.loss_weight=1.0", "model.embedding.std=0.5")
    model = build(config).train()
    text = torch.arange(300, 307).repeat(20)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        tokens = torch.stack([text[start : start + 25] for start in torch.randint(0, 7, (4,)).tolist()])
        batch = lab.data.Batch(tokens[:, :-1], tokens[:, 1:], torch.zeros(4, 24, dtype=torch.int64))
        plan = plan_step(batch, config, 0)
        step_loss(model, batch.tokens, batch.labels, batch.document_ids, config, plan, 1.0)[0].backward()
        optimizer.step(), optimizer.zero_grad()
    found = speculate(model, text[:10], 31)
    assert found.tokens.tolist() == text[:41].tolist()
    assert found.accepted_length == 3.0 and found.rounds == 10


# --- shared selections --------------------------------------------------------------------------------------------------------

LSA = (
    "model.attention.kind=lsa",
    "model.attention.index_topk=12",
    "model.attention.index_local_tokens=4",
    "model.attention.index_head_dim=12",
)


def lsa(*overrides, steps=3):
    config = load("tiny", f"model.mtp.num_nextn_predict_layers={steps}", *LSA, "model.initializer_range=0.2", *overrides)
    return build(config).double().eval()


@pytest.mark.parametrize("shared", ["true", "false"])
@pytest.mark.parametrize("first", [5, 11, 12, 13, 30])
def test_drafting_steps_select_as_in_training(first, shared):
    """Over known text the states of all steps are those of a whole pass, wherever the rounds began and ended."""
    model, tokens = lsa(f"model.attention.dsa_mtp_cli={shared}"), torch.randint(0, 512, (60,))
    with torch.no_grad():
        hidden = model.hidden(tokens[None])
        whole = model.ahead(hidden, tokens[None])
        drafts = AlignedDrafts(model)
        for count in (first, first + 1, first + 4, first + 6):
            drafts.propose(hidden[:, :count], tokens[: count + 1])
    for k, state in enumerate(drafts.states, 1):
        true = count - k + 1  # positions whose token ahead is known
        assert torch.allclose(model.mtp.block(k).norm(state[:, :true]), whole[k - 1][:, :true], atol=1e-9)


@pytest.mark.parametrize("rule", ["slide", "append", "reuse"])
@pytest.mark.parametrize("kind", ["lsa", "mla"])
def test_chained_drafts_give_the_same_text(kind, rule):
    sparse = [f"model.attention.index_mtp_newest={rule}"] if kind == "lsa" else []
    overrides = ["model.mtp.draft_positions=chained", *sparse]
    made = lsa(*overrides) if kind == "lsa" else build(load("tiny", "model.mtp.num_nextn_predict_layers=3", *overrides)).double().eval()
    model, prompt = repeating(made), torch.randint(0, 512, (9,))
    found = speculate(model, prompt, 40)
    assert torch.equal(found.tokens, generate(model, prompt, 40))


def test_chained_steps_stand_behind_the_text_and_see_the_drafts():
    """The first proposal by hand: dense attention, one pass over the known text and then token by token."""
    model, tokens = (
        build(load("tiny", "model.mtp.num_nextn_predict_layers=3", "model.mtp.draft_positions=chained")).double().eval(),
        torch.randint(0, 512, (20,)),
    )
    block = model.mtp.block(1)
    with torch.no_grad():
        hidden = model.hidden(tokens[None, :-1])
        drafts = ChainedDrafts(model).propose(hidden, tokens)
        states, read = hidden, tokens[None, 1:]
        for k in range(3):
            out = block(states, model.mtp.embed(read, model.embed_tokens), model.context(states))
            found = model.lm_head(block.norm(out[:, -1:])).argmax(-1)
            assert int(found) == int(drafts[k])
            states, read = torch.cat((states, out[:, -1:]), 1), torch.cat((read, found), 1)


def test_what_becomes_of_the_newest_keys_is_an_option():
    indices = torch.tensor([[[-1, 0, 5, 7, 18, 19, 20]]], dtype=torch.int32)  # sink 0, window 18 to 20 of a query at 20

    def by(rule):
        attention = load("tiny", *LSA, f"model.attention.index_mtp_newest={rule}", "model.attention.index_local_tokens=3").model.attention
        return [key for key in newest(indices, 2, attention)[0, 0].tolist() if key >= 0]

    assert by("reuse") == [0, 5, 7, 18, 19, 20]
    assert by("append") == [0, 5, 7, 18, 19, 20, 21, 22]
    assert by("slide") == [0, 5, 7, 20, 21, 22]


def test_chained_drafts_need_a_repeated_block():
    with pytest.raises(ConfigError, match="draft_positions chained needs repeat_block"):
        load("tiny", "model.mtp.num_nextn_predict_layers=2", "model.mtp.repeat_block=false", "model.mtp.draft_positions=chained")


@pytest.mark.parametrize("rule", ["window", "random", "oracle", "indexer"])
@pytest.mark.parametrize("newest_rule", ["slide", "append", "reuse"])
def test_chained_drafts_pass_from_dense_to_sparse_with_any_rule(rule, newest_rule):
    """Prompts of 10 tokens: the first rounds see no more than index_topk keys."""
    overrides = ["model.mtp.draft_positions=chained", f"model.attention.index_mtp_newest={newest_rule}"]
    model = repeating(lsa(*overrides, f"model.attention.selection.kind={rule}"))
    prompt = torch.randint(0, 512, (10,))
    assert torch.equal(speculate(model, prompt, 20).tokens, generate(model, prompt, 20))


@pytest.mark.parametrize("decode", ["true", "false"])
def test_drafts_are_judged_by_the_indexing_that_decoding_has(decode):
    pages = f"{{page: 4, block: 2, pages: 3, exempt: 0, from_length: 0, decode: {decode}}}"
    model, prompt = repeating(lsa(f"model.attention.hierarchical={pages}")), torch.randint(0, 512, (30,))
    assert torch.equal(speculate(model, prompt, 20).tokens, generate(model, prompt, 20))
