"""A mixture of experts against one dense SwiGLU of equal FLOPs, and against other ways to compute the mixture."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Row, compare
from longcat_lab.blocks import MoEConfig
from longcat_lab.blocks.moe.experts_op import experts, experts_grouped, experts_reference
from longcat_lab.config import load

TOKENS, HIDDEN, TOPK = 2048, 256, 8
SIZES = ((128, 128), (32, 512))  # experts, inner width of one; the dense network is 8 times as wide inside


def _leaf(*shape: int) -> Tensor:
    return (0.05 * torch.randn(shape)).requires_grad_()


def _step(call: Callable[[Tensor], Tensor], u: Tensor, parameters: list[Tensor]) -> Callable[[], None]:
    """Forward and backward with all gradients, which are let go before the next call as a training step does."""
    d_out = torch.randn_like(u)

    def run() -> None:
        for leaf in (u, *parameters):
            leaf.grad = None
        call(u).backward(d_out)

    return run


def _dense(u: Tensor, inner: int) -> Callable[[], None]:
    gate, up, down = _leaf(inner, HIDDEN), _leaf(inner, HIDDEN), _leaf(HIDDEN, inner)
    return _step(lambda x: F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down), u, [gate, up, down])


def _with_threads(threads: int, *arguments: object, **settings: int) -> Row:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return compare(*arguments, **settings)
    finally:
        torch.set_num_threads(before)


def mixture() -> Iterator[Row]:
    """Forward and backward in fp32: the layer with its router, the experts alone, and other forms of them; at one thread and at two."""
    shape = load("nano", f"model.hidden_size={HIDDEN}").model.shape()
    u = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    for n, width in SIZES:
        layer = MoEConfig(n_routed_experts=n, zero_expert_num=0, moe_topk=TOPK, expert_ffn_hidden_size=width).build(shape).train()
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        slots, weights = torch.rand(TOKENS, n).topk(TOPK).indices, torch.rand(TOKENS, TOPK, requires_grad=True)
        gate_up, down = _leaf(n, 2 * width, HIDDEN), _leaf(n, HIDDEN, width)

        def form(op: Callable[..., Tensor], a: tuple[Tensor, ...] = (slots, weights, gate_up, down)) -> Callable[[], None]:
            return _step(lambda x: op(x, *a), u, list(a[1:]))

        dense = ("dense, equal FLOPs", _dense(u, TOPK * width))
        whole = ("MoE layer", _step(lambda x, layer=layer: layer(x[None])[0], u, list(layer.parameters())))
        for threads in (1, 2)[: os.cpu_count()]:
            name = f"mixture/{n}x{width}/{threads}"
            yield _with_threads(threads, name, whole, dense)
            yield _with_threads(threads, name, ("experts alone", form(experts)), dense)
            yield _with_threads(threads, name, ("experts alone", form(experts)), ("grouped product", form(experts_grouped)), pairs=5)
            yield _with_threads(threads, name, ("experts alone", form(experts)), ("loop over experts", form(experts_reference)), pairs=5)


def unused_experts() -> Iterator[Row]:
    """What picks of zero-computation experts and experts without tokens cost, forward and backward: nothing but their gradient's zeros."""
    n, width = SIZES[0]
    u, gate_up, down = torch.randn(TOKENS, HIDDEN, requires_grad=True), _leaf(n, 2 * width, HIDDEN), _leaf(n, HIDDEN, width)
    more_up, more_down = _leaf(2 * n, 2 * width, HIDDEN), _leaf(2 * n, HIDDEN, width)
    real = torch.rand(TOKENS, n).topk(4).indices
    both = torch.cat([real, n + torch.arange(4).expand(TOKENS, -1)], 1)
    four, eight = torch.rand(TOKENS, 4, requires_grad=True), torch.rand(TOKENS, 8, requires_grad=True)
    plain = _step(lambda x: experts(x, real, four, gate_up, down), u, [four, gate_up, down])
    zeros = _step(lambda x: experts(x, both, eight, gate_up, down), u, [eight, gate_up, down])
    unused = _step(lambda x: experts(x, real, four, more_up, more_down), u, [four, more_up, more_down])
    yield compare("unused/identity", ("4 real, 4 identity", zeros), ("4 real picks", plain))
    yield compare("unused/experts", ("256 experts, 128 used", unused), ("128 experts", plain))
