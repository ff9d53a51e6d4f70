"""Text from a model, one token after the other, with a cache of what the layers keep of earlier tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from longcat_lab.blocks import Cache
from longcat_lab.blocks.token_embedding.module import check_tokens


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode inside, and afterwards, whatever happened, the mode from before."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@torch.no_grad()
def generate(
    model: torch.nn.Module,
    tokens: Tensor,
    count: int,
    temperature: float = 0.0,
    seed: int = 0,
    stop: int | None = None,
    cached: bool = True,
) -> Tensor:
    """Continues `tokens` by up to `count` tokens.

    While all tokens fit into max_position_embeddings each new one costs one pass over itself; beyond, the last
    max_position_embeddings tokens are computed anew for each (their positions move).

    Args:
        tokens: int64 [T], T at least 1.
        temperature: 0 is greedy.
        stop: a token that ends the text (it is kept).
        cached: False computes everything anew for each token; for comparison.

    Returns:
        int64 [T + at most count].

    Raises:
        LabError: a token is outside the vocabulary.
    """
    check_tokens(tokens, model.config.vocab_size)
    generator = torch.Generator(device="cpu").manual_seed(seed)
    window = model.config.max_position_embeddings
    cache = Cache() if cached and len(tokens) <= window else None
    fresh = tokens[None, -window:]
    with evaluating(model):
        for _ in range(count):
            if cache is not None and cache.length + fresh.shape[1] > window:
                cache, fresh = None, tokens[None, -window:]
            hidden = model.hidden(fresh, cache=cache)[:, -1:]
            logits = model.lm_head(model.norm(hidden))[0, -1].float().cpu()
            if temperature > 0:
                chosen = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
            else:
                chosen = logits.argmax(keepdim=True)
            tokens = torch.cat((tokens, chosen.to(tokens.device)))
            if stop is not None and int(chosen) == stop:
                break
            fresh = tokens[None, -1:] if cache is not None else tokens[None, -window:]
    return tokens
