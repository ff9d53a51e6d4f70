from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import nn

from longcat_lab.blocks.interface import BlockConfig, Budget, ModelShape, register, slot
from longcat_lab.blocks.token_embedding.module import TokenEmbedding


@register("embedding")
class TokenEmbeddingConfig(BlockConfig):
    """The input embedding: a row a token, and n-gram tables beside it where `ngram` is given."""

    kind: Literal["token"] = "token"
    std: float | None = Field(None, gt=0, description="RMS of the embedding's output at initialisation; empty: initializer_range")
    ngram: slot("ngram") | None = Field(None, description="n-gram embedding; empty for none")

    def check(self, shape: ModelShape) -> None:
        if self.ngram is not None:
            self.ngram.check(shape)

    def budget(self, shape: ModelShape) -> Budget:
        own = Budget(params=shape.vocab_size * shape.hidden_size)  # looked up, not multiplied: not active
        return own + (self.ngram.budget(shape) if self.ngram else Budget())

    def build(self, shape: ModelShape) -> nn.Module:
        std = self.std or shape.initializer_range
        return self.ngram.build(shape, std) if self.ngram else TokenEmbedding(shape.vocab_size, shape.hidden_size, std)
