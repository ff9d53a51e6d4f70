from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from longcat_lab.blocks.interface import ModelShape
from longcat_lab.blocks.ngram_embedding.op import fuse_reference, ngram_rows, table_moduli
from longcat_lab.blocks.token_embedding.module import TokenEmbedding

if TYPE_CHECKING:
    from longcat_lab.blocks.ngram_embedding.config import NgramEmbeddingConfig


class NgramEmbedding(TokenEmbedding):
    """Mean of the token's embedding and of E = (order - 1) * splits projected hashed tables. [B, T] to [B, T, H].

    All tables lie in one parameter `tables` [sum of rows, H / E], one behind the other. It is a token embedding with tables, so
    that the token's rows have the name, and with it the initial values, that they have without tables: arms stay paired.
    """

    roles: ClassVar[dict[str, str]] = {**TokenEmbedding.roles, "tables": "table"}
    idle = False  # carried along and never read (LongCat-2.0's prediction module)

    def __init__(self, config: NgramEmbeddingConfig, shape: ModelShape, std: float) -> None:
        super().__init__(shape.vocab_size, shape.hidden_size, std)
        self.config = config
        moduli = table_moduli(shape.vocab_size, config.vocab_ratio, config.order, config.splits)
        count, self.width = len(moduli), shape.hidden_size // len(moduli)
        self.tables = nn.Parameter(torch.empty(sum(moduli), self.width))
        self.projection = nn.Linear(shape.hidden_size, shape.hidden_size, bias=False)
        # E branches with `ratio` times the token's RMS s: their sum has s * sqrt(1 + E ratio^2), the mean 1 / (E + 1) of it.
        self.scale = (count + 1) / (1 + count * config.table_init_ratio**2) ** 0.5 if config.normalised_init else 1.0
        weights = [
            [pow(shape.vocab_size, j, m) if j < table // config.splits + 2 else 0 for table, m in enumerate(moduli)]
            for j in range(config.order)
        ]
        starts = [sum(moduli[:i]) for i in range(count)]
        for name, value in (("weights", weights), ("moduli", moduli), ("starts", starts)):
            self.register_buffer(f"hash_{name}", torch.tensor(value, dtype=torch.int64, device="cpu"), persistent=False)
        self.register_buffer("touched", torch.zeros(sum(moduli), dtype=torch.bool), persistent=False)

    def initial_std(self) -> dict[str, float]:
        # A branch is a sum of `width` products, so its RMS is that of the table's entries with this projection.
        return {**super().initial_std(), "tables": self.config.table_init_ratio * self.std, "projection.weight": self.width**-0.5}

    def rows(self, tokens: Tensor, document_ids: Tensor | None) -> Tensor:
        """Rows of `tables` that each token reads, int64 [B, T, E]."""
        return ngram_rows(tokens, document_ids, self.hash_weights, self.hash_moduli) + self.hash_starts

    def forward(self, tokens: Tensor, document_ids: Tensor | None = None, history: Tensor | None = None) -> Tensor:
        """`history`: int64 [B, h], tokens before these in the same document (decoding); the last order - 1 of them are read."""
        if history is None:
            rows = self.rows(tokens, document_ids)
        else:
            before = history[:, max(0, history.shape[1] - self.config.order + 1) :]
            rows = self.rows(torch.cat((before, tokens), 1), None)[:, before.shape[1] :]
        if self.training:
            self.touched[rows.flatten()] = True
        read = nn.functional.embedding(rows, self.tables)
        return fuse_reference(super().forward(tokens), read, self.projection.weight, self.scale)

    @torch.no_grad()
    def statistics(self) -> dict[str, float]:
        if self.idle:
            return {}
        return {"rows_touched": float(self.touched.float().mean()), "table_rms": float(self.tables.square().mean().sqrt())}

    def not_engaged(self, measured: dict[str, float]) -> list[str]:
        return [] if self.idle or measured.get("table_rms") else ["its tables are still empty"]
