"""A mixture whose experts are divided over the processes of a group: rows travel to their experts and back."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from longcat_lab.blocks.moe.experts_op import ZeroExpertType, experts, zero_experts
from longcat_lab.parallel.collectives import count_traffic, exchange, exchange_counts, group_size, place_in


def expert_parallel(
    u: Tensor,
    slots: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    zero_expert_type: ZeroExpertType,
    group: ProcessGroup | None,
    n_routed: int,
    once: bool = False,
) -> Tensor:
    """`experts` of all `n_routed` experts, of which this process holds those from place x N / g to (place + 1) x N / g.

    Picks of zero-computation experts never leave their process. Values and gradients do not depend on timing. All processes take part
    in all collectives, in the forward and the backward pass, also those that have no token, no real pick or nothing to compute.

    Args:
        u: [T, H], T may differ between processes; slots: int64 [T, K], of all experts; weights: [T, K].
        gate_up: [N / g, 2 F, H]; down: [N / g, H, F].
        once: a token travels once to a process that holds several of its experts, and their weighted sum comes back; else once a pick.

    Returns:
        [T, H], in u's dtype.

    Raises:
        ValueError: n_routed is not g times what this process holds.

    Sent for "expert", N = n_routed, b bytes an element of u: N / g (g - 1) counts of 8 bytes; then H b for each real pick of another
    process's expert, and as much for each pick that was answered; in the backward pass the same without counts. With `once`: (g - 1)
    counts of 8 bytes; a (token, other process) costs (H + K) b + 4 K, its answer H b; in the backward pass the same without counts
    and without 4 K.
    """
    size = group_size(group)
    if len(gate_up) * size != n_routed:
        raise ValueError(f"{size} processes with {len(gate_up)} experts each do not make {n_routed} experts")
    if size == 1:
        return experts(u, slots, weights, gate_up, down, zero_expert_type)
    with count_traffic("expert"):
        real = (_once_a_process if once else _once_a_pick)(u, slots, weights.to(u.dtype), gate_up, down, group, n_routed)
    passed = zero_experts(u, slots, weights, n_routed, zero_expert_type)
    return real if passed is None else real + passed


def _once_a_pick(u: Tensor, slots: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, group: ProcessGroup, n_routed: int) -> Tensor:
    """Sorted by expert, and so by its owner. The counts by expert say at the other end which expert each row is for."""
    held = len(gate_up)
    trip = Trip.plan(slots, n_routed, group)
    rows = exchange(_Spread.apply(u, trip.picks, trip.position), trip.send, trip.receive, group)
    local = torch.arange(held, device=u.device).repeat(group.size())
    local = local.repeat_interleave(trip.received.flatten(), output_size=len(rows))
    computed = _compute(rows, local[:, None], rows.new_ones(len(rows), 1), gate_up, down)
    return _Collect.apply(exchange(computed, trip.receive, trip.send, group), weights, trip.picks, trip.position)


def _once_a_process(u: Tensor, slots: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, group: ProcessGroup, n_routed: int) -> Tensor:
    """The first of a token's picks at each owner stands for all of them there; slots and weights travel beside the row."""
    held, size, (hidden, topk) = len(gate_up), group.size(), (u.shape[1], slots.shape[1])
    owner = torch.where(slots < n_routed, slots // held, size)
    again = (owner[:, :, None] == owner[:, None, :]).tril(-1).any(-1)
    trip = Trip.plan(owner.masked_fill(again, size), size, group)
    both = exchange(_Spread.apply(torch.cat((u, weights), 1), trip.picks, trip.position), trip.send, trip.receive, group)
    rows, theirs = both.split((hidden, topk), 1)
    local = exchange(slots[trip.picks // topk].to(torch.int32), trip.send, trip.receive, group).long() - place_in(group) * held
    local = local.masked_fill((local < 0) | (local >= held), held)  # another owner's, or a zero-computation expert's: not computed
    computed = _compute(rows, local, theirs, gate_up, down)
    return _Collect.apply(exchange(computed, trip.receive, trip.send, group), None, trip.picks, trip.position)


def _compute(rows: Tensor, slots: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    if len(rows):
        return experts(rows, slots, weights, gate_up, down, "drop")
    # Nothing came. The graph goes from the answer to the rows and to the experts nevertheless: without it this process would be
    # missing in the backward pass's exchanges, and the others would wait for it.
    return rows + (gate_up[:0].sum() + down[:0].sum()).to(rows.dtype)


@dataclasses.dataclass
class Trip:
    """Which picks travel, and in which order.

    picks: int64 [P], t K + k of the picks that travel, in their order; position: int64 [T, K], place of each in it (P and more: stays).
    send, receive: rows for and from each process; received: int64 [g, keys a process], rows from each process by key.
    """

    picks: Tensor
    position: Tensor
    send: list[int]
    receive: list[int]
    received: Tensor

    @staticmethod
    def plan(keys: Tensor, count: int, group: ProcessGroup) -> Trip:
        """keys int64 [T, K]: a pick with a key below `count` travels, to process key x g / count; equal keys in order of the tokens."""
        flat = keys.flatten()
        order = torch.argsort(flat, stable=True)
        position = torch.empty_like(order)
        position[order] = torch.arange(len(order), device=order.device)
        counts = torch.bincount(flat, minlength=count)[:count].view(group.size(), -1)
        received = exchange_counts(counts, group)
        send, receive = torch.stack((counts.sum(1), received.sum(1))).tolist()  # one wait for an accelerator
        return Trip(order[: sum(send)], position.view_as(keys), send, receive, received)


class _Spread(Function):
    """u [T, H] to the rows [P, H] of the picks that travel. The gradient is gathered in a fixed order, and not scattered."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, picks: Tensor, position: Tensor) -> Tensor:
        ctx.save_for_backward(position)
        return u.index_select(0, picks // position.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_rows: Tensor) -> tuple[Tensor | None, ...]:
        return _collect(d_rows, None, *ctx.saved_tensors), None, None


class _Collect(Function):
    """rows [P, H] to out_t = sum over the picks k of t that travelled of weights[t, k] rows[position[t, k]]; weights None: ones."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor | None, picks: Tensor, position: Tensor) -> Tensor:
        ctx.save_for_backward(*((rows, weights) if ctx.needs_input_grad[1] else (None, weights)), picks)
        ctx.topk = position.shape[1]
        return _collect(rows, weights, position)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        rows, weights, picks = ctx.saved_tensors
        d_rows = d.index_select(0, picks // ctx.topk)
        d_weights = None
        if ctx.needs_input_grad[1]:
            d_weights = torch.zeros_like(weights).flatten().index_copy(0, picks, (d_rows * rows).sum(-1)).view_as(weights)
        return d_rows if weights is None else d_rows * weights.flatten()[picks, None], d_weights, None, None


def _collect(rows: Tensor, weights: Tensor | None, position: Tensor) -> Tensor:
    """A token's picks are one bag of rows, summed in order of k. (On a CPU ten times as fast as a loop over k.)"""
    if len(rows) == 0:
        return rows.new_zeros(len(position), rows.shape[1])
    travelled = position < len(rows)
    counts = travelled.sum(1)
    weights = None if weights is None else weights[travelled]
    return F.embedding_bag(position[travelled], rows, counts.cumsum(0) - counts, mode="sum", per_sample_weights=weights)
