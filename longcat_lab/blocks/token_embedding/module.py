from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from longcat_lab.blocks.interface import Block


class TokenEmbedding(Block):
    """One row a token. tokens int64 [B, T] to [B, T, H]; document ids and history are taken and not needed."""

    roles: ClassVar[dict[str, str]] = {"weight": "embedding"}

    def __init__(self, vocab_size: int, hidden_size: int, std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))
        self.std = std

    def initial_std(self) -> dict[str, float]:
        return {"weight": self.std}

    def forward(self, tokens: Tensor, document_ids: Tensor | None = None, history: Tensor | None = None) -> Tensor:
        return nn.functional.embedding(tokens, self.weight)
