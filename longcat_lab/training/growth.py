"""Depth growth: the layers of a shallow model, stacked several times, with the optimizer's state of each.

Source: LongCat-Flash (arXiv 2509.01322), model growth: l1 ... ln becomes l1 ... ln l1 ... ln; sample counter and schedule go on.
"""

from __future__ import annotations

import re

import torch
from torch import nn

from longcat_lab.blocks.ngram_embedding.tables import NgramAddresses
from longcat_lab.blocks.sparse_attention.indexer import Indexer
from longcat_lab.config import RunConfig
from longcat_lab.errors import LabError
from longcat_lab.model import build

LAYER = re.compile(r"^layers\.(\d+)\.")


def shallow(config: RunConfig) -> RunConfig:
    """The configuration before growth: model.num_layers divided by training.growth.times."""
    layers = config.model.num_layers // config.training.growth.times
    return config.model_copy(update={"model": config.model.model_copy(update={"num_layers": layers})})


def source_name(name: str, layers: int) -> str:
    """Name in the shallow model (of `layers` layers) of what becomes `name` in the stacked one."""
    return LAYER.sub(lambda found: f"layers.{int(found[1]) % layers}.", name)


def _counterparts(small: nn.Module, large: nn.Module) -> None:
    """Raises LabError where a layer of `large` and its source are not made of the same parts, or look n-grams up by another hash.

    An indexer that the source owns may be missing: in a group of more attentions than the shallow model has, its copy is served.
    """
    layers = len(small.layers)
    for number, layer in enumerate(large.layers):
        source = small.layers[number % layers]
        shapes = [{name: p.shape for name, p in each.named_parameters()} for each in (layer, source)]
        served = {f"{name}." for name, module in source.named_modules() if isinstance(module, Indexer)}
        kept = {name for name in shapes[1] if name in shapes[0] or not name.startswith(tuple(served))}
        shapes[1] = {name: shape for name, shape in shapes[1].items() if name in kept}
        plans = [{name: m.plan for name, m in each.named_modules() if isinstance(m, NgramAddresses)} for each in (layer, source)]
        if shapes[0] != shapes[1] or plans[0] != plans[1]:
            what = "has other parts than" if shapes[0] != shapes[1] else "looks n-grams up by another hash than"
            raise LabError(f"training.growth: layer {number} {what} layer {number % layers}; layers must be alike to be stacked.")


def pairs(small: nn.Module, large: nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(target, source) for every parameter and buffer of `large`, whose layer i has its source in small's layer i modulo its depth.

    Raises:
        LabError: a layer of `large` has parts that its source does not have (layers that differ by their place).
    """
    _counterparts(small, large)
    layers, found = len(small.layers), []
    for collect in (nn.Module.named_parameters, nn.Module.named_buffers):
        sources, targets = dict(collect(small)), dict(collect(large))
        for name, target in targets.items():
            source = sources.get(source_name(name, layers))
            if source is None or source.shape != target.shape:
                raise LabError(f"training.growth: '{name}' has no counterpart in the shallow model; layers must be alike to be stacked.")
            found.append((target, source))
    return found


def check(config: RunConfig) -> None:
    """Raises what `stack` would, before anything is trained, and what a shallow model is refused for."""
    few = shallow(config).model
    try:
        few.check()
    except LabError as error:
        raise LabError(f"training.growth: the shallow model, of {few.num_layers} layers, cannot be built: {error}") from None
    with torch.device("meta"):
        pairs(build(few), build(config))


@torch.no_grad()
def stack(small: nn.Module, large: nn.Module) -> None:
    """Copies every parameter and buffer of `small` into `large` as `pairs` says."""
    for target, source in pairs(small, large):
        target.copy_(source)


def stack_moments(small: nn.Module, before: torch.optim.Optimizer, large: nn.Module, after: torch.optim.Optimizer) -> None:
    """Gives each parameter of `large` a copy of the optimizer state of its source in `small`."""
    sources, layers = dict(small.named_parameters()), len(small.layers)
    old = {parameter: state for part in _parts(before) for parameter, state in part.state.items()}
    owner = {p: part for part in _parts(after) for group in part.param_groups for p in group["params"]}
    for name, parameter in large.named_parameters():
        state = old.get(sources[source_name(name, layers)])
        if state:
            owner[parameter].state[parameter] = {k: v.clone() if torch.is_tensor(v) else v for k, v in state.items()}


def _parts(optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    return list(getattr(optimizer, "parts", {"": optimizer}).values())
