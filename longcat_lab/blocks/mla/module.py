from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, cat, nn

from longcat_lab.blocks.context import ForwardContext
from longcat_lab.blocks.interface import Block, ModelShape
from longcat_lab.blocks.mla.op import attention
from longcat_lab.blocks.rope.op import rotate

if TYPE_CHECKING:
    from longcat_lab.blocks.mla.config import MLAConfig


class MLA(Block):
    """Dense multi-head latent attention, expanded form.

        c_q = norm(W_qa x) * sqrt(H / q_lora_rank)              [B, T, q_lora_rank]
        [c_kv ; k_rope] = W_kva x,  c_kv = norm(c_kv) * sqrt(H / kv_lora_rank)
        q = W_qb c_q,  [k_nope ; v] = W_kvb c_kv,  RoPE on the rope parts; one k_rope serves all heads

    Source: DeepSeek-V2 (arXiv 2405.04434) section 2.1; the two scale corrections are LongCat-Flash's (arXiv 2509.01322),
    and do not touch k_rope. Parameter names are those of the LongCat and DeepSeek checkpoints.
    """

    def __init__(self, config: MLAConfig, shape: ModelShape) -> None:
        super().__init__()
        c, hidden = config, shape.hidden_size
        self.config = c
        norm = c.latent_norm(shape)
        if c.q_lora_rank is None:
            self.q_proj = nn.Linear(hidden, c.num_attention_heads * c.qk_head_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden, c.q_lora_rank, bias=False)
            self.q_a_layernorm = norm.build(shape, c.q_lora_rank)
            self.q_b_proj = nn.Linear(c.q_lora_rank, c.num_attention_heads * c.qk_head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, c.kv_lora_rank + c.qk_rope_head_dim, bias=False)
        self.kv_a_layernorm = norm.build(shape, c.kv_lora_rank)
        self.kv_b_proj = nn.Linear(c.kv_lora_rank, c.num_attention_heads * (c.qk_nope_head_dim + c.v_head_dim), bias=False)
        self.o_proj = nn.Linear(c.num_attention_heads * c.v_head_dim, hidden, bias=False)
        self.q_scale = (hidden / c.q_lora_rank) ** 0.5 if c.mla_scale_q_lora and c.q_lora_rank else 1.0
        self.kv_scale = (hidden / c.kv_lora_rank) ** 0.5 if c.mla_scale_kv_lora else 1.0
        self.softmax_scale = c.qk_head_dim**-0.5 * getattr(shape.rope, "attention_scale", 1.0)

    def latents(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """What a decoding cache keeps of each token: c_kv [B, T, kv_lora_rank] and k_rope [B, T, qk_rope_head_dim]."""
        c_kv, k_rope = self.kv_a_proj_with_mqa(x).split((self.config.kv_lora_rank, self.config.qk_rope_head_dim), -1)
        return self.kv_a_layernorm(c_kv) * self.kv_scale, rotate(k_rope, *rope)

    def query_latent(self, x: Tensor) -> Tensor:
        """c_q [B, T, q_lora_rank], scaled; x itself where there is no query latent."""
        return x if self.config.q_lora_rank is None else self.q_a_layernorm(self.q_a_proj(x)) * self.q_scale

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        """x [B, T, H] to [B, T, H]; positions, mask and cache come from `context`."""
        c, heads = self.config, (self.config.num_attention_heads, -1)
        c_q = self.query_latent(x)
        q = (self.q_proj if c.q_lora_rank is None else self.q_b_proj)(c_q).unflatten(-1, heads).transpose(1, 2)
        q_nope, q_rope = q.split((c.qk_nope_head_dim, c.qk_rope_head_dim), -1)
        c_kv, k_rope = self.latents(x, context.rope)
        if context.cache is not None:
            c_kv, k_rope = context.cache.extend(self, c_kv, k_rope)
        kv = self.kv_b_proj(c_kv).unflatten(-1, heads).transpose(1, 2)
        k_nope, v = kv.split((c.qk_nope_head_dim, c.v_head_dim), -1)
        k_rope = k_rope[:, None].expand(-1, c.num_attention_heads, -1, -1)
        q_BHTD = cat((q_nope, rotate(q_rope, *context.rope)), -1)
        mask = self.visible(x, c_q, context)
        out = attention(q_BHTD, cat((k_nope, k_rope), -1), v, mask, self.softmax_scale)
        return self.o_proj(out.transpose(1, 2).flatten(-2))

    def visible(self, x: Tensor, c_q: Tensor, context: ForwardContext) -> Tensor | None:
        """The mask of this attention: all that the pass allows. A sparse attention selects among it."""
        return context.mask
