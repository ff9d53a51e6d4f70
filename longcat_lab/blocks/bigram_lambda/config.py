from __future__ import annotations

from typing import Literal

from pydantic import Field

from longcat_lab.blocks.bigram_lambda.module import SIGNS, BigramLambda
from longcat_lab.blocks.hash_sum.config import FullWidthSettings
from longcat_lab.blocks.interface import Budget, ModelShape, register
from longcat_lab.blocks.ngram_embedding.config import check_layers
from longcat_lab.blocks.ngram_embedding.hash_config import HashFamily
from longcat_lab.blocks.ngram_embedding.hash_op import HashPlan, make_plan

MULTIPLIERS = [36313, 27191]


@register("ngram")
class BigramLambdaConfig(FullWidthSettings):
    """A hashed bigram row that enters the residual stream before every layer, with one learned scale a layer.

        x += lambda_l B[h_2]         with sign_rows: x += lambda_l (B[h_2] * S[h'_2]), S fixed rows of +1 and -1

    Longer orders and more splits add their rows to B[h_2]. Signs of a second hash let n-grams that share a row disagree.
    Its 2 H element-wise operations a layer count as little as any others in FLOPs, which are those of matrix products.
    Source: modded-nanogpt and nanochat (public training code, 2026), whose two multipliers are the default.
    """

    kind: Literal["bigram_lambda"] = "bigram_lambda"
    order: int = Field(2, ge=2, le=16, description="longest n-gram, in tokens; each order from 2 on has `splits` full-width tables")
    splits: int = Field(1, ge=1, description="hash tables for each order")
    hash: HashFamily = Field("multiplicative_xor", description="see ngram_embedding")
    multipliers: list[int] | None = Field(
        None,
        description="multiplicative_xor: one odd number a lag, the current token's first; empty: 36313 and 27191 for bigrams, else drawn",
    )
    lambda_init: float = Field(0.1, gt=0, description="what each layer's scale starts with; the rows start with zeros")
    injection_layers: list[int] | None = Field(None, description="layers before which the rows are added; empty: all")
    sign_rows: int = Field(0, ge=0, description="rows of fixed signs, of a second hash (the next prime from here on); 0: no signs")

    def layers(self, shape: ModelShape) -> list[int]:
        return list(range(shape.num_layers)) if self.injection_layers is None else self.injection_layers

    def plan(self, vocab_size: int, salt: int = 0) -> HashPlan:
        usual = self.hash == "multiplicative_xor" and self.order == 2 and self.multipliers is None and salt == 0
        settings = self.model_copy(update={"multipliers": MULTIPLIERS}) if usual else self
        return make_plan(settings, vocab_size, self.moduli(vocab_size), salt)

    def sign_settings(self) -> BigramLambdaConfig:
        """The second hash: as many tables, `sign_rows` each, multipliers drawn from hash_seed."""
        changes = {"hash": "multiplicative_xor", "multipliers": None, "table_rows": self.sign_rows}
        return self.model_copy(update=changes)

    def check(self, shape: ModelShape) -> None:
        super().check(shape)
        if self.sign_rows:
            self.sign_settings().plan(shape.vocab_size, salt=SIGNS).check(f"{self.where}.sign_rows")
        check_layers(self.layers(shape), shape, self.where, first=0)

    def budget(self, shape: ModelShape) -> Budget:
        scales = len(self.layers(shape))
        return Budget(params=self.table_params(shape) + scales, active_params=scales)

    def build(self, shape: ModelShape, std: float) -> BigramLambda:
        """`std`: RMS that the token's rows start with."""
        return BigramLambda(self, shape, std)
