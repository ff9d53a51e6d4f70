"""Finished weights of a divided model: from what each process holds to the one safetensors file that `weights.py` knows."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from longcat_lab.files import write_whole
from longcat_lab.parallel.checkpoint import Checkpoints, model_tensors
from longcat_lab.parallel.checkpoint.manifest import MANIFEST, Manifest, piece_name
from longcat_lab.parallel.checkpoint.tensors import MODEL, Rows
from longcat_lab.parallel.world import World

PARTS = ".weights"  # folder beside the file, while it is put together
KINDS = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.bool: "BOOL"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"},
}


def save_divided(model: nn.Module, path: Path, world: World, rows: Rows, timeout: float) -> None:
    """`save_weights` of a model that is divided over the processes, which all call it.

    Each process writes what it holds, as for a checkpoint; then the first one joins the pieces, of which it holds one row of blocks at a
    time. For that while they take their space on the disk twice.

    Args:
        rows: tables, of which each process holds some rows. timeout: seconds to wait for a process that does not come.

    Raises:
        LabError: on all processes; the disk is full, or the folder cannot be written.
    """
    parts = Checkpoints(path.with_name(PARTS), "weights", timeout=timeout)
    parts.remove_all()  # of a sitting that was killed here
    kept = model.state_dict().keys()
    parts.save(0, {name: t for name, t in model_tensors(model, rows).items() if name.removeprefix(MODEL) in kept}, {})
    pieces = parts.folder / "checkpoint-00000000"
    try:
        world.first_of_all(lambda: write_whole(path, lambda temporary: join(pieces, temporary)))
    finally:
        parts.remove_all()
        if world.first:
            with contextlib.suppress(OSError):
                parts.folder.rmdir()


def join(pieces: Path, path: Path) -> None:
    """The tensors of a checkpoint of a model's weights as one safetensors file (https://huggingface.co/docs/safetensors): the length of
    the header in 8 bytes, the header, and the tensors one after the other.
    """
    manifest = Manifest.parse((pieces / MANIFEST).read_text(encoding="utf-8"))
    kinds = {name: getattr(torch, entry["dtype"]) for name, entry in manifest.tensors.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    names, at = sorted(kinds, key=lambda name: (-kinds[name].itemsize, name)), 0  # so that each begins at a multiple of its numbers' size
    for name in names:
        shape = manifest.tensors[name]["shape"]
        end = at + torch.Size(shape).numel() * kinds[name].itemsize
        header[name.removeprefix(MODEL)] = {"dtype": KINDS[kinds[name]], "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file, contextlib.ExitStack() as opened:
        handles = {part: opened.enter_context(safe_open(pieces / part, framework="pt")) for part in manifest.files}
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            for block in _blocks(name, manifest.tensors[name], kinds[name], handles):
                file.write(block.contiguous().flatten().view(torch.uint8).numpy().data)


def _blocks(name: str, entry: dict[str, Any], kind: torch.dtype, handles: dict[str, Any]) -> Iterator[Tensor]:
    """A tensor's rows in order, in blocks of those that begin and end in the same pieces."""
    shape, pieces = torch.Size(entry["shape"]), entry["pieces"]
    if not shape:
        yield handles[pieces[0][0]].get_tensor(name)
        return
    edges = sorted({edge for _, offsets, sizes in pieces for edge in (offsets[0], offsets[0] + sizes[0])})
    for first, end in itertools.pairwise(edges):
        block = torch.empty(end - first, *shape[1:], dtype=kind)
        for file, offsets, sizes in pieces:
            if offsets[0] <= first < offsets[0] + sizes[0]:
                place = tuple(slice(begin, begin + size) for begin, size in zip(offsets[1:], sizes[1:], strict=True))
                piece = handles[file].get_slice(piece_name(name, torch.Size(offsets), torch.Size(sizes), shape))
                block[(slice(None), *place)] = piece[first - offsets[0] : end - offsets[0]]
        yield block
