from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from longcat_lab.blocks.context import ForwardContext
from longcat_lab.blocks.engram.op import convolve, gate
from longcat_lab.blocks.interface import Block, ModelShape
from longcat_lab.blocks.ngram_embedding.tables import HashedTables
from longcat_lab.blocks.token_embedding.module import TokenEmbedding

if TYPE_CHECKING:
    from longcat_lab.blocks.engram.config import EngramConfig

SHUT = 0.01  # a mean gate below this lets nothing through


class EngramLayer(Block):
    """What stands before one layer: `engram_reference` on tables of its own. h [B, T, H] to [B, T, H].

    W_K and W_V start with a standard deviation of w^-0.5 (w: width of the concatenated rows) and the tables with `std`, so that W_V e
    starts with RMS `std`, as the token's rows do; the gate halves it.
    """

    roles: ClassVar[dict[str, str]] = {"conv": "vector"}  # a filter for each channel, no matrix

    def __init__(self, config: EngramConfig, shape: ModelShape, std: float, layer: int) -> None:
        super().__init__()
        width = config.width(shape)
        self.features, self.config = config.tables * width, config
        self.tables = HashedTables(config, shape.vocab_size, width, std, salt=layer)
        self.key = nn.Linear(self.features, shape.hidden_size, bias=False)
        self.value = nn.Linear(self.features, shape.hidden_size, bias=False)
        self.hidden_norm, self.key_norm = shape.norm.build(shape), shape.norm.build(shape)
        self.conv_norm = shape.norm.build(shape) if config.conv_kernel else None
        self.conv = nn.Parameter(torch.empty(config.conv_kernel, shape.hidden_size)) if config.conv_kernel else None
        self._gate: Tensor | None = None

    def initial_std(self) -> dict[str, float]:
        own = {"key.weight": self.features**-0.5, "value.weight": self.features**-0.5}
        return own if self.conv is None else {**own, "conv": 0.0}

    def forward(self, h: Tensor, context: ForwardContext) -> Tensor:
        e = self.tables.read(self.tables.addresses.of(context)).flatten(-2)
        alpha = gate(self.hidden_norm(h), self.key_norm(self.key(e)))
        if self.training:
            self._gate = alpha.detach()
        v = alpha[..., None] * self.value(e)
        return h + v if self.conv is None else h + v + nn.functional.silu(self.convolved(self.conv_norm(v), context))

    def convolved(self, v: Tensor, context: ForwardContext) -> Tensor:
        """The convolution over v [B, T, H] and, while decoding, over what the cache has of the tokens before. [B, T, H]."""
        reach, documents = (len(self.conv) - 1) * self.config.order, context.document_ids
        if self.config.conv_boundary == "none":
            documents = None
        if context.cache is None or reach == 0:
            return convolve(v, self.conv, self.config.order, documents)
        if context.cache.length:
            documents = None  # one document a row
        (seen,) = context.cache.extend(self, v)
        return convolve(seen[:, -(v.shape[1] + reach) :], self.conv, self.config.order, documents)[:, -v.shape[1] :]

    @torch.no_grad()
    def statistics(self) -> dict[str, float]:
        """gate: mean of alpha over the last pass; gate_spread: its standard deviation over tokens."""
        if self._gate is None:
            return {}
        spread = self._gate.float().std(correction=0)
        return {"gate": float(self._gate.float().mean()), "gate_spread": float(spread)}

    def not_engaged(self, measured: dict[str, float]) -> list[str]:
        if self.tables.idle or measured.get("gate", 0.0) >= SHUT:
            return []
        return [f"its gate is shut (mean {measured['gate']:.3f})" if "gate" in measured else "its gate made no step"]


class Engram(TokenEmbedding):
    """The token's row at the input and an `EngramLayer` before each of `injection_layers`. tokens int64 [B, T] to [B, T, H]."""

    whole_rows = True

    def __init__(self, config: EngramConfig, shape: ModelShape, std: float) -> None:
        super().__init__(shape.vocab_size, shape.hidden_size, std)
        self.engrams = nn.ModuleDict({str(layer): EngramLayer(config, shape, std, layer) for layer in config.injection_layers})

    def enter(self, point: int, x: Tensor, context: ForwardContext) -> Tensor:
        name = str(point)
        return self.engrams[name](x, context) if name in self.engrams else x
