"""What the layers of one forward pass share: positions, what is visible, the decoding cache."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn


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


@dataclasses.dataclass
class ForwardContext:
    """One forward pass, as layers see it.

    rope: cosines and sines of the positions, each [T, rope width / 2].
    mask: bool [B or 1, 1, T, S], True where visible, S = tokens in the cache + T; None is plain causal with S = T.
    padding: bool [B, T], True where there is no token; None where all are tokens.
    share: the part of the global batch's tokens that this pass holds: what its mean auxiliary losses weigh in the step's loss.
    cache: the decoding cache, or None.
    tokens, document_ids: int64 [B, T] of this pass, for blocks that look something up by them (document_ids None: one document a row).
    history: int64 [B, h], tokens before these in the same document, while decoding.
    embedded: the embedding's output [B, T, H], as it entered the residual stream.
    shared: notes that layers leave for later layers of the same pass.
    """

    rope: tuple[Tensor, Tensor]
    mask: Tensor | None = None
    padding: Tensor | None = None
    share: float = 1.0
    cache: Cache | None = None
    tokens: Tensor | None = None
    document_ids: Tensor | None = None
    history: Tensor | None = None
    embedded: Tensor | None = None
    shared: dict[str, Any] = dataclasses.field(default_factory=dict)


def feed_forward(network: nn.Module, x: Tensor, context: ForwardContext) -> Tensor:
    """A dense network on x [B, T, H]; one that looks something up by the tokens (`reads_context`) is given the context too."""
    return network(x, context) if getattr(network, "reads_context", False) else network(x)


def in_backward() -> bool:
    """Whether autograd is running backward here: a forward pass that recomputes activations must not be counted again."""
    return torch._C._current_graph_task_id() != -1
