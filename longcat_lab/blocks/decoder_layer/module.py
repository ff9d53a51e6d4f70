from __future__ import annotations

import dataclasses

from torch import Tensor

from longcat_lab.blocks.context import ForwardContext, feed_forward
from longcat_lab.blocks.interface import Block, ModelShape


class DecoderLayer(Block):
    """The layer of DeepSeek-V3 and of most others: one attention, then one dense network or one mixture.

        a = x + MLA(N_in(x));  y = a + F(N_post(a)),  F the mixture, or the dense network where `dense`

    Parameter names are those of the DeepSeek checkpoints.
    """

    def __init__(self, shape: ModelShape, dense: bool) -> None:
        super().__init__()
        self.dense = dense
        place = dataclasses.replace(shape, attention_index=shape.layer_index)
        self.input_layernorm, self.post_attention_layernorm = shape.norm.build(shape), shape.norm.build(shape)
        self.self_attn = shape.attention.build(place)
        self.mlp = shape.ffn.build(shape) if dense else shape.moe.build(shape)

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        """x [B, T, H] to [B, T, H]."""
        a = x + self.self_attn(self.input_layernorm(x), context)
        u = self.post_attention_layernorm(a)
        return a + (feed_forward(self.mlp, u, context) if self.dense else self.mlp(u, context))
