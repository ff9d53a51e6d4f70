from __future__ import annotations

from typing import Literal

from longcat_lab.blocks.interface import BlockConfig, Budget, ModelShape, register
from longcat_lab.blocks.scmoe.module import ScMoELayer


@register("layer")
class ScMoELayerConfig(BlockConfig):
    """LongCat's shortcut-connected layer: 2 attentions, 2 dense networks, 1 mixture, 4 norms, as the other roles define them."""

    kind: Literal["scmoe"] = "scmoe"

    def budget(self, shape: ModelShape) -> Budget:
        return 2 * shape.attention.budget(shape) + 2 * shape.ffn.budget(shape) + shape.moe.budget(shape) + 4 * shape.norm.budget(shape)

    def build(self, shape: ModelShape) -> ScMoELayer:
        return ScMoELayer(shape)
