"""What the schema of a question cannot see by itself: names that must be variants, seeds, rules that fight."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from longcat_lab.ablation import written
from longcat_lab.node import ConfigError, nearest

if TYPE_CHECKING:
    from longcat_lab.ablation.spec import Ablation

SEEDS = 2**31  # number generators take no larger seed everywhere


def check(a: Ablation) -> None:
    """Raises ConfigError, with the keys down to what is wrong, where the parts of a question do not agree."""
    _arms(a)
    for key, seeds in (("seeds", a.seeds), ("tune.seeds", a.tune.seeds if a.tune else [])):
        if len(set(seeds)) != len(seeds):
            raise _wrong(f"'{key}' has one seed twice ({seeds}); a repeated seed is the same run, not a new one.", *key.split("."))
    for key, seeds in (("seeds", a.seeds), ("data_seeds", a.data_seeds), ("tune.seeds", a.tune.seeds if a.tune else [])):
        if seeds and min(seeds) < 0:
            raise _wrong(f"'{key}' must not be negative, got {min(seeds)}.", *key.split("."))
        if seeds and max(seeds) >= SEEDS:
            raise _wrong(f"'{key}' must be below 2**31 = {SEEDS}, got {max(seeds)}.", *key.split("."))
    if a.data_seeds and len(a.data_seeds) != len(a.seeds):
        said = f"'data_seeds' has {len(a.data_seeds)} numbers for {len(a.seeds)} seeds; write one for each, or one number for all."
        raise _wrong(said, "data_seeds")
    for place, at, overrides in [
        ("set", ("set",), a.set),
        *((f"variants.{name}", ("variants", name), values) for name, values in a.variants.items()),
    ]:
        if "plugins" in overrides:
            said = f"'{place}' sets 'plugins', but they are the same for every variant: name them under 'plugins' itself."
            raise _wrong(said, *at, "plugins")
        if "seed" in overrides:
            raise _wrong(f"'{place}' sets 'seed', but seeds come from 'seeds' so that they are paired.", *at, "seed")
        if "data.seed" in overrides and a.data_seeds:
            raise _wrong(f"'{place}' sets 'data.seed', but 'data_seeds' does that, paired by seed.", *at, "data.seed")
    if len(set(a.control)) != len(a.control):
        raise _wrong(f"'control' has one word twice ({', '.join(a.control)}).", "control")
    _tune(a)
    _match(a)
    written.check(a)


def _wrong(said: str, *at: Any) -> ConfigError:
    return ConfigError(said, at)


def _variant(a: Ablation, name: str, place: str, *at: Any) -> None:
    if name in a.evaluate:
        raise _wrong(f"{place} names '{name}', which is evaluated and not trained; name a variant.", *at)
    if name not in a.variants:
        raise _wrong(f"{place} names '{name}', which is not a variant{nearest(name, list(a.variants))}", *at)


def _arms(a: Ablation) -> None:
    _variant(a, a.baseline, "'baseline'", "baseline")
    for name, evaluation in a.evaluate.items():
        if name in a.variants:
            said = f"'{name}' is in 'variants' and in 'evaluate'; give one of them another name."
            raise _wrong(said, "evaluate", name)
        _variant(a, evaluation.of, f"evaluate.{name} ('of')", "evaluate", name, "of")
        for key in evaluation.set:
            if not key.startswith("model."):
                said = f"evaluate.{name} sets '{key}', but only settings of the model (model....) can change after training."
                raise _wrong(said, "evaluate", name, "set", key)
    for i, claim in enumerate(a.claims):
        for side in ("better", "than"):
            name = getattr(claim, side)
            if name not in a.evaluate and name not in a.variants:
                what = "not a variant" if not a.evaluate else "no variant and not in 'evaluate'"
                raise _wrong(f"claim {i + 1} ('{side}') names '{name}', which is {what}{nearest(name, a.arms)}", "claims", i, side)
        if claim.better == claim.than:
            raise _wrong(f"claim {i + 1} compares '{claim.better}' with itself.", "claims", i)
        if (claim.better, claim.than) in [(c.better, c.than) for c in a.claims[:i]]:
            raise _wrong("a claim is there twice; each one counts as a comparison.", "claims", i)


def _tune(a: Ablation) -> None:
    if a.tune is None:
        return
    if both := sorted({*a.tune.seeds} & {*a.seeds}):
        said = f"'tune.seeds' and 'seeds' both have {', '.join(map(str, both))}: what is chosen on a seed cannot be tested on it."
        raise _wrong(said, "tune", "seeds")
    if len(set(a.tune.values)) != len(a.tune.values):
        raise _wrong(f"'tune.values' has one value twice ({a.tune.values}).", "tune", "values")
    if a.tune.setting in ("seed", "data.seed", "plugins"):
        raise _wrong(f"'tune.setting' is '{a.tune.setting}', which is nothing to choose a best value of.", "tune", "setting")


def _match(a: Ablation) -> None:
    moved: dict[tuple[str, str], int] = {}
    for i, rule in enumerate(a.match, 1):
        _variant(a, rule.reference, f"match {i} ('reference')", "match", i - 1, "reference")
        at = ("match", i - 1, "free")
        for name in [*(rule.variants or []), *rule.free]:
            _variant(a, name, f"match {i}", *at[:2])
            if name == rule.reference:
                raise _wrong(f"match {i} holds '{name}' to itself; its reference cannot be one of its variants.", *at[:2])
            if rule.variants is not None and name not in rule.variants:
                raise _wrong(f"match {i} frees a setting of '{name}', which is not among its 'variants'.", *at, name)
        for pair in rule.free.items():
            if pair in moved:
                raise _wrong(f"match {moved[pair]} and match {i} both move {pair[1]} of '{pair[0]}'; free another one.", *at, pair[0])
            if a.tune is not None and pair[1] == a.tune.setting:
                raise _wrong(f"match {i} moves {pair[1]} of '{pair[0]}', which 'tune' chooses; free another one.", *at, pair[0])
            moved[pair] = i
        if (twice := [w.quantity for w in a.match[: i - 1]].count(rule.quantity)) and rule.quantity == "wall_clock":
            raise _wrong(f"match {i} is rule number {twice + 1} of wall_clock; keep one.", *at[:2])
