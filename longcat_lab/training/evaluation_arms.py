"""The trained weights in a model of other settings: what a way to attend, route or index costs at inference alone."""

from __future__ import annotations

import re

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from longcat_lab.config import RunConfig, apply
from longcat_lab.data import Corpus
from longcat_lab.errors import LabError
from longcat_lab.model import LongcatLM
from longcat_lab.training.evaluation import evaluate_all

NAME = re.compile(r"^[A-Za-z0-9_][A-Za-z0-9_-]*$")
NAMED = 3  # tensors that one message names


def changed(config: RunConfig, name: str) -> RunConfig:
    """`config` as `training.evaluations.NAME` has it: that arm's settings, and no arms of its own.

    Raises:
        LabError: a setting is not one of the model, or does not fit the others.
    """
    if not NAME.match(name):
        raise LabError(f"training.evaluations: the name {name!r} is not of letters, digits, - and _ alone.")
    where, settings = f"training.evaluations.{name}", config.training.evaluations[name]
    for key in settings:
        if not key.startswith("model."):
            raise LabError(f"{where} sets '{key}': only settings of the model (model....) can be others when training is over.")
    try:
        return apply(config, {**settings, "training.evaluations": {}})
    except LabError as error:
        raise LabError(f"{where}: {error}") from None


def check(config: RunConfig) -> None:
    """Raises LabError, before anything is trained, where an arm of `training.evaluations` needs tensors that will not be trained."""
    if not config.training.evaluations:
        return
    trained = _shapes(config)
    for name in config.training.evaluations:
        wanted = _shapes(changed(config, name))
        odd = [key for key in wanted if trained.get(key) != wanted[key]]
        if odd:
            said = [f"{key} {wanted[key]}" + (f" (trained: {trained[key]})" if key in trained else "") for key in odd[:NAMED]]
            more = f" and {len(odd) - NAMED} more" if len(odd) > NAMED else ""
            raise LabError(
                f"training.evaluations.{name} needs tensors that this run does not train: {', '.join(said)}{more}; "
                "set only what leaves the weights as they are or needs fewer of them."
            )


def _shapes(config: RunConfig) -> dict[str, list[int]]:
    """Name to shape of what the model keeps: parameters and persistent buffers."""
    with torch.device("meta"), torch.no_grad():
        return {name: list(tensor.shape) for name, tensor in LongcatLM(config.model).state_dict().items()}


def with_weights(config: RunConfig, trained: nn.Module) -> nn.Module:
    """The model of `config` on the weights and persistent buffers of `trained`: the same tensors, not copies, on the same device.

    What it has no place for is left out. Other buffers are made as in any new model: they follow from the settings (a hash's numbers),
    or count what happens in training. The mode is evaluation.

    Args:
        trained: has all that the model of `config` keeps, see `check`.
    """

    def nowhere(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter:
        # Weights would be drawn only to be replaced, and a second model may not fit. Buffers are made for real.
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)

    hook = register_module_parameter_registration_hook(nowhere)
    try:
        with torch.no_grad():
            model = LongcatLM(config.model)
    finally:
        hook.remove()
    state = trained.state_dict()
    model.load_state_dict({name: state[name] for name in model.state_dict()}, assign=True)
    return model.to(next(trained.parameters()).device).eval()


def evaluate_arms(model: nn.Module, corpus: Corpus, config: RunConfig) -> dict[str, float]:
    """`NAME/METRIC` for every arm of `training.evaluations` and every metric of `evaluate_all`: `model`, trained as `config` says,
    evaluated with the arm's settings on the same text, in the same precision. `model` is left as it is.
    """
    found: dict[str, float] = {}
    for name in config.training.evaluations:
        other = changed(config, name)
        measures = evaluate_all(with_weights(other, model), corpus, other)
        found.update({f"{name}/{metric}": value for metric, value in measures.items()})
    return found
