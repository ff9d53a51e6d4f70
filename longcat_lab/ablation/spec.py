"""The question file: what is compared, what is held equal, what would count as an answer. Written before anything runs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from longcat_lab.config.plugins import located
from longcat_lab.config.yaml import parse_yaml, read_yaml
from longcat_lab.errors import LabError
from longcat_lab.node import Node, nearest, validate_node

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_-]*$", max_length=80)]
Sentence = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
SEEDS = 2**31  # number generators take no larger seed everywhere
Quantity = Literal["total_params", "active_params", "flops_per_token"]


class Match(Node):
    """One thing that is held equal between variants, solved before anything runs."""

    quantity: Quantity = Field(description="what is held equal: a total that `longcat-lab budget` shows")
    reference: str = Field(description="the variant whose total is the target")
    tolerance: float = Field(default=0.01, gt=0, lt=1, description="largest relative distance from the target (0.01 is one per cent)")
    variants: list[str] | None = Field(default=None, description="the variants held to it; all but the reference when left out")
    free: dict[str, str] = Field(
        default_factory=dict, description="per variant the integer setting that may move; variants without one are only checked"
    )


class Claim(Node):
    """A directional contrast, paired by seed."""

    better: str = Field(description="the arm that is claimed to have the lower primary metric")
    than: str = Field(description="the arm that it is compared with")


class Evaluation(Node):
    """An arm that is not trained: the weights of a trained variant, evaluated with other settings of the model."""

    of: str = Field(description="the variant whose trained weights are evaluated")
    set: dict[str, Any] = Field(description="dotted overrides of settings of the model; {} evaluates it as it was trained")


class Vanishes(Node):
    """Where the effect should not be: a negative control."""

    where: Sentence = Field(description="in words, for example: shuffled tokens")
    metric: Name = Field(description="the metric that measures it there")


class Ablation(Node):
    """One question, its arms, and what will count as an answer."""

    name: Name = Field(description="letters, digits, - and _ only; the sweep's folder is runs/NAME")
    question: Sentence = Field(description="the question in one sentence")
    hypothesis: Sentence = Field(description="the answer that is expected, written before running")
    base: str = Field(description="preset name, or a configuration file beside the question or in the working folder")
    plugins: list[str] = Field(
        default_factory=list,
        description="Python files with blocks of your own, beside the question or in the working folder; the sweep keeps a copy",
    )
    set: dict[str, Any] = Field(default_factory=dict, description="dotted overrides for every variant")
    baseline: str = Field(description="the variant that the others are a change of")
    variants: dict[Name, dict[str, Any]] = Field(min_length=1, description="variant name -> dotted overrides; one change per arm")
    evaluate: dict[Name, Evaluation] = Field(
        default_factory=dict, description="arms that are not trained: a trained variant evaluated with other settings; claims may name them"
    )
    seeds: list[int] = Field(min_length=1, description="paired seeds, below 2**31; a claim needs at least 3")
    match: list[Match] = Field(default_factory=list, description="what is held equal between variants")
    metric: Name = Field(default="validation_bpb", description="primary metric; lower is better")
    smallest_effect: float = Field(gt=0, description="the smallest difference in the primary metric that would matter")
    claims: list[Claim] = Field(default_factory=list, description="the contrasts that are judged, in order")
    also: list[Name] = Field(default_factory=list, description="secondary metrics, reported without a verdict")
    vanishes: Vanishes | None = Field(default=None, description="where the effect should vanish")
    tuned: str = Field(default="", description="what was tuned on which arm, and on which other seeds")
    notebook: str | None = Field(default=None, description="the notebook that runs one job; notebooks/run.ipynb when left out")
    solved: dict[str, Any] = Field(default_factory=dict, description="written by the runner: moved settings and totals per arm")
    copied: dict[str, dict[str, str]] = Field(
        default_factory=dict, description="written by the runner: copy of each plugin -> the file that it is of, and its hash"
    )
    changes: list[str] = Field(default_factory=list, description="written by the runner: what was edited after a job had begun")
    before: dict[str, Any] = Field(default_factory=dict, description="written by the runner: the same as it was before any of that")

    @property
    def arms(self) -> list[str]:
        """Every arm that has results: the variants, then what is evaluated from them."""
        return [*self.variants, *self.evaluate]


def read(source: str | Path | dict[str, Any], overrides: Iterable[str] = ()) -> Ablation:
    """The question in `source` (a YAML file, or its content as plain data), with `key=value` overrides.

    An override `ablation.KEY=value` changes the question itself; any other goes on top of `set`, for every variant.

    Raises:
        LabError: one sentence saying what is wrong in the file and what to write instead.
    """
    where = "ablation" if isinstance(source, dict) else str(source)
    data = dict(source) if isinstance(source, dict) else read_yaml(source)
    for override in overrides:
        key, sign, text = override.partition("=")
        if not sign or not key.strip():
            raise LabError(f"Override '{override}': write it as key=value.")
        key, value = key.strip(), parse_yaml(text, f"Override '{override}'")
        if key == "plugins":  # the question's and the configurations' are one list
            data[key] = value
        elif not key.startswith("ablation."):
            if data.get("set") is None or isinstance(data["set"], dict):  # else the schema says what is wrong with it
                data["set"] = {**(data.get("set") or {}), key: value}
        elif (own := key.removeprefix("ablation.")) in Ablation.model_fields:
            data[own] = value
        else:
            raise LabError(f"Unknown key '{key}'{nearest(own, list(Ablation.model_fields))}")
    for block in ("variants", "set"):
        if isinstance(data.get(block), dict):
            # YAML reads a bare `plain:` as null and the words no, on and 1 as something else than text.
            data[block] = {k: {} if v is None and block == "variants" else v for k, v in data[block].items()}
            for key in data[block]:
                if not isinstance(key, str):
                    raise LabError(f"{where}: the key {key!r} in '{block}' is not text to YAML; put it in quotes.")
    if not isinstance(source, dict) and isinstance(data.get("base"), str):
        data["base"] = _place(data["base"], Path(source))
    try:
        if data.get("plugins"):
            data["plugins"] = located(data["plugins"], None if isinstance(source, dict) else Path(source).resolve().parent)
        ablation = validate_node(Ablation, data)
    except LabError as error:
        raise LabError(f"{where}: {error}") from None
    _check(ablation, where)
    return ablation


def _place(base: str, question: Path) -> str:
    """A configuration file beside the question, or else in the working folder, by its full path; anything else as it is."""
    if Path(base).suffix in (".yaml", ".yml"):
        for folder in (question.resolve().parent, Path.cwd()):
            if (folder / base).is_file():
                return str((folder / base).resolve())
    return base


def _check(a: Ablation, where: str) -> None:
    """What the schema alone cannot see: names that must be variants, seeds, rules that fight."""

    def variant(name: str, place: str) -> None:
        if name in a.evaluate:
            raise LabError(f"{where}: {place} names '{name}', which is evaluated and not trained; name a variant.")
        if name not in a.variants:
            raise LabError(f"{where}: {place} names '{name}', which is not a variant{nearest(name, list(a.variants))}")

    def arm(name: str, place: str) -> None:
        if name not in a.evaluate and name not in a.variants:
            what = "not a variant" if not a.evaluate else "no variant and not in 'evaluate'"
            raise LabError(f"{where}: {place} names '{name}', which is {what}{nearest(name, a.arms)}")

    variant(a.baseline, "'baseline'")
    for name, evaluation in a.evaluate.items():
        if name in a.variants:
            raise LabError(f"{where}: '{name}' is in 'variants' and in 'evaluate'; give one of them another name.")
        variant(evaluation.of, f"evaluate.{name} ('of')")
        for key in evaluation.set:
            if not key.startswith("model."):
                raise LabError(
                    f"{where}: evaluate.{name} sets '{key}', but only settings of the model (model....) can change after training."
                )
    for i, claim in enumerate(a.claims, 1):
        arm(claim.better, f"claim {i} ('better')")
        arm(claim.than, f"claim {i} ('than')")
        if claim.better == claim.than:
            raise LabError(f"{where}: claim {i} compares '{claim.better}' with itself.")
    if len({(c.better, c.than) for c in a.claims}) != len(a.claims):
        raise LabError(f"{where}: a claim is there twice; each one counts as a comparison.")
    if len(set(a.seeds)) != len(a.seeds):
        raise LabError(f"{where}: 'seeds' has one seed twice ({a.seeds}); a repeated seed is the same run, not a new one.")
    if min(a.seeds) < 0:
        raise LabError(f"{where}: 'seeds' must not be negative, got {min(a.seeds)}.")
    if max(a.seeds) >= SEEDS:
        raise LabError(f"{where}: 'seeds' must be below 2**31 = {SEEDS}, got {max(a.seeds)}.")
    for place, overrides in [("set", a.set), *((f"variants.{name}", values) for name, values in a.variants.items())]:
        if "plugins" in overrides:
            raise LabError(f"{where}: '{place}' sets 'plugins', but they are the same for every variant: name them under 'plugins' itself.")
        if "seed" in overrides:
            raise LabError(f"{where}: '{place}' sets 'seed', but seeds come from 'seeds' so that they are paired.")
    moved: dict[tuple[str, str], int] = {}
    for i, rule in enumerate(a.match, 1):
        variant(rule.reference, f"match {i} ('reference')")
        for name in [*(rule.variants or []), *rule.free]:
            variant(name, f"match {i}")
            if name == rule.reference:
                raise LabError(f"{where}: match {i} holds '{name}' to itself; its reference cannot be one of its variants.")
            if rule.variants is not None and name not in rule.variants:
                raise LabError(f"{where}: match {i} frees a setting of '{name}', which is not among its 'variants'.")
        for pair in rule.free.items():
            if pair in moved:
                raise LabError(f"{where}: match {moved[pair]} and match {i} both move {pair[1]} of '{pair[0]}'; free another one.")
            moved[pair] = i
