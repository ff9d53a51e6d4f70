"""Pipeline parallelism: which layers are here, and the embedding that the first and the last stage share."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from longcat_lab.blocks.token_embedding.module import TokenEmbedding
from longcat_lab.errors import LabError
from longcat_lab.model import LongcatLM
from longcat_lab.parallel.collectives import add_traffic, reduce_bytes
from longcat_lab.parallel.locally import local
from longcat_lab.parallel.world import World


class Elsewhere(nn.Module):
    """A layer of another pipeline stage; keeps the numbers, and so the names, of the layers that are here."""


def keep_stage(model: LongcatLM, world: World) -> None:
    """Takes away from `model` what other stages hold."""
    if world.layout.pipeline == 1:
        return
    first, end = world.layout.stages[world.at["pipeline"]]
    model.stage = range(first, end)
    for index in range(len(model.layers)):
        if index not in model.stage:
            model.layers[index] = Elsewhere()
    if not world.last_stage:
        model.norm, model.lm_head, model.mtp = Elsewhere(), Elsewhere(), None
    if first > 0:
        model.embed_tokens = _rows_alone(model) if world.last_stage and reads_trunk(model) else Elsewhere()


def reads_trunk(model: LongcatLM) -> bool:
    """Whether prediction steps look tokens up in the trunk's embedding."""
    return model.mtp is not None and model.mtp.embed_tokens is None


def tied(model: LongcatLM) -> set[nn.Parameter]:
    """Parameters here that another stage has too, and counts."""
    copies = model.stage.start > 0 and isinstance(model.embed_tokens, TokenEmbedding)
    return {model.embed_tokens.weight} if copies else set()


def sum_tied_gradient(model: LongcatLM, world: World) -> None:
    """Adds up the gradients of the token's rows on the first and on the last stage, which then take the same step."""
    if world.ends is None or model.config.mtp is None or model.config.mtp.own_embedding:
        return
    weight = model.embed_tokens.weight
    if not weight.requires_grad:
        return
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    gradient = local(weight.grad)
    dist.all_reduce(gradient, group=world.ends)
    add_traffic(reduce_bytes(gradient.nbytes, 2), "pipeline")


def _rows_alone(model: LongcatLM) -> TokenEmbedding:
    """The token's rows without tables, under the name, and so with the initial values, that they have on the first stage."""
    rows = TokenEmbedding(0, 1, model.embed_tokens.std)
    rows.weight = model.embed_tokens.weight
    return rows


def check(model: LongcatLM) -> None:
    """Raises LabError where n-gram tables are read behind the first stage."""
    embedding = model.embed_tokens
    behind = getattr(embedding, "layer_projections", None)
    if type(embedding).enter is not TokenEmbedding.enter and (behind is None or len(behind)):
        raise LabError(
            f"parallel.pipeline: the n-gram kind '{model.config.embedding.ngram.kind}' is read at layers, and its tables are on the first "
            "stage alone; set parallel.pipeline=1 or injection_layers=[0]."
        )
