from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from longcat_lab.blocks.interface import BlockConfig, Budget, ModelShape, register
from longcat_lab.blocks.moe.module import MoE


@register("moe")
class MoEConfig(BlockConfig):
    """LongCat's mixture: softmax router, selection bias under budget control, real and zero-computation experts."""

    kind: Literal["moe"] = "moe"
    n_routed_experts: int = Field(16, ge=1, description="N: experts that compute")
    zero_expert_num: int = Field(8, ge=0, description="Z: experts that return their input and cost nothing")
    moe_topk: int = Field(3, ge=1, description="K: slots picked a token, of the N + Z")
    expert_ffn_hidden_size: int = Field(64, ge=1, description="inner width of one expert")
    routed_scaling_factor: float = Field(6.0, gt=0, description="multiplies every picked weight")
    expected_real_experts: float | None = Field(None, gt=0, description="K_e: real experts a token in the mean; empty: K N / (N + Z)")
    bias_update_rate: float = Field(0.1, ge=0, description="step of the selection bias towards K_e; 0 leaves the router alone")

    @property
    def real_experts(self) -> float:
        """K_e, the mean number of real experts a token that the bias is steered to."""
        if self.expected_real_experts is not None:
            return self.expected_real_experts
        return self.moe_topk * self.n_routed_experts / (self.n_routed_experts + self.zero_expert_num)

    @model_validator(mode="after")
    def _possible(self) -> MoEConfig:
        slots = self.n_routed_experts + self.zero_expert_num
        if self.moe_topk > slots:
            raise ValueError(f"moe_topk is {self.moe_topk}, but n_routed_experts + zero_expert_num is {slots}: lower it")
        if self.real_experts > min(self.moe_topk, self.n_routed_experts):
            raise ValueError(f"expected_real_experts is {self.real_experts}, above moe_topk or n_routed_experts: lower it")
        if self.zero_expert_num == 0 and self.real_experts != self.moe_topk:
            raise ValueError("expected_real_experts is below moe_topk, which needs zero_expert_num above 0")
        return self

    def budget(self, shape: ModelShape) -> Budget:
        slots, expert = self.n_routed_experts + self.zero_expert_num, 3 * shape.hidden_size * self.expert_ffn_hidden_size
        used = self.real_experts * expert
        experts = Budget(params=self.n_routed_experts * expert, active_params=round(used), flops_per_token=2.0 * used)
        return Budget.of_weights(slots * shape.hidden_size) + Budget(params=slots, active_params=slots) + experts

    def build(self, shape: ModelShape) -> MoE:
        return MoE(self, shape)
