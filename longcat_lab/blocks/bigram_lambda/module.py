from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from longcat_lab.blocks.context import ForwardContext
from longcat_lab.blocks.interface import ModelShape
from longcat_lab.blocks.ngram_embedding.tables import HashedTables, NgramAddresses
from longcat_lab.blocks.token_embedding.module import TokenEmbedding

if TYPE_CHECKING:
    from longcat_lab.blocks.bigram_lambda.config import BigramLambdaConfig

SIGNS = 1  # salt of the second hash


class BigramLambda(TokenEmbedding):
    """The token's row at the input; before layer l, x += lambda_l sum_i B_i[H_i] (times fixed signs). [B, T] to [B, T, H].

    B starts with zeros and lambda_l with `lambda_init`: the model starts as the plain one, and B has a gradient from the first step on.
    """

    def __init__(self, config: BigramLambdaConfig, shape: ModelShape, std: float) -> None:
        super().__init__(shape.vocab_size, shape.hidden_size, std)
        self.lambda_init, self.layers = config.lambda_init, config.layers(shape)
        self.tables = HashedTables(config, shape.vocab_size, shape.hidden_size, 0.0)
        self.lambdas = nn.Parameter(torch.empty(len(self.layers)))
        self.sign_addresses = NgramAddresses(config.sign_settings(), shape.vocab_size, salt=SIGNS) if config.sign_rows else None
        signs = None
        if self.sign_addresses is not None:
            size = (self.sign_addresses.rows, shape.hidden_size)
            signs = torch.empty(size, dtype=torch.int8)
            if not signs.is_meta:
                generator = torch.Generator(device="cpu").manual_seed(config.hash_seed)
                signs.copy_(torch.randint(0, 2, size, generator=generator, dtype=torch.int8, device="cpu") * 2 - 1)
        self.register_buffer("signs", signs, persistent=False)  # fixed and drawn anew: no part of the weights

    def initial_value(self) -> dict[str, float]:
        return {"lambdas": self.lambda_init}

    def enter(self, point: int, x: Tensor, context: ForwardContext) -> Tensor:
        if point not in self.layers:
            return x
        if "bigram_rows" not in context.shared:  # the same at all layers: one gradient for the table
            context.shared["bigram_rows"] = self.rows(context)
        return x + self.lambdas[self.layers.index(point)] * context.shared["bigram_rows"]

    def rows(self, context: ForwardContext) -> Tensor:
        """What enters, before any scale: [B, T, H]."""
        read = self.tables.read(self.tables.addresses.of(context))
        if self.sign_addresses is not None:
            read = read * self.signs[self.sign_addresses.of(context)]
        return read.sum(-2)

    @torch.no_grad()
    def statistics(self) -> dict[str, float]:
        """mean_lambda: mean of the scales' absolute values."""
        return {} if self.tables.idle else {"mean_lambda": float(self.lambdas.abs().mean())}

    @torch.no_grad()
    def distributions(self) -> dict[str, list[float]]:
        return {} if self.tables.idle else {"lambdas": self.lambdas.tolist()}

    def not_engaged(self, measured: dict[str, float]) -> list[str]:
        shut = not self.tables.idle and not measured.get("mean_lambda")
        return ["its scales are 0: no row enters the residual stream"] if shut else []
