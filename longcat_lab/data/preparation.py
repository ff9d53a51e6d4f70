"""From text to a corpus on disk, once per source, caps and vocabulary size.

A corpus is written into a temporary folder, synced, and renamed into place: a folder that has its final name is whole, whatever was
killed. The lock only saves concurrent callers (the ranks of a run) from doing the work twice.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any

import numpy as np

from longcat_lab.config.data import DataConfig
from longcat_lab.data.corpus import MANIFEST, TOKEN_BYTES, TOKENIZER, Corpus, eos_id, open_corpus, split_files, token_dtype
from longcat_lab.data.documents import (
    OUT_OF_DISTRIBUTION,
    SPLITS,
    TRAIN,
    VALIDATION,
    Document,
    Tally,
    TextSource,
    byte_caps,
    cut,
    select,
)
from longcat_lab.data.sources import open_source
from longcat_lab.data.tokenizer import SMALLEST_VOCABULARY, token_byte_counts, train_tokenizer
from longcat_lab.errors import LabError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FORMAT = 1  # raise it when the same configuration gives other files
CHUNK_BYTES = 2**20  # text tokenized at once
CACHE_VARIABLE = "LONGCAT_LAB_CACHE"


def prepare(
    config: DataConfig,
    vocab_size: int,
    cache: Path | str | None = None,
    progress: Callable[[str], None] | None = None,
) -> Corpus:
    """Tokenizes the source's text, or finds it prepared before.

    Args:
        config: source and caps; sequence length, batch size and seed do not matter here.
        vocab_size: ids of the tokenizer, end of document included (`model.vocab_size`); at least 257.
        cache: where corpora are kept; default `$LONGCAT_LAB_CACHE`, else `./.cache/longcat_lab`.
        progress: called with a short line now and then.

    Raises:
        LabError: no text, text that cannot be read, no space, or a prepared file that was cut since.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise LabError(f"model.vocab_size is {vocab_size}, but a byte-level tokenizer needs at least {SMALLEST_VOCABULARY}: raise it.")
    source = open_source(config)
    identity = _identity(config, source, vocab_size)
    root = Path(cache or os.environ.get(CACHE_VARIABLE) or Path(".cache", "longcat_lab"))
    folder = root / f"{config.source.kind}-{_digest(_json(identity))[:16]}"
    try:
        if not folder.exists():
            root.mkdir(parents=True, exist_ok=True)
            with _lock(root / f".{folder.name}.lock") as locked:
                if not folder.exists():
                    _write_in_place(folder, locked, lambda tmp: _build(config, source, identity, vocab_size, tmp, progress or _silent))
    except OSError as error:  # sources turn their own reading errors into sentences, so this one is about the cache
        raise LabError(_writing_failed(root, error)) from error
    return open_corpus(folder)


def _identity(config: DataConfig, source: TextSource, vocab_size: int) -> dict[str, Any]:
    from tokenizers import __version__

    return {
        "format": FORMAT,
        "source": config.source.to_dict(),
        "text": source.identity(),
        "caps": byte_caps(config) | {"tokenizer": config.tokenizer_bytes},
        "vocab_size": vocab_size,
        "tokenizers": __version__,
    }


def _write_in_place(folder: Path, locked: bool, build: Callable[[Path], None]) -> None:
    prefix = f".{folder.name}.tmp-"
    if locked:  # nobody else writes this corpus now: what lies here was left by a process that was killed
        for stale in folder.parent.glob(f"{prefix}*"):
            shutil.rmtree(stale, ignore_errors=True)
    tmp = Path(mkdtemp(prefix=prefix, dir=folder.parent))
    try:
        build(tmp)
        tmp.chmod(0o755)  # mkdtemp makes it private
        _sync(tmp)
        try:
            tmp.rename(folder)
        except OSError:
            if not folder.exists():  # else another process was faster, and its corpus is the same
                raise
        _sync(folder.parent)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def _build(
    config: DataConfig, source: TextSource, identity: dict[str, Any], vocab_size: int, tmp: Path, progress: Callable[[str], None]
) -> None:
    caps, tally = byte_caps(config), Tally()
    progress(f"reading text ({config.source.kind})")
    documents = select(source.documents(tally), caps, tally)
    read, sample = _until_sampled(documents, config.tokenizer_bytes)
    if not sample:
        raise LabError(f"data.source ({config.source.kind}) has no text to train on: point it to text, or to more than one document.")
    progress(f"learning a tokenizer of {vocab_size} tokens")
    tokenizer = train_tokenizer(sample, vocab_size)
    dtype = token_dtype(vocab_size)
    with contextlib.ExitStack() as stack:
        writers = {name: stack.enter_context(_SplitWriter(tmp, name, dtype)) for name in SPLITS}
        for chunk in _chunks(chain(read, documents)):
            _append(chunk, tokenizer, writers)
            done = writers[TRAIN].bytes
            progress(f"tokenizing: {done / 1e6:.1f} MB of at most {caps[TRAIN] / 1e6:.1f} MB")
    if not writers[VALIDATION].starts:
        raise LabError(f"data.source ({config.source.kind}) has no text to validate on: add documents, or a held-out source.")
    for name in split_files(tmp, OUT_OF_DISTRIBUTION) if not writers[OUT_OF_DISTRIBUTION].starts else ():
        name.unlink()
    splits = {name: writers[name].summary() for name in SPLITS if writers[name].starts}
    serialized = tokenizer.to_str(pretty=True).encode()
    _write(tmp / TOKENIZER, serialized)
    np.save(tmp / TOKEN_BYTES, token_byte_counts(tokenizer, vocab_size))
    hashes = {name: split["hash"] for name, split in splits.items()}
    content = {"vocab_size": vocab_size, "tokenizer": _digest(serialized), "splits": hashes}
    manifest = {
        "hash": _digest(_json(content)),
        "source": config.source.to_dict(),
        "splits": splits,
        "skipped": dict(sorted(tally.skipped.items())),
        "duplicates": tally.duplicates,
        "vocab_size": vocab_size,
        "learned_tokens": tokenizer.get_vocab_size(),
        "eos_id": eos_id(tokenizer),
        "dtype": dtype,
        "identity": identity,
        "files": {path.name: path.stat().st_size for path in sorted(tmp.iterdir())},
    }
    _write(tmp / MANIFEST, json.dumps(manifest, indent=1).encode())


