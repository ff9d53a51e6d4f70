"""Greedy speculative decoding with the model's own prediction steps as the draft: same tokens, fewer passes through the trunk."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from longcat_lab.blocks import Cache
from longcat_lab.blocks.token_embedding.module import check_tokens
from longcat_lab.errors import LabError
from longcat_lab.model.drafts import AlignedDrafts, ChainedDrafts
from longcat_lab.model.generate import evaluating


@dataclass(frozen=True)
class Speculation:
    """What speculative decoding gave.

    tokens: int64 [T + generated], exactly what plain greedy decoding gives.
    rounds: verifying passes through the trunk; drafted, accepted: draft tokens by prediction step (lists of D integers).
    """

    tokens: Tensor
    generated: int
    rounds: int
    drafted: list[int]
    accepted: list[int]

    @property
    def accepted_length(self) -> float:
        """Tokens gained by one verifying pass in the mean: 1 (the trunk's own) to D + 1."""
        return 1 + sum(self.accepted) / self.rounds if self.rounds else 1.0


@torch.no_grad()
def speculate(model: torch.nn.Module, tokens: Tensor, count: int, stop: int | None = None) -> Speculation:
    """Continues `tokens` greedily by up to `count` tokens; drafts come from the prediction steps, the trunk verifies them.

    A draft is kept where it equals the trunk's own choice, so the text is that of `generate(..., temperature=0)`, token for token.

    Args:
        tokens: int64 [T], T at least 1, T + count at most max_position_embeddings.
        stop: a token that ends the text (it is kept).

    Raises:
        LabError: the model has no prediction steps, or the text would not fit into its window, or a token is outside the
            vocabulary.
    """
    if model.mtp is None:
        raise LabError("speculate: this model has no prediction steps; set model.mtp.num_nextn_predict_layers and train it.")
    if len(tokens) + count > model.config.max_position_embeddings:
        raise LabError(
            f"speculate: {len(tokens)} + {count} tokens are more than model.max_position_embeddings "
            f"{model.config.max_position_embeddings}; ask for fewer."
        )
    check_tokens(tokens, model.config.vocab_size)
    if count < 1:
        steps = model.config.mtp.num_nextn_predict_layers
        return Speculation(tokens, 0, 0, [0] * steps, [0] * steps)
    with evaluating(model):
        return _speculate(model, tokens, len(tokens) + count, stop)


def _speculate(model: torch.nn.Module, tokens: Tensor, end: int, stop: int | None) -> Speculation:
    chained = model.config.mtp.draft_positions == "chained"
    drafts, cache, start = (ChainedDrafts if chained else AlignedDrafts)(model), Cache(), len(tokens)
    drafted, accepted, rounds = [0] * drafts.steps, [0] * drafts.steps, 0
    hidden = model.hidden(tokens[None], cache=cache)
    tokens = torch.cat((tokens, _choices(model, hidden[:, -1:])))
    while len(tokens) < end and not (stop is not None and int(tokens[-1]) == stop):
        # The last round drafts as many as any other, so that its accepted length counts alike; what is too long is cut off below.
        proposal = drafts.propose(hidden, tokens)
        fresh = model.hidden(torch.cat((tokens[-1:], proposal))[None], cache=cache)
        own = _choices(model, fresh)
        agrees = (proposal == own[:-1]).tolist()
        kept = agrees.index(False) if False in agrees else len(agrees)
        gained = own[: kept + 1]  # the accepted drafts are the trunk's own choices; one more comes for nothing
        if stop is not None and stop in gained.tolist():
            gained = gained[: gained.tolist().index(stop) + 1]
        rounds += 1
        for k in range(len(proposal)):
            drafted[k] += 1
            accepted[k] += int(k < min(kept, len(gained)))
        tokens = torch.cat((tokens, gained))
        cache.cut(len(tokens) - 1)
        hidden = torch.cat((hidden, fresh), 1)[:, : len(tokens) - 1]
    tokens = tokens[:end]
    return Speculation(tokens, len(tokens) - start, rounds, drafted, accepted)


def _choices(model: torch.nn.Module, hidden: Tensor) -> Tensor:
    """The trunk's choice after each position; hidden [1, T, H], int64 [T]."""
    return model.lm_head(model.norm(hidden)).argmax(-1)[0]
