from __future__ import annotations

from typing import Literal

from longcat_lab.blocks.interface import ModelShape, register
from longcat_lab.blocks.scmoe.config import ScMoELayerConfig
from longcat_lab.blocks.serial_layer.module import SerialLayer


@register("layer")
class SerialLayerConfig(ScMoELayerConfig):
    """The shortcut layer's parts in the ordinary order: the mixture beside the second dense network, on the same input."""

    kind: Literal["serial"] = "serial"

    def build(self, shape: ModelShape) -> SerialLayer:
        return SerialLayer(shape)
