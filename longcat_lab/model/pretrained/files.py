"""The safetensors files of a checkpoint: which there are, what their headers say."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from longcat_lab.errors import LabError

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Stored:
    """One tensor by its file's header. dtype: the file's word for it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def read_object(path: Path) -> dict[str, Any]:
    """The keys and values of a JSON file.

    Raises:
        LabError: there is no such file, or something else is in it.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LabError(f"{path} cannot be read ({error.strerror}): give a folder with config.json and safetensors files.") from None
    except ValueError as error:
        raise LabError(f"{path} is not JSON ({error}): fetch it again.") from None
    if not isinstance(data, dict):
        raise LabError(f"{path} holds no keys and values: fetch it again.")
    return data


def headers(folder: Path) -> dict[str, Stored]:
    """All tensors of the folder, from the headers alone.

    Raises:
        LabError: there are no safetensors files, one is missing, damaged or outside the folder, or index and files disagree.
    """
    if (folder / WEIGHTS).is_file():
        return _header(folder / WEIGHTS)
    if not (folder / INDEX).is_file():
        if list(folder.glob("*.bin")) or list(folder.glob("*.pt")) or list(folder.glob("*.pth")):
            raise LabError(f"{folder} holds weights only as pickles, which can run any code when read: convert them to safetensors.")
        raise LabError(f"{folder} holds neither {WEIGHTS} nor {INDEX}: give the folder of a whole checkpoint.")
    index = folder / INDEX
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(file, str) for file in weight_map.values()):
        raise LabError(f"{index} has no 'weight_map' from tensor names to files: fetch it again.")
    found: dict[str, Stored] = {}
    for file in sorted(set(weight_map.values())):
        # By the text alone: Hugging Face's own cache has links out of the folder, which are the user's.
        plain = PurePosixPath(file.replace("\\", "/"))
        if plain.is_absolute() or ".." in plain.parts or ":" in file or plain.suffix != ".safetensors":
            raise LabError(f"{index} names the file {file!r}, which is no safetensors file inside the folder: do not trust it.")
        if not (folder / plain).is_file():
            raise LabError(f"{folder / plain} is missing, though {INDEX} names it: fetch it.")
        for name, stored in _header(folder / plain).items():
            if name in found:
                raise LabError(f"{folder}: tensor {name!r} is in {found[name].file.name} and in {file}: delete the wrong file.")
            found[name] = stored
    for name, file in weight_map.items():
        if name not in found or found[name].file != folder / file:
            raise LabError(f"{folder / file} does not hold tensor {name!r}, though {INDEX} says so: fetch both again.")
    return found


def _header(path: Path) -> dict[str, Stored]:
    with opened(path) as handle:
        found = {}
        for name in handle.keys():  # noqa: SIM118 - no mapping
            part = handle.get_slice(name)
            found[name] = Stored(path, tuple(part.get_shape()), part.get_dtype())
        return found


def opened(path: Path) -> Any:
    """`safe_open`, to be used in `with`.

    Raises:
        LabError: the file is damaged or cut short.
    """
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise LabError(f"{path} is damaged or cut short ({why}): fetch it again.") from None
