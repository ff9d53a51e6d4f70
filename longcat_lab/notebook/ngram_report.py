"""Tables behind the figures of hashed n-grams: the same text under many sizes, hashes and numbers of tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from longcat_lab.blocks.ngram_embedding.analyse import analyse
from longcat_lab.blocks.ngram_embedding.counting import distinct_ngrams, read_stream, rows_of
from longcat_lab.config import OptimizerConfig, RunConfig
from longcat_lab.data import Corpus
from longcat_lab.errors import LabError
from longcat_lab.model import build
from longcat_lab.training.batches import training_loader
from longcat_lab.training.run import Run
from longcat_lab.training.table_optimizer import once_hit_displacement

if TYPE_CHECKING:
    import pandas

    from longcat_lab.blocks.ngram_embedding.counting import DistinctNgrams
    from longcat_lab.blocks.ngram_embedding.hash_config import HashSettings


def corpus_stream(corpus: Corpus, split: str = "train", tokens: int = 205_000) -> tuple[np.ndarray, np.ndarray]:
    """The first `tokens` tokens of a split and the document that each belongs to, both int64 [N]."""
    part = corpus.split(split)
    stream = np.asarray(part.tokens[:tokens]).astype(np.int64)
    return stream, np.searchsorted(part.document_starts, np.arange(len(stream)), side="right")


def training_stream(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Every sequence that a run was trained on, in order, and the documents in it, both int64 [sequences, T]."""
    loader = training_loader(run.config, run.corpus)
    batches = [next(loader) for _ in range(run.config.training.steps)]
    return tuple(torch.cat([getattr(batch, name) for batch in batches]).numpy() for name in ("tokens", "document_ids"))


def starting_scale(arms: Mapping[str, RunConfig], tokens: torch.Tensor) -> pandas.DataFrame:
    """How loud each arm's embedding starts, from models that are built and not trained.

    Args:
        tokens: int64 [B, T].

    Returns:
        A row an arm: embedding RMS, RMS of the token's rows, the token's share of the variance.
    """
    import pandas

    rows = {}
    for name, config in arms.items():
        embedding = build(config).embed_tokens.train()
        with torch.no_grad():
            out = embedding(tokens)
        rows[name] = {
            "embedding RMS": float(out.square().mean().sqrt()),
            "RMS of token rows": float(embedding.weight.detach().square().mean().sqrt()),
            "token's share of the variance": embedding.statistics().get("base_variance_share", 1.0),
        }
    return pandas.DataFrame.from_dict(rows, orient="index")


def table_rows(model: nn.Module) -> dict[str, np.ndarray]:
    """L2 norm of each row [M] of the n-gram input embedding's first table of each order, by `2-grams`, `3-grams` and so on."""
    tables = model.embed_tokens.tables
    plan, splits, found = tables.addresses.plan, tables.addresses.splits, {}
    for order in range(2, plan.lags + 2):
        first = (order - 2) * splits
        start = int(tables.addresses.starts[first])
        rows = tables.weight[start : start + plan.moduli[first]].detach()
        found[f"{order}-grams"] = torch.linalg.vector_norm(rows, dim=1).numpy()
    return found


def displacement_table(betas: Iterable[float] = (0.95, 0.99, 0.999)) -> pandas.DataFrame:
    """How far a row moves that is hit once after a long silence, in learning rates: columns mode, beta2, displacement."""
    import pandas

    rows = []
    for mode in ("adamw", "row_wise", "lazy_adam"):
        for beta2 in betas:
            config = OptimizerConfig(table_optimizer=mode, table_beta2=beta2)
            rows.append({"mode": mode, "beta2": beta2, "displacement": once_hit_displacement(config)})
    return pandas.DataFrame(rows)


def slope_by_seed(results: pandas.DataFrame, sizes: Mapping[str, float], metric: str = "validation_bpb") -> tuple[float, float, float]:
    """Slope of a metric against log10 of a size, fitted for each seed: mean over seeds and its 95 % t interval.

    Args:
        results: of a sweep (results.parquet). sizes: variant to size; variants that are not named are left out.

    Raises:
        LabError: fewer than two seeds have all the named variants.
    """
    done = results[(results["status"] == "finished") & results["variant"].isin(list(sizes))]
    grid = done.pivot(index="seed", columns="variant", values=metric)[list(sizes)].dropna()
    if len(grid) < 2:
        raise LabError(f"slope_by_seed: {len(grid)} seeds have all of {', '.join(sizes)}; at least 2 are needed.")
    x = np.log10(list(sizes.values()))
    slopes = np.polyfit(x, grid.to_numpy().T, 1)[0]
    from scipy import stats  # here: it takes seconds to load

    half = stats.t.ppf(0.975, len(slopes) - 1) * slopes.std(ddof=1) / np.sqrt(len(slopes))
    return float(slopes.mean()), float(slopes.mean() - half), float(slopes.mean() + half)


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
