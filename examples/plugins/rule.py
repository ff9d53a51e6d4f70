"""A selection rule: beyond the window, every fourth key."""

from typing import ClassVar, Literal

import longcat_lab as lab


@lab.register("selection")
class Comb(lab.Selection):
    kind: Literal["comb"] = "comb"
    uses_indexer: ClassVar[bool] = False
    every: int = 4

    def rank(self, at):  # [B, t, S]: the highest are selected first, of equal ones the earlier key
        return (at.distance % self.every == 0).float().expand_as(at.visible)
