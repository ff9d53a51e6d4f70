"""Muon for stacks of matrices, such as a layer's experts; single matrices have torch.optim.Muon."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from longcat_lab.training.parameter_wise import ParameterWise

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic; steepest at zero, so it ends near 1 and not at 1


def orthogonalise(matrices: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
    """Each matrix of a stack with its singular values brought near 1: X = G / |G|, then `steps` times X = a X + (b A + c A^2) X, A = X X^T.

    Args:
        matrices: [S, m, n]. They do not see one another: each is divided by its own Frobenius norm.
        steps: iterations; after 5 the singular values lie in about 0.68 ... 1.2 where they were at least 0.002 of the norm, else lower.
        eps: smallest norm that is divided by, so a matrix of zeros (an expert without tokens) stays zero.

    Returns:
        bf16 [S, m, n]; the iteration runs in bf16, as torch's does.

    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; the batched form of torch.optim.Muon's.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]  # the square products are taken on the short side
    x = matrices.bfloat16()
    x = x.transpose(-2, -1) if tall else x
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = torch.bmm(x, x.transpose(-2, -1))
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.transpose(-2, -1) if tall else x


def shape_factor(rows: int, columns: int, adjust_lr_fn: str) -> float:
    """What the learning rate of a [rows, columns] matrix is multiplied by.

    original: sqrt(max(1, rows / columns)), a step of one spectral size. match_rms_adamw: 0.2 sqrt(max(rows, columns)), a step with
    the RMS 0.2 that AdamW's have (Moonlight, arXiv 2502.16982, eq. 4).
    """
    return math.sqrt(max(1, rows / columns)) if adjust_lr_fn == "original" else 0.2 * math.sqrt(max(rows, columns))


class StackedMuon(ParameterWise):
    """torch.optim.Muon for parameters of shape [..., stack * m, n] that are many m x n matrices, each orthogonalised on its own.

    Knobs are torch.optim.Muon's. `stack` (of a group) is the number of matrices that lie one below the other in the last two
    dimensions: 2 for experts' gate rows above up rows, 1 where only the leading dimensions stack. A stack of one takes torch's steps.

    State: `momentum_buffer`, as the parameter.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str = "original",
        stack: int = 1,
    ) -> None:
        knobs = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov, "eps": eps}
        super().__init__(params, {**knobs, "ns_steps": ns_steps, "adjust_lr_fn": adjust_lr_fn, "stack": stack})

    def step_of(self, parameter: Tensor, group: dict[str, Any]) -> None:
        gradient, state = parameter.grad, self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient, memory_format=torch.preserve_format)
        buffer = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        update = gradient.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer
        matrices = update.unflatten(-2, (group["stack"], -1)).flatten(0, -3)  # [S, m, n]
        update = orthogonalise(matrices, group["ns_steps"], group["eps"]).reshape(parameter.shape)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update, alpha=-group["lr"] * shape_factor(*matrices.shape[1:], group["adjust_lr_fn"]))
