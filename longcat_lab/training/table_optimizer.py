"""Optimizers for tables of which a step reads few rows: they cost time by the row that was hit, and not by the row there is.

A row is *hit* in a step where its gradient is not zero everywhere. What is not hit keeps its values and its state as they are: no decay,
no momentum that runs on, no second moment that fades. `once_hit_displacement` says what that does to rare rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longcat_lab.config import OptimizerConfig
from longcat_lab.parallel.embedding_op import sum_by_row
from longcat_lab.training.parameter_wise import ParameterWise


def merge(gradient: Tensor) -> Tensor:
    """A sparse gradient in which each row stands once, in ascending order, with the sum of what stood there for it.

    Args:
        gradient: COO, indices [1, n], values [n, d], as the backward pass of an embedding makes it (several passes: one after the other).

    Returns:
        The same, coalesced; the same object where nothing is to do. Entries of a row are summed in the order in which they stood, so the
        bits do not follow the number of threads. (On a CPU about twice as fast as `coalesce`, which adds entry by entry.)
    """
    if gradient.is_coalesced() or gradient._nnz() == 0 or gradient._values().ndim != 2:
        return gradient.coalesce()
    rows, values = sum_by_row(gradient._indices()[0], gradient._values())
    return torch.sparse_coo_tensor(rows[None], values, gradient.shape, is_coalesced=True, check_invariants=False)


def hit_rows(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers [m] of the rows whose gradient is not zero everywhere, ascending, and their gradients [m, d]; not to be written to.

    A dense gradient [rows, d] costs time by the row there is, and gives the same.
    """
    if not gradient.is_sparse:
        rows = gradient.ne(0).any(1).nonzero()[:, 0]
        return rows, gradient[rows]
    gradient = merge(gradient)
    rows, values = gradient._indices()[0], gradient._values()
    hit = values.abs().amax(1).ne(0)  # true for nan; ten times faster than the maximum norm of torch.linalg
    return (rows, values) if hit.all() else (rows[hit], values[hit])


class TableOptimizer(ParameterWise):
    """One of three rules for the rows that are hit; t is the number of steps in which the table had a gradient.

    lazy_adam: Adam; the moments of other rows stay. m <- b1 m + (1 - b1) g, v <- b2 v + (1 - b2) g^2,
        p <- p - lr sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + eps). State: `exp_avg`, `exp_avg_sq`, as the table. The equations are those
        of torch.optim.SparseAdam (which takes a row with a zero gradient for hit): eps stands beside the uncorrected root.
    row_wise: one second moment a row and no first. v <- b2 v + (1 - b2) mean_j g_j^2, p <- p - lr g / (sqrt(v / (1 - b2^t)) + eps).
        State: `row_exp_avg_sq` [rows], 4 bytes a row in float32. Source: one accumulator a row as in FBGEMM's row-wise Adagrad
        (EXACT_ROWWISE_ADAGRAD: the sum of the mean squares) and in the n-gram table of karpathy/nanochat, pull request 854; ours is the
        exponential form, which is Adam's second moment.
    sgd: m <- momentum m + g, p <- p - lr m. State: `momentum_buffer`, as the table; none at all where momentum is 0. Momentum acts from
        hit to hit.

    Decay is decoupled, p <- (1 - lr weight_decay) p, before the step and on the rows that are hit alone.

    Args:
        params: tables [rows, d] or groups of them; gradients sparse (COO) or dense.
    """

    def __init__(
        self,
        params: Iterable[Any],
        mode: str,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-16,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
    ) -> None:
        self.update: Callable[..., None] = {"lazy_adam": _lazy_adam, "row_wise": _row_wise, "sgd": _sgd}[mode]
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "momentum": momentum})

    def step_of(self, table: Tensor, group: dict[str, Any]) -> None:
        rows, gradient = hit_rows(table.grad)
        values = table.index_select(0, rows)
        if group["weight_decay"]:
            values.mul_(1 - group["lr"] * group["weight_decay"])
        self.update(values, rows, gradient, table, self.state[table], group)
        table.index_copy_(0, rows, values)


