from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from longcat_lab.blocks.context import ForwardContext
from longcat_lab.blocks.interface import Block, ModelShape
from longcat_lab.blocks.moe.experts_op import experts
from longcat_lab.blocks.moe.router import Router

if TYPE_CHECKING:
    from longcat_lab.blocks.moe.config import MoEConfig


class MoE(Block):
    """Router, real experts, zero-computation experts, and shared experts where there are any. [B, T, H] to [B, T, H]."""

    stacks: ClassVar[dict[str, int]] = {"gate_up_proj": 2}
    compute = staticmethod(experts)  # where others hold a part of the experts, a function that asks them

    def __init__(self, config: MoEConfig, shape: ModelShape) -> None:
        super().__init__()
        n, hidden, inner = config.n_routed_experts, shape.hidden_size, config.expert_ffn_hidden_size
        self.config = config
        self.router = Router(config, shape)
        self.gate_up_proj = nn.Parameter(torch.empty(n, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(n, hidden, inner))
        self.shared_experts = config.shared().build(shape) if config.shared() else None

    def forward(self, x: Tensor, context: ForwardContext | None = None) -> Tensor:
        u = x.flatten(0, -2)
        slots, weights = self.router(u, context)
        # The grouped product is not on autocast's list, so what autocast does for other products is done here.
        kind = x.device.type
        narrow = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else u.dtype
        stacks = self.gate_up_proj.to(narrow), self.down_proj.to(narrow)
        out = self.compute(u.to(narrow), slots, weights, *stacks, self.config.zero_expert_type)
        out = out.view_as(x).to(x.dtype)
        return out if self.shared_experts is None else out + self.shared_experts(x)
