from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pydantic import Field

from longcat_lab.blocks.decoder_layer.module import DecoderLayer
from longcat_lab.blocks.interface import BlockConfig, Budget, ModelShape, register


@register("layer")
class DecoderLayerConfig(BlockConfig):
    """One attention and one mixture a layer (DeepSeek-V3); the first layers may have the dense network in the mixture's place."""

    kind: Literal["decoder"] = "decoder"
    first_k_dense_replace: int = Field(0, ge=0, description="leading layers that have the dense network instead of the mixture")

    def mixtures(self, shape: ModelShape) -> int:
        """Mixtures in the layer at `shape.layer_index`."""
        return int(shape.layer_index >= self.first_k_dense_replace)

    def budget(self, shape: ModelShape) -> Budget:
        inner = shape.moe if self.mixtures(shape) else shape.ffn
        attention = shape.attention.budget(replace(shape, attention_index=shape.layer_index))
        return attention + inner.budget(shape) + 2 * shape.norm.budget(shape)

    def build(self, shape: ModelShape) -> DecoderLayer:
        return DecoderLayer(shape, dense=not self.mixtures(shape))
