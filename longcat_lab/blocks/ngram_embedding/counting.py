"""Exact counts behind `analyse`: distinct n-grams of a text, the rows that they take, the addresses that tables give them together."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch

from longcat_lab.blocks.ngram_embedding.advise import has_lattice, table_spread
from longcat_lab.blocks.ngram_embedding.hash_op import HashPlan, ngram_rows_reference, predecessors
from longcat_lab.blocks.ngram_embedding.numbers import evenness
from longcat_lab.errors import LabError


@dataclass(frozen=True, eq=False)
class Stream:
    """Tokens as the hash reads them: both int64 [B, T]; document_ids None for one document a row."""

    tokens: torch.Tensor
    document_ids: torch.Tensor | None


@dataclass(frozen=True, eq=False)
class DistinctNgrams:
    """The u distinct n-grams of one order.

    first: int64 [u], where each occurs first, counted through all positions; occurrences: int64 [u], how often.
    """

    first: np.ndarray
    occurrences: np.ndarray


@dataclass(frozen=True)
class TableCount:
    """What one table gets to see.

    rows M; ngrams u, distinct n-grams of its order in the text; rows_used by them; sharing: share of all occurrences whose row serves
    another distinct n-gram too; pairs: pairs of distinct n-grams on one row; evenness, spread: of the size by `numbers`, over the last two
    tokens, NaN where the hash has no lattice or token ids do not follow frequency.
    """

    table: int
    order: int
    split: int
    rows: int
    ngrams: int
    rows_used: int
    sharing: float
    pairs: int
    evenness: float
    spread: float

    @property
    def hit_rate(self) -> float:
        return self.rows_used / self.rows

    @property
    def load(self) -> float:
        """Distinct n-grams a row."""
        return self.ngrams / self.rows

    @property
    def colliding(self) -> int:
        """n-grams that found their row taken: u minus rows used."""
        return self.ngrams - self.rows_used

    @property
    def expected(self) -> float:
        """What `colliding` is in the mean of a uniform hash: u - M (1 - (1 - 1/M)^u)."""
        return expected_collisions(self.ngrams, self.rows)

    @property
    def relative(self) -> float:
        """Colliding over expected. It is near 1 for every hash of a full table (load well above 1): `relative_pairs` is not."""
        return self.colliding / self.expected if self.expected > 0 else math.nan

    @property
    def relative_pairs(self) -> float:
        """Pairs on one row over the u (u - 1) / 2M of a uniform hash."""
        return self.pairs * 2 * self.rows / (self.ngrams * (self.ngrams - 1)) if self.ngrams > 1 else math.nan


@dataclass(frozen=True)
class OrderCount:
    """What the K tables of one order tell apart together.

    addresses: distinct n-grams by the rows of the first 1 ... K tables together; needed: fewest tables that tell all V^n apart
    (`tables_needed`); covers: the own sizes' lcm is at least V^n, which for a polynomial in base V proves that no two n-grams share all
    rows.
    """

    order: int
    tables: int
    ngrams: int
    addresses: tuple[int, ...]
    needed: int
    covers: bool

    @property
    def colliding(self) -> int:
        """n-grams whose rows are another's in all K tables."""
        return self.ngrams - self.addresses[-1]


def count_table(plan: HashPlan, table: int, row: np.ndarray, ngrams: DistinctNgrams) -> TableCount:
    """row: int64 [u], where each distinct n-gram goes in the table."""
    _, place, guests = np.unique(row, return_inverse=True, return_counts=True)
    sharing = ngrams.occurrences[guests[place] > 1].sum() / ngrams.occurrences.sum()
    order, rows = plan.orders[table], plan.moduli[table]
    even = (evenness(plan.weights[1][table], rows), table_spread(plan, table)) if has_lattice(plan) else (math.nan, math.nan)
    pairs = int((guests * (guests - 1) // 2).sum())
    return TableCount(table, order, table - plan.orders.index(order), rows, len(row), len(guests), float(sharing), pairs, *even)


def distinct_ngrams(plan: HashPlan, stream: Stream) -> list[DistinctNgrams]:
    """Of orders 2 ... n, counted exactly: no hash is involved, so no two of them are taken for one."""
    lags = [lag.flatten().numpy() for lag in predecessors(stream.tokens, stream.document_ids, plan)]
    rank, found = lags[0], []
    for lag in lags[1:]:
        _, first, rank, occurrences = np.unique(joined(rank, lag), return_index=True, return_inverse=True, return_counts=True)
        found.append(DistinctNgrams(first, occurrences))
    return found


def joined(rank: np.ndarray, more: np.ndarray) -> np.ndarray:
    """Numbers that are equal where both arrays are. They fit 64 bits: rank counts below 2^31 positions, ids and rows are below 2^32."""
    return rank * (int(more.max()) + 1) + more


def expected_collisions(ngrams: int, rows: int) -> float:
    """u - M (1 - (1 - 1/M)^u), without cancellation where u is far below M."""
    return ngrams - 1.0 if rows == 1 else ngrams + rows * math.expm1(ngrams * math.log1p(-1 / rows))


def rows_of(plan: HashPlan, order: int, stream: Stream, ngrams: DistinctNgrams) -> np.ndarray:
    """int64 [K, u], where each distinct n-gram of `order` goes in each of its tables."""
    rows = ngram_rows_reference(stream.tokens, stream.document_ids, of_order(plan, order))
    return rows.flatten(0, 1)[torch.from_numpy(ngrams.first)].numpy().T


def of_order(plan: HashPlan, order: int) -> HashPlan:
    """The plan with the tables of one order alone."""
    own = [table for table, n in enumerate(plan.orders) if n == order]
    weights = tuple(tuple(lag[table] for table in own) for lag in plan.weights)
    return replace(plan, moduli=tuple(plan.moduli[t] for t in own), orders=(order,) * len(own), weights=weights)


def read_stream(
    tokens: np.ndarray | torch.Tensor, document_ids: np.ndarray | torch.Tensor | None, vocab_size: int | None
) -> tuple[Stream, int]:
    """Tokens as int64 [B, T] on the CPU, and V; raises as `analyse` says."""
    found = [None if each is None else _whole(each) for each in (tokens, document_ids)]
    if found[0] is None or found[0].numel() == 0:
        raise LabError("There are no tokens to analyse: give at least one.")
    if found[1] is not None and found[1].shape != found[0].shape:
        raise LabError(f"document_ids have the shape {list(found[1].shape)} and tokens {list(found[0].shape)}: give one a token.")
    vocab_size = vocab_size or int(found[0].max()) + 1
    if int(found[0].min()) < 0 or int(found[0].max()) >= vocab_size:
        raise LabError(f"Tokens reach from {int(found[0].min())} to {int(found[0].max())}, outside 0 to vocab_size - 1 = {vocab_size - 1}.")
    return Stream(*found), vocab_size


def _whole(array: np.ndarray | torch.Tensor) -> torch.Tensor:
    """int64 [B, T]; one row of what has one axis."""
    array = array.cpu().numpy() if isinstance(array, torch.Tensor) else np.asarray(array)
    if array.ndim not in (1, 2) or not np.issubdtype(array.dtype, np.integer):
        raise LabError(f"Tokens and document ids are whole numbers [N] or [B, T], not {array.dtype} {list(array.shape)}.")
    return torch.from_numpy(np.atleast_2d(array).astype(np.int64))