def _lazy_adam(values: Tensor, rows: Tensor, gradient: Tensor, table: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    """Steps `values`, the table's rows that are hit; so do the others below."""
    if not state:
        state.update(step=0, exp_avg=_zeros(table, table.shape), exp_avg_sq=_zeros(table, table.shape))
    state["step"] += 1
    first, second = (1 - beta ** state["step"] for beta in group["betas"])
    mean = state["exp_avg"].index_select(0, rows).lerp_(gradient, 1 - group["betas"][0])
    square = state["exp_avg_sq"].index_select(0, rows).mul_(group["betas"][1]).addcmul_(gradient, gradient, value=1 - group["betas"][1])
    state["exp_avg"].index_copy_(0, rows, mean)
    state["exp_avg_sq"].index_copy_(0, rows, square)
    values.addcdiv_(mean, square.sqrt_().add_(group["eps"]), value=-group["lr"] * math.sqrt(second) / first)


def _row_wise(values: Tensor, rows: Tensor, gradient: Tensor, table: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    if not state:
        state.update(step=0, row_exp_avg_sq=_zeros(table, table.shape[:1]))
    state["step"] += 1
    beta = group["betas"][1]
    square = state["row_exp_avg_sq"].index_select(0, rows).mul_(beta).add_(gradient.square().mean(1), alpha=1 - beta)
    state["row_exp_avg_sq"].index_copy_(0, rows, square)
    scale = square.div_(1 - beta ** state["step"]).sqrt_().add_(group["eps"])
    values.addcdiv_(gradient, scale[:, None], value=-group["lr"])


def _sgd(values: Tensor, rows: Tensor, gradient: Tensor, table: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    if group["momentum"]:
        if not state:
            state["momentum_buffer"] = _zeros(table, table.shape)
        gradient = state["momentum_buffer"].index_select(0, rows).mul_(group["momentum"]).add_(gradient)
        state["momentum_buffer"].index_copy_(0, rows, gradient)
    values.add_(gradient, alpha=-group["lr"])


def _zeros(table: Tensor, shape: Iterable[int]) -> Tensor:
    """Zeros of the table's kind and place. On a CPU their memory is taken page by page, when first written: torch.zeros writes it all."""
    numpys = {torch.float32: np.float32, torch.float64: np.float64}.get(table.dtype)
    if table.device.type != "cpu" or numpys is None:
        return torch.zeros(tuple(shape), dtype=table.dtype, device=table.device)
    return torch.from_numpy(np.zeros(tuple(shape), numpys))


def table_betas(config: OptimizerConfig) -> tuple[float, float]:
    """(beta1, beta2) of the tables: their own, or those of everything that AdamW trains."""
    own = (config.table_beta1, config.table_beta2)
    return tuple(default if beta is None else beta for beta, default in zip(own, (config.beta1, config.beta2), strict=True))


def once_hit_displacement(config: OptimizerConfig) -> float:
    """How far an entry of a row moves in all, in units of the tables' learning rate, that is hit once after a long silence.

    Second moment 0 before, late in a run (bias corrections 1), entries of the gradient alike in size, no decay, a constant rate, eps 0.
    Of sgd the unit is the rate times the gradient.

    adamw goes on for as long as its moments fade: the k-th step after the hit is (1 - b1) b1^k / sqrt((1 - b2) b2^k), whose sum is
    (1 - b1) / sqrt(1 - b2) / (1 - b1 / sqrt(b2)), or inf where b1 >= sqrt(b2) (then eps ends it). lazy_adam takes the first step alone.
    """
    beta1, beta2 = table_betas(config)
    if config.table_optimizer == "sgd":
        return 1.0
    if config.table_optimizer == "row_wise":
        return (1 - beta2) ** -0.5
    first = (1 - beta1) * (1 - beta2) ** -0.5
    if config.table_optimizer == "lazy_adam":
        return first
    return first / (1 - beta1 * beta2**-0.5) if beta1 < beta2**0.5 else math.inf


def told(config: OptimizerConfig) -> str:
    """One line on the tables: mode, displacement of a rare row beside dense AdamW's, and whom decay acts on."""
    mode, dense = config.table_optimizer, once_hit_displacement(config.model_copy(update={"table_optimizer": "adamw"}))
    unit = "learning rates times its gradient" if mode == "sgd" else "learning rates"
    beside = "" if mode == "adamw" else f" (dense AdamW: {dense:.3g} learning rates)" if mode == "sgd" else f" (dense AdamW: {dense:.3g})"
    decay = "every row in every step" if mode == "adamw" else "rows that are hit"
    moved = f"{once_hit_displacement(config):.3g} {unit}{beside}"
    return f"tables: {mode}; a row that is hit once after a long silence moves by {moved}; decay acts on {decay}"
