"""What a hash does to a text, counted: which n-grams share rows of each table, which share them in all tables of their order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from longcat_lab.blocks.ngram_embedding.advise import FAMILIES, better_ratio, is_crowded, tables_needed, warnings
from longcat_lab.blocks.ngram_embedding.counting import (
    DistinctNgrams,
    OrderCount,
    TableCount,
    count_table,
    distinct_ngrams,
    expected_collisions,
    joined,
    read_stream,
    rows_of,
)
from longcat_lab.blocks.ngram_embedding.hash_config import HashSettings

if TYPE_CHECKING:
    import pandas

FULL = 4.0  # n-grams a row from which `advice` calls a table too small
CLUSTERED = 1.5  # collisions over those of a uniform hash from which `advice` speaks of them,
FEW = 100  # and by how many more


@dataclass(frozen=True, eq=False)
class Analysis:
    """`tables` of E counts, `order_counts` of one an order, over `tokens` tokens."""

    settings: HashSettings
    vocab_size: int
    tokens: int
    tables: tuple[TableCount, ...]
    order_counts: tuple[OrderCount, ...]

    @property
    def table(self) -> pandas.DataFrame:
        """A row a table."""
        import pandas

        derived = ("hit_rate", "load", "colliding", "expected", "relative", "relative_pairs")
        rows = [asdict(count) | {name: getattr(count, name) for name in derived} for count in self.tables]
        return pandas.DataFrame(rows).set_index("table")

    @property
    def orders(self) -> pandas.DataFrame:
        """A row an order; `addresses` are those of all its tables together."""
        import pandas

        rows = [asdict(count) | {"addresses": count.addresses[-1], "colliding": count.colliding} for count in self.order_counts]
        return pandas.DataFrame(rows).set_index("order")

    def relative(self, order: int = 2) -> float:
        """Colliding n-grams of the order's tables over those of uniform hashes."""
        own = [count for count in self.tables if count.order == order]
        expected = sum(count.expected for count in own)
        return sum(count.colliding for count in own) / expected if expected > 0 else math.nan

    def advice(self) -> list[str]:
        """`warnings`, and what only the text shows: full tables, and collisions that arithmetic did not foresee."""
        found, where = warnings(self.settings, self.vocab_size), self.settings.where
        plan = self.settings.plan(self.vocab_size)
        for order in range(2, self.settings.order + 1):
            own = [count for count in self.tables if count.order == order]
            if own[0].load >= FULL:
                found.append(
                    f"{where}: {own[0].ngrams} distinct {order}-grams share the {own[0].rows} rows of a table ({own[0].load:.1f} a row): "
                    "raise vocab_ratio, or lower order."
                )
            worst = max(own, key=lambda count: count.colliding / max(count.expected, 1.0))
            if worst.colliding > CLUSTERED * worst.expected + FEW and not is_crowded(plan, worst.table):
                found.append(
                    f"{where}: in table {worst.table} {worst.colliding} distinct {order}-grams collide, {worst.relative:.1f} times as many "
                    f"as under a uniform hash: use another vocab_ratio, or {FAMILIES}."
                )
        return found


def analyse(
    settings: HashSettings,
    tokens: np.ndarray | torch.Tensor,
    document_ids: np.ndarray | torch.Tensor | None = None,
    vocab_size: int | None = None,
    known: list[DistinctNgrams] | None = None,
) -> Analysis:
    """Counts what the tables of `settings` make of a text.

    An n-gram is what the hash reads: a token and its order - 1 predecessors, with the pad where they lie in another document.

    Args:
        tokens: whole numbers [N], one text, or [B, T], rows that do not see each other. document_ids: the same shape, or None.
        vocab_size: V of the hash; the largest id + 1 where left out.
        known: `distinct_ngrams` of the same tokens and rules, to save counting them again for another size.

    Raises:
        LabError: no tokens, other shapes, or ids that are none of vocab_size.
    """
    stream, vocab_size = read_stream(tokens, document_ids, vocab_size)
    plan = settings.plan(vocab_size)
    known = known or distinct_ngrams(plan, stream)
    tables, orders = [], []
    for order, ngrams in enumerate(known[: settings.order - 1], 2):
        first, address, addresses = (order - 2) * settings.splits, np.zeros(len(ngrams.first), np.int64), []
        for table, row in enumerate(rows_of(plan, order, stream, ngrams), first):
            tables.append(count_table(plan, table, row, ngrams))
            _, address = np.unique(joined(address, row), return_inverse=True)
            addresses.append(int(address.max()) + 1)
        needed = tables_needed(settings, vocab_size, order)
        covers = plan.base is not None and math.lcm(*plan.moduli[first : first + settings.splits]) >= plan.base**order
        orders.append(OrderCount(order, settings.splits, len(ngrams.first), tuple(addresses), needed, covers))
    return Analysis(settings, vocab_size, stream.tokens.numel(), tuple(tables), tuple(orders))


