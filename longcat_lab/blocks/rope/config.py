from __future__ import annotations

from typing import Literal

from pydantic import Field

from longcat_lab.blocks.interface import BlockConfig, Budget, ModelShape, register
from longcat_lab.blocks.rope.module import RotaryEmbedding


@register("rope")
class RopeConfig(BlockConfig):
    """Rotary positions, interleaved pairs, no extension of the context."""

    kind: Literal["rope"] = "rope"
    theta: float = Field(10_000.0, gt=1, description="rope_theta: base of the wavelengths")

    def budget(self, shape: ModelShape) -> Budget:
        return Budget()  # no weights; element-wise work is not counted as FLOPs

    def build(self, shape: ModelShape) -> RotaryEmbedding:
        return RotaryEmbedding(self.theta)
