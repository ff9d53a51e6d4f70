"""What the layers of one forward pass share: positions, what is visible, the decoding cache."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from longcat_lab.errors import LabError


class Cache:
    """What decoding keeps of the tokens already seen, by the module that made it: exact, grown by doubling, cut back at will.

    length: tokens seen in whole passes; a pass's own tokens are added to it when the pass is over (`advance`).
    tokens: int64 [B, length], for embeddings that look at predecessors.
    """

    def __init__(self) -> None:
        self.length = 0
        self.tokens: Tensor | None = None
        self._kept: dict[int, list[Tensor]] = {}

    def extend(self, module: nn.Module, *new: Tensor) -> tuple[Tensor, ...]:
        """Appends what `module` computed for the tokens of this pass (each [B, T, ...]) and returns old and new, [B, length + T, ...]."""
        end = self.length + new[0].shape[1]
        stores = self._kept.get(id(module))
        if stores is None or stores[0].shape[1] < end:
            grown = [each.new_empty(each.shape[0], max(16, 2 * end), *each.shape[2:]) for each in new]
            for store, old in zip(grown, stores or []):
                store[:, : self.length] = old[:, : self.length]
            stores = self._kept[id(module)] = grown
        for store, each in zip(stores, new, strict=True):
            store[:, self.length : end] = each
        return tuple(store[:, :end] for store in stores)

    def advance(self, tokens: Tensor) -> None:
        """The pass over `tokens` [B, T] is over."""
        self.tokens = tokens if self.tokens is None else torch.cat((self.tokens, tokens), 1)
        self.length += tokens.shape[1]

    def cut(self, length: int) -> None:
        """Forgets everything from token number `length` on (drafts that were not accepted)."""
        self.length = min(self.length, length)
        self.tokens = None if self.tokens is None else self.tokens[:, : self.length]


@dataclasses.dataclass(frozen=True)
class Part:
    """Which positions of its rows a pass holds, where others hold the rest of the same rows.

    chunks: (first, end) positions that lie here, in ascending order; length: T of the whole row; ways: how many share a row.
    whole: [B, here, ...] of every holder to [B, T, ...] in the row's order, with gradient; summed: a tensor's sum over the holders.
    """

    chunks: tuple[tuple[int, int], ...]
    length: int
    ways: int
    whole: Callable[[Tensor], Tensor]
    summed: Callable[[Tensor], Tensor]

    def take(self, rows: Tensor, dim: int = 1) -> Tensor:
        """Of something that has all T positions in `dim`, those that lie here."""
        return torch.cat([rows.narrow(dim, first, end - first) for first, end in self.chunks], dim)


def taken(rows: Tensor, part: Part | None, dim: int = 1) -> Tensor:
    """`rows` as they are where a pass holds whole rows."""
    return rows if part is None else part.take(rows, dim)


@dataclasses.dataclass
class ForwardContext:
    """One forward pass, as layers see it.

    rope: cosines and sines of the positions, each [T, rope width / 2].
    first: int64 [B, T], the first of the S keys (S = tokens in the cache + T) that each query may see, where its document starts; it
        sees all from there up to itself. None: key 0, one document a row.
    padding: bool [B, T], True where there is no token; None where all are tokens.
    share: the part of the global batch's tokens that this pass holds: what its mean auxiliary losses weigh in the step's loss.
    cache: the decoding cache, or None.
    tokens, document_ids: int64 [B, T] of this pass, for blocks that look something up by them (document_ids None: one document a row).
    history: int64 [B, h], tokens before these in the same document, while decoding.
    embedded: the embedding's output [B, T, H], as it entered the residual stream.
    shared: notes that layers leave for later layers of the same pass.
    step, steps: number of the prediction step that runs (1 ... steps); 0 in the trunk.
    part: where the pass holds a part of its rows: hidden states, rope, first and padding are of that part, `tokens` and `document_ids`
        of the whole rows.
    keys: S, where that is not the tokens of the cache and of this pass. length: tokens of a whole row, where S is fewer.
    real: the share of all positions of the whole rows that are no padding; None where what lies here tells.
    """

    rope: tuple[Tensor, Tensor]
    first: Tensor | None = None
    padding: Tensor | None = None
    share: float = 1.0
    cache: Cache | None = None
    tokens: Tensor | None = None
    document_ids: Tensor | None = None
    history: Tensor | None = None
    embedded: Tensor | None = None
    shared: dict[str, Any] = dataclasses.field(default_factory=dict)
    step: int = 0
    steps: int = 0
    part: Part | None = None
    keys: int | None = None
    length: int | None = None
    real: Tensor | float | None = None

    @functools.cached_property
    def chunks(self) -> list[tuple[slice, ForwardContext]]:
        """The part's chunks one by one: where each lies in what is here, and its own context, whose queries are the last of its S keys."""
        found, begin = [], 0
        for number, (first, end) in enumerate(self.part.chunks):
            here = slice(begin, begin + end - first)
            begin = here.stop
            found.append((here, self._chunk(number, here, end)))
        return found

    def _chunk(self, number: int, here: slice, end: int) -> ForwardContext:
        count = sum(last - first for first, last in self.part.chunks)
        return dataclasses.replace(
            self,
            rope=tuple(each[here] for each in self.rope),
            first=None if self.first is None else self.first[:, here],
            padding=None if self.padding is None else self.padding[:, here],
            share=self.share * (here.stop - here.start) / count,
            shared=self.shared.setdefault(f"chunk/{number}", {}),
            part=None,
            keys=end,
            length=self.part.length,
        )

    @functools.cached_property
    def mask(self) -> Tensor | None:
        """bool [B or 1, 1, T, S], True where visible; None is plain causal with S = T. Made when the first attention asks: it is O(T S)."""
        if self.part is not None:
            raise LabError("parallel.context: an attention asks for a whole row's mask; let it go through context.chunks, or set it to 1.")
        queries, device = len(self.rope[0]), self.rope[0].device
        keys = self.keys or queries + (self.cache.length if self.cache is not None else 0)
        if self.first is None and keys == queries:
            return None
        return visible_keys(self.first, queries, keys, device)[:, None]


def visible_keys(first: Tensor | None, queries: int, keys: int, device: torch.device, begin: int = 0, end: int | None = None) -> Tensor:
    """Which keys the queries `begin` ... `end` - 1 see: from their document's start up to themselves.

    Args:
        first: int [B, T], the first key of each query's document; None: key 0 for all.
        queries: T; keys: S. Query t stands at key S - T + t.

    Returns:
        bool [B or 1, end - begin, S].
    """
    end = queries if end is None else end
    key = torch.arange(keys, device=device)
    seen = key <= torch.arange(keys - queries + begin, keys - queries + end, device=device)[:, None]
    return seen[None] if first is None else seen & (key >= first[:, begin:end, None])


def document_starts(document_ids: Tensor) -> Tensor:
    """The position at which each token's document starts. document_ids [B, T], equal inside a document; int64 [B, T]."""
    position = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    begins = torch.ones_like(document_ids, dtype=torch.bool)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return position.masked_fill(~begins, 0).cummax(1).values


def feed_forward(network: nn.Module, x: Tensor, context: ForwardContext) -> Tensor:
    """A dense network on x [B, T, H]; one that looks something up by the tokens (`reads_context`) is given the context too."""
    return network(x, context) if getattr(network, "reads_context", False) else network(x)


def in_backward() -> bool:
    """Whether autograd is running backward here: a forward pass that recomputes activations must not be counted again."""
    return torch._C._current_graph_task_id() != -1
