"""What a source of text is, and which of its documents are used: no text twice, none in two splits, no more than asked for."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from longcat_lab.config.data import DataConfig

TRAIN, VALIDATION, OUT_OF_DISTRIBUTION = "train", "validation", "out_of_distribution"
SPLITS = (TRAIN, VALIDATION, OUT_OF_DISTRIBUTION)

# Without a held-out source, at least this share of the documents' bytes is validation even when `train_bytes` is never reached.
SMALLEST_VALIDATION_SHARE = 0.02


@dataclass(frozen=True)
class Document:
    """One text. `split` None leaves the choice between train and validation to `select`."""

    package: str
    text: str
    split: str | None = None


@dataclass
class Tally:
    """What was left out, for the manifest: files or records skipped by reason, and texts seen before."""

    skipped: Counter[str] = field(default_factory=Counter)
    duplicates: int = 0


class TextSource(Protocol):
    """Where documents come from. Both methods are deterministic for unchanged text."""

    def identity(self) -> dict[str, Any]:
        """Plain data that changes whenever the text may have; cheap, since every run asks."""
        ...

    def documents(self, tally: Tally) -> Iterator[Document]:
        """All documents in a fixed order, those of a known held-out split before all others.

        Raises:
            LabError: the source has no text, or cannot be read.
        """
        ...


def byte_caps(config: DataConfig) -> dict[str, int]:
    """Most bytes of text per split."""
    return {TRAIN: config.train_bytes, VALIDATION: config.validation_bytes, OUT_OF_DISTRIBUTION: config.out_of_distribution_bytes}


def select(documents: Iterable[Document], caps: dict[str, int], tally: Tally) -> Iterator[Document]:
    """The documents to use, each with its split, until the training text is full.

    A text is used at its first appearance only. Sources give held-out documents first, so a text that is both held out and
    in training is dropped from training, also when the held-out split was full before it. The document that would pass a
    split's cap is cut at a line.
    """
    seen: set[bytes] = set()
    used = dict.fromkeys(caps, 0)
    share = max(caps[VALIDATION] / (caps[VALIDATION] + caps[TRAIN]), SMALLEST_VALIDATION_SHARE)
    for document in documents:
        size = len(encoded := document.text.encode())
        digest = hashlib.sha256(encoded).digest()
        if digest in seen:
            tally.duplicates += 1
            continue
        seen.add(digest)
        split = document.split
        if split is None:
            behind = used[VALIDATION] <= share * (used[TRAIN] + used[VALIDATION])
            split = VALIDATION if behind and used[VALIDATION] < caps[VALIDATION] else TRAIN
        room = caps[split] - used[split]
        if size > room:
            encoded = cut(encoded, room)
            used[split] = caps[split]  # full, although the cut may leave a few bytes
        else:
            used[split] += size
        if encoded:
            yield Document(document.package, document.text if len(encoded) == size else encoded.decode(), split)
        if used[TRAIN] >= caps[TRAIN]:
            return


def cut(encoded: bytes, limit: int) -> bytes:
    """The start of a UTF-8 text, at most `limit` bytes: whole lines if a line fits, else whole characters."""
    head = encoded[: max(limit, 0)]
    newline = head.rfind(b"\n")
    return head[: newline + 1] if newline >= 0 else head.decode(errors="ignore").encode()
