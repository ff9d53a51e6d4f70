from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from longcat_lab.blocks.context import ForwardContext, in_backward
from longcat_lab.blocks.interface import Block, ModelShape
from longcat_lab.blocks.moe.balance_op import add_loss, balance_loss, budget_error, controller_step, sign_step
from longcat_lab.blocks.moe.router_op import route_reference, weigh

if TYPE_CHECKING:
    from longcat_lab.blocks.moe.config import MoEConfig

COLLAPSED = 0.5  # load entropy over that of equal loads: below, few experts do all the work
OFF_BUDGET = 0.05  # relative distance from K_e above which the budget was not held


class Router(Block):
    """Picks slots and weights, counts the picks, and moves its bias so that K_e real experts a token are picked in the mean."""

    roles: ClassVar[dict[str, str]] = {"classifier.weight": "router"}

    def __init__(self, config: MoEConfig, shape: ModelShape) -> None:
        super().__init__()
        self.config = config
        slots = config.n_routed_experts + config.zero_expert_num
        self.classifier = nn.Linear(shape.hidden_size, slots, bias=False)
        self.register_buffer("e_score_correction_bias", torch.zeros(slots))
        # Not weights, but state of the run, which its checkpoints keep. Counts are exact integers, whatever the number of
        # micro-batches: `counts` of this step (and this rank's part of it), `collected` of all steps since the last update.
        self.register_buffer("counts", torch.zeros(slots, dtype=torch.int64), persistent=False)
        self.register_buffer("collected", torch.zeros(slots, dtype=torch.int64), persistent=False)
        self.register_buffer("errors", torch.zeros(2, slots), persistent=False)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64), persistent=False)
        self.register_buffer("last", torch.zeros(slots, dtype=torch.int64), persistent=False)  # counts of the last update
        self.gradients: list[Tensor] = []  # of this step, by the mean probabilities: [language model's, balance loss's]
        self.measured: dict[str, float] = {}

    def forward(self, u: Tensor, context: ForwardContext | None = None) -> tuple[Tensor, Tensor]:
        """u [T, H] to slots int64 [T, K] and weights [T, K]."""
        c = self.config
        with torch.autocast(u.device.type, enabled=False):  # scores are fp32 whatever the rest runs in
            slots, weights, p = route_reference(
                u,
                self.classifier.weight,
                self.e_score_correction_bias,
                c.moe_topk,
                c.routed_scaling_factor,
                c.scoring_func,
                c.norm_topk_prob,
                c.n_group,
                c.topk_group,
            )
            padding = None if context is None or context.padding is None else context.padding.flatten()
            if padding is not None and c.padding_to_zero_experts:
                slots = torch.where(padding[:, None], c.n_routed_experts, slots)
                weights = weights.masked_fill(padding[:, None], 0)
            if self.training and torch.is_grad_enabled() and (c.balance_loss_alpha or not in_backward()):
                real = slots if padding is None else slots[~padding]
                counts = torch.bincount(real.flatten(), minlength=len(self.counts))[: len(self.counts)]
                if c.balance_loss_alpha:
                    weights = self._with_balance_loss(p, slots, counts, padding, context)
                if not in_backward():  # a forward pass that recomputes activations was counted when it first ran
                    self.counts += counts
        return slots, weights

    def _with_balance_loss(
        self, p: Tensor, slots: Tensor, counts: Tensor, padding: Tensor | None, context: ForwardContext | None
    ) -> Tensor:
        """The weights again, such that backward through them also adds the balance loss; both gradients are noted for R_g."""
        c, share = self.config, 1.0 if context is None else context.share
        kept, tokens = (p, None) if padding is None else (p[~padding], None)
        if context is not None and context.part is not None:  # the load of whole rows, and this part's share in their probabilities
            counts = context.part.summed(counts.double()) / context.part.ways
            tokens = len(p) * (1.0 if context.real is None else context.real)
        kept = kept / kept.sum(-1, keepdim=True) if c.scoring_func == "sigmoid" else kept
        loss, f = balance_loss(kept, counts, c.balance_groups, c.real_experts, c.moe_topk, c.n_routed_experts, tokens)
        picked = p.view_as(p)  # the language model's gradient passes here, the balance loss's does not
        if not in_backward():
            self.gradients = self.gradients or [torch.zeros_like(f), torch.zeros_like(f)]
            self.gradients[1].add_(share * c.balance_loss_alpha * f)
            sums = self.gradients[0]  # of all passes of the step: a repeated block makes several before their backward
            picked.register_hook(lambda gradient: _add(sums, gradient.sum(0)))
            self.measured["balance_loss"] = float(loss.detach())
        weights = weigh(picked, slots, c.routed_scaling_factor, c.norm_topk_prob)
        if padding is not None and c.padding_to_zero_experts:
            weights = weights.masked_fill(padding[:, None], 0)
        return add_loss(weights, loss, share * c.balance_loss_alpha)

    def counters(self) -> list[Tensor]:
        return [self.counts]

    def combine(self, summed: Callable[[Tensor], Tensor]) -> None:
        super().combine(summed)
        for gradient in self.gradients:
            summed(gradient)

    @torch.no_grad()
    def after_step(self) -> None:
        c = self.config
        if self.gradients:
            language, balance = (float(g.norm()) for g in self.gradients)
            self.measured["router_gradient_ratio"] = balance / language if language else 0.0
            self.gradients = []
        self.steps += 1
        self.collected += self.counts
        self.counts.zero_()
        picks = int(self.collected.sum())
        if picks == 0 or int(self.steps) % c.bias_update_period:
            return
        decay = 1.0 if c.bias_rate_half_life is None else 0.5 ** ((int(self.steps) - 1) / c.bias_rate_half_life)
        if c.bias_rule == "sign":
            step = sign_step(self.collected, decay * c.bias_update_rate)
        else:
            error = budget_error(self.collected, picks // c.moe_topk, c.moe_topk, c.real_experts, c.n_routed_experts)
            errors = torch.stack((error, *self.errors.to(error)))
            gains = (c.bias_proportional_gain, c.bias_update_rate, c.bias_derivative_gain)
            step = controller_step(errors, *(decay * gain for gain in gains))
            self.errors.copy_(errors[:2])
        self.e_score_correction_bias += step.to(self.e_score_correction_bias)
        self.last.copy_(self.collected)
        self.collected.zero_()

    @torch.no_grad()
    def statistics(self) -> dict[str, float]:
        """Of the last update's tokens: real experts a token, busiest expert over the mean (minus 1), entropy of the real experts' load
        over that of equal loads; mean cosine of the classifier's rows; largest bias; R_g and the loss where there is a balance loss.
        """
        if not int(self.last.sum()):
            return {}
        c = self.config
        real, tokens = self.last[: c.n_routed_experts].double(), int(self.last.sum()) / c.moe_topk
        total = float(real.sum())
        share = real / max(total, 1.0)
        entropy = float(-(share * share.clamp_min(1e-300).log()).sum() / torch.tensor(max(len(share), 2)).log()) if total else 0.0
        rows = nn.functional.normalize(self.classifier.weight.float(), dim=-1)
        count = len(rows)
        # mean over pairs a != b of <r_a, r_b> = (|sum r|^2 - n) / (n (n - 1)), without the n x n products
        cosine = float((rows.sum(0).square().sum() - count) / max(count * (count - 1), 1))
        return {
            "real_experts_per_token": total / tokens,
            "max_violation": float(real.max()) * len(real) / total - 1 if total else 0.0,
            "load_entropy": entropy,
            "router_cosine": cosine,
            "bias_max": float(self.e_score_correction_bias.abs().max()),
            **self.measured,
        }

    def distributions(self) -> dict[str, list[float]]:
        if not int(self.last.sum()):
            return {}
        tokens = int(self.last.sum()) / self.config.moe_topk
        return {"expert_load": [count / tokens for count in self.last.tolist()]}

    def not_engaged(self, measured: dict[str, float]) -> list[str]:
        c, said = self.config, []
        found = measured.get("real_experts_per_token")
        if found is None:
            return ["its router made no step: it saw no token, or bias_update_period is longer than the run"]
        steered = c.bias_update_rate or c.bias_proportional_gain or c.bias_derivative_gain
        if c.zero_expert_num and found >= c.moe_topk:
            said.append("its zero-experts were never picked")
        elif c.zero_expert_num and c.bias_rule == "budget" and steered and abs(found / c.real_experts - 1) > OFF_BUDGET:
            said.append(f"{found:.3g} real experts a token, not the {c.real_experts:.3g} that were asked for")
        if c.n_routed_experts > 1 and measured.get("load_entropy", 1.0) < COLLAPSED:
            said.append(f"few experts do all the work (load entropy {measured['load_entropy']:.2f} of 1)")
        if c.balance_loss_alpha and not measured.get("router_gradient_ratio"):
            said.append("its balance loss had no gradient")
        return said


def _add(into: Tensor, value: Tensor) -> None:
    into.add_(value)  # and returns nothing: a hook that returns something replaces the gradient
