"""The batches of a run: those of the language model, and beside them those of the indexers' warm-up."""

from __future__ import annotations

from typing import Any

from longcat_lab.config import RunConfig
from longcat_lab.data import Batch, Corpus, Loader, ProbeLoader

WARMUP_STREAM = 1 << 56  # of the warm-up's own order


def training_loader(config: RunConfig, corpus: Corpus, stream: int = 0, place: int = 0, ways: int = 1) -> Loader:
    """The batches that `fit` trains on, from the first one on; `stream` is added to the seed of their order.

    place, ways: which part of each batch, of how many.
    """
    seed = (config.seed if config.data.seed is None else config.data.seed) + stream
    if config.data.probe is not None:
        return ProbeLoader(corpus, config.data, seed, place, ways)
    return Loader(corpus.split("train"), config.data.sequence_length, config.data.batch_size, seed, place, ways)


class Batches:
    """What each step reads. The warm-up of indexers reads batches of its own, which the other steps do not miss."""

    def __init__(self, config: RunConfig, corpus: Corpus, place: int = 0, ways: int = 1) -> None:
        self.config, self.corpus, self.part = config, corpus, (place, ways)
        self.language, self.warmup = training_loader(config, corpus, 0, *self.part), None

    def next(self, step: int, stage: str) -> Batch:
        """The batch of optimizer step `step`, which is in `stage`."""
        if stage != "warmup":
            return next(self.language)
        if self.warmup is None:
            self.warmup = training_loader(self.config, self.corpus, WARMUP_STREAM, *self.part)
        # As far on as the language model is: what a probe asks follows from how many samples came before.
        self.warmup.samples_seen = step * self.config.data.batch_size
        return next(self.warmup)

    @property
    def epoch(self) -> float:
        """Times the language model has read the training split."""
        return self.language.epoch

    def state_dict(self) -> dict[str, Any]:
        return self.language.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises LabError where the state is of other data; the warm-up's place follows from the step."""
        self.language.load_state_dict(state)
