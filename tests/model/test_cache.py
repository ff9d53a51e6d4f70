"""Decoding with a cache equals decoding without one, whatever the model is made of and however the text comes in."""

import pytest
import torch

from longcat_lab.blocks import Cache
from longcat_lab.config import load
from longcat_lab.model import build, generate

NGRAM = "model.embedding.ngram.order=4"
DECODER = ("model.num_layers=2", "model.layer.kind=decoder", "model.layer.first_k_dense_replace=1")
YARN = ("model.rope.kind=yarn", "model.rope.factor=8", "model.rope.original_max_position_embeddings=16")
ARMS = {
    "plain": (),
    "n-grams": (NGRAM, "model.embedding.ngram.splits=1", "model.hidden_size=48"),
    "serial": ("model.layer.kind=serial", "model.num_layers=2"),
    "decoder": DECODER,
    "no query latent": ("model.attention.q_lora_rank=null",),
    "yarn": YARN,
    "copy": ("model.moe.zero_expert_type=copy", "model.moe.n_shared_experts=1"),
    "sigmoid": ("model.moe.scoring_func=sigmoid", "model.moe.norm_topk_prob=true"),
}


def model_of(arm, *overrides):
    return build(load("tiny", *ARMS[arm], "model.initializer_range=0.2", *overrides)).double().eval()


@pytest.mark.parametrize("arm", ARMS)
def test_cached_generation_is_the_uncached_one(arm):
    model, prompt = model_of(arm), torch.randint(0, 512, (7,))
    found = generate(model, prompt, 20)
    assert torch.equal(found, generate(model, prompt, 20, cached=False))
    assert len(set(found[7:].tolist())) > 3
    sampled = [generate(model, prompt, 20, temperature=1.0, seed=3, cached=cached) for cached in (True, False)]
    assert torch.equal(*sampled) and not torch.equal(sampled[0], found)


@pytest.mark.parametrize("arm", ARMS)
def test_a_text_read_in_pieces_has_the_states_of_the_whole(arm):
    model, tokens = model_of(arm), torch.randint(0, 512, (2, 40))
    with torch.no_grad():
        whole = model.hidden(tokens)
        for sizes in ([40], [1, 39], [16, 16, 8], [17, 1, 1, 21], [5] * 8):
            cache = Cache()
            pieces = [model.hidden(piece, cache=cache) for piece in tokens.split(sizes, 1)]
            torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-9, atol=1e-9)
            assert cache.length == 40 and torch.equal(cache.tokens, tokens)


@pytest.mark.parametrize("arm", ["plain", "n-grams", "decoder"])
def test_after_a_cut_the_cache_is_as_if_the_rest_had_never_come(arm):
    model, tokens, other = model_of(arm), torch.randint(0, 512, (1, 40)), torch.randint(0, 512, (1, 25))
    with torch.no_grad():
        for kept in (0, 1, 15, 16, 17, 29):
            cache = Cache()
            model.hidden(tokens[:, :20], cache=cache), model.hidden(tokens[:, 20:30], cache=cache)
            cache.cut(kept)
            assert cache.length == kept
            found = model.hidden(other, cache=cache)
            text = torch.cat((tokens[:, :kept], other), 1)
            torch.testing.assert_close(found, model.hidden(text)[:, kept:], rtol=1e-9, atol=1e-9)
            assert torch.equal(cache.tokens, text)


def test_cutting_behind_the_end_changes_nothing():
    model, tokens, cache = model_of("plain"), torch.randint(0, 512, (1, 9)), Cache()
    cache.cut(4)
    assert cache.length == 0 and cache.tokens is None
    with torch.no_grad():
        model.hidden(tokens, cache=cache)
    cache.cut(12)
    assert cache.length == 9 and torch.equal(cache.tokens, tokens)


@pytest.mark.parametrize("length", [50, 62, 63, 64, 65, 80])
def test_text_that_outgrows_the_window_goes_on_over_its_last_tokens(length):
    """From token 65 on each choice is the one over the last 64 tokens, their positions counted anew."""
    model, prompt = model_of("n-grams"), torch.randint(0, 512, (length,))
    found = generate(model, prompt, 12)
    assert torch.equal(found, generate(model, prompt, 12, cached=False))
    with torch.no_grad():
        for i in range(length, length + 12):
            assert found[i] == model(found[None, max(0, i - 64) : i])[0, -1].argmax()


def test_no_new_tokens_and_one_token_of_prompt():
    model, prompt = model_of("plain"), torch.randint(0, 512, (1,))
    assert torch.equal(generate(model, prompt, 0), prompt)
    assert torch.equal(generate(model, prompt, 9), generate(model, prompt, 9, cached=False))


def test_a_stop_token_ends_the_text_in_both_ways():
    model, prompt = model_of("plain"), torch.randint(0, 512, (5,))
    found = generate(model, prompt, 12)
    for i in (5, 9):
        first = found.tolist().index(int(found[i]), 5)
        for cached in (True, False):
            assert torch.equal(generate(model, prompt, 12, stop=int(found[i]), cached=cached), found[: first + 1])


def test_the_cache_keeps_the_latents_and_nothing_wider():
    """As the budget's bytes a token say: kv_lora_rank + qk_rope_head_dim numbers for each attention."""
    config, tokens, cache = load("tiny"), torch.randint(0, 512, (1, 20)), Cache()
    with torch.no_grad():
        build(config).eval().hidden(tokens, cache=cache)
    widths = [sum(store.shape[-1] for store in stores) for stores in cache._kept.values()]
    assert widths == [8 + 8] * 2  # two attentions


def test_generation_neither_trains_nor_counts():
    model, prompt = (
        build(load("tiny", NGRAM, "model.embedding.ngram.splits=1", "model.hidden_size=48")).train(),
        torch.randint(0, 512, (5,)),
    )
    generate(model, prompt, 4)
    assert model.training and int(model.layers[0].mlp.router.counts.sum()) == 0 and not model.embed_tokens.tables.touched.any()
