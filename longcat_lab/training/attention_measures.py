"""What a model's attention looks at, measured as the model stands: how much a selection leaves out, how alike the attentions are.

p_{t,s}, the mean over heads of dense softmax attention, is what an attention would give each key if it saw all of them, on the input that
it really had. Everything here is a sum of p over some set of keys, or a comparison of such sets, and a mean over the queries that see
more keys than are selected.

Source: what is measured follows LSA (arXiv 2608.01662): overlap and coverage of adjacent layers, the share of sinks and window, the
selection against the dense top-K.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from longcat_lab.blocks.context import visible_keys
from longcat_lab.blocks.sparse_attention.distill_op import attention_mass
from longcat_lab.blocks.sparse_attention.op import select
from longcat_lab.config import RunConfig
from longcat_lab.data import Batch, Corpus, evaluation_batches
from longcat_lab.errors import LabError
from longcat_lab.training.attention_record import AttentionPass, asked, fixed_keys, members, record

CHUNK_ELEMENTS = 1 << 24  # pairs of query and key, of all attentions together, at a time
POSITIONS = 8  # parts of the sequence
FARTHEST = 8  # distances between attentions that a run's summary tells of


@dataclass(frozen=True, eq=False)
class AttentionMeasures:
    """Means over `queries` queries: those that see more than `topk` keys. Arrays are float64, one entry for each attention of the trunk.

    names, places: of the modules, in the order in which they run; place of each in its index group (0 where there are no groups).
    topk, sinks, window: K, and the fixed keys, that were asked about.
    longest: keys of the longest sequence, T. chance: mean of K / keys seen: what K keys at random share with any others, and cover.
    uncovered: 1 - p on the keys that the attention uses; NaN where it uses all.
    missed: 1 - |keys used ∩ the attention's own top-K of p| / K; NaN likewise.
    fixed_uncovered: 1 - p on sinks and window; NaN where there are none.
    fixed_by_position: the same in equal parts of the keys seen, topk + 1 ... T: [attentions, 8]; NaN where no query falls.
    overlap: |top-K of attention i ∩ top-K of attention j| / K, [attentions, attentions].
    coverage: p of attention j on the top-K of attention i, likewise; its diagonal is the most that K keys can cover.
    """

    names: list[str]
    places: list[int]
    topk: int
    sinks: int
    window: int
    queries: int
    longest: int
    chance: float
    uncovered: np.ndarray
    missed: np.ndarray
    fixed_uncovered: np.ndarray
    fixed_by_position: np.ndarray
    overlap: np.ndarray
    coverage: np.ndarray

    def by_distance(self, distance: int) -> tuple[np.ndarray, np.ndarray]:
        """Overlap of attentions i and i + distance, and coverage where the later one reuses the earlier one's set: [pairs] each."""
        return self.overlap.diagonal(distance), self.coverage.diagonal(distance)

    @property
    def summary(self) -> dict[str, float]:
        """The same as numbers with names, lower is better where one is better; what was not measured is left out.

        `attention_queries`; `uncovered` and `topk_missed` (also `_place_P` where attentions share a selection, and `_attention_I`),
        `topk_uncovered` (what the best K keys leave out), `fixed_uncovered` and `fixed_uncovered_position_0` ... `_7`; for distances D
        up to 8 `overlap_distance_D` with the least of its pairs (`_min`), and `reuse_uncovered_distance_D` with its worst (`_max`).
        """
        if not self.queries:
            return {}
        found = {"attention_queries": float(self.queries), "topk_uncovered": float(1 - self.coverage.diagonal().mean())}
        found["fixed_uncovered"] = float(self.fixed_uncovered.mean())
        found.update({f"fixed_uncovered_position_{i}": float(each) for i, each in enumerate(_mean(self.fixed_by_position))})
        for name, values in (("uncovered", self.uncovered), ("topk_missed", self.missed)):
            found[name] = float(_mean(values[:, None])[0])
            for place in sorted(set(self.places)) if any(self.places) else ():
                found[f"{name}_place_{place}"] = float(_mean(values[np.array(self.places) == place, None])[0])
            found.update({f"{name}_attention_{i}": float(value) for i, value in enumerate(values)})
        for distance in range(1, min(FARTHEST + 1, len(self.names))):
            overlap, coverage = self.by_distance(distance)
            found[f"overlap_distance_{distance}"] = float(overlap.mean())
            found[f"overlap_distance_{distance}_min"] = float(overlap.min())
            found[f"reuse_uncovered_distance_{distance}"] = float(1 - coverage.mean())
            found[f"reuse_uncovered_distance_{distance}_max"] = float(1 - coverage.min())
        return {name: value for name, value in found.items() if not np.isnan(value)}


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean of each column over the rows that are not NaN; NaN where none is."""
    known = ~np.isnan(values)
    return np.where(known.any(0), np.where(known, values, 0.0).sum(0) / np.maximum(known.sum(0), 1), np.nan)


class _Totals:
    """Sums over queries, in float64 on the CPU."""

    def __init__(self, attentions: int) -> None:
        def zeros(*size: int) -> Tensor:
            return torch.zeros(*size, dtype=torch.float64)

        self.covered, self.hits, self.selects = zeros(attentions), zeros(attentions), torch.zeros(attentions, dtype=torch.bool)
        self.overlap, self.coverage = zeros(attentions, attentions), zeros(attentions, attentions)
        # By the number of keys that a query sees.
        self.counts, self.fixed = zeros(1), zeros(1, attentions)

    def grown(self, longest: int) -> None:
        more = longest + 1 - len(self.counts)
        if more > 0:
            self.counts = torch.cat((self.counts, self.counts.new_zeros(more)))
            self.fixed = torch.cat((self.fixed, self.fixed.new_zeros(more, self.fixed.shape[1])))

    def add(self, passes: list[AttentionPass], first: Tensor | None, fixed: tuple[int, int, int], begin: int, end: int) -> None:
        """The queries `begin` ... `end` - 1 of all rows."""
        topk, sinks, window = fixed
        rows, queries, keys = *passes[0].q.shape[:2], passes[0].k.shape[1]
        seen = visible_keys(first, queries, keys, passes[0].q.device, begin, end).expand(rows, -1, -1)
        counted = seen.sum(-1) > topk
        if not counted.any():
            return
        seen = seen[counted]  # [n, S], as all that follows
        mass = torch.stack([attention_mass(each.q, each.k, first, each.scale, begin, end)[counted] for each in passes])
        best = torch.stack([members(select(each[None], seen[None], topk)[0], keys) for each in mass])
        for place, each in enumerate(passes):
            used = seen if each.used is None else members(each.used[:, begin:end][counted], keys)
            self.covered[place] += (mass[place] * used).sum(-1).cpu().double().sum()
            self.hits[place] += (best[place] & used).sum().cpu()
            self.selects[place] |= each.used is not None
        number = seen.sum(-1).cpu()
        self.counts.index_add_(0, number, torch.ones(len(number), dtype=torch.float64))
        self.fixed.index_add_(0, number, (mass * fixed_keys(seen, sinks, window)).sum(-1).T.cpu().double())
        best = best.to(mass.dtype).flatten(1)
        self.overlap += (best @ best.T).cpu()
        self.coverage += (best @ mass.flatten(1).T).cpu()


def attention_measures(
    model: nn.Module,
    batches: Iterable[Batch],
    topk: int | None = None,
    sinks: int | None = None,
    window: int | None = None,
    precision: str = "fp32",
) -> AttentionMeasures:
    """Measures every attention of the trunk; a dense model too, if `topk` is given.

    One pass a batch, then O(T S) work an attention and head, some queries at a time: no matrix of all queries and keys is kept.

    Args:
        topk: K; by default index_topk. sinks, window: by default index_init_tokens and index_local_tokens.
        precision: of the pass, as `training.precision`; p is in at least fp32.

    Raises:
        LabError: the model has no index_topk and none is given, or no attention that is an MLA.
    """
    fixed, total, passes = asked(model, topk, sinks, window), None, []
    for batch in batches:
        passes, first = record(model, batch, precision)
        total = _Totals(len(passes)) if total is None else total
        (rows, queries), keys = passes[0].q.shape[:2], passes[0].k.shape[1]
        total.grown(keys)
        step = max(1, CHUNK_ELEMENTS // (rows * keys * len(passes)))
        for begin in range(0, queries, step):
            total.add(passes, first, fixed, begin, min(begin + step, queries))
    if total is None:
        raise LabError("attention_measures: there is no batch: give at least one.")
    return _measures(total, passes, fixed)


def _measures(total: _Totals, passes: list[AttentionPass], fixed: tuple[int, int, int]) -> AttentionMeasures:
    topk, sinks, window = fixed
    queries, longest = float(total.counts.sum()), len(total.counts) - 1
    share = 1 / queries if queries else float("nan")
    number = torch.arange(longest + 1)
    part = ((number - topk - 1).clamp(min=0) * POSITIONS // max(1, longest - topk)).clamp(max=POSITIONS - 1)
    counts = torch.zeros(POSITIONS, dtype=torch.float64).index_add_(0, part, total.counts)
    by_position = torch.zeros(POSITIONS, len(passes), dtype=torch.float64).index_add_(0, part, total.fixed)
    no_fixed = sinks + window == 0
    return AttentionMeasures(
        names=[each.name for each in passes],
        places=[each.place for each in passes],
        topk=topk,
        sinks=sinks,
        window=window,
        queries=int(queries),
        longest=longest,
        chance=float((total.counts * topk / number.clamp(min=1)).sum() * share),
        uncovered=(1 - total.covered * share).masked_fill(~total.selects, torch.nan).numpy(),
        missed=(1 - total.hits * share / topk).masked_fill(~total.selects, torch.nan).numpy(),
        fixed_uncovered=(torch.full((len(passes),), torch.nan) if no_fixed else 1 - total.fixed.sum(0) * share).double().numpy(),
        fixed_by_position=(1 - by_position / counts[:, None]).masked_fill(torch.tensor(no_fixed), torch.nan).T.numpy(),
        overlap=(total.overlap * share / topk).numpy(),
        coverage=(total.coverage * share).numpy(),
    )


def evaluate_attention(model: nn.Module, corpus: Corpus, config: RunConfig) -> dict[str, float]:
    """`attention_measures(...).summary` on the first `training.attention_measures` sequences of the validation split.

    Empty for an attention without an index_topk (plain MLA), and where no query sees more than index_topk keys.
    """
    if getattr(config.model.attention, "index_topk", None) is None:
        return {}
    count, data = config.training.attention_measures, config.data
    batches = evaluation_batches(corpus.split("validation"), data.sequence_length, data.batch_size, count)
    return attention_measures(model, batches, precision=config.training.precision).summary