class _SplitWriter:
    """Appends tokens to a split's files and keeps count."""

    def __init__(self, folder: Path, name: str, dtype: str) -> None:
        self.dtype, self.hash = dtype, hashlib.sha256()
        self.tokens_path, self.starts_path = split_files(folder, name)
        self.tokens, self.bytes, self.starts, self.packages = 0, 0, [], Counter()

    def __enter__(self) -> _SplitWriter:
        self.file = self.tokens_path.open("wb")
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        starts = np.asarray(self.starts, dtype="<i8").tobytes()
        self.hash.update(starts)
        _write(self.starts_path, starts)

    def add(self, document: Document, ids: list[int]) -> None:
        raw = np.asarray(ids, dtype=self.dtype).tobytes()
        self.file.write(raw)
        self.hash.update(raw)
        size = len(document.text.encode())
        self.starts.append(self.tokens)
        self.tokens += len(ids)
        self.bytes += size
        self.packages[document.package] += size

    def summary(self) -> dict[str, Any]:
        return {
            "documents": len(self.starts),
            "bytes": self.bytes,
            "tokens": self.tokens,
            "packages": dict(sorted(self.packages.items())),  # bytes of text
            "hash": self.hash.hexdigest(),
        }


def _append(chunk: list[Document], tokenizer: Tokenizer, writers: dict[str, _SplitWriter]) -> None:
    end = eos_id(tokenizer)
    for document, encoding in zip(chunk, tokenizer.encode_batch_fast([document.text for document in chunk]), strict=True):
        writers[document.split or TRAIN].add(document, [*encoding.ids, end])


def _until_sampled(documents: Iterator[Document], tokenizer_bytes: int) -> tuple[list[Document], list[str]]:
    """Documents read until the tokenizer has enough training text, and that text."""
    read: list[Document] = []
    sample: list[str] = []
    room = tokenizer_bytes
    for document in documents:
        read.append(document)
        if document.split == TRAIN:
            encoded = document.text.encode()
            sample.append(document.text if len(encoded) <= room else cut(encoded, room).decode())
            room -= len(encoded)
            if room <= 0:
                break
    return read, sample


def _chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    chunk, size = [], 0
    for document in documents:
        chunk.append(document)
        size += len(document.text)
        if size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Waits for other processes that prepare the same corpus; False where the file system cannot lock."""
    from filelock import FileLock

    lock = FileLock(path)
    try:
        lock.acquire()
        locked = True
    except (NotImplementedError, OSError) as error:
        if getattr(error, "errno", None) in (errno.EACCES, errno.EROFS, errno.ENOSPC):
            raise
        locked = False
    try:
        yield locked
    finally:
        if locked:
            lock.release()


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)


def _sync(folder: Path) -> None:
    """Makes a folder and the files in it durable, so that a rename cannot arrive on disk before what it names."""
    for path in [*(p for p in folder.iterdir() if p.is_file()), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _writing_failed(root: Path, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return (
            f"No space left for the corpus in {root.absolute()} ({error.strerror}); free some, lower data.train_bytes, "
            f"or set {CACHE_VARIABLE} to a folder on another disk."
        )
    return f"The corpus cannot be written to {root.absolute()} ({error}); set {CACHE_VARIABLE} to a folder that can be written."


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _silent(_: str) -> None:
    pass
