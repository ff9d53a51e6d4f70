from __future__ import annotations

import torch
from torch import Tensor

from longcat_lab.blocks.interface import Block
from longcat_lab.blocks.rope.op import rope_angles


class RotaryEmbedding(Block):
    """Cosines and sines for positions 0 to T - 1, computed once a forward pass and shared by all layers."""

    def __init__(self, theta: float) -> None:
        super().__init__()
        self.theta = theta

    def forward(self, length: int, dim: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Two tensors [length, dim / 2], of the dtype and on the device of `like`."""
        angles = rope_angles(torch.arange(length, device=like.device), dim, self.theta)
        return angles.cos().to(like.dtype), angles.sin().to(like.dtype)
