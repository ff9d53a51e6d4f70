"""An endless, deterministic, resumable stream of training batches."""

from __future__ import annotations

from typing import Any

import numpy as np

from longcat_lab.data.batch import Batch, window_count, windows
from longcat_lab.data.corpus import TokenSplit
from longcat_lab.errors import LabError


class Loader:
    """This rank's share of each global batch, without end.

    Samples are numbered 0, 1, 2, ... over the whole run: sample s is window `permutation(seed, epoch)[s % n]` of epoch `s // n`,
    with n the windows of the split. Global batch k is the samples k*B to (k+1)*B - 1, and rank r takes its r-th equal part. So the
    batch, and the state, are the same for every number of ranks, and resuming needs one number.

    Args:
        split: packed tokens.
        sequence_length: T.
        batch_size: B, sequences per step over all ranks.
        seed: of the order.
        rank, world_size: this process and how many share a batch.

    Raises:
        LabError: `batch_size` does not divide by `world_size`, or the split is shorter than one sequence.
    """

    def __init__(self, split: TokenSplit, sequence_length: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        if batch_size % world_size:
            raise LabError(
                f"data.batch_size={batch_size} cannot be shared equally by {world_size} ranks: make it a multiple of {world_size}."
            )
        if not 0 <= rank < world_size:
            raise LabError(f"Rank {rank} is not one of {world_size} ranks: give a rank from 0 to {world_size - 1}.")
        self.split, self.sequence_length, self.batch_size, self.seed = split, sequence_length, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.windows = window_count(split, sequence_length)
        self.samples_seen = 0
        self._permutations: dict[int, np.ndarray] = {}

    @property
    def epoch(self) -> float:
        """Times the split was read so far, with the fraction of the current time."""
        return self.samples_seen / self.windows

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Batch:
        share = self.batch_size // self.world_size
        samples = self.samples_seen + self.rank * share + np.arange(share)
        batch = windows(self.split, self._order(samples), self.sequence_length)
        self.samples_seen += self.batch_size
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Where the run is, the same on every rank: global samples seen, and what they are samples of."""
        return {"samples_seen": self.samples_seen, **self._what()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on after the samples that `state` has seen; the number of ranks and the batch size may have changed.

        Raises:
            LabError: the state belongs to other data, another order or another sequence length.
        """
        for key, own in self._what().items():
            if state.get(key) != own:
                raise LabError(
                    f"The checkpoint was reading other data ({key} {state.get(key)!r}, here {own!r}): "
                    f"resume with the data settings it was started with, or start a new run."
                )
        self.samples_seen = int(state["samples_seen"])

    def _what(self) -> dict[str, Any]:
        return {"seed": self.seed, "sequence_length": self.sequence_length, "split_hash": self.split.hash}

    def _order(self, samples: np.ndarray) -> np.ndarray:
        epochs, within = np.divmod(samples, self.windows)
        wanted = {int(epoch) for epoch in np.unique(epochs)}
        self._permutations = {epoch: self._permutations[epoch] if epoch in self._permutations else self._permute(epoch) for epoch in wanted}
        return np.array([self._permutations[int(epoch)][index] for epoch, index in zip(epochs, within, strict=True)])

    def _permute(self, epoch: int) -> np.ndarray:
        # RandomState's streams are frozen across numpy versions, those of the newer Generator are not.
        low, high = self.seed % 2**32, self.seed // 2**32 % 2**32
        return np.random.RandomState([low, high, epoch]).permutation(self.windows)
