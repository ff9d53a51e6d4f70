from __future__ import annotations

from torch import Tensor

from longcat_lab.blocks.context import ForwardContext, feed_forward
from longcat_lab.blocks.scmoe.module import ScMoELayer


class SerialLayer(ScMoELayer):
    """The parts of a shortcut layer without the shortcut: the mixture reads what its own attention made.

        b0 = a0 + FFN_0(N_post0(a0)) with a0 = x + MLA_0(N_in0(x))
        a1 = b0 + MLA_1(N_in1(b0));  v = N_post1(a1)
        y  = a1 + FFN_1(v) + MoE(v)

    Same parameters, names, initial values and FLOPs as the shortcut layer, so that an ablation changes the order alone; nothing is
    left for the mixture's communication to hide behind but FFN_1.
    """

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        """x [B, T, H] to [B, T, H]."""
        a0 = x + self.self_attn[0](self.input_layernorm[0](x), context)
        b0 = a0 + feed_forward(self.mlps[0], self.post_attention_layernorm[0](a0), context)
        a1 = b0 + self.self_attn[1](self.input_layernorm[1](b0), context)
        v = self.post_attention_layernorm[1](a1)
        return a1 + feed_forward(self.mlps[1], v, context) + self.mlp(v, context)
