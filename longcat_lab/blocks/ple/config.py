from __future__ import annotations

from typing import Literal

from pydantic import Field

from longcat_lab.blocks.interface import BlockConfig, Budget, ModelShape, register
from longcat_lab.blocks.ple.module import PerLayerEmbedding


@register("ngram")
class PLEConfig(BlockConfig):
    """Per-layer embeddings: a small row for each token and layer, gated into the residual stream behind the layer. Of tokens, not n-grams.

        x += RMSN(W_p (GELU(W_g x) * p_l)),   p_l = (RMSN(s_1 W_c e) + s_2 E_ple[t]_l) / sqrt 2

    Source: Gemma 3n and Gemma 4 (released code and weights); there the residual stream has further copies, which this leaves out.
    """

    kind: Literal["ple"] = "ple"
    per_layer_width: int = Field(16, ge=1, description="d_p, width of a token's row for one layer")
    initial_gain: float = Field(0.1, ge=0, description="what the gain of the norm behind W_p starts with: RMS of what enters")

    def budget(self, shape: ModelShape) -> Budget:
        layers, width = shape.num_layers, self.per_layer_width
        rows = Budget(params=shape.vocab_size * layers * width)  # looked up, not multiplied
        norms = shape.norm.budget(shape, width) + layers * shape.norm.budget(shape)
        return rows + Budget.of_weights(3 * layers * shape.hidden_size * width) + norms

    def build(self, shape: ModelShape, std: float) -> PerLayerEmbedding:
        """`std`: RMS that the embedding's output starts with."""
        return PerLayerEmbedding(self, shape, std)
