from __future__ import annotations

from typing import Literal

from pydantic import Field

from longcat_lab.blocks.interface import BlockConfig, Budget, ModelShape, register
from longcat_lab.blocks.ngram_embedding.module import NgramEmbedding
from longcat_lab.blocks.ngram_embedding.op import table_moduli
from longcat_lab.node import ConfigError


@register("ngram")
class NgramEmbeddingConfig(BlockConfig):
    """LongCat's n-gram embedding: hashed tables for orders 2 to `order`, `splits` a order, mean fusion, documents as boundaries."""

    kind: Literal["ngram_embedding"] = "ngram_embedding"
    order: int = Field(3, ge=2, description="longest n-gram, in tokens; orders 2 to this one have tables")
    splits: int = Field(2, ge=1, description="hash tables for each order")
    vocab_ratio: float = Field(
        12.567, gt=0, le=1000, description="rows of a table as a multiple of vocab_size; keep away from simple fractions"
    )
    table_init_ratio: float = Field(
        1.0, ge=0, description="RMS of each table's branch over that of the token's, at initialisation; 0 starts with empty tables"
    )
    normalised_init: bool = Field(True, description="scale the mean so that it starts with the RMS of the plain embedding")

    def check(self, shape: ModelShape) -> None:
        tables = (self.order - 1) * self.splits
        if shape.hidden_size % tables:
            raise ConfigError(
                f"model.embedding.ngram: {tables} tables ((order - 1) * splits) do not divide hidden_size {shape.hidden_size}: "
                "change order, splits or hidden_size."
            )

    def budget(self, shape: ModelShape) -> Budget:
        moduli = table_moduli(shape.vocab_size, self.vocab_ratio, self.order, self.splits)
        tables = sum(moduli) * (shape.hidden_size // len(moduli))
        return Budget(params=tables) + Budget.of_weights(shape.hidden_size**2)

    def build(self, shape: ModelShape, std: float) -> NgramEmbedding:
        """`std`: RMS that the output starts with."""
        return NgramEmbedding(self, shape, std)
