"""Rules by which an attention picks its keys. A new one is a class with one method:

    @lab.register("selection")
    class Strided(lab.Selection):
        kind: Literal["strided"] = "strided"
        uses_indexer: ClassVar[bool] = False

        def rank(self, at):
            return (at.distance % 4 == 0).float().expand_as(at.visible)

Then `model.attention.selection.kind=strided`. Sinks and window (`index_init_tokens`, `index_local_tokens`) are taken in before the rule
is asked, and `index_topk` holds for all rules.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from longcat_lab.blocks.interface import BlockConfig, register
from longcat_lab.errors import LabError


@dataclasses.dataclass(frozen=True)
class Candidates:
    """What a rule may look at: some of the queries, and all S keys.

    visible: bool [B, t, S], False for keys of other documents and for keys ahead.
    query, key: int64 [t] and [S], positions in the row (those of cached tokens count).
    group: number of the attention's index group in the model.
    index_scores: the trained indexer's I [B, t, S]; only for rules with `uses_indexer`.
    attention_mass: what the attention would give each key if it saw all: softmax of each head, mean over heads, [B, t, S]. It costs as
        much as dense attention.
    """

    visible: Tensor
    query: Tensor
    key: Tensor
    group: int
    index_scores: Callable[[], Tensor]
    attention_mass: Callable[[], Tensor]

    @property
    def distance(self) -> Tensor:
        """int64 [t, S]: how far a key lies behind the query; 0 is the query's own position."""
        return self.query[:, None] - self.key


class Selection(BlockConfig):
    """Base of the rules.

    uses_indexer: the attention has an indexer (parameters, cached keys), which is trained; otherwise it has none.
    selects: False for a rule that leaves the attention dense.
    """

    uses_indexer: ClassVar[bool] = True
    selects: ClassVar[bool] = True

    def rank(self, at: Candidates) -> Tensor:
        """Any real numbers [B, t, S]: visible keys are selected from the highest down; of equal ones the earlier key first."""
        raise NotImplementedError


@register("selection", default=True)
class IndexerSelection(Selection):
    """The keys that the lightning indexer scores highest: DSA's rule, and with sinks and window LSA's."""

    kind: Literal["indexer"] = "indexer"

    def rank(self, at: Candidates) -> Tensor:
        return at.index_scores()


@register("selection")
class DenseSelection(Selection):
    """All visible keys: MLA in the same place, with no indexer."""

    kind: Literal["dense"] = "dense"
    uses_indexer: ClassVar[bool] = False
    selects: ClassVar[bool] = False


@register("selection")
class WindowSelection(Selection):
    """The last index_topk keys, sinks among them where there are any."""

    kind: Literal["window"] = "window"
    uses_indexer: ClassVar[bool] = False

    def rank(self, at: Candidates) -> Tensor:
        return -at.distance.float().expand_as(at.visible)


@register("selection")
class RandomSelection(Selection):
    """Keys at random: a fixed hash of the two positions and the group, so that decoding selects what a whole pass does."""

    kind: Literal["random"] = "random"
    uses_indexer: ClassVar[bool] = False
    seed: int = Field(0, ge=0, lt=2**20, description="of the hash")

    def rank(self, at: Candidates) -> Tensor:
        mixed = at.query[:, None] * 0x9E3779B1 + at.key * 0x85EBCA77 + (self.seed * 64 + at.group) * 0xC2B2AE3D
        for shift, factor in ((15, 0x2C1B3C6D), (12, 0x297A2D39), (15, 1)):  # xor-shift and multiply until no line is left
            mixed = ((mixed ^ (mixed >> shift)) * factor) & 0xFFFFFFFF
        return mixed.double().expand_as(at.visible)


@register("selection")
class OracleSelection(Selection):
    """The keys that this attention would give most to if it were dense: what an indexer is trained to find. Costs more than dense."""

    kind: Literal["oracle"] = "oracle"
    uses_indexer: ClassVar[bool] = False

    def rank(self, at: Candidates) -> Tensor:
        return at.attention_mass()


def choose(rule: Selection, at: Candidates) -> Tensor:
    """`rule.rank` as floats, checked: the right shape, no NaN. -inf counts as the lowest finite number: invisible keys have it."""
    rank = rule.rank(at)
    if not isinstance(rank, Tensor) or rank.shape != at.visible.shape:
        found = list(rank.shape) if isinstance(rank, Tensor) else type(rank).__name__
        raise LabError(f"model.attention.selection.kind {rule.kind}: rank() gave {found}; it must give a tensor {list(at.visible.shape)}.")
    rank = rank if rank.is_floating_point() else rank.to(torch.float64)
    if rank.isnan().any():
        raise LabError(f"model.attention.selection.kind {rule.kind}: rank() gave NaN; it must give numbers.")
    return rank.clamp(min=torch.finfo(rank.dtype).min)
