from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from longcat_lab.blocks.interface import Block, ModelShape
from longcat_lab.blocks.moe.experts_op import experts
from longcat_lab.blocks.moe.router_op import budget_bias_step, route_reference

if TYPE_CHECKING:
    from longcat_lab.blocks.moe.config import MoEConfig


class Router(Block):
    """Picks slots and weights, counts the picks, and moves its bias so that K_e real experts a token are picked in the mean."""

    def __init__(self, config: MoEConfig, shape: ModelShape) -> None:
        super().__init__()
        self.config = config
        slots = config.n_routed_experts + config.zero_expert_num
        self.classifier = nn.Linear(shape.hidden_size, slots, bias=False)
        self.register_buffer("e_score_correction_bias", torch.zeros(slots))
        # Counts are exact integers over all tokens since the last step, whatever the number of micro-batches.
        self.register_buffer("counts", torch.zeros(slots, dtype=torch.int64), persistent=False)
        self.measured = {}

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """u [T, H] to slots int64 [T, K] and weights [T, K]."""
        c = self.config
        with torch.autocast(u.device.type, enabled=False):  # scores are fp32 whatever the rest runs in
            slots, weights = route_reference(u, self.classifier.weight, self.e_score_correction_bias, c.moe_topk, c.routed_scaling_factor)
        if self.training and torch.is_grad_enabled():
            self.counts += torch.bincount(slots.flatten(), minlength=len(self.counts))
        return slots, weights

    @torch.no_grad()
    def after_step(self) -> None:
        c, picks = self.config, int(self.counts.sum())
        if picks == 0:
            return
        tokens, real = picks // c.moe_topk, self.counts[: c.n_routed_experts]
        self.e_score_correction_bias += budget_bias_step(
            self.counts, tokens, c.moe_topk, c.real_experts, c.n_routed_experts, c.bias_update_rate
        ).to(self.e_score_correction_bias)
        busiest = float(real.max() / real.double().mean()) - 1 if int(real.sum()) else 0.0
        self.measured = {"real_experts_per_token": int(real.sum()) / tokens, "max_violation": busiest}
        self.counts.zero_()

    def statistics(self) -> dict[str, float]:
        return self.measured


class MoE(Block):
    """Router, real experts, and zero-computation (identity) experts. [B, T, H] to [B, T, H]."""

    def __init__(self, config: MoEConfig, shape: ModelShape) -> None:
        super().__init__()
        n, hidden, inner = config.n_routed_experts, shape.hidden_size, config.expert_ffn_hidden_size
        self.router = Router(config, shape)
        self.gate_up_proj = nn.Parameter(torch.empty(n, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(n, hidden, inner))

    def forward(self, x: Tensor) -> Tensor:
        u = x.flatten(0, -2)
        slots, weights = self.router(u)
        # The grouped product is not on autocast's list, so what autocast does for other products is done here.
        kind = x.device.type
        narrow = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else u.dtype
        out = experts(u.to(narrow), slots, weights, self.gate_up_proj.to(narrow), self.down_proj.to(narrow))
        return out.view_as(x).to(x.dtype)
