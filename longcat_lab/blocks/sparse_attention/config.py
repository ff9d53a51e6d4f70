from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from pydantic import Field, model_validator
from torch import nn

from longcat_lab.blocks.interface import STATE_ELEMENT_BYTES, Budget, ModelShape, attentions_of, register, slot
from longcat_lab.blocks.mla.config import MLAConfig
from longcat_lab.blocks.sparse_attention.module import SparseAttention
from longcat_lab.blocks.sparse_attention.op import mean_selected
from longcat_lab.blocks.sparse_attention.selection import IndexerSelection
from longcat_lab.node import ConfigError, Node

LAYER_NORM_EPS = 1e-6  # of DSA's key norm, whatever the model's own norms have


def attentions(shape: ModelShape) -> int:
    """Attentions of the trunk."""
    return shape.num_layers * attentions_of(shape.layer)


class DistillConfig(Node):
    """How the indexer learns from the attentions it serves: KL to their weights, in the dense warm-up and in sparse training."""

    weight: float = Field(1.0, ge=0, description="of each served attention's KL (mean over queries, nats) in the loss; 0: not trained")
    temperature: float = Field(1.0, gt=0, description="index scores are divided by it before their softmax")
    served: Literal["sum", "mean", "owner"] = Field(
        "sum", description="attentions that teach: all that the indexer serves (LSA's sum, or their mean), or its owner alone"
    )
    served_weights: list[float] = Field(
        [], description="in place of `served`: a weight for each attention of a group, the owner's first; as many as cli_factor"
    )
    support: Literal["all", "dynamic"] = Field(
        "all", description="keys of the sparse KL: all selected ones, as the paper has it; or without sinks and window"
    )
    teacher: Literal["per_head", "restricted"] = Field(
        "per_head",
        description="sparse teacher: each head's softmax over the selected keys, then their mean; or the mean over all keys, restricted "
        "to the selected ones and scaled to 1, which weighs heads by what they give these keys and costs as much as dense attention",
    )


class HierarchicalConfig(Node):
    """Hierarchical indexing, at inference alone: whole pages are ranked first, tokens inside the best pages then."""

    page: int = Field(128, ge=1, description="P: tokens of a page")
    block: int = Field(8, ge=1, description="B: tokens of a sub-block, whose mean key stands for them; divides page")
    pages: int = Field(1024, ge=1, description="M: pages whose tokens are scored")
    exempt: int = Field(4, ge=0, description="indexers, from the first on, that stay flat; a prediction step's counts as the first")
    pooling: Literal["mean", "minmax"] = Field("mean", description="of a sub-block's keys: their mean, or the bound by least and largest")
    from_length: int = Field(262_144, ge=0, description="keys below which indexing stays flat")
    decode: bool = Field(False, description="also for tokens that come after the prompt's own pass; LongCat serves decoding flat")

    @model_validator(mode="after")
    def _divides(self) -> HierarchicalConfig:
        if self.page % self.block:
            raise ValueError(f"block is {self.block}, which does not divide page {self.page}: make it a divisor")
        return self

    def applies(self, indexer: int, decoding: bool, keys: int) -> bool:
        """Whether the model's `indexer`-th indexer works page by page on `keys` keys; decoding: some of them are of earlier passes."""
        return indexer >= self.exempt and keys >= self.from_length and (self.decode or not decoding)


