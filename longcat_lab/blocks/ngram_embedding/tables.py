from __future__ import annotations

import torch
from torch import Tensor, nn

from longcat_lab.blocks.context import ForwardContext, taken
from longcat_lab.blocks.ngram_embedding.hash_config import HashSettings
from longcat_lab.blocks.ngram_embedding.hash_op import lone_tokens, ngram_rows, segments, shifted
from longcat_lab.blocks.table import Table


class NgramAddresses(nn.Module):
    """Rows that each token reads in tables that lie one behind the other. Holds the hash's numbers and no parameters."""

    def __init__(self, settings: HashSettings, vocab_size: int, salt: int = 0) -> None:
        super().__init__()
        self.plan, self.splits = settings.plan(vocab_size, salt), settings.splits
        sizes = self.plan.moduli
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        for name, value in (("weights", self.plan.weights), ("moduli", sizes), ("starts", starts)):
            self.register_buffer(name, torch.tensor(value, dtype=torch.int64, device="cpu"), persistent=False)
        self.register_buffer("permutation", self.plan.permutation(), persistent=False)

    @property
    def rows(self) -> int:
        return sum(self.plan.moduli)

    def forward(self, tokens: Tensor, document_ids: Tensor | None = None, history: Tensor | None = None) -> Tensor:
        """int64 [B, T] to [B, T, E].

        Args:
            document_ids: int64 [B, T], or None for one document a row.
            history: int64 [B, h], tokens before these in the same document (decoding, which has one document a row); the last
                order - 1 of them are read, so a cache of that many is enough.
        """
        plan, length = self.plan, tokens.shape[1]
        if history is not None:
            tokens, document_ids = torch.cat((history[:, max(0, history.shape[1] - plan.lags) :], tokens), 1), None
        ids, hole = tokens, plan.hole
        if self.permutation is not None:
            ids, hole = self.permutation[tokens], plan.hole_among(self.permutation)
        lags = shifted(ids, segments(tokens, document_ids, plan), lone_tokens(tokens, plan), hole, plan.lags)
        rows = ngram_rows([lag[:, -length:] for lag in lags], self.weights, self.moduli, self.splits, plan.xor)
        return rows.add_(self.starts)

    def of(self, context: ForwardContext) -> Tensor:
        """The rows of the tokens of this pass, reckoned once where several blocks have the same hash."""
        known = context.shared.setdefault("ngram_rows", {})
        if self.plan not in known:
            known[self.plan] = taken(self(context.tokens, context.document_ids, context.history), context.part)
        return known[self.plan]


class HashedTables(Table):
    """E tables of n-grams in one parameter `weight` [sum of rows, d], one behind the other."""

    def __init__(self, settings: HashSettings, vocab_size: int, width: int, std: float, salt: int = 0) -> None:
        addresses = NgramAddresses(settings, vocab_size, salt)
        super().__init__(addresses.rows, width, std)
        self.addresses = addresses
