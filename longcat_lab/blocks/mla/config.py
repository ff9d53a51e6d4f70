from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from longcat_lab.blocks.interface import STATE_ELEMENT_BYTES, BlockConfig, Budget, ModelShape, register
from longcat_lab.blocks.mla.module import MLA


@register("attention", default=True)
class MLAConfig(BlockConfig):
    """Dense multi-head latent attention (DeepSeek-V2), with LongCat's scale corrections."""

    kind: Literal["mla"] = "mla"
    num_attention_heads: int = Field(4, ge=1, description="heads; each reads the same compressed keys and values")
    q_lora_rank: int | None = Field(64, ge=1, description="width of the query latent; empty: queries straight from the hidden state")
    kv_lora_rank: int = Field(32, ge=1, description="width of the key-value latent: what the cache keeps")
    qk_nope_head_dim: int = Field(16, ge=1, description="part of a head's query and key without position")
    qk_rope_head_dim: int = Field(16, ge=2, description="part of a head's query and key that RoPE turns; even")
    v_head_dim: int = Field(32, ge=1, description="width of a head's values")
    mla_scale_q_lora: bool = Field(True, description="multiply the query latent by sqrt(hidden_size / q_lora_rank)")
    mla_scale_kv_lora: bool = Field(True, description="multiply the key-value latent by sqrt(hidden_size / kv_lora_rank)")
    latent_norm_eps: float | None = Field(
        None, gt=0, description="eps of the two latents' norms; empty: the model's (transformers takes 1e-6 whatever the model says)"
    )

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @model_validator(mode="after")
    def _even(self) -> MLAConfig:
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim is {self.qk_rope_head_dim}, but RoPE turns pairs: make it even")
        return self

    def latent_norm(self, shape: ModelShape) -> BlockConfig:
        """The configuration of the two latents' norms."""
        return shape.norm if self.latent_norm_eps is None else shape.norm.model_copy(update={"eps": self.latent_norm_eps})

    def visible(self, shape: ModelShape) -> float:
        """Keys that the core attention reads for one query, in the mean over a sequence."""
        return (shape.sequence_length + 1) / 2

    def core_width(self, shape: ModelShape) -> int:
        """Multiply-adds of one head for a pair of query and key."""
        return self.qk_head_dim + self.v_head_dim

    def budget(self, shape: ModelShape) -> Budget:
        hidden, heads, norm = shape.hidden_size, self.num_attention_heads, self.latent_norm(shape)
        queries = heads * self.qk_head_dim
        weights = (
            (hidden * queries if self.q_lora_rank is None else hidden * self.q_lora_rank + self.q_lora_rank * queries)
            + hidden * (self.kv_lora_rank + self.qk_rope_head_dim)
            + self.kv_lora_rank * heads * (self.qk_nope_head_dim + self.v_head_dim)
            + heads * self.v_head_dim * hidden
        )
        norms = norm.budget(shape, self.kv_lora_rank)
        if self.q_lora_rank is not None:
            norms += norm.budget(shape, self.q_lora_rank)
        core = Budget(flops_per_token=2.0 * heads * self.core_width(shape) * self.visible(shape))
        state = Budget(state_bytes_per_token=STATE_ELEMENT_BYTES * (self.kv_lora_rank + self.qk_rope_head_dim))
        return Budget.of_weights(weights) + norms + core + state

    def build(self, shape: ModelShape) -> MLA:
        return MLA(self, shape)
