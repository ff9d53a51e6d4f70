from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from longcat_lab.blocks.hash_sum.module import HashSum
from longcat_lab.blocks.interface import Budget, ModelShape, register
from longcat_lab.blocks.ngram_embedding.hash_config import HashSettings
from longcat_lab.node import ConfigError


class FullWidthSettings(HashSettings):
    """Hashed tables whose rows are as wide as the residual stream: nothing projects them."""

    shares_width: ClassVar[bool] = False

    def width(self, shape: ModelShape) -> int:
        return shape.hidden_size

    def check(self, shape: ModelShape) -> None:
        if self.table_width is not None:
            raise ConfigError(
                f"{self.where}.table_width: the rows of {self.kind} are added without a projection and are as wide as hidden_size "
                f"{shape.hidden_size}: leave it empty."
            )
        HashSettings.check(self.model_copy(update={"table_width": shape.hidden_size}), shape)  # tables need not divide the width


@register("ngram")
class HashSumConfig(FullWidthSettings):
    """Mean of the token's row and of one full-width hashed row from each of E tables; no projection.

        e = (E_0[t] + sum_i E_i[H_i]) / (E + 1)

    Source: BLT (arXiv 2412.09871), on bytes and orders 3 to 8; CANINE (arXiv 2103.06874) hashes characters alike.
    """

    kind: Literal["hash_sum"] = "hash_sum"
    table_init_ratio: float = Field(1.0, ge=0, description="RMS of a table's rows over that of the token's, at the start; 0: empty tables")
    normalised_init: bool = Field(
        True, description="initial rows such that the output starts with the RMS asked for; false: rows start with it, whatever comes out"
    )

    def budget(self, shape: ModelShape) -> Budget:
        return Budget(params=self.table_params(shape))  # looked up, not multiplied

    def build(self, shape: ModelShape, std: float) -> HashSum:
        """`std`: RMS that the output starts with."""
        return HashSum(self, shape, std)
