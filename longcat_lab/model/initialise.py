"""Initial weights that depend on the seed and the parameter's own name, and on nothing else."""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from longcat_lab.blocks import Block

BLOCK_ROWS = 1024


@dataclasses.dataclass(frozen=True)
class Slice:
    """Which part of a parameter is here: entries `first` and on of dimension `dim`, of a parameter of the shape `whole`."""

    whole: tuple[int, ...]
    dim: int
    first: int


def normal_rows(out: Tensor, std: float, seed: int, name: str, part: Slice | None = None) -> Tensor:
    """Fills `out` with N(0, std^2), drawn in fp32 on the CPU in blocks of 1024 rows, each from its own (seed, name, block).

    So arms that share a parameter's name and shape start from the same values whatever else they contain, and a process that holds only
    a part of a parameter draws the same values there, and only the blocks in which they lie.

    Args:
        part: what part `out` is; the first dimension or the last one can be divided.
    """
    rows, width, first, columns = out.view(-1, out.shape[-1]), out.shape[-1], 0, slice(None)
    if part is not None and part.dim == len(part.whole) - 1:
        width, columns = part.whole[-1], slice(part.first, part.first + out.shape[-1])
    elif part is not None:
        first = part.first * math.prod(part.whole[1:-1])
    for block in range(first // BLOCK_ROWS, -(-(first + len(rows)) // BLOCK_ROWS)):
        key = zlib.crc32(f"{seed}/{name}/{block}".encode())
        generator = torch.Generator(device="cpu").manual_seed(seed * 2**32 + key)
        drawn = torch.randn(BLOCK_ROWS, width, generator=generator, device="cpu")[:, columns]
        begin, end = max(first, block * BLOCK_ROWS), min(first + len(rows), (block + 1) * BLOCK_ROWS)
        rows[begin - first : end - first].copy_(drawn[begin - block * BLOCK_ROWS : end - block * BLOCK_ROWS] * std)
    return out


def _asked_for(model: nn.Module, method: str) -> dict[str, float]:
    """What blocks ask for their parameters, by the parameters' names in the model."""
    return {
        f"{prefix}.{name}" if prefix else name: value
        for prefix, module in model.named_modules()
        if isinstance(module, Block)
        for name, value in getattr(module, method)().items()
    }


@torch.no_grad()
def initialise(model: nn.Module, std: float, seed: int, width_scale: float = 1.0, parts: Mapping[str, Slice] | None = None) -> None:
    """Matrices N(0, std^2 / width_scale) or what their block asks for, vectors (gains) one, biases of the router zero.

    width_scale: s, this width over that of the proxy that `std` was chosen on. Hidden matrices and the head get 1 / s of the
    variance, embeddings (whose blocks ask for their own) keep theirs. Source: LongCat-Flash (arXiv 2509.01322), hyperparameter transfer.
    parts: parameters of which only a part is here, by name.
    """
    own, constant = _asked_for(model, "initial_std"), _asked_for(model, "initial_value")
    for name, parameter in model.named_parameters():
        if name in constant or own.get(name) == 0 or (parameter.ndim < 2 and name not in own):
            parameter.fill_(constant.get(name, own.get(name, 1.0)))
        else:
            normal_rows(parameter, own.get(name, std * width_scale**-0.5), seed, name, (parts or {}).get(name))
