"""Where one process of a run stands: what it holds of the model, what it runs, and a list of what it sends."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from functools import cached_property

from torch import nn

from longcat_lab.config import RunConfig
from longcat_lab.model import LongcatLM
from longcat_lab.parallel.layout import Layout

BF16, FP32, INT32, INT64, FP64 = 2, 4, 4, 8, 8


@dataclasses.dataclass(frozen=True)
class Sent:
    """bytes: sent by this process in one step; calls: collectives it takes part in, or messages it sends. what: in words.

    purpose: as in `collectives`, and `loop` for what the training loop sums up; kind: as in `wire`.
    """

    purpose: str
    kind: str
    what: str
    calls: int
    bytes: int


class Tally:
    """What was sent, entry by entry; collectives that are alike become one."""

    def __init__(self) -> None:
        self.calls: Counter[tuple[str, str, str]] = Counter()
        self.bytes: Counter[tuple[str, str, str]] = Counter()

    def put(self, purpose: str, kind: str, what: str, times: int, size: int) -> None:
        """`times` collectives, each of which sends `size` bytes from here."""
        self.calls[purpose, kind, what] += times
        self.bytes[purpose, kind, what] += times * size

    def found(self) -> list[Sent]:
        return [Sent(*key, count, self.bytes[key]) for key, count in self.calls.items() if count]


@dataclasses.dataclass(frozen=True)
class Pass:
    """A layer, or the block of a prediction step (`step` 1 ...), that runs here: forward and backward passes of it in one micro-batch.

    A forward pass that runs again in backward counts twice, and the second one ends where nothing more is kept.
    """

    module: nn.Module
    step: int
    forward: int
    backward: int = 1


@dataclasses.dataclass(frozen=True)
class Place:
    """Process `rank` of `layout`. model: the whole one, without memory."""

    config: RunConfig
    layout: Layout
    model: LongcatLM
    rank: int

    @cached_property
    def at(self) -> dict[str, int]:
        return self.layout.coordinates(self.rank)

    @property
    def stage(self) -> tuple[int, int]:
        """First layer here, and the one behind the last."""
        return self.layout.stages[self.at["pipeline"]]

    @property
    def first(self) -> bool:
        return self.at["pipeline"] == 0

    @property
    def last(self) -> bool:
        return self.at["pipeline"] == self.layout.pipeline - 1

    @property
    def dense_ways(self) -> int:
        """Processes that share a dense weight."""
        return self.layout.data_shard * self.layout.context

    @property
    def rows(self) -> int:
        """Sequences of a micro-batch."""
        return self.config.training.micro_batch_size or self.config.data.batch_size // self.layout.batch_ways

    @property
    def micros(self) -> int:
        return self.config.data.batch_size // self.layout.batch_ways // self.rows

    @property
    def length(self) -> int:
        """Tokens of a sequence here."""
        return self.config.data.sequence_length // self.layout.context

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch here."""
        return self.rows * self.length

    @property
    def chunks(self) -> tuple[int, ...]:
        """Keys that each chunk of queries here meets; chunks are alike long."""
        if self.layout.context == 1:
            return (self.length,)
        place, size = self.at["context"], self.length // 2
        return (place + 1) * size, (2 * self.layout.context - place) * size

    @property
    def prediction_weight(self) -> float:
        mtp = self.config.model.mtp
        return 0.0 if mtp is None else mtp.weight_at(0.0)

    @property
    def own_rows(self) -> bool:
        """Whether the token's rows are here: on the first stage, and on the last one where prediction steps read them."""
        mtp = self.model.mtp
        return self.first or (self.last and mtp is not None and mtp.embed_tokens is None)

    @property
    def layers(self) -> list[nn.Module]:
        return [*self.model.layers[self.stage[0] : self.stage[1]]]

    @property
    def blocks(self) -> list[nn.Module]:
        """Of prediction steps, that have weights here."""
        return [*self.model.mtp.layers] if self.last and self.model.mtp is not None else []

    def passes(self) -> Iterator[Pass]:
        again = 2 if self.config.training.recompute else 1
        for layer in self.layers:
            yield Pass(layer, 0, again)
        mtp = self.config.model.mtp
        if self.last and self.prediction_weight:
            for step in range(1, mtp.num_nextn_predict_layers + 1):
                yield Pass(self.model.mtp.block(step), step, 2 if mtp.recompute else 1)
