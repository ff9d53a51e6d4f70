from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, cat, nn

from longcat_lab.blocks.context import ForwardContext
from longcat_lab.blocks.interface import Block, ModelShape
from longcat_lab.blocks.mla.op import attention, shared_key_attention
from longcat_lab.blocks.rope.op import rotate

if TYPE_CHECKING:
    from longcat_lab.blocks.mla.config import MLAConfig


DECODED = 16  # tokens of a pass that is decoding, or the check of drafts


class MLA(Block):
    """Dense multi-head latent attention.

        c_q = norm(W_qa x) * sqrt(H / q_lora_rank)              [B, T, q_lora_rank]
        [c_kv ; k_rope] = W_kva x,  c_kv = norm(c_kv) * sqrt(H / kv_lora_rank)
        q = W_qb c_q,  [k_nope ; v] = W_kvb c_kv,  RoPE on the rope parts; one k_rope serves all heads

    Two forms of one sum. *Expanded*: keys and values of every head are made from the latents, as written. *Absorbed*: W_kvb = [W_uk ; W_uv]
    moves to the other side, q_h . (W_uk,h c) = (W_uk,h^T q_h) . c and sum_s a_s (W_uv,h c_s) = W_uv,h sum_s a_s c_s, so that all heads
    share one key [c_kv ; k_rope] and one value c_kv: more work a pair, none for keys that were seen before. Decoding takes it where it
    costs less.

    Source: DeepSeek-V2 (arXiv 2405.04434) section 2.1; the two scale corrections are LongCat-Flash's (arXiv 2509.01322),
    and do not touch k_rope. Parameter names are those of the LongCat and DeepSeek checkpoints.
    """

    def __init__(self, config: MLAConfig, shape: ModelShape) -> None:
        super().__init__()
        c, hidden = config, shape.hidden_size
        self.config = c
        self.heads = c.num_attention_heads  # that are computed here
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

    def queries(self, c_q: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """q_nope and q_rope, [B, heads, T, each width]."""
        c = self.config
        q = (self.q_proj if c.q_lora_rank is None else self.q_b_proj)(c_q).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        q_nope, q_rope = q.split((c.qk_nope_head_dim, c.qk_rope_head_dim), -1)
        return q_nope, rotate(q_rope, *rope)

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        """x [B, T, H] to [B, T, H]; positions, documents and cache come from `context`."""
        c_q = self.query_latent(x)
        q_nope, q_rope = self.queries(c_q, context.rope)
        c_kv, k_rope = self.latents(x, context.rope)
        if context.cache is not None:
            c_kv, k_rope = context.cache.extend(self, c_kv, k_rope)
        if context.part is None:
            return self.attend(x, c_q, q_nope, q_rope, c_kv, k_rope, context)
        return self.attend_in_chunks(x, c_q, q_nope, q_rope, c_kv, k_rope, context)

    def attend_in_chunks(
        self, x: Tensor, c_q: Tensor, q_nope: Tensor, q_rope: Tensor, c_kv: Tensor, k_rope: Tensor, context: ForwardContext
    ) -> Tensor:
        """`attend` where others hold the rest of the rows: queries stay, latents of the whole row come (kv_lora_rank + qk_rope_head_dim
        numbers a token), and each chunk of queries meets the keys up to its own end.
        """
        c_kv, k_rope = context.part.whole(cat((c_kv, k_rope), -1)).split((self.config.kv_lora_rank, self.config.qk_rope_head_dim), -1)
        out = []
        for here, chunk in context.chunks:
            chunk.step, chunk.steps = context.step, context.steps
            seen = (c_kv[:, : chunk.keys], k_rope[:, : chunk.keys])
            out.append(self.attend(x[:, here], c_q[:, here], q_nope[:, :, here], q_rope[:, :, here], *seen, chunk))
        return cat(out, 1)

    def attend(
        self, x: Tensor, c_q: Tensor, q_nope: Tensor, q_rope: Tensor, c_kv: Tensor, k_rope: Tensor, context: ForwardContext
    ) -> Tensor:
        """From queries and latents (those of the cache included) to [B, T, H]. A sparse attention selects here."""
        absorb = context.cache is not None and self.absorbed_costs_less(q_nope.shape[2], c_kv.shape[1])
        return self.o_proj((self.absorbed if absorb else self.expanded)(q_nope, q_rope, c_kv, k_rope, context.mask))

    def expanded(self, q_nope: Tensor, q_rope: Tensor, c_kv: Tensor, k_rope: Tensor, mask: Tensor | None) -> Tensor:
        """[B, T, heads * v_head_dim], with keys and values of every head."""
        c = self.config
        kv = self.kv_b_proj(c_kv).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k_nope, v = kv.split((c.qk_nope_head_dim, c.v_head_dim), -1)
        k_rope = k_rope[:, None].expand(-1, self.heads, -1, -1)
        out = attention(cat((q_nope, q_rope), -1), cat((k_nope, k_rope), -1), v, mask, self.softmax_scale)
        return out.transpose(1, 2).flatten(-2)

    def absorbed(self, q_nope: Tensor, q_rope: Tensor, c_kv: Tensor, k_rope: Tensor, mask: Tensor | None) -> Tensor:
        """The same, with one key and one value for all heads."""
        q = self.absorbed_queries(q_nope, q_rope)
        return self.raised(shared_key_attention(q, cat((c_kv, k_rope), -1), c_kv, mask, self.softmax_scale))

    def absorbed_costs_less(self, queries: int, keys: int) -> bool:
        """Multiply-adds of all heads: keys and values made and met, or latents met as they are. Never for a long pass, whose scores
        only the fused kernels of the expanded form keep out of memory.
        """
        if queries > DECODED:
            return False
        c = self.config
        pair = c.qk_head_dim + c.v_head_dim
        absorbed_pair = 2 * c.kv_lora_rank + c.qk_rope_head_dim
        up = c.kv_lora_rank * (c.qk_nope_head_dim + c.v_head_dim)
        return queries * keys * absorbed_pair + queries * up < queries * keys * pair + keys * up

    def absorbed_queries(self, q_nope: Tensor, q_rope: Tensor) -> Tensor:
        """[W_uk^T q_nope ; q_rope], [B, T, heads, kv_lora_rank + qk_rope_head_dim]."""
        up_k, _ = self._ups()
        return cat((torch.einsum("bhtd,hdr->bthr", q_nope, up_k.to(q_nope.dtype)), q_rope.transpose(1, 2)), -1)

    def raised(self, latent: Tensor) -> Tensor:
        """W_uv of each head's mean latent: [B, T, heads, kv_lora_rank] to [B, T, heads * v_head_dim]."""
        _, up_v = self._ups()
        return torch.einsum("bthr,hdr->bthd", latent, up_v.to(latent.dtype)).flatten(-2)

    def _ups(self) -> tuple[Tensor, Tensor]:
        """W_uk [heads, qk_nope_head_dim, kv_lora_rank] and W_uv [heads, v_head_dim, kv_lora_rank]."""
        c = self.config
        return self.kv_b_proj.weight.unflatten(0, (self.heads, -1)).split((c.qk_nope_head_dim, c.v_head_dim), 1)
