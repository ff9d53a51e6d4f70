"""Context parallelism: a row's positions are divided, queries stay at home, and what keys are made of is gathered.

A row of T positions is cut into 2 C chunks, and process r of C takes chunks r and 2 C - 1 - r: one early, one late, so that all have alike
many (query, key) pairs under a causal mask. What travels in each attention is the latent and the rotary key (and the index key) of each
token, whose gradient is summed where the token is at home. Source: all-gather CP, as Llama 3 (arXiv 2407.21783, 3.3.2) and LongCat-2.0
have it.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from longcat_lab.blocks import Block
from longcat_lab.blocks.context import Part
from longcat_lab.errors import LabError
from longcat_lab.model import LongcatLM
from longcat_lab.parallel.collectives import add_traffic, count_traffic, gathered, place_in, reduce_bytes


def chunks_of(place: int, ways: int, length: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """(first, end) of the two chunks of `place`, of a row of `length` positions."""
    size = length // (2 * ways)
    late = 2 * ways - 1 - place
    return (place * size, (place + 1) * size), (late * size, (late + 1) * size)


def connect(model: LongcatLM, length: int, group: dist.ProcessGroup) -> None:
    """Lets `model` run on this process's part of rows of `length` tokens."""
    ways = group.size()
    # Of all holders' chunks, one holder's after the other's, the place of the row's chunk 0, 1, ...
    order = torch.tensor([2 * k if k < ways else 2 * (2 * ways - 1 - k) + 1 for k in range(2 * ways)])

    def whole(x: Tensor) -> Tensor:
        with count_traffic("context"):
            found = gathered(x, group, 1)
        return found.unflatten(1, (2 * ways, -1)).index_select(1, order.to(x.device)).flatten(1, 2)

    def summed(x: Tensor) -> Tensor:
        dist.all_reduce(x, group=group)
        add_traffic(reduce_bytes(x.nbytes, ways), "context")
        return x

    model.part = Part(chunks_of(place_in(group), ways, length), length, ways, whole, summed)


def check(model: LongcatLM) -> None:
    """Raises LabError where a block looks at its neighbours in the row in a way that this does not serve."""
    if getattr(model.embed_tokens, "whole_rows", False):
        kind = model.config.embedding.ngram.kind
        raise LabError(f"parallel.context: the n-gram kind '{kind}' needs whole rows; set parallel.context=1 or take another kind.")
    for block in (module for module in model.modules() if isinstance(module, Block)):
        if type(block).__module__.partition(".")[0] != "longcat_lab" and not block.serves_parts:
            raise LabError(
                f"parallel.context: {type(block).__name__} may look at positions that another process holds; set parallel.context=1, or "
                "serves_parts = True in the class if it computes each position alone or goes through context.chunks."
            )
    if any(module.reads_context for module in model.modules() if isinstance(module, Block)):
        raise LabError(f"parallel.context: the ffn kind '{model.config.ffn.kind}' needs whole rows; set parallel.context=1.")
