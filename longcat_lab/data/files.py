"""Text on a local disk: .txt, .md and .py (a file is a document), .jsonl and .parquet (a record is a document)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

from longcat_lab.config.data import Files
from longcat_lab.data.documents import OUT_OF_DISTRIBUTION, VALIDATION, Document, Tally
from longcat_lab.errors import LabError

PROSE = (".txt", ".md")
SUFFIXES = (*PROSE, ".py", ".jsonl", ".parquet")
PIECE = 16 * 1024  # characters; longer prose files are cut into documents of one to two pieces


class FileSource:
    """Documents of `files`. Files are read in the order of a hash of their path, so that a byte cap samples all folders."""

    def __init__(self, source: Files) -> None:
        self.field = source.text_field
        # None: `select` takes validation out of it.
        named = {OUT_OF_DISTRIBUTION: source.out_of_distribution_path, VALIDATION: source.validation_path, None: source.path}
        keys = {OUT_OF_DISTRIBUTION: "out_of_distribution_path", VALIDATION: "validation_path", None: "path"}
        self.roots = {split: _root(path, f"data.source.{keys[split]}") for split, path in named.items() if path is not None}
        self.files = {split: find_files(root, f"data.source.{keys[split]}") for split, root in self.roots.items()}
        self.whole = VALIDATION in self.roots

    def identity(self) -> dict[str, Any]:
        """Path, size and modification time of every file."""
        try:
            stats = {split or "text": [(str(path), path.stat()) for path in files] for split, files in self.files.items()}
        except OSError as error:
            raise LabError(f"data.source: {_unreadable(error, self.roots[None])}") from error
        return {name: [[path, stat.st_size, stat.st_mtime_ns] for path, stat in listed] for name, listed in stats.items()}

    def documents(self, tally: Tally) -> Iterator[Document]:
        for split, files in self.files.items():
            root = self.roots[split]
            for path in files:
                package = path.parent.relative_to(root).as_posix() if path != root else path.name
                assigned = split or ("train" if self.whole else None)
                try:
                    for text in self._texts(path, tally):
                        if text.strip():
                            yield Document(package, text, assigned)
                        else:
                            tally.skipped["empty"] += 1
                except OSError as error:
                    raise LabError(f"{path} cannot be read ({error.strerror or error}): make it readable, or move it away.") from error

    def _texts(self, path: Path, tally: Tally) -> Iterator[str]:
        if path.suffix == ".jsonl":
            yield from self._json_lines(path, tally)
        elif path.suffix == ".parquet":
            yield from self._parquet(path, tally)
        else:
            try:
                text = path.read_bytes().decode()
            except UnicodeDecodeError:
                tally.skipped["not UTF-8"] += 1
                return
            yield from pieces(text) if path.suffix in PROSE else (text,)

    def _json_lines(self, path: Path, tally: Tally) -> Iterator[str]:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except RecursionError:
                    raise LabError(f"{path}, line {number} is nested too deeply to be read: correct or remove that line.") from None
                except ValueError:
                    raise LabError(f"{path}, line {number} is not JSON: correct or remove that line.") from None
                text = checked_text(record, self.field, f"{path}, line {number}")
                if text is None:
                    tally.skipped["no text"] += 1
                else:
                    yield text

    def _parquet(self, path: Path, tally: Tally) -> Iterator[str]:
        import pyarrow as pa
        from pyarrow import parquet

        try:
            file = parquet.ParquetFile(path)
            if self.field not in file.schema_arrow.names:
                raise LabError(_no_field(self.field, file.schema_arrow.names, str(path)))
            for batch in file.iter_batches(batch_size=1024, columns=[self.field]):
                for row in batch.column(0).to_pylist():
                    text = checked_text({self.field: row}, self.field, str(path))
                    if text is None:
                        tally.skipped["no text"] += 1
                    else:
                        yield text
        except (pa.ArrowException, OSError) as error:
            raise LabError(f"{path} cannot be read as Parquet ({str(error).splitlines()[0]}): replace or remove it.") from error


def checked_text(record: Any, field: str, where: str) -> str | None:
    """The text of a record; None where it is null or holds half a surrogate pair, which has no UTF-8 form.

    Raises:
        LabError: the record has no such field, or it holds something else than text.
    """
    if not isinstance(record, dict) or field not in record:
        raise LabError(_no_field(field, list(record) if isinstance(record, dict) else [], where))
    text = record[field]
    if text is None:
        return None
    if not isinstance(text, str):
        raise LabError(f"{where}: '{field}' holds {type(text).__name__}, not text: set data.source.text_field to a field of text.")
    try:
        text.encode()
    except UnicodeEncodeError:
        return None
    return text


def pieces(text: str) -> Iterator[str]:
    """A long text cut at blank lines (else lines, else spaces), so that a book in one file still gives two splits."""
    start = 0
    while len(text) - start > 2 * PIECE:
        low, high = start + PIECE, start + 2 * PIECE
        ends = (at + len(mark) for mark in ("\n\n", "\n", " ") if (at := text.find(mark, low, high)) >= 0)
        end = next(ends, high)
        yield text[start:end]
        start = end
    yield text[start:]


def find_files(root: Path, key: str) -> list[Path]:
    """The readable files at or below `root`, hidden ones left out, in the order of a hash of their path below it.

    Raises:
        LabError: there is nothing at `root`, nothing with text, or something that cannot be read.
    """
    try:
        return _find(root, key)
    except OSError as error:
        raise LabError(f"{key}: {_unreadable(error, root)}") from error


def _find(root: Path, key: str) -> list[Path]:
    kinds = ", ".join(SUFFIXES)
    if not root.exists():
        raise LabError(f"{key}: there is no file or folder '{root}'; give one that holds {kinds} files.")
    if root.is_file():
        if root.suffix not in SUFFIXES:
            raise LabError(f"{key}: '{root}' is not a kind of text that can be read; give one of {kinds}.")
        return [root]
    found = [(sha256(path.relative_to(root).as_posix().encode()).digest(), path) for path in _below(root)]
    if not found:
        raise LabError(f"{key}: the folder '{root}' holds no text; put {kinds} files there, or name another folder.")
    return [path for _, path in sorted(found)]


def _root(path: str, key: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise LabError(f"{key}: '{path}' is below a home folder that is not known; write the whole path.") from None


def _unreadable(error: OSError, path: Path) -> str:
    return f"'{error.filename or path}' cannot be read ({error.strerror or error}); make it readable, or name another file or folder."


def _below(root: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:  # a folder that is passed over in silence would be text that is missed by nobody
        raise error

    for folder, inner, names in os.walk(root, onerror=refuse):
        inner[:] = [name for name in inner if not name.startswith(".")]
        paths = [Path(folder, name) for name in names if not name.startswith(".")]
        yield from (path for path in paths if path.suffix in SUFFIXES and path.is_file())


def _no_field(field: str, fields: list[str], where: str) -> str:
    there = f"it has: {', '.join(map(str, fields))}" if fields else "it has no fields"
    return f"{where} has no field '{field}' ({there}): set data.source.text_field to the one that holds the text."
