from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from longcat_lab.blocks.interface import Block
from longcat_lab.blocks.rope.op import rope_frequencies


class RotaryEmbedding(Block):
    """Cosines and sines of positions, computed once a forward pass and shared by all layers.

    Args:
        theta: base of the wavelengths.
        frequencies: dim to float64 [dim / 2], radians a position; plain RoPE of `theta` where left out.
        amplitude: multiplies cosines and sines (YaRN's ratio of its two scales; 1 in the published models).
    """

    def __init__(self, theta: float, frequencies: Callable[[int], Tensor] | None = None, amplitude: float = 1.0) -> None:
        super().__init__()
        self.theta, self.amplitude = theta, amplitude
        self.frequencies = frequencies or (lambda dim: rope_frequencies(dim, theta))

    def forward(self, length: int, dim: int, like: Tensor, start: int = 0) -> tuple[Tensor, Tensor]:
        """Positions start to start + length - 1: two tensors [length, dim / 2], of the dtype and on the device of `like`."""
        positions = torch.arange(start, start + length, dtype=torch.float64, device="cpu")
        angles = positions[:, None] * self.frequencies(dim)  # float64, which not every accelerator has
        return tuple((self.amplitude * each).to(device=like.device, dtype=like.dtype) for each in (angles.cos(), angles.sin()))
