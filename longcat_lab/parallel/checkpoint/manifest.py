"""What a checkpoint's folder holds, as one JSON file: tensors, where their pieces lie, and what proves each file whole.

    checkpoint-00000100/
        manifest.json               {"checksum": of the content, "content": {...}}
        part-00000.safetensors      what process 0 wrote; a piece of a tensor is named `NAME[first:end,...]`, a whole one `NAME`

There is no pickle in it: reading a checkpoint runs no code of whoever wrote the files.
"""

from __future__ import annotations

import dataclasses
import json
import os
import zlib
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import Metadata
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties, TensorStorageMetadata

MANIFEST = "manifest.json"
FORMAT = 1
READ = 2**22  # bytes a read


class Damaged(Exception):
    """A checkpoint that is not whole; the text is a clause that says why."""


@dataclasses.dataclass(frozen=True)
class Manifest:
    """identity: of the run. state: what was saved beside tensors. processes: how many wrote it. files: name -> (bytes, CRC-32).

    tensors: name -> {"dtype", "shape", "pieces": [[file, offsets, sizes], ...]}; pieces without elements are left out.
    """

    identity: str
    step: int
    processes: int
    state: dict[str, Any]
    files: dict[str, tuple[int, int]]
    tensors: dict[str, dict[str, Any]]

    def text(self) -> str:
        content = {"format": FORMAT, **dataclasses.asdict(self)}
        return json.dumps({"checksum": _checksum_of(content), "content": content})

    @staticmethod
    def parse(text: str) -> Manifest:
        """Raises Damaged."""
        try:
            whole = json.loads(text)
            content = whole["content"]
            if whole["checksum"] != _checksum_of(content):
                raise Damaged(f"the checksum of {MANIFEST} is wrong")
            if content.pop("format") != FORMAT:
                raise Damaged(f"{MANIFEST} is of another format")
            found = Manifest(**content)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise Damaged(f"{MANIFEST} cannot be read") from None
        if any(Path(file).name != file for file in found.files):
            raise Damaged(f"{MANIFEST} names files elsewhere")
        return found

    def metadata(self, names: list[str]) -> Metadata:
        """For torch's planner: tensors and their pieces; `storage_data` says in which file a piece is and under which name."""
        tensors, places = {}, {}
        for name in names:
            entry = self.tensors[name]
            pieces = [(file, torch.Size(offsets), torch.Size(sizes)) for file, offsets, sizes in entry["pieces"]]
            shape = torch.Size(entry["shape"])
            properties = TensorProperties(dtype=getattr(torch, entry["dtype"]))
            tensors[name] = TensorStorageMetadata(properties, shape, [ChunkStorageMetadata(offsets, sizes) for _, offsets, sizes in pieces])
            for file, offsets, sizes in pieces:
                places[MetadataIndex(name, offsets)] = (file, piece_name(name, offsets, sizes, shape), sizes)
        return Metadata(tensors, storage_data=places)


def piece_name(name: str, offsets: torch.Size, sizes: torch.Size, shape: torch.Size) -> str:
    """Under which name a file holds the piece of `name` [shape] that begins at `offsets`."""
    if sizes == shape:
        return name
    return name + "[" + ",".join(f"{first}:{first + size}" for first, size in zip(offsets, sizes, strict=True)) + "]"


def proof(path: Path) -> tuple[int, int]:
    """Bytes and CRC-32 of a file. (CRC-32 reads 4 times as fast as BLAKE2b here, and nobody is kept from writing a new manifest.)"""
    size, found = 0, 0
    buffer = memoryview(bytearray(READ))
    with open(path, "rb", buffering=0) as handle:
        while count := handle.readinto(buffer):
            size, found = size + count, zlib.crc32(buffer[:count], found)
    return size, found


def check(folder: Path, file: str, expected: tuple[int, int]) -> None:
    """Raises Damaged where the file is missing, cut short or changed."""
    try:
        size = os.stat(folder / file).st_size
        if size != expected[0]:
            raise Damaged(f"{file} has {size} of {expected[0]} bytes")
        if proof(folder / file) != tuple(expected):
            raise Damaged(f"the checksum of {file} is wrong")
    except FileNotFoundError:
        raise Damaged(f"{file} is missing") from None
    except OSError as error:
        raise Damaged(f"{file} cannot be read: {error.strerror or error}") from None


def sync(path: Path) -> None:
    """Waits until a file, or the list of names of a folder, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _checksum_of(content: Any) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())
