"""Every attention of a model in one pass: queries, keys and the selection that it used."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from longcat_lab.blocks.context import visible_keys
from longcat_lab.blocks.mla.module import MLA
from longcat_lab.blocks.sparse_attention.distill_op import attention_mass
from longcat_lab.blocks.sparse_attention.module import SparseAttention
from longcat_lab.blocks.sparse_attention.op import select
from longcat_lab.data import Batch
from longcat_lab.errors import LabError
from longcat_lab.model.generate import evaluating
from longcat_lab.training.device import autocast


@dataclass(frozen=True, eq=False)
class AttentionPass:
    """One attention in one pass: queries [B, T, heads, d] and keys [B, T, d], absorbed; the selection it used, None if it used all."""

    name: str
    place: int
    q: Tensor
    k: Tensor
    scale: float
    used: Tensor | None


@torch.no_grad()
def record(model: nn.Module, batch: Batch, precision: str = "fp32") -> tuple[list[AttentionPass], Tensor | None]:
    """Every attention of the trunk in one pass over `batch`, in the order in which they run; and the first key that each query may see.

    Raises:
        LabError: the model has no attention that is an MLA.
    """
    passes: list[AttentionPass] = []
    first: list[Tensor | None] = []

    def keep(name: str, module: MLA, arguments: tuple) -> None:
        x, context = arguments[:2]
        queries = module.absorbed_queries(*module.queries(module.query_latent(x), context.rope))
        keys = torch.cat(module.latents(x, context.rope), -1).to(queries.dtype)
        sparse = isinstance(module, SparseAttention)
        index = context.shared.get(f"index/{module.group}") if sparse else None
        used = None if index is None else index.indices
        passes.append(AttentionPass(name, module.place if sparse else 0, queries, keys, module.softmax_scale, used))
        first.append(context.first)

    attentions = [(name, module) for name, module in model.named_modules() if isinstance(module, MLA)]
    hooks = [
        module.register_forward_hook(lambda module, arguments, out, name=name: keep(name, module, arguments)) for name, module in attentions
    ]
    device = next(model.parameters()).device
    try:
        with evaluating(model), autocast(device, precision):
            model.hidden(batch.tokens.to(device), batch.document_ids.to(device))
    finally:
        for hook in hooks:
            hook.remove()
    if not passes:
        raise LabError("attention_measures: the model has no attention that is an MLA: there is nothing to measure.")
    return passes, first[0]


def fixed_keys(seen: Tensor, sinks: int, window: int) -> Tensor:
    """The first `sinks` and the last `window` of the visible keys: bool like `seen` [..., S]."""
    number = seen.cumsum(-1)  # 1 for the oldest visible key
    return seen & ((number <= sinks) | (number > number[..., -1:] - window))


def members(indices: Tensor, keys: int) -> Tensor:
    """A selection [..., K] as a mask over the keys, bool [..., S]."""
    mask = torch.zeros(*indices.shape[:-1], keys + 1, dtype=torch.bool, device=indices.device)
    return mask.scatter_(-1, torch.where(indices < 0, keys, indices).long(), True)[..., :keys]


def asked(model: nn.Module, topk: int | None, sinks: int | None, window: int | None) -> tuple[int, int, int]:
    """K, sinks and window, from the model's attention where they are not given."""
    own = model.config.attention
    topk = getattr(own, "index_topk", None) if topk is None else topk
    sinks = getattr(own, "index_init_tokens", 0) if sinks is None else sinks
    window = getattr(own, "index_local_tokens", 0) if window is None else window
    if topk is None:
        raise LabError(f"Attention cannot be measured: model.attention.kind {own.kind} has no index_topk; give topk.")
    if topk < 1 or min(sinks, window) < 0:
        raise LabError(
            f"Attention cannot be measured with topk {topk}, sinks {sinks}, window {window}: make topk at least 1, the others at least 0."
        )
    return topk, sinks, window


@dataclass(frozen=True, eq=False)
class AttentionLook:
    """What one attention looks at in one sequence of T tokens.

    mass: p, float [T, T]. used: bool [T, T], the keys that it uses; the top-K of p where it uses all (`selects` is False).
    seen, window, sinks: bool [T, T], keys that are visible, and among them the window and the sinks.
    """

    name: str
    place: int
    selects: bool
    mass: np.ndarray
    used: np.ndarray
    seen: np.ndarray
    window: np.ndarray
    sinks: np.ndarray


def look(
    model: nn.Module, batch: Batch, topk: int | None = None, sinks: int | None = None, window: int | None = None
) -> list[AttentionLook]:
    """Every attention of the trunk on the first sequence of `batch`, for pictures; arguments as in `attention_measures`."""
    topk, sinks, window = asked(model, topk, sinks, window)
    passes, first = record(model, Batch(batch.tokens[:1], batch.labels[:1], batch.document_ids[:1]))
    length = passes[0].q.shape[1]
    seen = visible_keys(first, length, length, passes[0].q.device)
    found = []
    for each in passes:
        mass = attention_mass(each.q, each.k, first, each.scale)
        used = members(select(mass, seen, topk) if each.used is None else each.used, length)
        parts = (mass, used, seen, fixed_keys(seen, 0, window), fixed_keys(seen, sinks, 0))
        found.append(AttentionLook(each.name, each.place, each.used is not None, *(part[0].cpu().numpy() for part in parts)))
    return found
