from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from longcat_lab.blocks.context import ForwardContext
from longcat_lab.blocks.interface import Block, ModelShape
from longcat_lab.blocks.moe.experts_op import experts
from longcat_lab.blocks.moe.router import Router

if TYPE_CHECKING:
    from longcat_lab.blocks.moe.config import MoEConfig


class Pending(Protocol):
    """A mixture that has begun. `compute`, then `end`, once each; anything else may be computed before each of them."""

    def compute(self) -> None:
        """The experts' part of the work."""

    def end(self) -> Tensor:
        """The mixture's result, [B, T, H]."""


class Done:
    """A mixture that ran when it was begun."""

    def __init__(self, out: Tensor) -> None:
        self.out = out

    def compute(self) -> None:
        pass

    def end(self) -> Tensor:
        return self.out


class Away:
    """A mixture whose rows are on their way to experts elsewhere. What is computed at home, the shared experts, is computed first."""

    def __init__(self, mixture: MoE, x: Tensor, context: ForwardContext | None, held: Callable[..., Any]) -> None:
        u = x.flatten(0, -2)
        slots, weights = mixture.router(u, context)
        self.picks = mixture.send(u.to(mixture.width(u)), slots, weights, mixture.config.zero_expert_type)
        self.held, self.like = held, x
        self.shared = None if mixture.shared_experts is None else mixture.shared_experts(x)

    def compute(self) -> None:
        self.picks.compute(self.held)

    def end(self) -> Tensor:
        out = self.picks.end().view_as(self.like).to(self.like.dtype)
        return out if self.shared is None else out + self.shared


class MoE(Block):
    """Router, real experts, zero-computation experts, and shared experts where there are any. [B, T, H] to [B, T, H]."""

    stacks: ClassVar[dict[str, int]] = {"gate_up_proj": 2}
    compute = staticmethod(experts)  # where all experts are here
    # Where others hold a part of them: send(u, slots, weights, zero_expert_type) sends rows there; what it returns has compute(held),
    # for `held` or `apart` below, and end().
    send: Callable[..., Any] | None = None

    def __init__(self, config: MoEConfig, shape: ModelShape) -> None:
        super().__init__()
        n, hidden, inner = config.n_routed_experts, shape.hidden_size, config.expert_ffn_hidden_size
        self.config = config
        self.router = Router(config, shape)
        self.gate_up_proj = nn.Parameter(torch.empty(n, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(n, hidden, inner))
        self.shared_experts = config.shared().build(shape) if config.shared() else None

    def forward(self, x: Tensor, context: ForwardContext | None = None) -> Tensor:
        if self.send is not None:
            pending = Away(self, x, context, self.held)
            pending.compute()
            return pending.end()
        u = x.flatten(0, -2)
        slots, weights = self.router(u, context)
        u = u.to(self.width(u))
        stacks = self.gate_up_proj.to(u.dtype), self.down_proj.to(u.dtype)
        out = self.compute(u, slots, weights, *stacks, self.config.zero_expert_type)
        out = out.view_as(x).to(x.dtype)
        return out if self.shared_experts is None else out + self.shared_experts(x)

    def begin(self, x: Tensor, context: ForwardContext | None = None) -> Pending:
        """`forward` in parts: all of it now, or, where experts are elsewhere, what can be done before their answers are here."""
        return Done(self(x, context)) if self.send is None else Away(self, x, context, self.apart)

    def held(self, use: Callable[..., Any], *tokens: Tensor) -> Any:
        """What `use(gate_up, down, *tokens)` gives, with the experts that are here in the dtype of `tokens`."""
        return use(self.gate_up_proj.to(tokens[0].dtype), self.down_proj.to(tokens[0].dtype), *tokens)

    def apart(self, use: Callable[..., Any], *tokens: Tensor) -> Any:
        """`held` outside of `forward`: what makes the weights ready for `forward` does so for this too."""
        return self.held(use, *tokens)

    @staticmethod
    def width(u: Tensor) -> torch.dtype:
        """The grouped product is not on autocast's list, so what autocast does for other products is done here."""
        kind = u.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else u.dtype


def begin(mixture: nn.Module, x: Tensor, context: ForwardContext) -> Pending:
    """Begins any mixture: one that has no `begin` runs now."""
    return mixture.begin(x, context) if hasattr(mixture, "begin") else Done(mixture(x, context))
