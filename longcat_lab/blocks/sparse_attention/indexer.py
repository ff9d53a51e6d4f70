from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, cat, nn

from longcat_lab.blocks.context import ForwardContext
from longcat_lab.blocks.interface import Block, ModelShape
from longcat_lab.blocks.rope.op import rotate
from longcat_lab.blocks.sparse_attention.op import rotate_halves

if TYPE_CHECKING:
    from longcat_lab.blocks.sparse_attention.config import DSAConfig


class Indexer(Block):
    """The lightning indexer: scores every key for every query with few, narrow heads.

        q_{t,j} = RoPE(W_qb c_q)_j                 j = 1 ... H_I, each d_I wide, RoPE on the first qk_rope_head_dim of them
        k_s     = RoPE(norm(W_k x))                one key for all heads: what its cache keeps
        w_{t,j} = (W_w x)_j / sqrt(H_I d_I)        (`index_score_scale`: other factors)
        I_{t,s} = sum_j w_{t,j} ReLU(q_{t,j} . k_s)

    x and c_q are those of the attention it serves. Parameter names are those of the DeepSeek and LongCat checkpoints.
    Source: DeepSeek-V3.2 report, eq. 1; the two factors of w are those of the released code. The Hadamard rotation of q and k that
    some code has is orthogonal, changes no score and is left out.
    """

    def __init__(self, config: DSAConfig, shape: ModelShape) -> None:
        super().__init__()
        c = self.config = config
        self.wq_b = nn.Linear(c.q_lora_rank, c.index_n_heads * c.index_head_dim, bias=False)
        self.wk = nn.Linear(shape.hidden_size, c.index_head_dim, bias=False)
        self.k_norm = c.key_norm(shape)
        self.weights_proj = nn.Linear(shape.hidden_size, c.index_n_heads, bias=False)
        self.roles = {name: "indexer" for name, _ in self.named_parameters()}
        scaled = {"heads_and_width": c.index_n_heads * c.index_head_dim, "width": c.index_head_dim, "none": 1}
        self.score_scale = scaled[c.index_score_scale] ** -0.5

    def initial_std(self) -> dict[str, float]:
        return {"k_norm.bias": 0.0} if self.config.index_k_norm_type == "layer" else {}  # it is a vector and no gain: zero, not one

    def turned(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """RoPE on the first qk_rope_head_dim of the last dimension. x [..., T, d_I], same out."""
        turn = rotate if self.config.index_rope_layout == "interleaved" else rotate_halves
        width = self.config.qk_rope_head_dim
        return cat((turn(x[..., :width], *rope), x[..., width:]), -1)

    def keys(self, x: Tensor, context: ForwardContext) -> Tensor:
        """x [B, T, H] to k [B, S, d_I]: with a cache those of the earlier tokens too, S = tokens in it + T."""
        k = self.turned(self.k_norm(self.wk(x)), context.rope)
        return k if context.cache is None else context.cache.extend(self, k)[0]

    def queries(self, x: Tensor, c_q: Tensor, context: ForwardContext) -> tuple[Tensor, Tensor]:
        """x [B, T, H] and c_q [B, T, q_lora_rank] to q [B, T, H_I, d_I] and w [B, T, H_I]; w in at least fp32."""
        c, weight = self.config, self.weights_proj.weight
        q = self.wq_b(c_q).unflatten(-1, (c.index_n_heads, c.index_head_dim)).transpose(1, 2)
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            w = nn.functional.linear(x.to(wide), weight.to(wide)) * self.score_scale
        return self.turned(q, context.rope).transpose(1, 2), w

    def forward(self, x: Tensor, c_q: Tensor, context: ForwardContext) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, T, H_I, d_I], k [B, S, d_I] and w [B, T, H_I]: what `index_scores` makes the scores of, masked by nothing."""
        q, w = self.queries(x, c_q, context)
        return q, self.keys(x, context), w
