"""Batches of packed sequences: windows of a split's token stream, with labels and document ids."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from longcat_lab.data.corpus import TokenSplit
from longcat_lab.errors import LabError

IGNORED = -100  # label of a position that is not scored, as in torch's cross entropy


@dataclass(frozen=True, eq=False)
class Batch:
    """B sequences of T tokens.

    A row may hold the end of one document, whole documents, and the start of another. Attention and n-grams should not look
    across documents; labels never do.
    """

    tokens: torch.Tensor  # int64 [B, T]
    labels: torch.Tensor  # int64 [B, T]: the next token, or -100 where that belongs to another document
    document_ids: torch.Tensor  # int64 [B, T]: 0 for the row's first document, and so on


def window_count(split: TokenSplit, sequence_length: int) -> int:
    """Sequences in a split. The last token of one window's labels is the first token of the next window: each is predicted once.

    Raises:
        LabError: the split is shorter than one sequence and its last label.
    """
    count = (len(split) - 1) // sequence_length
    if count < 1:
        raise LabError(
            f"The {split.name} split has {len(split)} tokens, too few for one sequence of data.sequence_length={sequence_length} "
            f"and its last label: shorten the sequence or raise data.{split.name}_bytes."
        )
    return count


def windows(split: TokenSplit, indices: np.ndarray, sequence_length: int) -> Batch:
    """The windows numbered `indices` (int [B]); window i starts at token i * sequence_length."""
    positions = np.asarray(indices, dtype=np.int64)[:, None] * sequence_length + np.arange(sequence_length + 1)  # [B, T+1]
    tokens = np.asarray(split.tokens[positions], dtype=np.int64)
    documents = np.searchsorted(split.document_starts, positions, side="right")
    labels = np.where(documents[:, 1:] == documents[:, :-1], tokens[:, 1:], IGNORED)
    inside = documents[:, :-1] - documents[:, :1]
    return Batch(torch.from_numpy(tokens[:, :-1].copy()), torch.from_numpy(labels), torch.from_numpy(inside.astype(np.int64)))


def evaluation_batches(split: TokenSplit, sequence_length: int, batch_size: int, max_sequences: int | None = None) -> Iterator[Batch]:
    """A split's sequences in order, once; the last batch may be smaller. The tail shorter than a sequence is left out.

    Documents lie in a random order, so the first `max_sequences` sequences sample all packages.

    Raises:
        LabError: the split is shorter than one sequence.
    """
    count = window_count(split, sequence_length)
    count = count if max_sequences is None else min(count, max_sequences)
    return (windows(split, np.arange(start, min(start + batch_size, count)), sequence_length) for start in range(0, count, batch_size))


def shuffled(batch: Batch, seed: int) -> Batch:
    """A negative control: the same tokens in each row, their order destroyed, as one document.

    What a model gains from order must vanish here. The label of a row's last position is -100: nothing follows it.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(batch.tokens.shape, generator=generator, dtype=torch.float64).argsort(dim=1).to(batch.tokens.device)
    tokens = batch.tokens.gather(1, order)
    labels = torch.full_like(tokens, IGNORED)
    labels[:, :-1] = tokens[:, 1:]
    return Batch(tokens, labels, torch.zeros_like(tokens))
