"""The question file: what is compared, what is held equal, what would count as an answer. Written before anything runs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, StringConstraints

from longcat_lab.ablation import agreed, words
from longcat_lab.ablation.places import Places
from longcat_lab.ablation.resources import Resources
from longcat_lab.config.yaml import mapping, parse_yaml, read_text
from longcat_lab.errors import LabError
from longcat_lab.node import ConfigError, Node, nearest, validate_node

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_-]*$", max_length=80)]
Sentence = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Quantity = Literal["total_params", "active_params", "flops_per_token", "flops", "wall_clock"]


class Match(Node):
    """One thing that is held equal between variants, solved before anything runs.

    In a file `match: WORD` (active_params, total_params, flops or wall_clock) with `free: SETTING`, or a setting for each variant, is
    short for one rule that holds all variants to the baseline within 1 %.
    """

    quantity: Quantity = Field(
        description="what is held equal: a total that `longcat-lab budget` shows, flops of the whole training, or wall_clock, the seconds "
        "of its steps as they were measured"
    )
    reference: str = Field(description="the variant whose total is the target")
    tolerance: float = Field(default=0.01, gt=0, lt=1, description="largest relative distance from the target (0.01 is one per cent)")
    variants: list[str] | None = Field(
        default=None, description="the variants held to it; all but the reference and the controls when left out"
    )
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


class Tune(Node):
    """A sweep of one setting for each arm, run before the question itself, on seeds that the question does not use."""

    setting: str = Field(description="dotted setting, such as training.optimizer.learning_rate")
    values: list[int | float] = Field(min_length=2, description="what is tried for each arm; three or more that bracket the best")
    seeds: list[int] = Field(min_length=1, description="of the tuning alone: none of them may be in the question's seeds")
    steps: int | None = Field(default=None, ge=1, description="training.steps while tuning; the arm's own when left out")


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
    data_seeds: list[int] = Field(
        default_factory=list,
        description="order of the training data for each of the seeds, or one number for all; the seed itself when left out",
    )
    match: list[Match] = Field(default_factory=list, description="what is held equal between variants; one word, or rules")
    metric: Name = Field(default="validation_bpb", description="primary metric; lower is better")
    smallest_effect: float = Field(gt=0, description="the smallest difference in the primary metric that would matter")
    claims: list[Claim] = Field(default_factory=list, description="the contrasts that are judged, in order")
    also: list[Name] = Field(default_factory=list, description="secondary metrics, reported without a verdict")
    vanishes: Vanishes | None = Field(default=None, description="where the effect should vanish")
    control: list[Literal["shuffled_tokens", "feature_off", "a_a"]] = Field(
        default_factory=list,
        description="shuffled_tokens: the effect vanishes on shuffled text; feature_off: an arm VARIANT_off for each variant, which equals "
        "the baseline; a_a: the baseline once more with other initial values, which measures the noise; one word or several",
    )
    switch_off: dict[Name, dict[str, Any] | None] = Field(
        default_factory=dict, description="for feature_off: variant -> the settings that switch its feature off; null: not this variant"
    )
    tune: Tune | None = Field(default=None, description="a setting that is swept for each arm beforehand, on other seeds")
    tuned: str = Field(default="", description="what was tuned on which arm, and on which other seeds")
    compare_with: str | None = Field(default=None, description="folder of a sweep of another size, to compare the order of the arms with")
    notebook: str | None = Field(default=None, description="the notebook that runs one job; notebooks/run.ipynb when left out")
    resources: Resources = Field(
        default_factory=Resources, description="what each job may take: cards, cores, memory, time; which ends are tried again"
    )
    solved: dict[str, Any] = Field(default_factory=dict, description="written by the runner: moved settings and totals per arm")
    measured: dict[str, Any] = Field(default_factory=dict, description="written by the runner: seconds a step, for wall_clock")
    tuning: dict[str, Any] = Field(default_factory=dict, description="written by the runner: what the tuning found")
    noise: dict[str, Any] = Field(default_factory=dict, description="written by the runner: the noise floor known when the sweep began")
    copied: dict[str, dict[str, str]] = Field(
        default_factory=dict, description="written by the runner: copy of each plugin -> the file that it is of, and its hash"
    )
    changes: list[str] = Field(default_factory=list, description="written by the runner: what was edited after a job had begun")
    before: dict[str, Any] = Field(default_factory=dict, description="written by the runner: the same as it was before any of that")
    _places: Places = PrivateAttr(default_factory=Places)

    @property
    def arms(self) -> list[str]:
        """Every arm that has results: the variants, then what is evaluated from them."""
        return [*self.variants, *self.evaluate]

    @property
    def controls(self) -> dict[str, str]:
        """Variant that is a control -> which one."""
        return words.controls(self.control, self.variants)

    def held_by(self, rule: Match) -> list[str]:
        """The variants that a rule holds."""
        controls = self.controls
        return rule.variants if rule.variants is not None else [v for v in self.variants if v != rule.reference and v not in controls]

    def drawn(self, variant: str, seed: int, own: int | None = None) -> dict[str, int]:
        """The settings of a job that come from its seed: of the initial values, and where it is another one of the data's order.

        Args:
            own: data.seed of the variant's configuration, which is the order for all seeds where `data_seeds` says nothing.
        """
        order = dict(zip(self.seeds, self.data_seeds, strict=False)).get(seed, seed if own is None else own)
        first = words.other_seed(seed, self.seeds) if self.controls.get(variant) == "a_a" else seed
        return {"seed": first} | ({"data.seed": order} if order != (first if own is None else own) else {})

    def at(self, *keys: Any) -> str:
        """`demo.yaml, line 12: `, where the question says what `keys` lead to; empty where it is from no file."""
        return self._places.of(keys) if self._places.text is not None else ""


def read(source: str | Path | dict[str, Any], overrides: Iterable[str] = ()) -> Ablation:
    """The question in `source` (a YAML file, or its content as plain data), with `key=value` overrides.

    An override `ablation.KEY=value` changes the question itself; any other goes on top of `set`, for every variant.

    Raises:
        LabError: one sentence saying what is wrong, in which line of the file, and what to write instead.
    """
    if isinstance(source, dict):
        places, data = Places(), dict(source)
    else:
        places = Places(str(source), read_text(source))
        data = mapping(places.text, source)
    for override in overrides:
        _override(data, override, places)
    try:
        ablation = validate_node(Ablation, places.find(words.spelled_out(data)))
        agreed.check(ablation)
    except ConfigError as error:
        raise LabError(f"{places.of(error.at)}{error}") from None
    ablation._places = places
    return ablation


def _override(data: dict[str, Any], override: str, places: Places) -> None:
    key, sign, text = override.partition("=")
    if not sign or not key.strip():
        raise LabError(f"Override '{override}': write it as key=value.")
    key, value = key.strip(), parse_yaml(text, f"Override '{override}'")
    if key == "plugins":  # the question's and the configurations' are one list
        data[key] = value
        places.overridden[key,] = override
    elif not key.startswith("ablation."):
        if data.get("set") is None or isinstance(data["set"], dict):  # else the schema says what is wrong with it
            data["set"] = {**(data.get("set") or {}), key: value}
            places.overridden["set", key] = override
    elif (own := key.removeprefix("ablation.")) in Ablation.model_fields or own in words.SHORT:
        data[own] = value
        places.overridden[own,] = override
    elif own.startswith("resources."):
        if data.get("resources") is None or isinstance(data["resources"], dict):
            data["resources"] = {**(data.get("resources") or {}), own.removeprefix("resources."): value}
        places.overridden["resources", own.removeprefix("resources.")] = override
    else:
        raise LabError(f"Unknown key '{key}'{nearest(own, [*Ablation.model_fields, *words.SHORT])}")