def hit_rates(
    settings: HashSettings,
    tokens: np.ndarray | torch.Tensor,
    document_ids: np.ndarray | torch.Tensor | None = None,
    points: int | Sequence[int] = 24,
    vocab_size: int | None = None,
) -> pandas.DataFrame:
    """How full tables get: share of rows used by then, by order (mean of its tables), against tokens seen (arXiv 2601.21204 fig. 3a).

    Args:
        points: numbers of tokens, or how many of them, at equal ratios from 100 (or all, where there are fewer) to all.

    Returns:
        Columns tokens, order, hit_rate, uniform (what a uniform hash of the same n-grams uses in the mean), ngrams (distinct by then).
    """
    import pandas

    stream, vocab_size = read_stream(tokens, document_ids, vocab_size)
    total, plan = stream.tokens.numel(), settings.plan(vocab_size)
    if isinstance(points, int):
        points = np.unique(np.geomspace(min(100, total), total, points).round().astype(int)).tolist()
    found = []
    for order, ngrams in enumerate(distinct_ngrams(plan, stream), 2):
        sequence = np.argsort(ngrams.first)
        seen = np.searchsorted(ngrams.first[sequence], points)  # distinct n-grams among the first tokens
        rates, uniform = np.zeros(len(points)), np.zeros(len(points))
        for row, size in zip(rows_of(plan, order, stream, ngrams), plan.moduli[(order - 2) * settings.splits :], strict=False):
            first_use = np.sort(np.unique(row[sequence], return_index=True)[1])
            rates += np.searchsorted(first_use, seen) / size
            uniform += [(u - expected_collisions(int(u), size)) / size for u in seen]
        for point, rate, even, u in zip(points, rates / settings.splits, uniform / settings.splits, seen, strict=True):
            found.append({"tokens": point, "order": order, "hit_rate": rate, "uniform": even, "ngrams": int(u)})
    return pandas.DataFrame(found)


@dataclass(frozen=True, eq=False)
class Recommendation:
    """settings with the number of tables and their size changed; before and after: what both make of the text that was given."""

    settings: HashSettings
    before: Analysis
    after: Analysis

    @property
    def splits(self) -> int:
        return self.settings.splits

    @property
    def vocab_ratio(self) -> float:
        return self.settings.vocab_ratio

    @property
    def sentences(self) -> list[str]:
        old, new, after = self.before.settings, self.settings, self.after
        loads = ", ".join(f"{count.load:.2g} ({count.order}-grams)" for count in after.tables if count.split == 0)
        bounds = ", ".join(f"{count.needed} for order {count.order}" for count in after.order_counts)
        promise = "that tell all n-grams apart" if new.plan(self.before.vocab_size).base else "with addresses for all n-grams (no promise)"
        sentences = [
            f"splits: {new.splits} (now {old.splits}): the fewest tables {promise} are {bounds}.",
            f"vocab_ratio: {new.vocab_ratio:g} (now {_size(old)}): 2-grams collide {after.relative():.2f} times as often as under a "
            f"uniform hash (now {self.before.relative():.2f} times).",
            f"Distinct n-grams a row after {after.tokens:,} tokens: {loads}.",
        ]
        if new.shares_width and new.table_width is None:
            sentences.append(f"That makes {new.tables} tables: hidden_size must be a multiple of it, or table_width set.")
        return sentences

    def __str__(self) -> str:
        return "\n".join(self.sentences)


def _size(settings: HashSettings) -> str:
    return f"{settings.vocab_ratio:g}" if settings.table_rows is None else f"table_rows {settings.table_rows}"


def recommend(
    settings: HashSettings,
    tokens: np.ndarray | torch.Tensor,
    document_ids: np.ndarray | torch.Tensor | None = None,
    vocab_size: int | None = None,
) -> Recommendation:
    """As many tables as the largest order needs to tell all n-grams apart, at the nearest size that spreads bigrams evenly.

    Both are measured on the text, with the settings as they are and as recommended. Width and hash stay as they are.

    Raises:
        LabError: as `analyse`, or no good size is near (`better_ratio`).
    """
    before, changed = analyse(settings, tokens, document_ids, vocab_size), settings
    for _ in range(3):  # another size may need another number of tables, and these be other sizes
        splits = max(tables_needed(changed, before.vocab_size, order) for order in range(2, settings.order + 1))
        changed = changed.model_copy(update={"splits": splits})
        changed = changed.model_copy(update={"vocab_ratio": better_ratio(changed, before.vocab_size), "table_rows": None})
    return Recommendation(changed, before, analyse(changed, tokens, document_ids, before.vocab_size))
