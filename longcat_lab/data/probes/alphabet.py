"""Which token ids probes use: some mark places, some stand for keys and values; none depends on the order of a text."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from longcat_lab.config.data import ProbeConfig
from longcat_lab.data.corpus import Corpus
from longcat_lab.errors import LabError

# Bytes that no UTF-8 text has. A byte-level vocabulary has a token for each all the same, so these can stand for a mark: no text holds
# them. In the tokenizer's spelling they are the characters of the same numbers.
MARK, BLANK = chr(0xF5), chr(0xF6)
UNUSED_BYTES = [0xC0, 0xC1, *range(0xF5, 0x100)]


@dataclass(frozen=True, eq=False)
class Alphabet:
    """Token ids of a probe.

    mark: stands before what is asked for, and before the question; in no text.
    blank: tells nothing; in no text.
    own: int64 [ids]: keys, values, strings. The last ids of the vocabulary, which a byte-pair tokenizer gave to its rarest tokens.
    rest: int64, all others but the end of a document: what random filler is drawn from.
    """

    mark: int
    blank: int
    own: np.ndarray
    rest: np.ndarray


def check_vocabulary(probe: ProbeConfig, vocab_size: int) -> None:
    """Raises LabError where the vocabulary has too few ids for the probe."""
    needed = probe.ids() + (probe.filler == "random")  # random filler takes at least one more
    there = vocab_size - 1 - len(UNUSED_BYTES)  # 1: the end of a document
    if needed > there:
        raise LabError(
            f"The {probe.kind} probe needs {needed} token ids for itself, but model.vocab_size {vocab_size} leaves {there}: "
            f"raise it or lower the probe's numbers of tokens."
        )


def alphabet(corpus: Corpus, probe: ProbeConfig) -> Alphabet:
    """The ids that `probe` uses with this corpus's tokenizer.

    Raises:
        LabError: the vocabulary is too small.
    """
    check_vocabulary(probe, corpus.vocab_size)
    special = [corpus.eos_id, *(corpus.tokenizer.token_to_id(chr(byte)) for byte in UNUSED_BYTES)]
    ordinary = np.setdiff1d(np.arange(corpus.vocab_size, dtype=np.int64), special)[::-1]
    mark, blank = (corpus.tokenizer.token_to_id(spelling) for spelling in (MARK, BLANK))
    return Alphabet(mark, blank, ordinary[: probe.ids()].copy(), ordinary[probe.ids() :].copy())
