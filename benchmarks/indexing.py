"""Which keys each query attends to: scores and selection against the materialised way, in two stages, shared by two layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Row, compare
from longcat_lab.blocks.sparse_attention import op, ops

HEADS, WIDTH, TOPK = 4, 32, 256
LENGTH = 4096
PAGE, BLOCK, PAGES = 128, 8, 8  # 1024 keys in pages; sub-blocks of 8 as in the paper
TAIL = 1024  # late queries
HIDDEN, LATENT = 256, 128  # what an indexer's projections read


def _inputs(queries: int, keys: int) -> list[Tensor]:
    return [torch.randn(1, queries, HEADS, WIDTH), torch.randn(1, keys, WIDTH), torch.randn(1, queries, HEADS)]


def _materialised(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    """Scores of all pairs as one tensor, a mask, torch's own selection."""
    future = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).triu(1)
    return op.index_scores(q, k, w).masked_fill_(future, -torch.inf).topk(TOPK, sorted=False).indices


def _layer(x: Tensor, latent: Tensor, weights: list[Tensor]) -> Tensor:
    """One layer's index: projections (without norm and RoPE, which cost little beside them), scores, selection."""
    to_q, to_k, to_w = weights
    return ops.index_topk(F.linear(latent, to_q).unflatten(-1, (HEADS, WIDTH)), F.linear(x, to_k), F.linear(x, to_w), None, TOPK)


def _step(call: Callable[..., Tensor], leaves: list[Tensor], indices: Tensor) -> Callable[[], None]:
    d_out = torch.randn(indices.shape)

    def run() -> None:
        for leaf in leaves:
            leaf.grad = None
        call(*leaves, indices).backward(d_out)

    return run


def indexing() -> Iterator[Row]:
    """fp32, one row, 4 index heads of 32, 256 of up to 32768 keys; forward but for `selected`, which goes backward too.

    `tail` rows are the last 1024 queries of a sequence, all of which see about all of it; the others are whole sequences, whose early
    queries see less than the pages hold. At 8 M P a late query meets 1/8 + 1/BLOCK = 1/4 of the keys that one stage meets, the average
    one of a whole sequence 0.36 of them.
    """
    with torch.no_grad():
        tensors = _inputs(LENGTH, LENGTH)
        ours = ("as chosen here", lambda: ops.index_topk(*tensors, None, TOPK))
        yield compare(f"index/{LENGTH}", ours, ("materialised, torch.topk", lambda: _materialised(*tensors)), 9)
        yield compare(f"index/{LENGTH}", ours, ("scores alone, all pairs", lambda: op.index_scores(*tensors)), 9)
        yield compare(f"index/{LENGTH}", ours, ("reference, in chunks", lambda: op.index_topk(*tensors, None, TOPK)), 3)
        cases = [(times, PAGES, name) for times in (8, 16) for name in ("tail", "whole")]
        for times, kept, name in (*cases, (8, 4 * PAGES, "tail")):
            keys = times * PAGE * kept
            given = _inputs(TAIL if name == "tail" else keys, keys)
            pages = {"page": PAGE, "block": BLOCK, "pages": kept}
            paged = ("two stages", lambda given=given, pages=pages: ops.hierarchical_topk(*given, None, TOPK, 0, 0, **pages))
            flat = ("one stage", lambda given=given: ops.index_topk(*given, None, TOPK))
            yield compare(f"pages/{times} M P/M={kept}/{name}", paged, flat, 9 if name == "tail" else 5)
        x, latent = torch.randn(1, LENGTH, HIDDEN), torch.randn(1, LENGTH, LATENT)
        shapes = (HEADS * WIDTH, LATENT), (WIDTH, HIDDEN), (HEADS, HIDDEN)
        layers = [[torch.randn(shape) / shape[1] ** 0.5 for shape in shapes] for _ in range(2)]
        shared = ("one index for both", lambda: _layer(x, latent, layers[0]))
        yield compare("index/two layers", shared, ("an index each", lambda: [_layer(x, latent, each) for each in layers]), 9)
        selection = ops.index_topk(*tensors, None, TOPK)
    steps = [_step(form, [t.clone().requires_grad_() for t in tensors], selection) for form in (ops.selected_scores, op.selected_scores)]
    yield compare(f"selected/{LENGTH}", ("as chosen here", steps[0]), ("reference, gathered rows", steps[1]), 5)
