from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from longcat_lab.blocks.interface import BlockConfig, Budget, ModelShape, register
from longcat_lab.blocks.rope.module import RotaryEmbedding
from longcat_lab.blocks.rope.op import yarn_frequencies


@register("rope", default=True)
class RopeConfig(BlockConfig):
    """Rotary positions, interleaved pairs, no extension of the context."""

    kind: Literal["rope"] = "rope"
    theta: float = Field(10_000.0, gt=1, description="rope_theta: base of the wavelengths")

    @property
    def attention_scale(self) -> float:
        """What the attention multiplies its scores by, beside 1 / sqrt(head width)."""
        return 1.0

    def budget(self, shape: ModelShape) -> Budget:
        return Budget()  # no weights; element-wise work is not counted as FLOPs

    def build(self, shape: ModelShape) -> RotaryEmbedding:
        return RotaryEmbedding(self.theta)


@register("rope")
class YarnConfig(RopeConfig):
    """Rotary positions stretched by YaRN (arXiv 2309.00071), in the form that DeepSeek and LongCat configurations describe.

    Slow pairs (fewer than `beta_slow` turns over the original context) are stretched by `factor`, fast ones (more than
    `beta_fast`) not at all, a ramp between; scores are multiplied by (0.1 mscale_all_dim ln(factor) + 1)^2.
    """

    kind: Literal["yarn"] = "yarn"
    factor: float = Field(40.0, ge=1, description="how much longer the context becomes")
    original_max_position_embeddings: int = Field(4096, ge=1, description="context before it was stretched")
    beta_fast: float = Field(32.0, gt=0, description="YaRN: wavelengths with more turns than this in the original context stay as they are")
    beta_slow: float = Field(1.0, gt=0, description="YaRN: wavelengths with fewer turns than this are stretched by the whole factor")
    mscale: float = Field(1.0, ge=0, description="YaRN: how much the rotated parts grow with the logarithm of the factor")
    mscale_all_dim: float = Field(1.0, ge=0, description="YaRN: scores are multiplied by (0.1 x this x ln(factor) + 1) squared")

    @model_validator(mode="after")
    def _ordered(self) -> YarnConfig:
        if self.beta_slow >= self.beta_fast:
            raise ValueError(f"beta_slow is {self.beta_slow}, not below beta_fast {self.beta_fast}: swap them")
        return self

    def _mscale(self, weight: float) -> float:
        return 0.1 * weight * math.log(self.factor) + 1

    @property
    def attention_scale(self) -> float:
        return self._mscale(self.mscale_all_dim) ** 2

    def build(self, shape: ModelShape) -> RotaryEmbedding:
        def frequencies(dim: int):
            return yarn_frequencies(dim, self.theta, self.factor, self.original_max_position_embeddings, self.beta_fast, self.beta_slow)

        return RotaryEmbedding(self.theta, frequencies, self._mscale(self.mscale) / self._mscale(self.mscale_all_dim))
