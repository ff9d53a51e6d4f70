"""Which parameter is trained how: roles, learning rates, decay and clipping."""

from __future__ import annotations

import torch
from torch import nn

from longcat_lab.blocks import Block
from longcat_lab.config import OptimizerConfig


def roles(model: nn.Module) -> dict[str, str]:
    """Role of each parameter by name: what its block declares (`embedding`, `table`), else `matrix` or `vector` by its shape."""
    declared = {
        f"{prefix}.{name}" if prefix else name: role
        for prefix, module in model.named_modules()
        if isinstance(module, Block)
        for name, role in module.roles.items()
    }
    return {name: declared.get(name, "matrix" if p.ndim > 1 else "vector") for name, p in model.named_parameters()}


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW with a group a role; `group["peak"]` is the role's peak learning rate, `group["role"]` its name."""
    multiplier = {"embedding": config.embedding_lr_multiplier, "table": config.table_lr_multiplier}
    by_role: dict[str, list[nn.Parameter]] = {}
    names = roles(model)
    for name, parameter in model.named_parameters():
        by_role.setdefault(names[name], []).append(parameter)
    groups = [
        {
            "params": parameters,
            "role": role,
            "peak": config.learning_rate * multiplier.get(role, 1.0),
            "lr": config.learning_rate * multiplier.get(role, 1.0),
            "weight_decay": config.weight_decay if role == "matrix" else 0.0,
        }
        for role, parameters in by_role.items()
    ]
    return torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor


def clip(optimizer: torch.optim.Optimizer, largest: float) -> float:
    """Scales the gradients of everything but n-gram tables to an L2 norm of at most `largest`; the norm before.

    Tables stay out: their gradient's norm follows the number of rows hit, and would set the step of all others.
    """
    dense = [p for group in optimizer.param_groups if group["role"] != "table" for p in group["params"]]
    return float(nn.utils.clip_grad_norm_(dense, largest))
