"""A checkpoint's files into a model that is allocated once."""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from longcat_lab.errors import LabError
from longcat_lab.model.lm import LongcatLM
from longcat_lab.model.pretrained.config import model_config
from longcat_lab.model.pretrained.files import CONFIG, DTYPES, Stored, headers, opened, read_object
from longcat_lab.model.pretrained.keys import Keys
from longcat_lab.model.pretrained.names import ROUTER, Part, layout

NAMED = 6  # tensors that one message names of each kind
CHUNK_BYTES = 2**24  # read at once
REOPEN_BYTES = 2**26  # then the file is opened anew: pages that were read through one mapping count as this process's memory


def from_pretrained(
    folder: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    latent_norm_eps: float | None = None,
) -> LongcatLM:
    """A model from a folder with Hugging Face's config.json and safetensors files, in LongCat's or DeepSeek's names.

    Read are `longcat_flash`, `longcat_flash_ngram` (Flash-Lite), the sparse models LongCat-2.0 and Flash-Lite-Sparse (without a
    `model_type`), `deepseek_v3` and `deepseek_v32`; experts a tensor each, as published, or stacked; prediction modules where the
    files hold one. The names of the n-gram tables that LongCat-2.0's prediction module carries are not confirmed: any place below
    `model.mtp.` will do. The layout of its indexers' RoPE is in no key: it is what the engines have. Names and shapes of all files
    are checked before anything is read, and each tensor goes straight to its place: memory is that of the model and a few
    megabytes. Nothing in the folder is run. A second copy of a shared tensor (DeepSeek's `embed_tokens` and `shared_head.head`
    of the prediction layers) is left out, with a warning where it is none.

    Args:
        folder: on this machine.
        dtype: of all weights but the routers', which are never below fp32; None: as stored.
        device: where the weights go; None: the CPU.
        latent_norm_eps: eps of the norms of MLA's two latents. transformers takes 1e-6 there whatever `rms_norm_eps` says, and so
            does this function; other engines (SGLang) take rms_norm_eps: give that value to match them.

    Returns:
        The model in evaluation mode; `model.config` is its ModelConfig. Settings of training alone have their defaults.

    Raises:
        LabError: one sentence: not such a folder, damaged files, a setting that the model cannot express, tensors that are
            missing, unknown or of another shape (named, with both shapes). No model is made then.
    """
    folder = Path(folder)
    try:
        device = torch.device(device or "cpu")
    except (RuntimeError, TypeError):
        raise LabError(f"There is no device {device!r}: give one such as 'cpu', or none.") from None
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise LabError(f"dtype is {dtype!r}: give a floating-point dtype such as torch.bfloat16, or none.")
    if not folder.is_dir():
        raise LabError(f"There is no folder {folder}: from_pretrained reads a checkpoint on this machine, download it first.")
    keys = Keys(read_object(folder / CONFIG), folder / CONFIG)
    stored = {name: each for name, each in headers(folder).items() if not _derived(name, each)}
    config, naming = model_config(keys, stored, latent_norm_eps)
    with torch.device("meta"), torch.no_grad():
        model = LongcatLM(config)
    parts = layout(config, naming, model.state_dict(), stored)
    _compare(folder, parts, stored)
    _allocate(model, _dtypes(parts, stored, dtype), device)
    _fill(model, parts, stored)
    return model.eval()


def _derived(name: str, stored: Stored) -> bool:
    """Tensors that say nothing: tables that old transformers saved, and empty ones."""
    return name.endswith(".rotary_emb.inv_freq") or math.prod(stored.shape) == 0


def _compare(folder: Path, parts: dict[str, Part], stored: dict[str, Stored]) -> None:
    """Raises LabError where a checkpoint's tensors are not those of `parts`."""

    def fits(part: Part, shape: tuple[int, ...]) -> bool:
        spared = (part.shape[0] + part.spare, *part.shape[1:]) if part.spare else part.shape
        return shape in (part.shape, spared)

    both = [name for name in parts if name in stored]
    wrong = {
        "missing": [name for name, part in parts.items() if not part.optional and name not in stored],
        "not known": [name for name in stored if name not in parts],
        "of another shape": [
            f"{name} {list(stored[name].shape)} in place of {list(parts[name].shape)}"
            for name in both
            if not fits(parts[name], stored[name].shape)
        ],
        "of a dtype that cannot be read": [f"{name} {stored[name].dtype}" for name in both if stored[name].dtype not in DTYPES],
    }
    said = [f"{len(found)} {what} ({_some(found)})" for what, found in wrong.items() if found]
    if said:
        raise LabError(f"{folder}: the tensors are not those that {CONFIG} describes: {'; '.join(said)}: give a checkpoint of that model.")


