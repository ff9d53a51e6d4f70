"""A byte-level BPE tokenizer: every text can be encoded, and decoding gives the same bytes back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from tokenizers import Tokenizer

EOS = "<|endoftext|>"
SMALLEST_VOCABULARY = 257  # the 256 bytes and the end of a document


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A tokenizer of at most `vocab_size` tokens learned from `texts`; short texts may hold fewer merges than asked for.

    The same texts give the same merges, with any number of threads: counts are summed, and ties go to the lower pair of ids.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return plain(tokenizer)


def plain(tokenizer: Tokenizer) -> Tokenizer:
    """Makes `<|endoftext|>` inside a text ordinary characters; only the packing writes the end-of-document token.

    Source code about language models spells that token out. The setting is not part of the tokenizer's file.
    """
    tokenizer.encode_special_tokens = True
    return tokenizer


def token_byte_counts(tokenizer: Tokenizer, vocab_size: int) -> np.ndarray:
    """int64 [vocab_size]: bytes of UTF-8 text that each token id stands for; 0 for the end of a document and for unused ids."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for token, index in tokenizer.get_vocab(with_added_tokens=True).items():
        counts[index] = 0 if token == EOS else len(token)  # byte-level: one character of a token's spelling is one byte
    return counts
