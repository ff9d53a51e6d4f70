from __future__ import annotations

from typing import Literal

from pydantic import Field

from longcat_lab.blocks.engram.module import Engram
from longcat_lab.blocks.interface import STATE_ELEMENT_BYTES, Budget, ModelShape, register
from longcat_lab.blocks.ngram_embedding.config import check_layers
from longcat_lab.blocks.ngram_embedding.hash_config import HashFamily, HashSettings


@register("ngram")
class EngramConfig(HashSettings):
    """Hashed n-gram rows that enter the residual stream before chosen layers, gated by what the stream holds, and a short convolution.

        e = concat of all tables' rows;  s = <RMSN(h), RMSN(W_K e)> / sqrt(H);  v = sigmoid(sign(s) sqrt|s|) W_V e
        h += v + SiLU(DWConv(RMSN(v)))       causal, depthwise, dilation `order`, weights 0 at the start

    Each layer has tables and a draw of the hash of its own. Left out: the source's merging of token ids that read alike.
    Source: Engram (arXiv 2601.07372).
    """

    kind: Literal["engram"] = "engram"
    splits: int = Field(8, ge=1, description="hash tables for each order")
    hash: HashFamily = Field("multiplicative_xor", description="see ngram_embedding")
    injection_layers: list[int] = Field([0], description="layers before which it stands, each with tables of its own")
    conv_kernel: int = Field(4, ge=0, description="k, taps of the convolution, `order` tokens apart; 0: none")
    conv_boundary: Literal["documents", "none"] = Field("documents", description="what the convolution does not reach across")

    def check(self, shape: ModelShape) -> None:
        super().check(shape)
        check_layers(self.injection_layers, shape, self.where, first=0)

    def budget(self, shape: ModelShape) -> Budget:
        hidden, features = shape.hidden_size, self.tables * self.width(shape)
        one = Budget(params=self.table_params(shape)) + Budget.of_weights(2 * hidden * features + self.conv_kernel * hidden)
        one += (3 if self.conv_kernel else 2) * shape.norm.budget(shape)
        # Decoding keeps the normed v of earlier tokens where a second tap reads it.
        kept = Budget(state_bytes_per_token=STATE_ELEMENT_BYTES * hidden if self.conv_kernel > 1 else 0)
        return len(self.injection_layers) * (one + kept)

    def build(self, shape: ModelShape, std: float) -> Engram:
        """`std`: RMS that the token's rows, and W_V e, start with."""
        return Engram(self, shape, std)
