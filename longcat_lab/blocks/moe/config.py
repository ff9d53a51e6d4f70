from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from longcat_lab.blocks.interface import BlockConfig, Budget, ModelShape, register
from longcat_lab.blocks.moe.module import MoE
from longcat_lab.blocks.swiglu.config import SwiGLUConfig


@register("moe")
class MoEConfig(BlockConfig):
    """LongCat's mixture: softmax router, selection bias under budget control, real and zero-computation experts.

    The other family (DeepSeek-V3) is the same kind with scoring_func sigmoid, norm_topk_prob, bias_rule sign and shared experts.
    """

    kind: Literal["moe"] = "moe"
    n_routed_experts: int = Field(16, ge=1, description="N: experts that compute")
    zero_expert_num: int = Field(8, ge=0, description="Z: experts that cost nothing")
    zero_expert_type: Literal["identity", "copy", "drop"] = Field(
        "identity", description="a zero-expert's pick adds: weight times the input, the input (weight 1), or nothing"
    )
    moe_topk: int = Field(3, ge=1, description="K: slots picked a token, of the N + Z")
    expert_ffn_hidden_size: int = Field(64, ge=1, description="inner width of one expert")
    n_shared_experts: int = Field(0, ge=0, description="experts that every token takes, as one network of that many times the width")
    scoring_func: Literal["softmax", "sigmoid"] = Field("softmax", description="softmax over all slots, or a sigmoid of each")
    norm_topk_prob: bool = Field(False, description="divide the picked weights by their sum")
    n_group: int = Field(1, ge=1, description="groups of slots for group-limited picks")
    topk_group: int = Field(1, ge=1, description="groups that one token may pick from")
    routed_scaling_factor: float = Field(
        6.0,
        gt=0,
        description="gamma: multiplies every picked weight; cutting experts into m parts each (and K m picks) asks for m times as much",
    )
    expected_real_experts: float | None = Field(None, gt=0, description="K_e: real experts a token in the mean; empty: K N / (N + Z)")
    bias_rule: Literal["budget", "sign"] = Field(
        "budget", description="budget: steer every real expert to its share of K_e; sign: fixed steps to the uniform share of all slots"
    )
    bias_update_rate: float = Field(0.1, ge=0, description="step of the selection bias (k_i of the budget rule); 0 leaves the router alone")
    bias_proportional_gain: float = Field(0.0, ge=0, description="k_p of the budget rule")
    bias_derivative_gain: float = Field(0.0, ge=0, description="k_d of the budget rule")
    bias_rate_half_life: float | None = Field(None, gt=0, description="optimizer steps in which rate and gains halve; empty: constant")
    bias_update_period: int = Field(1, ge=1, description="optimizer steps whose counts make one update; more where batches are small")
    balance_loss_alpha: float = Field(0.0, ge=0, description="weight of the device-level balance loss")
    balance_groups: int = Field(1, ge=1, description="D: groups of experts (devices) that the balance loss makes equal")
    padding_to_zero_experts: bool = Field(True, description="padding takes no real expert and is not counted")

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
        if self.balance_loss_alpha and self.zero_expert_num and self.real_experts == self.moe_topk:
            raise ValueError(
                "balance_loss_alpha needs expected_real_experts below moe_topk, or zero_expert_num 0: no pick is left for these"
            )
        if self.n_routed_experts % self.balance_groups:
            raise ValueError(f"balance_groups is {self.balance_groups}, which does not divide n_routed_experts {self.n_routed_experts}")
        if slots % self.n_group or self.topk_group > self.n_group:
            raise ValueError(
                f"n_group {self.n_group} must divide n_routed_experts + zero_expert_num ({slots}), and topk_group be no larger"
            )
        if self.topk_group < self.n_group and (slots < 2 * self.n_group or slots // self.n_group * self.topk_group < self.moe_topk):
            raise ValueError(f"moe_topk {self.moe_topk} does not fit into topk_group {self.topk_group} groups of {slots // self.n_group}")
        return self

    def shared(self) -> SwiGLUConfig | None:
        """The shared experts as one dense network, or None."""
        width = self.n_shared_experts * self.expert_ffn_hidden_size
        return SwiGLUConfig(ffn_hidden_size=width) if width else None

    def expert_params(self, shape: ModelShape) -> int:
        """Parameters of one real expert."""
        return 3 * shape.hidden_size * self.expert_ffn_hidden_size

    def budget(self, shape: ModelShape) -> Budget:
        slots, expert = self.n_routed_experts + self.zero_expert_num, self.expert_params(shape)
        used = self.real_experts * expert
        experts = Budget(params=self.n_routed_experts * expert, active_params=round(used), flops_per_token=2.0 * used)
        shared = self.shared().budget(shape) if self.shared() else Budget()
        return Budget.of_weights(slots * shape.hidden_size) + Budget(params=slots, active_params=slots) + experts + shared

    def build(self, shape: ModelShape) -> MoE:
        return MoE(self, shape)
