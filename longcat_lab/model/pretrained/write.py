"""A model's weights as a folder of a checkpoint, whole or not there."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longcat_lab.errors import LabError
from longcat_lab.files import save_tensors, write_folder
from longcat_lab.model.lm import LongcatLM
from longcat_lab.model.pretrained.config import Naming
from longcat_lab.model.pretrained.describe import config_json, fold_factors
from longcat_lab.model.pretrained.files import CONFIG, INDEX, WEIGHTS
from longcat_lab.model.pretrained.names import Part, layout

SHARD_BYTES = 5 * 10**9


def save_pretrained(
    model: LongcatLM,
    folder: str | Path,
    naming: Naming | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    transformers_zero_rows: bool = True,
    extra: dict[str, Any] | None = None,
) -> None:
    """Writes config.json and safetensors files that transformers and `from_pretrained` read: a tensor an expert, as published.

    Weights are written from where they lie, one file at a time, in the model's dtypes; the folder appears whole or not at all.
    LongCat's sparse models, which transformers does not have, get the keys and names of LongCat-2.0; those of the n-gram tables of its
    prediction module (`model.mtp.oe_embed_tokens0.weight`, `model.mtp.oe_embed_proj0.weight`) are by analogy and not confirmed.
    Settings that change what is computed and have no key of their own (eps of the latents' norms other than 1e-6, which is what
    transformers takes there whatever the file says; an unnormed start of the prediction steps) are noted under `longcat_lab` for
    `from_pretrained`; settings of training alone are not written. Scales of the n-gram fusion and a constant
    amplifier are multiplied into the token's rows and the projections: checkpoints know the plain mean alone.

    Args:
        folder: must not exist.
        naming: `longcat` or `deepseek`; None: by the kind of the layers.
        max_shard_bytes: largest size of a file's tensors, unless a single one is larger.
        transformers_zero_rows: write gate and up rows of zeros for zero-experts. No model uses them, transformers 5 does not load
            without them, and the published files do not have them: False writes those. Never written for LongCat's sparse models.
        extra: further keys of config.json, such as `{"eos_token_id": 2}`.

    Raises:
        LabError: the folder exists, the disk is full, or these names cannot describe the model (says which setting).
    """
    folder = Path(folder).absolute()
    if not isinstance(model, LongcatLM):
        raise LabError(f"save_pretrained writes a LongcatLM, not a {type(model).__name__}: give the model itself.")
    if folder.exists():
        raise LabError(f"{folder} exists: give another folder, or delete it.")
    if isinstance(max_shard_bytes, bool) or not isinstance(max_shard_bytes, int) or max_shard_bytes < 1:
        raise LabError(f"max_shard_bytes is {max_shard_bytes!r}: give a positive number of bytes.")
    config = model.config
    naming = naming or ("deepseek" if config.layer.kind == "decoder" else "longcat")
    if naming not in ("longcat", "deepseek"):
        raise LabError(f"There is no naming {naming!r}: give 'longcat' or 'deepseek'.")
    described = config_json(config, naming)
    if taken := sorted(set(extra or {}) & set(described)):
        raise LabError(f"extra sets {', '.join(taken)}, which the model itself says: leave it out.")
    described |= {"dtype": str(model.lm_head.weight.dtype).removeprefix("torch."), **(extra or {})}
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if any(tensor.is_meta for tensor in state.values()):
        raise LabError("The model has no weights (it is on the meta device): build it on another.")
    parts = layout(config, naming, state, zero_rows=transformers_zero_rows)
    token, projection = fold_factors(config)
    factors = {"model.embed_tokens.weight": token, "embed_tokens.projection.weight": projection}
    shards = list(_shards(parts, lambda part: _dtype(part, state).itemsize, max_shard_bytes))

    def write(temporary: Path) -> None:
        weight_map, total = {}, 0
        for number, names in enumerate(shards, 1):
            file = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            tensors = {name: _tensor(parts[name], state, factors.get(name, factors.get(parts[name].ours, 1.0))) for name in names}
            save_tensors(tensors, temporary / file)
            weight_map |= dict.fromkeys(names, file)
            total += sum(tensor.nbytes for tensor in tensors.values())
            del tensors
        if len(shards) > 1:
            _json(temporary / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
        _json(temporary / CONFIG, dict(sorted(described.items())))

    write_folder(folder, write)


def _dtype(part: Part, state: dict[str, Tensor]) -> torch.dtype:
    return state[part.ours or "lm_head.weight"].dtype


def _shards(parts: dict[str, Part], element_bytes: Callable[[Part], int], limit: int) -> Iterator[list[str]]:
    """Names in their order, cut into files of at most `limit` bytes."""
    names: list[str] = []
    size = 0
    for name, part in parts.items():
        own = torch.Size(part.shape).numel() * element_bytes(part)
        if names and size + own > limit:
            yield names
            names, size = [], 0
        names.append(name)
        size += own
    yield names


def _tensor(part: Part, state: dict[str, Tensor], factor: float) -> Tensor:
    """What the file holds; a view of our tensor wherever that is possible."""
    if part.ours is None:
        return torch.zeros(part.shape, dtype=_dtype(part, state))
    tensor = state[part.ours]
    tensor = tensor[part.index] if part.index else tensor
    if not math.isclose(factor, 1):
        tensor = (factor * tensor.double()).to(tensor.dtype)
    tensor = tensor.cpu().contiguous()
    return tensor.clone() if part.copy else tensor  # safetensors refuses two names for the same memory


def _json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
