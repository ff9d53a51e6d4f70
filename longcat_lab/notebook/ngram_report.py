"""Tables behind the figures of hashed n-grams: the same text under many sizes, hashes and numbers of tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from longcat_lab.blocks.ngram_embedding.analyse import analyse
from longcat_lab.blocks.ngram_embedding.counting import distinct_ngrams, read_stream, rows_of

if TYPE_CHECKING:
    import pandas

    from longcat_lab.blocks.ngram_embedding.counting import DistinctNgrams
    from longcat_lab.blocks.ngram_embedding.hash_config import HashSettings


def collision_sweep(
    settings: HashSettings,
    tokens: np.ndarray,
    document_ids: np.ndarray | None,
    vocab_size: int,
    ratios: Iterable[float],
    families: Sequence[str] = ("polynomial", "prime_base", "permuted", "multiplicative_xor"),
    order: int = 2,
) -> pandas.DataFrame:
    """Distinct n-grams of `order` that collide, over sizes and hash families; the settings' tables of that order together.

    Returns:
        Columns family, ratio, collisions, expected (of uniform hashes), relative (one over the other).
    """
    import pandas

    stream, found = read_stream(tokens, document_ids, vocab_size)[0], []
    known: dict[tuple[int, int | None], list[DistinctNgrams]] = {}  # n-grams depend on the pad and on the order of ids alone
    for family in families:
        for ratio in ratios:
            changed = settings.model_copy(update={"hash": family, "vocab_ratio": float(ratio), "table_rows": None, "order": order})
            plan = changed.plan(vocab_size)
            key = (plan.hole, plan.permutation_seed)
            if key not in known:
                known[key] = distinct_ngrams(plan, stream)
            own = [t for t in analyse(changed, tokens, document_ids, vocab_size, known[key]).tables if t.order == order]
            collisions, expected = sum(t.colliding for t in own), sum(t.expected for t in own)
            relative = collisions / expected if expected > 0 else float("nan")
            found.append({"family": family, "ratio": float(ratio), "collisions": collisions, "expected": expected, "relative": relative})
    return pandas.DataFrame(found)


def joint_sweep(
    settings: HashSettings, tokens: np.ndarray, document_ids: np.ndarray | None, vocab_size: int, most: int = 4
) -> pandas.DataFrame:
    """Distinct n-grams whose rows are another's in all tables of their order, for 1 to `most` tables an order.

    Returns:
        Columns order, tables, ngrams, collisions, needed (fewest tables that tell all V^n apart).
    """
    import pandas

    stream, found = read_stream(tokens, document_ids, vocab_size)[0], []
    known = distinct_ngrams(settings.plan(vocab_size), stream)
    for tables in range(1, most + 1):
        analysis = analyse(settings.model_copy(update={"splits": tables}), tokens, document_ids, vocab_size, known)
        for count in analysis.order_counts:
            row = {"order": count.order, "tables": tables, "ngrams": count.ngrams, "collisions": count.colliding, "needed": count.needed}
            found.append(row)
    return pandas.DataFrame(found)


def row_counts(settings: HashSettings, tokens: np.ndarray, document_ids: np.ndarray | None, vocab_size: int) -> dict[str, np.ndarray]:
    """Times that each row of the first table of each order is hit, int64 [M], by `2-grams`, `3-grams` and so on."""
    stream = read_stream(tokens, document_ids, vocab_size)[0]
    plan, found = settings.plan(vocab_size), {}
    for order, ngrams in enumerate(distinct_ngrams(plan, stream), 2):
        counts = np.zeros(plan.moduli[(order - 2) * settings.splits], np.int64)
        np.add.at(counts, rows_of(plan, order, stream, ngrams)[0], ngrams.occurrences)
        found[f"{order}-grams"] = counts
    return found
