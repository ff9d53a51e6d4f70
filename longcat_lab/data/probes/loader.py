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
                self._write(batch, row, self.episodes(first + row))
        return batch

    def episodes(self, sample: int) -> list[Episode]:
        """The probes in sample number `sample`: one, or in the first samples, with `probe.lengths`, several short ones."""
        (window,) = self._order(np.array([sample]))
        text = _text(self.split, int(window), self.sequence_length)
        random, length = _random(self.seed, TRAINING, sample), self.sequence_length
        if self.probe.lengths is not None and sample < len(self.probe.lengths) * self.probe.length_samples:
            length = self.probe.lengths[sample // self.probe.length_samples]
        probe, size = self.probe.within(length), length + 1
        return [draw(probe, self.alphabet, length, random, text[start : start + size]) for start in range(0, len(text) - size + 1, size)]

    def _write(self, batch: Batch, row: int, episodes: list[Episode]) -> None:
        """Puts probes into a row, each as one document; what room is left is blank and not scored."""
        tokens = np.full(self.sequence_length + 1, self.alphabet.blank)
        labels = np.full(self.sequence_length + 1, IGNORED)  # of the next token, at the next token's place
        documents = np.full(self.sequence_length + 1, len(episodes))
        start = 0
        for number, episode in enumerate(episodes):
            end = start + len(episode.tokens)
            tokens[start:end], documents[start:end] = episode.tokens, number
            places = episode.answers.ravel() if self.probe.scored == "answers" else np.arange(1, len(episode.tokens))
            labels[start + places] = episode.tokens[places]
            start = end
        for tensor, values in ((batch.tokens, tokens[:-1]), (batch.labels, labels[1:]), (batch.document_ids, documents[:-1])):
            tensor[row] = torch.from_numpy(values)

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
        tokens = torch.from_numpy(np.stack([episode.tokens for episode in episodes]))
        labels = torch.full_like(tokens, IGNORED)
        places = torch.from_numpy(np.stack([episode.answers.ravel() for episode in episodes]))
        labels.scatter_(1, places, tokens.gather(1, places))
        yield Batch(tokens[:, :-1].contiguous(), labels[:, 1:].contiguous(), torch.zeros_like(tokens)[:, 1:].contiguous()), episodes


def _text(split: TokenSplit, window: int, length: int) -> np.ndarray:
    return np.asarray(split.tokens[window * length : (window + 1) * length + 1], dtype=np.int64)


def _random(seed: int, stream: int, *numbers: int) -> np.random.RandomState:
    # As in Loader: RandomState's streams are frozen across numpy versions.
    words = [part for number in (seed, *numbers) for part in (number % 2**32, number // 2**32 % 2**32)]
    return np.random.RandomState([stream, *words])
