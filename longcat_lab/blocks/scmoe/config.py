from __future__ import annotations

from dataclasses import replace
from typing import Literal

from longcat_lab.blocks.interface import BlockConfig, Budget, ModelShape, register
from longcat_lab.blocks.scmoe.module import ScMoELayer


@register("layer", default=True)
class ScMoELayerConfig(BlockConfig):
    """LongCat's shortcut-connected layer: 2 attentions, 2 dense networks, 1 mixture, 4 norms, as the other roles define them."""

    kind: Literal["scmoe"] = "scmoe"

    def mixtures(self, shape: ModelShape) -> int:
        """Mixtures in the layer at `shape.layer_index`."""
        return 1

    def budget(self, shape: ModelShape) -> Budget:
        attentions = [shape.attention.budget(replace(shape, attention_index=2 * shape.layer_index + s)) for s in range(2)]
        return sum(attentions, Budget()) + 2 * shape.ffn.budget(shape) + shape.moe.budget(shape) + 4 * shape.norm.budget(shape)

    def build(self, shape: ModelShape) -> ScMoELayer:
        return ScMoELayer(shape)