@register("attention")
class DSAConfig(MLAConfig):
    """DeepSeek sparse attention: MLA over the index_topk keys that a lightning indexer scores highest."""

    kind: Literal["dsa"] = "dsa"
    index_n_heads: int = Field(2, ge=1, description="H_I: heads of the indexer; the published models have half of the attention's")
    index_head_dim: int = Field(32, ge=2, description="d_I: width of an indexer head, at least qk_rope_head_dim")
    index_topk: int = Field(64, ge=1, description="K: keys that a query attends to, sinks and window among them")
    index_init_tokens: int = Field(0, ge=0, description="sinks: first tokens of the document, selected always")
    index_local_tokens: int = Field(0, ge=0, description="window: last tokens up to the query's own, selected always")
    cli_factor: int = Field(1, ge=1, description="N: consecutive attentions that share one indexer and its selection")
    cli_offset: int = Field(
        0,
        ge=0,
        description="attentions before the first whole group, which make a group of their own; below cli_factor (1 with cli_factor 2: "
        "indexers stand at the second attention of a shortcut layer)",
    )
    dsa_mtp_cli: bool = Field(False, description="prediction steps after the first take the first one's selection")
    index_mtp_newest: Literal["slide", "append", "reuse"] = Field(
        "slide",
        description="chained drafts that share a selection: keys newer than it. The window moves on with the query; or they are added to "
        "it; or they stay out, the query's own too. Which one LongCat serves is not known",
    )
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
    index_score_scale: Literal["heads_and_width", "width", "none"] = Field(
        "heads_and_width",
        description="factor in the scores: 1 / sqrt(H_I d_I) as the released code has it, 1 / sqrt(d_I), or none; "
        "the selection is the same, the KL's temperature is not",
    )
    selection: slot("selection") = Field(default_factory=IndexerSelection, description="rule that picks the keys")
    distill: DistillConfig = Field(default_factory=DistillConfig, description="how the indexer learns")
    hierarchical: HierarchicalConfig | None = Field(None, description="page-wise indexing when not training; empty: none")

    @model_validator(mode="after")
    def _sparse(self) -> DSAConfig:
        fixed = self.index_init_tokens + self.index_local_tokens
        if fixed > self.index_topk:
            raise ValueError(f"index_topk is {self.index_topk}, below index_init_tokens + index_local_tokens ({fixed}): raise it")
        if self.index_head_dim < self.qk_rope_head_dim:
            raise ValueError(f"index_head_dim is {self.index_head_dim}, below qk_rope_head_dim {self.qk_rope_head_dim}: raise it")
        if self.q_lora_rank is None:
            raise ValueError("q_lora_rank is empty, but the indexer reads the query latent: give it a width")
        if self.cli_offset >= self.cli_factor:
            raise ValueError(f"cli_offset is {self.cli_offset}, not below cli_factor {self.cli_factor}: lower it")
        weights = self.distill.served_weights
        if weights and (len(weights) != self.cli_factor or min(weights) < 0):
            raise ValueError(f"distill.served_weights {weights} must be {self.cli_factor} numbers (cli_factor), none below 0")
        pages = self.hierarchical
        if pages and self.selection.kind != "indexer":
            raise ValueError(f"hierarchical is for selection.kind indexer, not {self.selection.kind}: leave it out")
        if pages and pages.page * pages.pages < self.index_topk:
            raise ValueError(f"hierarchical.pages x page is {pages.page * pages.pages}, below index_topk {self.index_topk}: raise pages")
        return self

    def check(self, shape: ModelShape) -> None:
        weights = self.distill.served_weights
        for group in {self.group(index) for index in range(attentions(shape))} if weights else ():
            if not any(weights[: self.members(group, shape)]):
                raise ConfigError(
                    f"model.attention.distill.served_weights {weights} leaves the index of group {group} without a teacher "
                    f"(it serves {self.members(group, shape)}): give one of these a weight."
                )

    def members(self, group: int, shape: ModelShape) -> int:
        """Attentions of the trunk in an index group; the first and the last one of a model may be smaller than cli_factor."""
        return max(1, sum(self.group(index) == group for index in range(attentions(shape))))

    def members_in_layer(self, shape: ModelShape) -> int:
        """Attentions of the group of `shape.attention_index` in a prediction step, which is a layer behind the trunk, or one attention."""
        behind = range(attentions(shape), attentions(shape) + attentions_of(shape.layer))
        return sum(self.group(i) == self.group(shape.attention_index) for i in behind) if shape.attention_index in behind else 1

    def group(self, attention_index: int) -> int:
        """Number of the group of attentions that share a selection."""
        if self.cli_offset == 0:
            return attention_index // self.cli_factor
        return 0 if attention_index < self.cli_offset else 1 + (attention_index - self.cli_offset) // self.cli_factor

    def place(self, attention_index: int) -> int:
        """How many attentions of its group come before it; 0 for the one that selects."""
        return attention_index if attention_index < self.cli_offset else (attention_index - self.cli_offset) % self.cli_factor

    def check_stages(self, starts: Iterable[int]) -> None:
        """For pipelines: raises ConfigError where a stage would begin inside a group, whose index lives on one stage.

        Args:
            starts: number of the first attention of each stage.
        """
        for start in starts:
            if self.place(start):
                first = start - self.place(start)
                raise ConfigError(
                    f"A pipeline stage begins at attention {start}, inside the group of cli_factor {self.cli_factor} that begins at "
                    f"{first}: let it begin at attention {first} or {first + self.cli_factor}."
                )

    def owns_index(self, shape: ModelShape) -> bool:
        """Whether the attention at `shape.attention_index` has an indexer of its own."""
        return self.selection.uses_indexer and self.place(shape.attention_index) == 0

    def key_norm(self, shape: ModelShape) -> nn.Module:
        if self.index_k_norm_type == "layer":
            return nn.LayerNorm(self.index_head_dim, eps=LAYER_NORM_EPS)
        return shape.norm.build(shape, self.index_head_dim)

    def selects(self, shape: ModelShape) -> bool:
        """Whether a sequence has keys to leave out."""
        return self.selection.selects and shape.sequence_length > self.index_topk

    def visible(self, shape: ModelShape) -> float:
        return mean_selected(shape.sequence_length, self.index_topk) if self.selects(shape) else super().visible(shape)

    def core_width(self, shape: ModelShape) -> int:
        """Absorbed where keys are gathered: all heads share one key and value of the latent's width."""
        return 2 * self.kv_lora_rank + self.qk_rope_head_dim if self.selects(shape) else super().core_width(shape)

    def index_budget(self, shape: ModelShape) -> Budget:
        """What an indexer costs beside its attention: projections, key norm, scores of all visible pairs, cached keys. Its losses are not
        counted, nor is what the rule `oracle` looks at.

        No FLOPs where a sequence has no more than index_topk tokens: all of them are selected, and it does not run.
        """
        heads, width, length = self.index_n_heads, self.index_head_dim, shape.sequence_length
        projections = Budget.of_weights(heads * width * self.q_lora_rank + width * shape.hidden_size + heads * shape.hidden_size)
        layer_norm = Budget(params=2 * width, active_params=2 * width)
        norm = layer_norm if self.index_k_norm_type == "layer" else shape.norm.budget(shape, width)
        scores = Budget(flops_per_token=(2.0 * heads * width + 2.0 * heads) * (length + 1) / 2)
        state = Budget(state_bytes_per_token=STATE_ELEMENT_BYTES * width)
        whole = projections + norm + scores + state
        return whole if self.selects(shape) else Budget(whole.params, whole.active_params, 0.0, whole.state_bytes_per_token)

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
    cli_factor: int = Field(2, ge=1, description="N: consecutive attentions that share one indexer and its selection")
    dsa_mtp_cli: bool = Field(True, description="prediction steps after the first take the first one's selection")
    index_k_norm_type: Literal["layer", "rms"] = Field("rms", description="norm of the index key: LayerNorm with bias, or the model's own")
    index_rope_layout: Literal["half-split", "interleaved"] = Field(
        "interleaved", description="pairs that the indexer's RoPE turns: (0, d/2), ... or (0, 1), ... as the attention's"
    )
