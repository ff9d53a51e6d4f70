"""Text from a model, one token after the other."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def generate(
    model: torch.nn.Module, tokens: Tensor, count: int, temperature: float = 0.0, seed: int = 0, stop: int | None = None
) -> Tensor:
    """Continues `tokens` by up to `count` tokens. The whole window is computed anew for each token: for a look, not for serving.

    Args:
        tokens: int64 [T], T at least 1; the last max_position_embeddings of it are seen.
        temperature: 0 is greedy.
        stop: a token that ends the text (it is kept).

    Returns:
        int64 [T + at most count].
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    window, was_training = model.config.max_position_embeddings, model.training
    model.eval()
    for _ in range(count):
        logits = model(tokens[None, -window:])[0, -1].float().cpu()
        if temperature > 0:
            chosen = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        else:
            chosen = logits.argmax(keepdim=True)
        tokens = torch.cat((tokens, chosen.to(tokens.device)))
        if stop is not None and int(chosen) == stop:
            break
    model.train(was_training)
    return tokens
