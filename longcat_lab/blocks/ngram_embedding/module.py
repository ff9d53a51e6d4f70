from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from longcat_lab.blocks.context import ForwardContext, Part, taken
from longcat_lab.blocks.interface import ModelShape
from longcat_lab.blocks.ngram_embedding.op import fuse
from longcat_lab.blocks.ngram_embedding.tables import HashedTables
from longcat_lab.blocks.token_embedding.module import TokenEmbedding

if TYPE_CHECKING:
    from longcat_lab.blocks.ngram_embedding.config import NgramEmbeddingConfig

NORM_EPS = 1e-12  # torch's 1e-5 is more than the mean square of a quiet start (16 tables at an initializer_range of 0.006)
SHARE_TOKENS = 256  # whose outputs are taken apart for the log


class NgramEmbedding(TokenEmbedding):
    """The token's row and E = (order - 1) * splits projected hashed rows, fused. [B, T] to [B, T, H].

    It is a token embedding with tables, so that the token's rows have the name, and with it the initial values (up to a factor under
    `normalised_init: rows`), that they have without tables: arms stay paired.
    """

    def __init__(self, config: NgramEmbeddingConfig, shape: ModelShape, std: float) -> None:
        *scales, divisor = config.output_scales(shape.hidden_size)
        super().__init__(shape.vocab_size, shape.hidden_size, std / divisor)
        self.config, self.width = config, config.width(shape)
        self.scales = tuple(scales)
        reads_at_input = 0 in config.injection_layers
        self.tables = HashedTables(config, shape.vocab_size, self.width, config.table_init_ratio * self.std)
        features = config.tables * self.width
        self.projection = nn.Linear(features, shape.hidden_size, bias=False) if reads_at_input else None
        self.layer_projections = nn.ModuleDict(
            {str(layer): nn.Linear(features, shape.hidden_size, bias=False) for layer in config.injection_layers if layer > 0}
        )
        self.norm = (
            nn.LayerNorm(shape.hidden_size, eps=NORM_EPS, bias=False) if config.amplifier == "layer_norm" and reads_at_input else None
        )

    def initial_std(self) -> dict[str, float]:
        # A branch is a sum of `width` products, so its RMS is that of the table's entries with these projections.
        names = ["projection.weight"] if self.projection is not None else []
        names += [f"layer_projections.{layer}.weight" for layer in self.layer_projections]
        return {**super().initial_std(), **dict.fromkeys(names, self.width**-0.5)}

    def forward(
        self, tokens: Tensor, document_ids: Tensor | None = None, history: Tensor | None = None, part: Part | None = None
    ) -> Tensor:
        """`history`: int64 [B, h], tokens before these in the same document (decoding); the last order - 1 of them are read."""
        token = super().forward(tokens, part=part)
        if self.projection is None:
            return token
        read = self.tables.read(taken(self.tables.addresses(tokens, document_ids, history), part))
        if self.training:
            self._seen = taken(tokens, part).detach(), read.detach()
        out = fuse(token, read, self.projection.weight, *self.scales)
        return out if self.norm is None else self.norm(out)

    def enter(self, point: int, x: Tensor, context: ForwardContext) -> Tensor:
        name = str(point)
        if name not in self.layer_projections:
            return x
        read = self.tables.read(self.tables.addresses.of(context))
        return x + self.config.ngram_scale * self.layer_projections[name](read.flatten(-2))

    _seen: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def statistics(self) -> dict[str, float]:
        """base_variance_share: of the fused output's mean square, what the token's row brings (a few tokens of the last pass)."""
        if self._seen is None or self.projection is None or self.tables.idle:
            return {}
        tokens, read = (each.flatten(0, 1)[:SHARE_TOKENS] for each in self._seen)
        token = self.scales[0] * self.weight[tokens]
        rest = self.scales[1] * nn.functional.linear(read.flatten(-2), self.projection.weight)
        total = float(token.square().mean() + rest.square().mean())
        return {"base_variance_share": float(token.square().mean()) / total if total else 0.0}