def _some(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def _dtypes(parts: dict[str, Part], stored: dict[str, Stored], dtype: torch.dtype | None) -> dict[str, torch.dtype]:
    """Of each of our tensors: the widest of what it is made of, or `dtype`; fp32 at least for the routers."""
    found: dict[str, list[torch.dtype]] = {}
    for name, part in parts.items():
        if not part.optional:
            found.setdefault(part.ours, []).append(dtype or DTYPES[stored[name].dtype])
    for ours, kinds in found.items():
        if ROUTER.search(ours):
            kinds.append(torch.float32)
    return {ours: functools.reduce(torch.promote_types, kinds) for ours, kinds in found.items()}


def _allocate(model: nn.Module, dtypes: dict[str, torch.dtype], device: torch.device) -> None:
    """Gives a model on the meta device its memory: weights as they come, buffers of a run at zero."""
    try:
        for place, module in model.named_modules():
            prefix = f"{place}." if place else ""
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(torch.empty(parameter.shape, dtype=dtypes[prefix + name], device=device))
            for name, buffer in module._buffers.items():
                if buffer is None:
                    continue
                if prefix + name in dtypes:
                    module._buffers[name] = torch.empty(buffer.shape, dtype=dtypes[prefix + name], device=device)
                else:  # those with content were made on the CPU
                    module._buffers[name] = torch.zeros_like(buffer, device=device) if buffer.is_meta else buffer.to(device)
    except (MemoryError, RuntimeError, AssertionError) as error:  # torch asserts that it was built for the device
        why = str(error).splitlines()[0].split(". ")[0].rstrip(".") if str(error) else "out of memory"
        if any(words in why for words in ("allocate", "out of memory", "enough memory")):
            raise LabError(f"The checkpoint does not fit into the memory of {device}: give a smaller dtype or a larger device.") from None
        raise LabError(f"The device {device} cannot be used here ({why}): give another.") from None


@torch.no_grad()
def _fill(model: LongcatLM, parts: dict[str, Part], stored: dict[str, Stored]) -> None:
    """Reads every tensor into its place, a few megabytes at a time; copies are compared with what they are copies of."""
    state = model.state_dict()
    own = sorted((name for name, part in parts.items() if name in stored and not part.optional), key=lambda n: str(stored[n].file))
    copies = [name for name, part in parts.items() if name in stored and part.copy]
    differ = []
    for _, target, piece in _pieces(own, state, parts, stored):
        target.copy_(piece)
    for name, target, piece in _pieces(copies, state, parts, stored):
        if name not in differ and not torch.equal(piece.to(device=target.device, dtype=target.dtype), target):
            differ.append(name)
    if differ:
        warnings.warn(
            f"Left out though not the copies that this model takes them for: {_some(differ)}; the shared tensors are used.", stacklevel=3
        )


def _pieces(
    names: list[str], state: dict[str, Tensor], parts: dict[str, Part], stored: dict[str, Stored]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, place in our tensor, content): rows of the tensors `names`, file by file."""
    for file, group in itertools.groupby(names, key=lambda name: stored[name].file):
        handle: Any = None
        read = 0
        for name in group:
            part = parts[name]
            place = state[part.ours][part.index] if part.index else state[part.ours]
            rows = place.shape[0]
            row_bytes = max(1, place.numel() // rows * DTYPES[stored[name].dtype].itemsize)
            step = max(1, CHUNK_BYTES // row_bytes)
            for start in range(0, rows, step):
                if handle is None or read > REOPEN_BYTES:
                    handle, read = opened(file), 0
                piece = handle.get_slice(name)[start : min(start + step, rows)]
                yield name, place[start : start + step], piece
                read += piece.numel() * piece.element_size()
                del piece  # it holds the mapping
