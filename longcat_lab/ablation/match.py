"""Variants made equal in parameters, FLOPs or time, before anything runs: rules are met one after the other until all hold (Gauss-Seidel),
each by moving one whole-number setting of one variant (bisection on a total that rises or falls with it)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from longcat_lab.ablation import evaluated
from longcat_lab.ablation.quantities import STEPS, Clock, quantities, setting
from longcat_lab.ablation.rooms import Rooms
from longcat_lab.ablation.spec import Ablation, Match
from longcat_lab.errors import LabError
from longcat_lab.node import ConfigError

if TYPE_CHECKING:
    import pandas as pd

SWEEPS = 30  # rules that help each other settle in two or three rounds
WINDOW = 64  # how far to look for the next value that the configuration allows (multiples of 8, of the head count, ...)
LARGEST = 2**31


@dataclass(frozen=True)
class Solution:
    """Matched configurations.

    Attributes:
        configs: variant -> configuration with the solved settings.
        moved: variant -> {dotted setting: solved value}, only settings that were free.
        totals: variant, or arm that is evaluated from one -> {quantity: total}.
        evaluated: arm that is evaluated from a variant -> the configuration that it is evaluated with.
        plugins: path of a file of one's own blocks -> what was imported from it; the same for every variant.
        quantities: variant -> what `match` can hold equal (see `quantities.quantities`), wall_clock where it was measured.
    """

    configs: dict[str, Any]
    moved: dict[str, dict[str, int]]
    totals: dict[str, dict[str, float]]
    evaluated: dict[str, Any] = field(default_factory=dict)
    plugins: dict[str, bytes] = field(default_factory=dict)
    quantities: dict[str, dict[str, float | None]] = field(default_factory=dict)

    @property
    def table(self) -> pd.DataFrame:
        """One row per arm: its totals, and what was moved to get there."""
        import pandas as pd

        rows = {name: {**totals, "moved": _said(self.moved.get(name, {}))} for name, totals in self.totals.items()}
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("variant")


def _said(moved: dict[str, int]) -> str:
    return ", ".join(f"{key}={value}" for key, value in moved.items())


def solve(ablation: Ablation, rooms: Rooms | None = None) -> Solution:
    """The configuration of every variant, with every match rule met. Pure arithmetic: nothing is built or written.

    Raises:
        LabError: an override does not fit a variant, or a rule cannot be met (the sentence gives the nearest total reached).
    """
    rooms = rooms or Rooms()
    key = "plugins"
    try:
        if ablation.plugins:
            rooms.use_plugins(ablation.plugins)
        key = "base"
        base = rooms.load(ablation.base)
    except LabError as error:
        raise LabError(f"{ablation.at(key)}{error}") from None
    files = list(dict.fromkeys([*getattr(base, "plugins", []), *ablation.plugins]))
    own = {"plugins": files} if files else {}
    moved: dict[str, dict[str, int]] = {name: {} for name in ablation.variants}
    clocks = {name: Clock.of(told) for name, told in ablation.measured.items()}

    def configure(name: str, more: dict[str, Any]) -> Any:
        # One application of everything: settings that only fit together must not be checked one by one.
        return rooms.apply(base, {**own, **ablation.set, **ablation.variants[name], **moved[name], **more})

    def known(name: str, config: Any) -> dict[str, float | None]:
        return quantities(config, rooms.totals(config), clocks.get(name))

    configs = {}

    def settle(name: str) -> None:
        try:
            configs[name] = configure(name, {})
        except LabError as error:
            raise LabError(f"{ablation.at(*_written(ablation, name, error))}Variant '{name}': {error}") from None

    for name in ablation.variants:
        settle(name)

    for number, rule in enumerate(ablation.match, 1):
        for name in [rule.reference, *ablation.held_by(rule)]:
            if known(name, configs[name]).get(rule.quantity) is None:
                clock = rule.quantity == "wall_clock"
                lacks = "no steps of it have been measured: longcat-lab run measures them" if clock else "it has none"
                raise LabError(f"{_at(ablation, number)}Match {number} holds {rule.quantity} of '{name}', but {lacks}.")

    seen: set[str] = set()
    for _ in range(SWEEPS if ablation.match else 0):
        for number, rule in enumerate(ablation.match, 1):
            target = known(rule.reference, configs[rule.reference])[rule.quantity]
            for name, key in rule.free.items():
                start = _whole_number(configs[name], key, name, number, ablation)

                def total(value: int, name: str = name, key: str = key, quantity: str = rule.quantity) -> float | None:
                    try:
                        return known(name, configure(name, {key: value}))[quantity]
                    except LabError:
                        return None  # this value does not fit the other settings

                value = nearest_value(total, start, target)
                if value is None:
                    where = _at(ablation, number, "free", name)
                    raise LabError(f"{where}Match {number}: {key} does not change {rule.quantity} of '{name}'; free another setting.")
                # A control is the baseline, but for other initial values or a feature that is switched off.
                for each in (name, *(ablation.controls if name == ablation.baseline else ())):
                    moved[each][key] = value
                    settle(each)
        state = repr(moved)
        if state in seen:  # settled, or going round in circles: either way nothing new comes
            break
        seen.add(state)

    if ablation.tune is not None:
        _check_tune(ablation, configure)
    totals = {name: dict(rooms.totals(config)) for name, config in configs.items()}
    found = {name: known(name, config) for name, config in configs.items()}
    for number, rule in enumerate(ablation.match, 1):
        _hold(number, rule, ablation, found, moved)
    try:
        others = evaluated.configurations(ablation, configs, rooms)
    except LabError as error:
        raise LabError(f"{ablation.at('evaluate')}{error}") from None
    totals |= {name: dict(rooms.totals(config)) for name, config in others.items()}
    return Solution(evaluated.asked(ablation, configs, rooms), moved, totals, others, rooms.contents(files), found)


def _at(ablation: Ablation, number: int, *more: str) -> str:
    return ablation.at("match", number - 1, *more)


def _written(ablation: Ablation, name: str, error: LabError) -> tuple[str, ...]:
    """The keys of the question that brought what an error of a variant's configuration is about."""
    wrong = tuple(map(str, error.at)) if isinstance(error, ConfigError) else ()
    for keys, overrides in ((("variants", name), ablation.variants[name]), (("set",), ablation.set)):
        for key in overrides:
            path = tuple(key.split("."))
            if f"'{key}'" in str(error) or (wrong and (path[: len(wrong)] == wrong or wrong[: len(path)] == path)):
                return (*keys, key)
    return ("variants", name)


