"""What is measured. Each function yields rows; its name is the benchmark's."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.attention import attention
from benchmarks.expert_overlap import expert_overlap
from benchmarks.harness import Row, compare
from benchmarks.indexing import indexing
from benchmarks.mixture import mixture, unused_experts
from benchmarks.ngram import ngram_addresses, ngram_fusion, ngram_step, table_optimizers
from benchmarks.sparse_core import sparse_core
from benchmarks.sweeps import many_jobs, sweep_jobs, sweep_overhead
from benchmarks.training_step import training_step
from longcat_lab.blocks.moe import experts_op
from longcat_lab.blocks.moe.router_op import route_reference
from longcat_lab.blocks.rms_norm.op import rms_norm, rms_norm_reference
from longcat_lab.blocks.rope.op import rope_angles, rotate, rotate_pairs


def _backward(call: Callable[[], Tensor]) -> Callable[[], None]:
    def run() -> None:
        out = call()
        out.backward(torch.ones_like(out))

    return run


def _padded_bmm(u: Tensor, slots: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The usual alternative on a CPU: every expert padded to the busiest one, two batched products."""
    n, topk = len(gate_up), slots.shape[1]
    flat = slots.flatten()
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=n)[:n]
    picks, width = order[: int(counts.sum())], int(counts.max())
    place = torch.repeat_interleave(torch.arange(n) * width - (counts.cumsum(0) - counts), counts) + torch.arange(len(picks))
    padded = u.new_zeros(n * width, u.shape[1]).index_copy(0, place, u[picks // topk]).view(n, width, -1)
    gate, up = torch.bmm(padded, gate_up.transpose(1, 2)).chunk(2, -1)
    value = torch.bmm(F.silu(gate) * up, down.transpose(1, 2)).flatten(0, 1)[place] * weights.flatten()[picks, None]
    identity = (weights * (slots >= n)).sum(-1, keepdim=True) * u
    return identity + u.new_zeros(slots.numel(), u.shape[1]).index_copy(0, picks, value).view(len(u), topk, -1).sum(1)


def experts() -> Iterator[Row]:
    """Forward and backward of one mixture, fp32, at the demo's two sizes: 16 and 150 experts beside 8 that compute nothing."""
    for n in (16, 150):
        u = torch.randn(1024, 128, requires_grad=True)
        slots, weights, _ = route_reference(u.detach(), torch.randn(n + 8, 128), torch.zeros(n + 8), 3, 6.0)
        gate_up, down = torch.randn(n, 128, 128, requires_grad=True), torch.randn(n, 128, 64, requires_grad=True)
        ours = ("as chosen here", _backward(lambda a=(u, slots, weights, gate_up, down): experts_op.experts(*a)))
        for name, op in (("loop over experts", experts_op.experts_reference), ("padded bmm", _padded_bmm)):
            peer = _backward(lambda op=op, a=(u, slots, weights, gate_up, down): op(*a))
            yield compare(f"experts/{n}", ours, (name, peer))


def zero_experts() -> Iterator[Row]:
    """What identity picks cost: all picks real against half of them identity, same number of picks."""
    u = torch.randn(1024, 128)
    gate_up, down, weights = torch.randn(16, 128, 128), torch.randn(16, 128, 64), torch.rand(1024, 4)
    real = torch.rand(1024, 16).topk(4).indices
    half = torch.where(torch.arange(4) < 2, real, 16 + torch.arange(4))
    yield compare(
        "zero_experts",
        ("2 of 4 picks identity", lambda: experts_op.experts(u, half, weights, gate_up, down)),
        ("4 of 4 picks real", lambda: experts_op.experts(u, real, weights, gate_up, down)),
    )


def small_ops() -> Iterator[Row]:
    """RMSNorm and rotation, fast form against reference, forward and backward."""
    x, weight = torch.randn(1024, 128, requires_grad=True), torch.ones(128, requires_grad=True)
    yield compare(
        "rms_norm",
        ("torch's kernel", _backward(lambda: rms_norm(x, weight, 1e-5))),
        ("reference", _backward(lambda: rms_norm_reference(x, weight, 1e-5))),
    )
    q, angles = torch.randn(4, 4, 256, 16, requires_grad=True), rope_angles(torch.arange(256), 16, 1e4)
    cos, sin = angles.cos().float(), angles.sin().float()
    yield compare(
        "rope",
        ("complex", _backward(lambda: rotate(q, cos, sin))),
        ("real pairs", _backward(lambda: rotate_pairs(q, cos, sin))),
    )


SUITE = {
    function.__name__: function
    for function in (
        *(experts, zero_experts, mixture, unused_experts, expert_overlap, attention, indexing, sparse_core, training_step),
        *(sweep_jobs, sweep_overhead, many_jobs),
        *(ngram_addresses, ngram_fusion, ngram_step, table_optimizers, small_ops),
    )
}
