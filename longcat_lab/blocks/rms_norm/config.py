from __future__ import annotations

from typing import Literal

from pydantic import Field

from longcat_lab.blocks.interface import BlockConfig, Budget, ModelShape, register
from longcat_lab.blocks.rms_norm.module import RMSNorm


@register("norm")
class RMSNormConfig(BlockConfig):
    """RMS normalisation; `width` is the hidden size unless a block asks for its own."""

    kind: Literal["rms_norm"] = "rms_norm"
    eps: float = Field(1e-5, gt=0, description="added to the mean square")

    def budget(self, shape: ModelShape, width: int | None = None) -> Budget:
        count = width or shape.hidden_size
        return Budget(params=count, active_params=count)  # element-wise work is not counted as FLOPs

    def build(self, shape: ModelShape, width: int | None = None) -> RMSNorm:
        return RMSNorm(width or shape.hidden_size, self.eps)
