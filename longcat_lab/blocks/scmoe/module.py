from __future__ import annotations

import dataclasses

from torch import Tensor
from torch.nn import ModuleList

from longcat_lab.blocks.context import ForwardContext, feed_forward
from longcat_lab.blocks.interface import Block, BlockConfig, ModelShape
from longcat_lab.blocks.moe.module import begin


class ScMoELayer(Block):
    """One shortcut layer: two attentions, two dense networks, and one mixture whose result is needed only at the end.

        a0 = x + MLA_0(N_in0(x));  u = N_post0(a0);  m = MoE(u)
        a1 = b0 + MLA_1(N_in1(b0)) with b0 = a0 + FFN_0(u)
        y  = a1 + FFN_1(N_post1(a1)) + m

    Mixture and first dense network read the same normed u, so that the mixture may run (and communicate) at any time between: where its
    experts are elsewhere, rows leave at the fork and are on their way while FFN_0 runs, and answers while MLA_1 and FFN_1 do.
    Source: LongCat-Flash (arXiv 2509.01322) section 2.2. In place of an op folder, this block only orders others.
    """

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()

        def two(part: BlockConfig) -> ModuleList:
            places = [dataclasses.replace(shape, attention_index=2 * shape.layer_index + s) for s in range(2)]
            return ModuleList(part.build(place) for place in places)

        self.input_layernorm, self.post_attention_layernorm = two(shape.norm), two(shape.norm)
        self.self_attn, self.mlps, self.mlp = two(shape.attention), two(shape.ffn), shape.moe.build(shape)

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        """x [B, T, H] to [B, T, H]."""
        a0 = x + self.self_attn[0](self.input_layernorm[0](x), context)
        u = self.post_attention_layernorm[0](a0)
        shortcut = begin(self.mlp, u, context)  # rows travel to their experts
        b0 = a0 + feed_forward(self.mlps[0], u, context)
        shortcut.compute()  # and back
        a1 = b0 + self.self_attn[1](self.input_layernorm[1](b0), context)
        return a1 + feed_forward(self.mlps[1], self.post_attention_layernorm[1](a1), context) + shortcut.end()
