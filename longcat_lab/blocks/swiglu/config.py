from __future__ import annotations

from typing import Literal

from pydantic import Field

from longcat_lab.blocks.interface import BlockConfig, Budget, ModelShape, register
from longcat_lab.blocks.swiglu.module import SwiGLU


@register("ffn")
class SwiGLUConfig(BlockConfig):
    """Dense SwiGLU feed-forward network."""

    kind: Literal["swiglu"] = "swiglu"
    ffn_hidden_size: int = Field(256, ge=1, description="inner width of the dense feed-forward network")

    def budget(self, shape: ModelShape) -> Budget:
        return Budget.of_weights(3 * shape.hidden_size * self.ffn_hidden_size)

    def build(self, shape: ModelShape) -> SwiGLU:
        return SwiGLU(shape.hidden_size, self.ffn_hidden_size)
