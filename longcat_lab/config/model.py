"""What a model is: sizes, and a block kind for every role."""

from __future__ import annotations

from pydantic import Field, model_validator

from longcat_lab.blocks import ModelShape, slot
from longcat_lab.node import Node


class ModelConfig(Node):
    """A LongcatLM. Knobs have the names of the published configurations."""

    hidden_size: int = Field(128, ge=1, description="width of the residual stream")
    num_layers: int = Field(2, ge=1, description="layers; a shortcut layer has two attentions")
    vocab_size: int = Field(4096, ge=257, description="tokens, the tokenizer's too; 256 bytes and the end-of-document token at least")
    max_position_embeddings: int = Field(256, ge=2, description="longest sequence")
    initializer_range: float = Field(0.02, gt=0, description="standard deviation of initial weights")
    base_hidden_size: int | None = Field(
        None,
        ge=1,
        description="width of the proxy whose learning rate and initializer_range are carried over to this width; empty: none",
    )
    embedding: slot("embedding") = Field(default={}, description="input embedding")
    rope: slot("rope") = Field(default={}, description="positions")
    norm: slot("norm") = Field(default={}, description="normalisation")
    attention: slot("attention") = Field(default={}, description="attention, twice a shortcut layer")
    ffn: slot("ffn") = Field(default={}, description="dense feed-forward network, twice a shortcut layer")
    moe: slot("moe") = Field(default={}, description="mixture of experts, once a layer")
    layer: slot("layer") = Field(default={}, description="how a layer orders the others")
    mtp: slot("mtp") | None = Field(default=None, description="multi-token prediction; empty for none")

    @property
    def width_scale(self) -> float:
        """s of the width transfer: hidden_size over the proxy's, 1 where there is none."""
        return self.hidden_size / (self.base_hidden_size or self.hidden_size)

    def shape(self) -> ModelShape:
        """What the blocks are told of this model."""
        return ModelShape(
            hidden_size=self.hidden_size,
            vocab_size=self.vocab_size,
            sequence_length=self.max_position_embeddings,
            initializer_range=self.initializer_range,
            num_layers=self.num_layers,
            norm=self.norm,
            rope=self.rope,
            attention=self.attention,
            ffn=self.ffn,
            moe=self.moe,
            layer=self.layer,
            embedding=self.embedding,
        )

    def check(self) -> None:
        """Raises ConfigError where the blocks' settings and the model's do not fit together."""
        parts = (self.embedding, self.rope, self.norm, self.attention, self.ffn, self.moe, self.layer, self.mtp)
        for part in parts:
            if part is not None:
                part.check(self.shape())

    @model_validator(mode="after")
    def _fits(self) -> ModelConfig:
        self.check()
        return self
