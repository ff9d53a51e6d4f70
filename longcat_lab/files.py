"""Files that are either whole or not there."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from longcat_lab.errors import LabError


def sentence_of(error: OSError, doing: str) -> LabError:
    """An operating-system error as one sentence; a full disk says what is kept and what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return LabError(f"No space left while {doing}: free some and run the same command again, what is finished is kept.")
    return LabError(f"Failed while {doing}: {error.strerror or error}.")


def write_whole(path: str | Path, write: Callable[[Path], Any]) -> None:
    """`write(temporary path)`, then the file takes the name `path` in one step. On any failure `path` is as it was.

    Raises:
        LabError: the disk is full, or the folder cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise sentence_of(error, f"writing {path}") from error
    finally:
        with contextlib.suppress(OSError):  # not to hide what went wrong before
            temporary.unlink(missing_ok=True)


def remove_temporary(folder: Path, names: Iterable[str] = ("*",)) -> None:
    """What `write_whole` left of files of these names (patterns) where its process was killed. Nobody may write them now."""
    for name in names:
        for path in folder.glob(f".{name}.*-*.tmp"):
            if path.is_file():
                path.unlink(missing_ok=True)


def write_json(path: str | Path, data: Any) -> None:
    """`data` as JSON, whole or not at all."""
    write_whole(path, lambda temporary: temporary.write_text(json.dumps(data, indent=1, default=str) + "\n", encoding="utf-8"))


def read_json(path: str | Path) -> Any:
    """What `write_json` wrote; None where there is no such file or it is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write_folder(path: Path, write: Callable[[Path], Any]) -> None:
    """`write(temporary folder)`, then the folder takes the name `path`, which must not exist, in one step.

    Raises:
        LabError: the disk is full, or the place cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        write(temporary)
        for file in temporary.iterdir():
            with open(file, "rb+") as handle:
                os.fsync(handle.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise sentence_of(error, f"writing {path}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def save_tensors(tensors: dict[str, Any], path: Path) -> None:
    """`tensors` as one safetensors file, written from where they lie. Raises OSError with the system's own number."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # which hides the operating system's number in its text
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), str(error)) from error