def _check_tune(ablation: Ablation, configure: Callable[[str, dict[str, Any]], Any]) -> None:
    """The tuning's jobs, which a question of its own names, can be what `tune` says."""
    tune = ablation.tune
    steps = {} if tune.steps is None else {STEPS: tune.steps}
    for name in (name for name in ablation.variants if name not in ablation.controls):
        wrong: dict[int, LabError] = {}
        for i, value in enumerate(tune.values):
            try:
                configure(name, {**steps, tune.setting: value})
            except LabError as error:
                wrong[i] = error
        if wrong:
            i, error = next(iter(wrong.items()))
            at = ("tune", "setting") if len(wrong) == len(tune.values) else ("tune", "values", i)
            raise LabError(f"{ablation.at(*at)}'tune' sets {tune.setting} of '{name}' to {tune.values[i]:g}: {error}")


def _hold(
    number: int, rule: Match, ablation: Ablation, known: dict[str, dict[str, float | None]], moved: dict[str, dict[str, int]]
) -> None:
    target = known[rule.reference][rule.quantity]
    for name in ablation.held_by(rule):
        reached = known[name][rule.quantity]
        off = abs(reached - target) / target if target else abs(reached)
        if off > rule.tolerance:
            if name in rule.free:
                at, fix = f"the nearest is {_amount(reached, rule)} at {_said(moved[name])}", "free another setting"
            else:
                at, fix = f"it has {_amount(reached, rule)} and nothing of it is free", "free a setting"
            raise LabError(
                f"{_at(ablation, number, 'free', name)}Match {number} cannot be met: {rule.quantity} of '{name}' should be within "
                f"{100 * rule.tolerance:g} % of {_amount(target, rule)} ('{rule.reference}'), but {at} ({100 * off:.3g} % off); {fix} "
                f"or widen 'tolerance'."
            )


def _amount(value: float, rule: Match) -> str:
    return f"{value:.4g} s" if rule.quantity == "wall_clock" else f"{value:,.0f}"


def _whole_number(config: Any, key: str, name: str, number: int, ablation: Ablation) -> int:
    value = setting(config, key)
    if type(value) is not int:
        raise LabError(
            f"{_at(ablation, number, 'free', name)}Match {number} frees {key} of '{name}', which is {value!r} there; it must be a setting "
            "that holds a whole number."
        )
    return value


def nearest_value(total: Callable[[int], float | None], start: int, target: float) -> int | None:
    """The whole number >= 0 at which `total` is nearest to `target`, or None if it does not depend on it.

    Args:
        total: rises or falls with its argument; None where the argument is not allowed. `start` must be allowed.
    """
    known: dict[int, float | None] = {}

    def at(x: int) -> float | None:
        if not 0 <= x <= LARGEST:
            return None
        if x not in known:
            known[x] = total(x)
        return known[x]

    def beyond(x: int, way: int) -> int | None:
        """The first allowed value from x on, going `way`."""
        return next((y for y in range(x, x + way * WINDOW, way) if at(y) is not None), None)

    here = at(start)
    assert here is not None
    neighbours = [n for n in (beyond(start + 1, 1), beyond(start - 1, -1)) if n is not None and at(n) != here]
    if here == target:
        return start
    if not neighbours:
        return None
    rising = (at(neighbours[0]) > here) == (neighbours[0] > start)  # type: ignore[operator]
    way = 1 if (here < target) == rising else -1

    def short(x: int) -> bool:
        return (at(x) < target) == (here < target) and at(x) != target  # type: ignore[operator]

    # Walk away from the start in growing steps until the target is passed, or until no further value is allowed.
    near, far, step, limit = start, None, 1, False
    while step:
        x = beyond(near + way * step, way)
        if x is None or x == near:
            limit, step = True, step // 2
        elif short(x):
            near, step = x, (step // 2 if limit else step * 2)
        else:
            far = x
            break
    if far is None:
        return near
    # Then halve the stretch between a value that falls short and one that does not.
    while True:
        low, high = sorted((near, far))
        middle = (low + high) // 2
        inside = [y for d in range(WINDOW) for y in (middle + d, middle - d) if low < y < high and at(y) is not None][:1]
        if not inside:
            break
        near, far = (inside[0], far) if short(inside[0]) else (near, inside[0])
    return min((near, far), key=lambda x: (abs(at(x) - target), x))  # type: ignore[operator]
