from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field, model_validator

from longcat_lab.blocks.decoder_layer.config import DecoderLayerConfig
from longcat_lab.blocks.interface import BlockConfig, Budget, ModelShape, attentions_of, register
from longcat_lab.blocks.mtp.module import MTP
from longcat_lab.node import ConfigError

Pair = Annotated[list[float], Field(min_length=2, max_length=2)]  # a tuple would not be found in YAML or JSON


@register("mtp")
class MTPConfig(BlockConfig):
    """Multi-token prediction: D further steps, from D blocks (DeepSeek-V3) or from one repeated block (LongCat-2.0)."""

    kind: Literal["mtp"] = "mtp"
    num_nextn_predict_layers: int = Field(1, ge=1, description="D: tokens predicted beyond the next one")
    repeat_block: bool = Field(True, description="one block for all steps; false: a block of its own for each")
    block: Literal["dense", "layer"] = Field("dense", description="one attention and one dense network, or a layer of the trunk's kind")
    hidden: Literal["raw", "normed"] = Field(
        "raw", description="what a step takes from the one before it (the trunk, for the first): before or after that one's final norm"
    )
    recompute: bool = Field(True, description="run again in backward instead of keeping activations: less memory, little time")
    loss_weight: float = Field(0.1, ge=0, description="lambda: the mean of the steps' losses enters the loss with this weight")
    loss_weight_schedule: list[Pair] = Field(
        [], description="pairs (share of the training steps, weight from there on), rising; before the first, loss_weight holds"
    )
    draft_positions: Literal["aligned", "chained"] = Field(
        "aligned",
        description="where step k stands when it drafts: at the trunk's position with a cache of its own, as it is trained; or k - 1 "
        "positions further in one cache, as engines serve a repeated block. The text is the same, acceptance is not",
    )
    detach: bool = Field(False, description="train the prediction blocks alone: no gradient into trunk, embedding and head")
    own_embedding: bool = Field(False, description="a token embedding of its own, as LongCat's checkpoints have; false: the trunk's")
    own_ngram_tables: bool = Field(
        False, description="carry a copy of the n-gram tables that is never read, as LongCat-2.0's checkpoint does"
    )

    @model_validator(mode="after")
    def _possible(self) -> MTPConfig:
        shares = [share for share, _ in self.loss_weight_schedule]
        if shares != sorted(shares) or any(not 0 <= share <= 1 for share in shares):
            raise ValueError(f"loss_weight_schedule has shares {shares}, which must rise and lie between 0 and 1")
        if any(weight < 0 for _, weight in self.loss_weight_schedule):
            raise ValueError("loss_weight_schedule has a negative weight")
        if self.draft_positions == "chained" and not self.repeat_block:
            raise ValueError("draft_positions chained needs repeat_block, whose one cache the steps share")
        if self.own_ngram_tables and not self.own_embedding:
            raise ValueError("own_ngram_tables needs own_embedding")
        return self

    @property
    def blocks(self) -> int:
        """Prediction blocks that have parameters of their own."""
        return 1 if self.repeat_block else self.num_nextn_predict_layers

    def weight_at(self, share: float) -> float:
        """lambda when `share` (0 to 1) of the training steps are done."""
        weight = self.loss_weight
        for start, later in self.loss_weight_schedule:
            weight = later if share >= start else weight
        return weight

    def inner(self, shape: ModelShape) -> tuple[BlockConfig, ModelShape]:
        """The layer that a block holds, and the place it stands at: its attention owns its index like a first layer's.

        Its dense networks look nothing up: a step's position holds the token ahead, and drafts would have to be looked up too.
        """
        if hasattr(shape.ffn, "plain"):
            shape = replace(shape, ffn=shape.ffn.plain())
        if self.block == "layer":
            return shape.layer, replace(shape, layer_index=shape.num_layers)
        return DecoderLayerConfig(first_k_dense_replace=1), replace(shape, layer_index=0)

    def check(self, shape: ModelShape) -> None:
        attention, (layer, place) = shape.attention, self.inner(shape)
        first = replace(place, attention_index=place.layer_index * attentions_of(layer))
        if hasattr(attention, "place") and attention.place(first.attention_index):
            raise ConfigError("model.mtp: its attention would reuse an index that no layer before it owns: make num_layers fit cli_factor.")
        if self.own_ngram_tables and getattr(shape.embedding, "ngram", None) is None:
            raise ConfigError(
                "model.mtp.own_ngram_tables copies the tables of model.embedding.ngram, which is empty: give it tables, or write false."
            )

    def own_embedding_config(self, shape: ModelShape) -> BlockConfig | None:
        """The configuration of its own embedding, or None where it reads the trunk's."""
        if not self.own_embedding:
            return None
        return shape.embedding if self.own_ngram_tables else shape.embedding.model_copy(update={"ngram": None})

    def budget(self, shape: ModelShape) -> Budget:
        layer, place = self.inner(shape)
        one = 3 * shape.norm.budget(shape) + Budget.of_weights(2 * shape.hidden_size**2) + layer.budget(place)
        head = Budget(flops_per_token=2.0 * shape.hidden_size * shape.vocab_size)  # the trunk's, used once more a step
        every_step = replace(one, params=0) + head
        shared = Budget()
        if getattr(shape.attention, "dsa_mtp_cli", False):  # steps 2 ... D take step 1's selection
            per_layer = attentions_of(layer)
            places = [replace(place, attention_index=place.layer_index * per_layer + s) for s in range(per_layer)]
            owners = sum(shape.attention.owns_index(each) for each in places)
            index = replace(shape.attention.index_budget(place), params=0, state_bytes_per_token=0)
            shared = owners * (1 - self.num_nextn_predict_layers) * index
        own = self.own_embedding_config(shape)
        carried = Budget(params=own.budget(shape).params) if own else Budget()  # looked up or idle, never multiplied
        return Budget(params=self.blocks * one.params) + self.num_nextn_predict_layers * every_step + shared + carried

    def build(self, shape: ModelShape) -> MTP:
        return MTP(self, shape)
