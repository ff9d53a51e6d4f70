from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from longcat_lab.blocks.context import Part, taken
from longcat_lab.blocks.interface import ModelShape
from longcat_lab.blocks.ngram_embedding.tables import HashedTables
from longcat_lab.blocks.token_embedding.module import TokenEmbedding

if TYPE_CHECKING:
    from longcat_lab.blocks.hash_sum.config import HashSumConfig


class HashSum(TokenEmbedding):
    """e = (E_0[t] + sum_i E_i[H_i]) / (E + 1), every row H wide. tokens int64 [B, T] to [B, T, H]."""

    def __init__(self, config: HashSumConfig, shape: ModelShape, std: float) -> None:
        # A mean of E rows with `ratio` times the token's RMS and of the token's: sqrt(1 + E ratio^2) / (E + 1) of it.
        gain = (1 + config.tables * config.table_init_ratio**2) ** 0.5 / (config.tables + 1)
        super().__init__(shape.vocab_size, shape.hidden_size, std / gain if config.normalised_init else std)
        self.tables = HashedTables(config, shape.vocab_size, shape.hidden_size, config.table_init_ratio * self.std)

    def forward(
        self, tokens: Tensor, document_ids: Tensor | None = None, history: Tensor | None = None, part: Part | None = None
    ) -> Tensor:
        """`history`: int64 [B, h], tokens before these in the same document (decoding); the last order - 1 of them are read."""
        token = super().forward(tokens, part=part)
        read = self.tables.read(taken(self.tables.addresses(tokens, document_ids, history), part))  # [B, T, E, H]
        return (token + read.sum(-2)) / (read.shape[-2] + 1)
