"""What blocks tell of their mechanisms while they train, and whether each took part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from longcat_lab.blocks import Block

LATE = 5  # mechanisms are judged on the last fifth of the rows, where the model has settled


def blocks(model: nn.Module) -> dict[str, Block]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Block)}


def after_step(model: nn.Module, summed: Callable[[Tensor], Tensor] | None = None) -> None:
    """Lets every block take its own step (a router's bias), on what was counted in the whole global batch.

    summed: the sum over the processes that hold other parts of the batch, in place; None where there are none.
    """
    for block in (each for each in blocks(model).values() if each.training):  # frozen blocks stay as they are
        if summed is not None:
            block.combine(summed)
        block.after_step()


def statistics(model: nn.Module) -> dict[str, Any]:
    """`BLOCK/MEASURE` to a number, or to a list of them."""
    found: dict[str, Any] = {}
    for name, block in blocks(model).items():
        found.update({f"{name}/{key}": value for key, value in {**block.statistics(), **block.distributions()}.items()})
    return found


def late_means(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Mean of every `BLOCK/MEASURE` (numbers only) over the last fifth of the logged rows."""
    late = rows[-max(1, len(rows) // LATE) :]
    values: dict[str, list[float]] = {}
    for name, value in ((name, value) for row in late for name, value in row.items()):
        if "/" in name and isinstance(value, int | float):
            values.setdefault(name, []).append(value)
    return {name: sum(each) / len(each) for name, each in values.items()}


def over_blocks(means: dict[str, float]) -> dict[str, float]:
    """Each measure's mean over the blocks that have it."""
    values: dict[str, list[float]] = {}
    for name, value in means.items():
        values.setdefault(name.rsplit("/", 1)[1], []).append(value)
    return {key: sum(each) / len(each) for key, each in values.items()}


def not_engaged(model: nn.Module, means: dict[str, float]) -> list[str]:
    """`BLOCK: sentence` for every mechanism that was asked for and took no part: such an arm was not tested."""
    own: dict[str, dict[str, float]] = {}
    for key, value in means.items():
        name, _, measure = key.rpartition("/")
        own.setdefault(name, {})[measure] = value
    return [f"{name}: {said}" for name, block in blocks(model).items() for said in block.not_engaged(own.get(name, {}))]
