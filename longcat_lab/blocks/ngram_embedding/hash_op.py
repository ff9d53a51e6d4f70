"""Row addresses of hashed n-grams: the equations, and a form with all tables at once."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from longcat_lab.blocks.ngram_embedding.numbers import is_prime
from longcat_lab.node import ConfigError

if TYPE_CHECKING:
    from longcat_lab.blocks.ngram_embedding.hash_config import HashSettings


def table_moduli(vocab_size: int, vocab_ratio: float, order: int, splits: int) -> list[int]:
    """M_i = floor(ratio * V) + 2 i + 1 for table i = (n - 2) * splits + k, n = 2 ... order: rows of each table.

    Computed in floating point as the released code does. Source: LongCat-Flash-Lite (arXiv 2601.21204), released configurations.
    """
    return [int(vocab_ratio * vocab_size + 2 * i + 1) for i in range((order - 1) * splits)]


@dataclass(frozen=True)
class HashPlan:
    """A hash with every number in it; table e = (n - 2) * splits + k belongs to order n.

    Attributes:
        moduli: E sizes. orders: the order n of each table.
        weights: [order][E], what lag j is multiplied with in table e (0 where the table's order does not reach lag j).
        xor: terms are combined by exclusive or in place of a sum.
        base: of the polynomial, where all tables have the same; None for an exclusive or and for bases that are drawn.
        vocab_size: V. hole: the id that stands where there is no token (V itself where it is an id of its own).
        permutation_seed: ids are put into the order that this draws, before anything else; None leaves them.
        boundary, eos_token_id, eos_looks_back: see HashSettings.
    """

    moduli: tuple[int, ...]
    orders: tuple[int, ...]
    weights: tuple[tuple[int, ...], ...]
    xor: bool
    base: int | None
    vocab_size: int
    hole: int
    permutation_seed: int | None
    boundary: str
    eos_token_id: int | None
    eos_looks_back: bool

    @property
    def lags(self) -> int:
        """Predecessors that the longest n-gram reads: what decoding must keep."""
        return len(self.weights) - 1

    def largest(self) -> int:
        """An upper bound of every number that an address is computed from."""
        products = [[max(self.vocab_size, self.hole) * w for w in lag] for lag in self.weights]
        if self.xor:  # no bit above those of the terms
            return 2 ** max(p.bit_length() for lag in products for p in lag) - 1
        return max(sum(column) for column in zip(*products, strict=True))

    def check(self, where: str) -> None:
        if max(self.largest(), sum(self.moduli)) >= 2**63:
            raise ConfigError(
                f"{where}: with vocab_size {self.vocab_size} and tables of {max(self.moduli)} rows the hash would leave 64 bits: "
                "make the tables (or the multipliers) smaller."
            )

    def permutation(self) -> Tensor | None:
        """int64 [V], where each id goes."""
        if self.permutation_seed is None:
            return None
        generator = torch.Generator(device="cpu").manual_seed(self.permutation_seed)
        return torch.randperm(self.vocab_size, generator=generator, device="cpu")

    def hole_among(self, permutation: Tensor) -> int:
        """The hole after ids have been permuted: an end-of-sequence token moves along, 0 and the id of its own stay."""
        return int(permutation[self.hole]) if 0 < self.hole < self.vocab_size else self.hole


def make_plan(settings: HashSettings, vocab_size: int, moduli: list[int], salt: int = 0) -> HashPlan:
    """The plan that settings ask for; `salt` gives each layer another one, where anything is drawn.

    Bases: V (LongCat; V + 1 where holes have an id of their own), the first prime above V, or one a table drawn from 2 ... M_e - 1.
    Multipliers of multiplicative_xor: odd, below 2^63 / (V + 1), so that no product leaves 63 bits.
    Sources: arXiv 2601.21204 eq. 2; Engram (arXiv 2601.07372) for the exclusive or; BLT (arXiv 2412.09871) for prime bases.
    """
    base, draw = None, random.Random(settings.hash_seed * 1_000_003 + salt)
    orders = [table // settings.splits + 2 for table in range(len(moduli))]
    if settings.hash == "multiplicative_xor":
        drawn = [draw.randrange(1, 2**63 // (vocab_size + 1), 2) for _ in range(settings.order)]
        lags = settings.multipliers or drawn
        weights = [[lags[j] if j < n else 0 for n in orders] for j in range(settings.order)]
    else:
        base = vocab_size + (settings.pad == "reserved")
        if settings.hash == "prime_base":
            base = next(p for p in range(base + 1, 2 * base + 2) if is_prime(p))
        bases = [draw.randrange(2, max(3, m)) if settings.hash == "random_base" else base for m in moduli]
        base = None if settings.hash == "random_base" else base
        weights = [[pow(b, j, m) if j < n else 0 for b, m, n in zip(bases, moduli, orders, strict=True)] for j in range(settings.order)]
    return HashPlan(
        tuple(moduli),
        tuple(orders),
        tuple(map(tuple, weights)),
        settings.hash == "multiplicative_xor",
        base,
        vocab_size,
        {"zero": 0, "reserved": vocab_size, "eos": settings.eos_token_id}[settings.pad],
        settings.hash_seed if settings.hash == "permuted" else None,
        settings.boundary,
        settings.eos_token_id,
        settings.eos_looks_back,
    )


def segments(tokens: Tensor, document_ids: Tensor | None, plan: HashPlan) -> Tensor | None:
    """Ids [B, T] that are equal where an n-gram may reach; None where nothing ends one. Under `eos` a segment ends after its token."""
    if plan.boundary == "eos":
        ends = (tokens == plan.eos_token_id).long()
        return ends.cumsum(-1) - ends
    return document_ids if plan.boundary == "documents" else None


def predecessors(tokens: Tensor, document_ids: Tensor | None, plan: HashPlan) -> list[Tensor]:
    """s_0 ... s_{order-1}, each [B, T]: s_j(i) = t_{i-j} where position i - j exists in the same segment, else the plan's hole."""
    ids, hole = tokens, plan.hole
    permutation = plan.permutation()
    if permutation is not None:
        ids, hole = permutation.to(tokens.device)[tokens], plan.hole_among(permutation)
    return shifted(ids, segments(tokens, document_ids, plan), lone_tokens(tokens, plan), hole, plan.lags)


def lone_tokens(tokens: Tensor, plan: HashPlan) -> Tensor | None:
    """True [B, T] at tokens that look at no other; None where all may."""
    return tokens == plan.eos_token_id if plan.boundary == "eos" and not plan.eos_looks_back else None


def shifted(ids: Tensor, inside: Tensor | None, alone: Tensor | None, hole: int, lags: int) -> list[Tensor]:
    """ids [B, T] moved right by 0 ... lags, `hole` where position i - j does not exist, lies in another segment, or i stands `alone`."""
    length, found = ids.shape[1], [ids]
    for lag in range(1, lags + 1):
        moved = F.pad(ids, (lag, 0), value=hole)[:, :length]
        if inside is not None:
            same = inside[:, lag:] == inside[:, :-lag] if lag < length else inside[:, :0].bool()
            keep = F.pad(same, (min(lag, length), 0), value=True)
            moved = torch.where(keep, moved, hole)
        if alone is not None:
            moved = moved.masked_fill(alone, hole)
        found.append(moved)
    return found


def ngram_rows_reference(tokens: Tensor, document_ids: Tensor | None, plan: HashPlan) -> Tensor:
    """H_{n,k}(i) = (sum_{j=0}^{n-1} s_j(i) w_j) mod m with w_j = base^j mod m, or (xor_j s_j(i) mu_j) mod m: the row of each table.

    The current token has weight base^0 = 1, the oldest the highest power.

    Args:
        tokens: int64 [B, T]; document_ids: int64 [B, T], or None for one document a row.

    Returns:
        int64 [B, T, E], rows inside each table. `HashPlan.check` bounds every number on the way below 2^63.

    Source: arXiv 2601.21204 eq. 2 and its footnote 2 (powers reduced first); Engram (arXiv 2601.07372) for the exclusive or.
    """
    lags, columns = predecessors(tokens, document_ids, plan), []
    for table, m in enumerate(plan.moduli):
        total = torch.zeros_like(tokens)
        for j in range(plan.orders[table]):
            term = lags[j] * plan.weights[j][table]
            total = total ^ term if plan.xor else total + term
        columns.append(total % m)
    return torch.stack(columns, -1)


def ngram_rows(lags: list[Tensor], weights: Tensor, moduli: Tensor, splits: int, xor: bool) -> Tensor:
    """`ngram_rows_reference` with one multiply-add a lag over the tables that it reaches, and one modulo over all tables.

    Args:
        lags: s_0 ... s_{order-1}, each int64 [B, T]; weights: int64 [order, E]; moduli: int64 [E]; splits: tables a order.

    Returns:
        int64 [B, T, E].
    """
    if xor:
        mixed = lags[0] * weights[0, 0]
        found = []
        for j, lag in enumerate(lags[1:]):
            mixed = mixed ^ (lag * weights[j + 1, -1])
            found.append(mixed)
        return torch.stack(found, -1).repeat_interleave(splits, -1).remainder_(moduli)
    total = lags[0][..., None] * weights[0]
    for j, lag in enumerate(lags[1:]):
        start = j * splits  # tables of order j + 2 on
        total[..., start:].addcmul_(lag[..., None], weights[j + 1, start:])
    return total.remainder_(moduli)


def joint_bound(plan: HashPlan, order: int) -> int:
    """ceil(n log b / log M): fewest tables of `order` that together have an address for every n-gram, sizes without common factors.

    By the Chinese remainder theorem the rows of K tables tell all n-grams apart iff lcm(M_1 ... M_K) >= b^n, for a polynomial in a base b
    above every id (without one base, b is V). `advise.tables_needed` takes the factors that sizes share into account.
    """
    rows = next(m for m, n in zip(plan.moduli, plan.orders, strict=True) if n == order)
    return math.ceil(order * math.log(plan.base or plan.vocab_size) / math.log(max(rows, 2)))
