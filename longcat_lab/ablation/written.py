"""What the runner writes into a question, checked when it is read again: the file may have been edited."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from longcat_lab.node import ConfigError, Node, validate_node

if TYPE_CHECKING:
    from longcat_lab.ablation.spec import Ablation

Pair = Annotated[list[int | float], Field(min_length=2, max_length=2)]  # a tuple would not be found in YAML


class Timed(Node):
    """Seconds a step of one variant, see `quantities.Clock`."""

    mark: str = Field(description="what tells its configuration apart")
    setting: str | None = Field(description="what was varied while measuring")
    points: list[Pair] = Field(min_length=1, description="(value of the setting, seconds a step)")
    spread: float = Field(ge=0, description="from the fastest to the slowest measured step, over the median")
    threads: int = Field(ge=1, description="of the process that measured")


class Tuned(Node):
    """What a tuning found, see `tuning.chosen`."""

    setting: str = Field(description="what was tuned")
    metric: str = Field(description="what was best")
    seeds: list[int] = Field(min_length=1, description="of the tuning")
    steps: int | None = Field(default=None, description="of the tuning, where not the arm's own")
    chosen: dict[str, int | float] = Field(description="arm -> its value")
    means: dict[str, list[Pair]] = Field(description="arm -> (value, mean over the tuning's seeds)")
    remarks: dict[str, str] = Field(description="arm -> what must be known of its choice")


def check(a: Ablation) -> None:
    """Raises ConfigError where what the runner has written is not of that form any more."""
    for key, where, kind, found in [
        *((("measured", name), f"measured.{name}", Timed, each) for name, each in a.measured.items()),
        *([(("tuning",), "tuning", Tuned, a.tuning)] if a.tuning else []),
    ]:
        try:
            validate_node(kind, found, where)
        except ConfigError as error:
            raise ConfigError(str(error), (*key, *error.at)) from None
    for name in a.measured:
        if name not in a.variants:
            raise ConfigError(f"'measured' names '{name}', which is not a variant.", ("measured", name))
    if a.tuning and (odd := {*a.tuning["means"]} - {*a.tuning["chosen"]}):
        raise ConfigError(f"'tuning' has no value chosen for {', '.join(sorted(odd))}.", ("tuning", "chosen"))
