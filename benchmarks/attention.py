"""Causal attention of a training step against torch's own kernel, and a dense SwiGLU network against its plain form."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Row, compare
from longcat_lab.blocks.mla.op import attention as fast
from longcat_lab.blocks.mla.op import causal_document_mask
from longcat_lab.blocks.swiglu.op import swiglu, swiglu_reference

BATCH, HEADS, LENGTH, WIDTH, VALUE_WIDTH = 4, 4, 512, 96, 64  # those of benchmarks/training_step.py


def _torch(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """F.scaled_dot_product_attention, the value padded to the one width that its fused CPU kernel has."""
    v = F.pad(v, (0, q.shape[-1] - v.shape[-1]))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)[..., :VALUE_WIDTH]


def _step(call: Callable[..., Tensor], leaves: list[Tensor]) -> Callable[[], None]:
    """Forward and backward with all gradients, which are let go before the next call as a training step does."""
    d_out = torch.randn_like(call(*leaves).detach())

    def run() -> None:
        for leaf in leaves:
            leaf.grad = None
        call(*leaves).backward(d_out)

    return run


def _documents(count: int) -> Tensor:
    """document_ids [B, T]: `count` documents a row, cut at random."""
    cuts = torch.rand(BATCH, LENGTH - 1).topk(count - 1).indices + 1
    return torch.zeros(BATCH, LENGTH, dtype=torch.int64).scatter(1, cuts, 1).cumsum(1)


def attention() -> Iterator[Row]:
    """Forward and backward in fp32 as MLA calls it (values a view of the joint projection): causal, and four packed documents a row."""
    joint = torch.randn(BATCH, LENGTH, HEADS, WIDTH + VALUE_WIDTH)
    q, k = (torch.randn(BATCH, HEADS, LENGTH, WIDTH) for _ in range(2))
    leaves = [t.requires_grad_() for t in (q, k, joint.transpose(1, 2)[..., WIDTH:])]
    network = [(0.05 * torch.randn(shape)).requires_grad_() for shape in ((BATCH * LENGTH, 256), (512, 256), (512, 256), (256, 512))]
    before = torch.get_num_threads()
    for threads in (1, 2)[: os.cpu_count()]:
        torch.set_num_threads(threads)
        try:
            for name, mask in (("causal", None), ("docs", causal_document_mask(_documents(4)))):
                ours, peer = (_step(lambda q, k, v, op=op, mask=mask: op(q, k, v, mask), leaves) for op in (fast, _torch))
                yield compare(f"attend/{name}/{threads}", ("as chosen here", ours), ("torch's SDPA, padded", peer))
            ours, peer = _step(swiglu, network), _step(swiglu_reference, network)
            yield compare(f"swiglu/{threads}", ("as chosen here", ours), ("plain torch", peer))
        finally:
            torch.set_num_threads(before)
