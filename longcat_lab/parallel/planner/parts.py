"""A model as the planner sees it: parameters by how they are laid out, and work by when it is done; both as the blocks answer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from longcat_lab.blocks import Block
from longcat_lab.blocks.interface import BlockConfig, Budget, ModelShape, attentions_of
from longcat_lab.blocks.moe.module import MoE
from longcat_lab.blocks.table import Table
from longcat_lab.budget import totals
from longcat_lab.config import ModelConfig, RunConfig

# Of these products every tensor rank has its own heads or columns; everything else is whole on each (latents and indexer too).
TENSOR_PARTS = {"q_proj", "q_b_proj", "kv_b_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"}


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter tensor. kind: `expert` (a stack of experts), `table` (rows of n-grams) or `dense`; role as its block declares it."""

    name: str
    shape: tuple[int, ...]
    kind: str
    role: str
    tensor_part: bool
    stack: int = 1

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def muon(self) -> bool:
        """Whether Muon trains it, where Muon is chosen."""
        return self.role == "matrix" and len(self.shape) > 1

    def orthogonalisation(self, steps: int) -> float:
        """FLOPs of one Muon step: per matrix [m, n], m <= n, `steps` times 4 m^2 n + 2 m^3. Source: moe_mtp_training section 3.2."""
        *stack, rows, columns = self.shape
        short, long = sorted((rows // self.stack, columns))
        return math.prod(stack) * self.stack * steps * (4.0 * short**2 * long + 2.0 * short**3)


@dataclasses.dataclass(frozen=True)
class Group:
    """Parameters that are laid out alike."""

    kind: str
    tensor_part: bool
    muon: bool
    count: int


@dataclasses.dataclass(frozen=True)
class Part:
    """An indivisible part: the embedding, a layer, the head (with final norm), the prediction steps.

    flops: forward FLOPs a token by what does them: `attention` and `ffn` (one entry each place), `experts`, `router`, `other`. `split`:
    those of them that tensor ranks divide among them, as a share.
    kept_gather: bytes a token that context ranks hand each other, one entry an attention (bf16: what a decoding cache keeps).
    expanded: forward FLOPs a token that make heads' keys and values of latents; context ranks do this for all gathered tokens.
    """

    name: str
    parameters: tuple[Parameter, ...]
    flops: dict[str, tuple[float, ...]]
    kept_gather: tuple[float, ...] = ()
    expanded: float = 0.0
    mixtures: int = 0
    attentions: int = 0
    ffns: int = 0

    @cached_property
    def work(self) -> float:
        return sum(sum(each) for each in self.flops.values())

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """The parameters without tables, summed by how they are laid out and trained."""
        found: dict[tuple[str, bool, bool], int] = {}
        for p in self.parameters:
            if p.kind != "table":
                key = p.kind, p.tensor_part, p.muon
                found[key] = found.get(key, 0) + p.count
        return tuple(Group(*key, count) for key, count in found.items())

    @cached_property
    def tables(self) -> tuple[tuple[int, ...], ...]:
        return tuple(p.shape for p in self.parameters if p.kind == "table")

    @cached_property
    def known(self) -> dict[object, Any]:
        """Found once, by who asked and for what."""
        return {}

    def products(self, steps: int) -> float:
        """FLOPs of one Muon step on all its matrices."""
        return steps * self._one_step

    @cached_property
    def _one_step(self) -> float:
        return sum(p.orthogonalisation(1) for p in self.parameters if p.muon)

    def count(self, kind: str | None = None) -> int:
        return sum(p.count for p in self.parameters if kind is None or p.kind == kind)


def model_parts(config: RunConfig) -> list[Part]:
    """The model in its order: embedding, layers in their order, head, and `mtp` where there is one.

    Tables that are carried and never read (the prediction module's copy) are left out: they need no gradient and no state, and are
    written into a checkpoint from the originals.
    """
    model, shape = config.model, replace(config.model.shape(), sequence_length=config.data.sequence_length)
    parts = [_embedding(model, shape)]
    for index in range(model.num_layers):
        parts.append(_layer(f"layers.{index}", model.layer, replace(shape, layer_index=index), model))
    head = Budget.of_weights(model.hidden_size * model.vocab_size)
    names = read_parameters(_meta(lambda: _Head(model, shape)))
    parts.append(Part("head", tuple(names), {"other": (head.flops_per_token,)}))
    if model.mtp is not None:
        parts.append(_mtp(config, model, shape))
    return parts


class _Head(nn.Module):
    def __init__(self, model: ModelConfig, shape: ModelShape) -> None:
        super().__init__()
        self.norm, self.lm_head = model.norm.build(shape), nn.Linear(model.hidden_size, model.vocab_size, bias=False)


def _meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()


def read_parameters(module: nn.Module) -> list[Parameter]:
    """Every parameter of `module` (on the meta device), tables that idle left out."""
    found, roles, stacks, kinds = [], {}, {}, {}
    for prefix, inner in module.named_modules():
        start = f"{prefix}." if prefix else ""
        if isinstance(inner, Block):
            roles.update({start + name: role for name, role in inner.roles.items()})
            stacks.update({start + name: stack for name, stack in getattr(inner, "stacks", {}).items()})
        if isinstance(inner, MoE):
            kinds.update(dict.fromkeys((f"{start}gate_up_proj", f"{start}down_proj"), "expert"))
        if isinstance(inner, Table):
            kinds[f"{start}weight"] = "idle" if inner.idle else "table"
    for name, parameter in module.named_parameters():
        kind = kinds.get(name, "dense")
        if kind == "idle":
            continue
        role = "head" if name == "lm_head.weight" else roles.get(name, "matrix" if parameter.ndim > 1 else "vector")
        whole = kind != "dense" or "indexer" in name
        part = not whole and any(each in TENSOR_PARTS for each in name.split("."))
        found.append(Parameter(name, tuple(parameter.shape), kind, role, part, stacks.get(name, 1)))
    return found


def _embedding(model: ModelConfig, shape: ModelShape) -> Part:
    cost = model.embedding.budget(shape)
    return Part("embedding", tuple(read_parameters(_meta(lambda: model.embedding.build(shape)))), {"other": (cost.flops_per_token,)})


def _layer(name: str, layer: BlockConfig, place: ModelShape, model: ModelConfig) -> Part:
    """Attentions and networks of one layer, each as its own block answers; what the layer's answer has beyond them is `other`."""
    module = _meta(lambda: layer.build(place))
    each = attentions_of(layer)
    places = [replace(place, attention_index=each * place.layer_index + s) for s in range(each)]
    attentions = [model.attention.budget(where) for where in places]
    mixtures = layer.mixtures(place) if hasattr(layer, "mixtures") else sum(isinstance(m, MoE) for m in module.modules())
    experts, router = _mixture(model.moe, place) if mixtures else (0.0, 0.0)
    dense = each if each == 2 else int(not mixtures)
    ffn = (place.ffn.budget(place).flops_per_token,) * dense
    flops: dict[str, tuple[float, ...]] = {"attention": tuple(a.flops_per_token for a in attentions), "ffn": ffn}
    flops |= {"experts": (mixtures * experts,), "router": (mixtures * router,)}
    known = sum(sum(values) for values in flops.values())
    flops["other"] = (max(layer.budget(place).flops_per_token - known, 0.0),)
    gathered = tuple(float(a.state_bytes_per_token) for a in attentions)
    parameters = tuple(read_parameters(module))
    absorbed = hasattr(model.attention, "selects") and model.attention.selects(place)
    expanded = 0.0 if absorbed else sum(2.0 * p.count for p in parameters if "kv_b_proj" in p.name)
    return Part(name, parameters, flops, gathered, expanded, mixtures, each, dense)


def _mixture(moe: BlockConfig, shape: ModelShape) -> tuple[float, float]:
    """Forward FLOPs a token of the routed experts, and of the rest (router, shared experts)."""
    experts = 2.0 * moe.real_experts * moe.expert_params(shape)
    return experts, moe.budget(shape).flops_per_token - experts


def _mtp(config: RunConfig, model: ModelConfig, shape: ModelShape) -> Part:
    found = totals(config)
    cost = found["flops_per_token"] - found["flops_per_token_without_mtp"]
    module = _meta(lambda: model.mtp.build(shape))
    return Part("mtp", tuple(read_parameters(module)), {"other": (cost,)})


def idle_parameters(config: RunConfig) -> int:
    """Elements of tables that are carried and never read, which `model_parts` leaves out."""
    if config.model.mtp is None:
        return 0
    module = _meta(lambda: config.model.mtp.build(config.model.shape()))
    return sum(inner.weight.numel() for inner in module.modules() if isinstance(inner, Table) and inner.idle)


def kept_picks(moe: Any) -> float:
    """Picks a token that travel: those of real experts (K_e); zero-experts' picks never leave their rank."""
    return float(moe.real_experts)
