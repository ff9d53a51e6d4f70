from __future__ import annotations

import torch
from torch import Tensor, nn

from longcat_lab.blocks.interface import Block
from longcat_lab.blocks.rms_norm.op import rms_norm


class RMSNorm(Block):
    """RMS normalisation with a learned gain. [..., width] to [..., width]."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)
