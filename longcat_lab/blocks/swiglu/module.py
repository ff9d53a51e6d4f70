from __future__ import annotations

from torch import Tensor, nn

from longcat_lab.blocks.interface import Block
from longcat_lab.blocks.swiglu.op import swiglu


class SwiGLU(Block):
    """Dense feed-forward network. [..., hidden] to [..., hidden]; parameter names are those of the checkpoints."""

    def __init__(self, hidden_size: int, ffn_hidden_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, ffn_hidden_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, ffn_hidden_size, bias=False)
        self.down_proj = nn.Linear(ffn_hidden_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return swiglu(x, self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight)
