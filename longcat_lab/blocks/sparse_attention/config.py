from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pydantic import Field, model_validator
from torch import nn

from longcat_lab.blocks.interface import STATE_ELEMENT_BYTES, Budget, ModelShape, register
from longcat_lab.blocks.mla.config import MLAConfig
from longcat_lab.blocks.sparse_attention.module import SparseAttention
from longcat_lab.blocks.sparse_attention.op import mean_selected

LAYER_NORM_EPS = 1e-6  # of DSA's key norm, whatever the model's own norms have


@register("attention")
class DSAConfig(MLAConfig):
    """DeepSeek sparse attention: MLA over the index_topk keys that a lightning indexer scores highest."""

    kind: Literal["dsa"] = "dsa"
    index_n_heads: int = Field(2, ge=1, description="H_I: heads of the indexer; the published models have half of the attention's")
    index_head_dim: int = Field(32, ge=2, description="d_I: width of an indexer head, at least qk_rope_head_dim")
    index_topk: int = Field(64, ge=1, description="K: keys that a query attends to, sinks and window among them")
    index_init_tokens: int = Field(0, ge=0, description="sinks: first tokens of the document, selected always")
    index_local_tokens: int = Field(0, ge=0, description="window: last tokens up to the query's own, selected always")
    cli_factor: int = Field(1, ge=1, description="consecutive attentions that share one indexer and its selection")
    dsa_mtp_cli: bool = Field(False, description="prediction steps after the first take the first one's selection")
    index_k_norm_type: Literal["layer", "rms"] = Field(
        "layer", description="norm of the index key: LayerNorm with bias, or the model's own"
    )
    index_rope_layout: Literal["half-split", "interleaved"] = Field(
        "half-split", description="pairs that the indexer's RoPE turns: (0, d/2), ... or (0, 1), ... as the attention's"
    )
    index_query_latent: Literal["normed", "scaled"] = Field(
        "normed",
        description="the query latent that the indexer reads: before or after the factor sqrt(hidden_size / q_lora_rank); "
        "the selection is the same, the size of the scores is not",
    )

    @model_validator(mode="after")
    def _sparse(self) -> DSAConfig:
        fixed = self.index_init_tokens + self.index_local_tokens
        if fixed > self.index_topk:
            raise ValueError(f"index_topk is {self.index_topk}, below index_init_tokens + index_local_tokens ({fixed}): raise it")
        if self.index_head_dim < self.qk_rope_head_dim:
            raise ValueError(f"index_head_dim is {self.index_head_dim}, below qk_rope_head_dim {self.qk_rope_head_dim}: raise it")
        if self.q_lora_rank is None:
            raise ValueError("q_lora_rank is empty, but the indexer reads the query latent: give it a width")
        return self

    def owns_index(self, shape: ModelShape) -> bool:
        """Whether the attention at `shape.attention_index` has an indexer of its own."""
        return shape.attention_index % self.cli_factor == 0

    def key_norm(self, shape: ModelShape) -> nn.Module:
        if self.index_k_norm_type == "layer":
            return nn.LayerNorm(self.index_head_dim, eps=LAYER_NORM_EPS)
        return shape.norm.build(shape, self.index_head_dim)

    def visible(self, shape: ModelShape) -> float:
        return mean_selected(shape.sequence_length, self.index_topk)

    def index_budget(self, shape: ModelShape) -> Budget:
        """What an indexer costs beside its attention: projections, key norm, scores of all visible pairs, cached keys.

        No FLOPs where a sequence has no more than index_topk tokens: all of them are selected, and it does not run.
        """
        heads, width, length = self.index_n_heads, self.index_head_dim, shape.sequence_length
        projections = Budget.of_weights(heads * width * self.q_lora_rank + width * shape.hidden_size + heads * shape.hidden_size)
        layer_norm = Budget(params=2 * width, active_params=2 * width)
        norm = layer_norm if self.index_k_norm_type == "layer" else shape.norm.budget(shape, width)
        scores = Budget(flops_per_token=(2.0 * heads * width + 2.0 * heads) * (length + 1) / 2)
        state = Budget(state_bytes_per_token=STATE_ELEMENT_BYTES * width)
        whole = projections + norm + scores + state
        return whole if length > self.index_topk else replace(whole, flops_per_token=0.0)

    def budget(self, shape: ModelShape) -> Budget:
        own = super().budget(shape)
        return own + self.index_budget(shape) if self.owns_index(shape) else own

    def build(self, shape: ModelShape) -> SparseAttention:
        return SparseAttention(self, shape)


@register("attention")
class LSAConfig(DSAConfig):
    """LongCat sparse attention: DSA with sinks and a window always selected, and one indexer for consecutive attentions.

    The same attention with other defaults; every difference to DSA is a knob of both kinds.
    """

    kind: Literal["lsa"] = "lsa"
    index_init_tokens: int = Field(1, ge=0, description="sinks: first tokens of the document, selected always")
    index_local_tokens: int = Field(32, ge=0, description="window: last tokens up to the query's own, selected always")
    cli_factor: int = Field(2, ge=1, description="consecutive attentions that share one indexer and its selection")
    dsa_mtp_cli: bool = Field(True, description="prediction steps after the first take the first one's selection")
    index_k_norm_type: Literal["layer", "rms"] = Field("rms", description="norm of the index key: LayerNorm with bias, or the model's own")
    index_rope_layout: Literal["half-split", "interleaved"] = Field(
        "interleaved", description="pairs that the indexer's RoPE turns: (0, d/2), ... or (0, 1), ... as the attention's"
    )
