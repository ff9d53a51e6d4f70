"""What can be said of a hash before any text is read: sizes that make frequent bigrams collide, too few tables, too many."""

from __future__ import annotations

import math

from longcat_lab.blocks.ngram_embedding.hash_config import HashSettings
from longcat_lab.blocks.ngram_embedding.hash_op import HashPlan, joint_bound
from longcat_lab.blocks.ngram_embedding.numbers import evenness, least_product, nearest_fraction, spread
from longcat_lab.errors import LabError

# Spread below which a table is warned of. Measured on tokens with Zipf's frequencies, against a uniform hash: bigrams collide 1.2 to 2
# times as often around 0.004, 13 times at LongCat-Flash-Lite's 78 V (0.00001). Longer n-grams suffer later: 1.2 times at 0.00015.
CROWDED_BIGRAMS, CROWDED_LONGER = 0.005, 0.0002
SPREAD_BIGRAMS, SPREAD_LONGER, EVEN = 0.05, 0.01, 0.6  # what `better_ratio` asks of every table
FARTHEST = 2000  # thousandths that `better_ratio` moves by
FURTHER = 8  # tables that `tables_needed` tries beyond the bound for sizes without common factors
FAMILIES = "hash permuted or multiplicative_xor, which do not depend on the size"


def has_lattice(plan: HashPlan) -> bool:
    """Whether ids that are neighbours in frequency collide by rule. An exclusive or has no such rule, permuted ids no such neighbours."""
    return not plan.xor and plan.permutation_seed is None


def is_crowded(plan: HashPlan, table: int) -> bool:
    """Whether a table's size makes frequent n-grams share rows."""
    return has_lattice(plan) and table_spread(plan, table) < (CROWDED_BIGRAMS if plan.orders[table] == 2 else CROWDED_LONGER)


def warnings(settings: HashSettings, vocab_size: int) -> list[str]:
    """One sentence for each thing that arithmetic alone finds wrong; none where all is well."""
    plan = settings.plan(vocab_size)
    return [*_size_warnings(settings, plan), *_split_warnings(settings, plan)]


def table_spread(plan: HashPlan, table: int) -> float:
    """`numbers.spread` of a table's hash over the last two tokens."""
    return spread(plan.weights[1][table], plan.moduli[table], plan.vocab_size)


def _size_warnings(settings: HashSettings, plan: HashPlan) -> list[str]:
    """About the most crowded table."""
    crowded = [table for table in range(settings.tables) if is_crowded(plan, table)]
    if not crowded:
        return []
    table = min(crowded, key=lambda table: (plan.orders[table], table_spread(plan, table)))
    base, rows = plan.weights[1][table], plan.moduli[table]
    vector = least_product(base, rows, plan.vocab_size)
    happens = f"frequent 2-grams share rows (in table {table} those whose two ids differ by {abs(vector[0])} and {abs(vector[1])})"
    if settings.hash == "random_base":
        return [f"{settings.where}.hash_seed: the base drawn for a table of {rows} rows is unlucky: {happens}; use another hash_seed."]
    p, q = nearest_fraction(base, rows, vector)
    ratio = settings.vocab_ratio if settings.table_rows is None else settings.table_rows / plan.vocab_size
    near = f"{round(ratio, 4)} is {'' if ratio * q == p else 'close to '}{p}/{q}"
    key = "vocab_ratio" if settings.table_rows is None else "table_rows"
    said = near if settings.table_rows is None else f"{settings.table_rows} rows over vocab_size, {near}"
    return [f"{settings.where}.{key}: {said}: {happens}; use {_instead(settings, plan.vocab_size)}{FAMILIES}."]


def _instead(settings: HashSettings, vocab_size: int) -> str:
    try:
        ratio = better_ratio(settings, vocab_size)
    except LabError:
        return ""
    return f"{ratio:g}, or " if settings.table_rows is None else f"vocab_ratio {ratio:g}, or "


def _split_warnings(settings: HashSettings, plan: HashPlan) -> list[str]:
    """About orders whose tables are too few to tell all n-grams apart, or tables beyond what any order needs."""
    own, where, found = settings.splits, f"{settings.where}.splits", []
    needed = {order: tables_needed(settings, plan.vocab_size, order) for order in range(2, settings.order + 1)}
    for order, fewest in needed.items():
        if fewest > own:
            found.append(
                f"{where}: order {order} needs {'' if plan.base else 'at least '}{fewest} tables of {plan.moduli[0]} rows to tell all "
                f"{plan.vocab_size}^{order} n-grams apart and has {own}: some may share all their rows."
            )
    most = max(needed.values())
    if most < own and plan.base is not None:
        found.append(f"{where}: {most} tables an order tell all n-grams apart, so that further tables ({own}) tell nothing more apart.")
    return found


def tables_needed(settings: HashSettings, vocab_size: int, order: int) -> int:
    """Fewest splits whose sizes' lcm is at least b^n, b the base of the polynomial.

    By the Chinese remainder theorem the rows of such a polynomial then tell all n-grams apart. With fewer than `joint_bound` says no
    hash does, for want of addresses; sizes that share factors may need more (those of 59.604 times 163840, all even, 4 tables for order 4).
    Of an exclusive or, and of bases drawn for each table, no number of tables is known to tell all apart: for them it is `joint_bound`.
    """
    plan = settings.plan(vocab_size)
    bound = joint_bound(plan, order)
    if plan.base is None:
        return bound
    for splits in range(bound, bound + FURTHER):
        sizes = settings.model_copy(update={"splits": splits, "order": order}).moduli(vocab_size)[-splits:]
        if math.lcm(*sizes) >= plan.base**order:
            return splits
    return bound + FURTHER


def better_ratio(settings: HashSettings, vocab_size: int) -> float:
    """The vocab_ratio nearest to the one asked for, to three decimals, whose tables all spread frequent n-grams well.

    It is the one asked for where that is not crowded, and where the hash has no lattice.

    Raises:
        LabError: none within 2 of it is good.
    """
    asked = settings.vocab_ratio if settings.table_rows is None else settings.table_rows / vocab_size
    plan = settings.plan(vocab_size)
    if not any(is_crowded(plan, table) for table in range(settings.tables)):
        return asked
    thousandths = round(1000 * asked)
    for step in range(1, FARTHEST + 1):
        for candidate in (thousandths + step, thousandths - step):
            if candidate * vocab_size >= 1000 and _is_good(settings, vocab_size, candidate / 1000):
                return candidate / 1000
    raise LabError(
        f"No vocab_ratio within {FARTHEST / 1000:g} of {asked:g} spreads the 2-grams of vocab_size {vocab_size} evenly: use {FAMILIES}."
    )


def _is_good(settings: HashSettings, vocab_size: int, ratio: float) -> bool:
    plan = settings.model_copy(update={"vocab_ratio": ratio, "table_rows": None}).plan(vocab_size)
    if plan.moduli[0] % 2 == 0:  # then all are: they share a factor, and tell an even id from an odd one in the same way
        return False
    return all(
        table_spread(plan, table) >= (SPREAD_BIGRAMS if order == 2 else SPREAD_LONGER) and evenness(plan.weights[1][table], rows) >= EVEN
        for table, (order, rows) in enumerate(zip(plan.orders, plan.moduli, strict=True))
    )
