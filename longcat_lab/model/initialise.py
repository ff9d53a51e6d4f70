"""Initial weights that depend on the seed and the parameter's own name, and on nothing else."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor, nn

from longcat_lab.blocks import Block

BLOCK_ROWS = 1024


def normal_rows(out: Tensor, std: float, seed: int, name: str) -> Tensor:
    """Fills `out` with N(0, std^2), drawn in fp32 on the CPU in blocks of 1024 rows, each from its own (seed, name, block).

    So arms that share a parameter's name and shape start from the same values whatever else they contain, and a rank that
    holds only some rows can draw those alone.
    """
    rows = out.view(-1, out.shape[-1])
    for start in range(0, len(rows), BLOCK_ROWS):
        key = zlib.crc32(f"{seed}/{name}/{start // BLOCK_ROWS}".encode())
        generator = torch.Generator(device="cpu").manual_seed(seed * 2**32 + key)
        part = rows[start : start + BLOCK_ROWS]
        part.copy_(torch.randn(BLOCK_ROWS, out.shape[-1], generator=generator, device="cpu")[: len(part)] * std)
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
def initialise(model: nn.Module, std: float, seed: int, width_scale: float = 1.0) -> None:
    """Matrices N(0, std^2 / width_scale) or what their block asks for, vectors (gains) one, biases of the router zero.

    width_scale: s, this width over that of the proxy that `std` was chosen on. Hidden matrices and the head get 1 / s of the
    variance, embeddings (whose blocks ask for their own) keep theirs. Source: LongCat-Flash (arXiv 2509.01322), hyperparameter transfer.
    """
    own, constant = _asked_for(model, "initial_std"), _asked_for(model, "initial_value")
    for name, parameter in model.named_parameters():
        if name in constant or own.get(name) == 0 or (parameter.ndim < 2 and name not in own):
            parameter.fill_(constant.get(name, own.get(name, 1.0)))
        else:
            normal_rows(parameter, own.get(name, std * width_scale**-0.5), seed, name)
