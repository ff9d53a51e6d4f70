"""Probes for training, in the place of some or all text rows, and the fixed ones that a model is tested on."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import torch

from longcat_lab.config.data import DataConfig, ProbeConfig
from longcat_lab.data.batch import IGNORED, Batch, window_count
from longcat_lab.data.corpus import Corpus, TokenSplit
from longcat_lab.data.loader import Loader
from longcat_lab.data.probes.alphabet import alphabet
from longcat_lab.data.probes.episode import Episode, draw

TRAINING, EVALUATION = 1, 2  # streams of random numbers that never meet
EVALUATION_SEED = 0  # the same probes for all runs, so that arms and seeds are compared on the same questions


class ProbeLoader(Loader):
    """A `Loader` in whose batches a part of the rows are probes.

    Sample s of the run is a probe or the text that `Loader` would give, by s and `probe.share` alone; the probe is a pure function of
    (seed, s), and its text filler is the window that it replaces. So this, too, is the same for every number of ranks, resumes from one
    number, and shows all variants the same sequences. A batch holds floor or ceil of `share` times its size, spread evenly.

    Args:
        corpus: of the text.
        config: its `probe` says what is asked.
        seed, rank, world_size: as of `Loader`.

    Raises:
        LabError: as `Loader`, or the vocabulary is too small for the probe.
    """

    def __init__(self, corpus: Corpus, config: DataConfig, seed: int, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(corpus.split("train"), config.sequence_length, config.batch_size, seed, rank, world_size)
        self.probe, self.alphabet = config.probe, alphabet(corpus, config.probe)
        self.share = Fraction(config.probe.share).limit_denominator(10_000)  # exact at any sample number

    @property
    def epoch(self) -> float:
        """Times the split was read so far; probes that show no text read none."""
        return super().epoch * (1.0 if self.probe.filler == "text" else float(1 - self.share))

    def is_probe(self, sample: int) -> bool:
        """Whether sample number `sample` is a probe."""
        n, d = self.share.numerator, self.share.denominator
        return (sample + 1) * n // d > sample * n // d

    def __next__(self) -> Batch:
        first = self.samples_seen + self.rank * (self.batch_size // self.world_size)
        batch = super().__next__()
        for row in range(len(batch.tokens)):
            if self.is_probe(first + row):
                _write(batch, row, self.episode(first + row), self.probe.scored)
        return batch

    def episode(self, sample: int) -> Episode:
        """The probe with number `sample`."""
        (window,) = self._order(np.array([sample]))
        text = _text(self.split, int(window), self.sequence_length)
        return draw(self.probe, self.alphabet, self.sequence_length, _random(self.seed, TRAINING, sample), text)

    def _what(self) -> dict[str, Any]:
        told = {key: value for key, value in self.probe.to_dict().items() if not key.startswith("evaluation_") and key != "far"}
        return {**super()._what(), "probe": told}


def evaluation_probes(
    corpus: Corpus, probe: ProbeConfig, length: int, batch_size: int, split: str = "validation"
) -> Iterator[tuple[Batch, list[Episode]]]:
    """The `probe.evaluation_episodes` probes of `length` tokens that a model is tested on, scored at their answers alone.

    They depend on nothing but the task, the corpus and the length. Each takes its text from a window of `split`.
    """
    ids, text = alphabet(corpus, probe), corpus.split(split)
    count = window_count(text, length)
    for start in range(0, probe.evaluation_episodes, batch_size):
        numbers = range(start, min(start + batch_size, probe.evaluation_episodes))
        episodes = [
            draw(probe, ids, length, _random(EVALUATION_SEED, EVALUATION, number, length), _text(text, number % count, length))
            for number in numbers
        ]
        empty = torch.zeros(len(episodes), length, dtype=torch.int64)
        batch = Batch(empty, empty.clone(), empty.clone())
        for row, episode in enumerate(episodes):
            _write(batch, row, episode, "answers")
        yield batch, episodes


def _write(batch: Batch, row: int, episode: Episode, scored: str) -> None:
    """Puts a probe into a row, as one document."""
    tokens = torch.from_numpy(episode.tokens)
    labels = tokens[1:].clone()
    if scored == "answers":
        labels.fill_(IGNORED)
        places = torch.from_numpy(episode.answers.ravel())
        labels[places - 1] = tokens[places]
    batch.tokens[row], batch.labels[row], batch.document_ids[row] = tokens[:-1], labels, 0


def _text(split: TokenSplit, window: int, length: int) -> np.ndarray:
    return np.asarray(split.tokens[window * length : (window + 1) * length + 1], dtype=np.int64)


def _random(seed: int, stream: int, *numbers: int) -> np.random.RandomState:
    # As in Loader: RandomState's streams are frozen across numpy versions.
    words = [part for number in (seed, *numbers) for part in (number % 2**32, number // 2**32 % 2**32)]
    return np.random.RandomState([stream, *words])
