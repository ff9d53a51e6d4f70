"""What optimizers share that take one parameter after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class ParameterWise(torch.optim.Optimizer):
    """An optimizer of which a kind says only how one parameter that has a gradient is stepped: `step_of`."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.step_of(parameter, group)
        return loss

    def step_of(self, parameter: Tensor, group: dict[str, Any]) -> None:
        """Steps `parameter`, in place; `group` holds its settings."""
        raise NotImplementedError
