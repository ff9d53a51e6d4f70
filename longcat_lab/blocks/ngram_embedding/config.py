from __future__ import annotations

from typing import Literal

from pydantic import Field

from longcat_lab.blocks.interface import Budget, ModelShape, register
from longcat_lab.blocks.ngram_embedding.hash_config import HashSettings
from longcat_lab.blocks.ngram_embedding.module import NgramEmbedding
from longcat_lab.node import ConfigError


@register("ngram", default=True)
class NgramEmbeddingConfig(HashSettings):
    """LongCat's n-gram embedding: hashed tables for orders 2 to `order`, `splits` a order, and one projection of what they hold.

        e = c (a E_0[t] + b sum_i W_i E_i[H_i])      mean: a = b = 1 / (E + 1); sum: a = base_scale, b = ngram_scale; concat: a = b = 1

    c is 1 where normalised_init is not `scale` and there is no amplifier: the published runtimes' mean.
    Source: LongCat-Flash-Lite (arXiv 2601.21204) eq. 2 and 3; section 3.2.4 for the amplifier.
    """

    kind: Literal["ngram_embedding"] = "ngram_embedding"
    fusion: Literal["mean", "sum", "concat"] = Field(
        "mean", description="mean of token and tables (LongCat); sum with base_scale and ngram_scale; concat: token plus projected rows"
    )
    base_scale: float = Field(1.0, ge=0, description="of the token's row, under fusion sum")
    ngram_scale: float = Field(1.0, gt=0, description="of the projected rows, under fusion sum, and where they enter at layers")
    amplifier: Literal["none", "sqrt_hidden", "layer_norm"] = Field(
        "none", description="the output times sqrt(hidden_size), or LayerNorm of it with a gain and no shift"
    )
    table_init_ratio: float = Field(
        1.0, ge=0, description="RMS of each table's branch over that of the token's row, at initialisation; 0 starts with empty tables"
    )
    normalised_init: Literal["scale", "rows", "none"] = Field(
        "scale",
        description="how the output is made to start with the RMS of the plain embedding. scale: by a constant factor, which stays "
        "(before the amplifier); rows: by the rows' first values alone (sqrt_hidden included; after LayerNorm the RMS is 1 all the same); "
        "none: rows start as a plain embedding's do",
    )
    injection_layers: list[int] = Field(
        [0], description="0: the input embedding; l > 0: also added to the residual stream before layer l, by a projection of its own"
    )

    @property
    def scales(self) -> tuple[float, float]:
        """a and b of the fusion."""
        if self.fusion == "mean":
            return 1 / (self.tables + 1), 1 / (self.tables + 1)
        return (self.base_scale, self.ngram_scale) if self.fusion == "sum" else (1.0, 1.0)

    def output_scales(self, hidden_size: int) -> tuple[float, float, float]:
        """c a, c b, and what the RMS of the rows at the start is divided by."""
        a, b = self.scales
        amplified = hidden_size**0.5 if self.amplifier == "sqrt_hidden" else 1.0
        # E branches with `table_init_ratio` times the token's RMS: the fused output has this much of it.
        own = (a**2 + b**2 * self.tables * self.table_init_ratio**2) ** 0.5 if 0 in self.injection_layers else 1.0
        factor = amplified / own if self.normalised_init == "scale" else amplified
        return factor * a, factor * b, amplified * own if self.normalised_init == "rows" else 1.0

    def check(self, shape: ModelShape) -> None:
        super().check(shape)
        a, b = self.scales
        if 0 in self.injection_layers and a == 0 and self.table_init_ratio * b == 0:
            raise ConfigError(f"{self.where}: base_scale 0 and table_init_ratio 0 make an embedding of zeros: raise one of them.")
        check_layers(self.injection_layers, shape, self.where, first=0)
        if self.amplifier != "none" and 0 not in self.injection_layers:
            raise ConfigError(
                f"{self.where}.amplifier: {self.amplifier} is of the input embedding, which injection_layers {self.injection_layers} "
                "leaves plain: add 0 to them, or write none."
            )

    def budget(self, shape: ModelShape) -> Budget:
        projection = Budget.of_weights(shape.hidden_size * self.tables * self.width(shape))
        gain = Budget(params=shape.hidden_size if self.amplifier == "layer_norm" and 0 in self.injection_layers else 0)
        gain = Budget(gain.params, gain.params)
        return Budget(params=self.table_params(shape)) + len(self.injection_layers) * projection + gain

    def build(self, shape: ModelShape, std: float) -> NgramEmbedding:
        """`std`: RMS that the output starts with."""
        return NgramEmbedding(self, shape, std)


@register("ngram")
class NgramSumConfig(NgramEmbeddingConfig):
    """The n-gram embedding whose branches are weighed by hand: a E_0[t] + b W concat(rows), a = b = 1 at first."""

    kind: Literal["ngram_sum"] = "ngram_sum"
    fusion: Literal["mean", "sum", "concat"] = Field("sum", description="see ngram_embedding")


@register("ngram")
class NgramAmplifiedConfig(NgramEmbeddingConfig):
    """The n-gram embedding with an amplified output (arXiv 2601.21204 section 3.2.4; Takase et al., arXiv 2312.16903)."""

    kind: Literal["ngram_amplified"] = "ngram_amplified"
    amplifier: Literal["none", "sqrt_hidden", "layer_norm"] = Field("sqrt_hidden", description="see ngram_embedding")


def check_layers(layers: list[int], shape: ModelShape, where: str, first: int) -> None:
    """Raises ConfigError where `injection_layers` is not a rising list of layers from `first` on."""
    if not layers or layers != sorted(set(layers)) or layers[0] < first or layers[-1] >= shape.num_layers:
        raise ConfigError(
            f"{where}.injection_layers: {layers} is not a rising list of numbers from {first} to {shape.num_layers - 1} "
            f"(num_layers is {shape.num_layers})."
        )
