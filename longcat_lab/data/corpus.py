"""A prepared corpus on disk: memory-mapped tokens, where each document starts, the tokenizer and the manifest."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from longcat_lab.data.tokenizer import EOS, plain
from longcat_lab.errors import LabError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
TOKEN_BYTES = "token_bytes.npy"


@dataclass(frozen=True, eq=False)
class TokenSplit:
    """The packed tokens of one split: documents one after the other, each ended by the end-of-document token."""

    name: str
    tokens: np.ndarray  # uint16 or uint32 [tokens], memory-mapped
    document_starts: np.ndarray  # int64 [documents], memory-mapped; index of each document's first token, ascending from 0
    hash: str  # of tokens and starts

    def __len__(self) -> int:
        """Tokens in the split."""
        return len(self.tokens)


@dataclass(frozen=True)
class Corpus:
    """What `prepare` returns.

    `hash` is the content hash (token files and tokenizer) that identifies the data of a run; it does not depend on where the text
    or the cache lie. `manifest` holds the source, the counts per split (documents, bytes, tokens, packages), what was skipped, and
    versions.
    """

    path: Path
    manifest: dict[str, Any]

    @property
    def hash(self) -> str:
        return self.manifest["hash"]

    @property
    def vocab_size(self) -> int:
        """The size that was asked for; a short text may leave the last ids unused."""
        return self.manifest["vocab_size"]

    @property
    def eos_id(self) -> int:
        """Id of the end-of-document token."""
        return self.manifest["eos_id"]

    @property
    def splits(self) -> list[str]:
        """Names that `split` takes; 'out_of_distribution' only where the source has such text."""
        return list(self.manifest["splits"])

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Encodes text without special tokens: the end-of-document token's spelling inside a text is ordinary text."""
        from tokenizers import Tokenizer

        return plain(Tokenizer.from_file(str(self.path / TOKENIZER)))

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """int64 [vocab_size]: bytes of UTF-8 text per token id; 0 for the end of a document and for unused ids."""
        return np.load(self.path / TOKEN_BYTES)

    def split(self, name: str) -> TokenSplit:
        """The packed tokens of a split.

        Raises:
            LabError: there is no such split.
        """
        if name not in self.manifest["splits"]:
            raise LabError(f"This corpus has no split '{name}'; it has: {', '.join(self.splits)}.")
        tokens, starts = split_files(self.path, name)
        return TokenSplit(
            name,
            np.memmap(tokens, dtype=self.manifest["dtype"], mode="r"),
            np.memmap(starts, dtype="<i8", mode="r"),
            self.manifest["splits"][name]["hash"],
        )


def split_files(folder: Path, name: str) -> tuple[Path, Path]:
    """Where a split's tokens and document starts lie."""
    return folder / f"{name}.tokens.bin", folder / f"{name}.starts.bin"


def token_dtype(vocab_size: int) -> str:
    """The smallest little-endian integer that holds every id."""
    return "<u2" if vocab_size <= 2**16 else "<u4"


def open_corpus(folder: Path) -> Corpus:
    """The corpus in `folder`, after checking that every file is there in its full length.

    Raises:
        LabError: a file is missing or has been cut; the sentence names it.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        sizes = manifest["files"]
    except PermissionError as error:
        raise LabError(
            f"The prepared corpus {folder} cannot be read ({error.strerror}); make it readable, or use another cache."
        ) from error
    except (OSError, ValueError, KeyError, TypeError):
        raise LabError(f"The prepared corpus {folder} has no readable {MANIFEST}; delete that folder, and it is prepared again.") from None
    for name, size in sizes.items():
        found = (folder / name).stat().st_size if (folder / name).exists() else 0
        if found != size:
            raise LabError(
                f"The prepared file {folder / name} holds {found} of {size} bytes; delete the folder {folder}, and it is prepared again."
            )
    return Corpus(folder, manifest)


def eos_id(tokenizer: Tokenizer) -> int:
    """Id of the end-of-document token."""
    return tokenizer.token_to_id(EOS)
