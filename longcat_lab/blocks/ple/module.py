from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from longcat_lab.blocks.context import ForwardContext
from longcat_lab.blocks.interface import ModelShape
from longcat_lab.blocks.table import Table
from longcat_lab.blocks.token_embedding.module import TokenEmbedding

if TYPE_CHECKING:
    from longcat_lab.blocks.ple.config import PLEConfig


class PerLayerEmbedding(TokenEmbedding):
    """The token's row e at the input; behind layer l, x += RMSN(W_p (GELU(W_g x) * p_l)). [B, T] to [B, T, H].

        p_l = (RMSN(s_1 W_c e) + s_2 E_ple[t]_l) / sqrt 2,   s_2 = sqrt(d_p)

    s_1 is Gemma's H^-0.5 over the RMS that e starts with (1 there); behind it stands a norm, so that only the norm's eps sees it.
    E_ple starts with a standard deviation of 1 / s_2: both terms of p_l then have RMS 1. GELU is the tanh form, as in the source.
    """

    whole_rows = True

    def __init__(self, config: PLEConfig, shape: ModelShape, std: float) -> None:
        super().__init__(shape.vocab_size, shape.hidden_size, std)
        layers, width, hidden = shape.num_layers, config.per_layer_width, shape.hidden_size
        self.layers, self.width, self.initial_gain = layers, width, config.initial_gain
        self.scale = hidden**-0.5 / std
        self.per_layer = Table(shape.vocab_size, layers * width, width**-0.5)
        self.context_projection = nn.Linear(hidden, layers * width, bias=False)
        self.stacks = {"context_projection.weight": layers}  # one matrix a layer
        self.context_norm = shape.norm.build(shape, width)
        self.gates = nn.ModuleList(nn.Linear(hidden, width, bias=False) for _ in range(layers))
        self.projections = nn.ModuleList(nn.Linear(width, hidden, bias=False) for _ in range(layers))
        self.norms = nn.ModuleList(shape.norm.build(shape) for _ in range(layers))

    def initial_value(self) -> dict[str, float]:
        return {f"norms.{layer}.weight": self.initial_gain for layer in range(self.layers)}

    def inputs(self, tokens: Tensor, embedded: Tensor) -> Tensor:
        """p of all layers, [B, T, L, d_p]. tokens int64 [B, T]; embedded: e [B, T, H]."""
        parts = (self.layers, self.width)
        context = self.context_norm(self.context_projection(embedded * self.scale).unflatten(-1, parts))
        return (context + self.width**0.5 * self.per_layer.read(tokens).unflatten(-1, parts)) * 2**-0.5

    def enter(self, point: int, x: Tensor, context: ForwardContext) -> Tensor:
        if point == 0:
            return x
        if "per_layer_inputs" not in context.shared:
            context.shared["per_layer_inputs"] = self.inputs(context.tokens, context.embedded)
        layer = point - 1
        gated = nn.functional.gelu(self.gates[layer](x), approximate="tanh") * context.shared["per_layer_inputs"][..., layer, :]
        return x + self.norms[layer](self.projections[layer](gated))

    @torch.no_grad()
    def statistics(self) -> dict[str, float]:
        """mean_gain: mean absolute gain of the norms through which the rows enter, that is the RMS of what enters."""
        if self.per_layer.idle:
            return {}
        return {"mean_gain": float(torch.stack([norm.weight.abs().mean() for norm in self.norms]).mean())}

    def not_engaged(self, measured: dict[str, float]) -> list[str]:
        shut = not self.per_layer.idle and not measured.get("mean_gain")
        return ["the gains of its norms are 0: nothing enters the residual stream"] if shut else []
