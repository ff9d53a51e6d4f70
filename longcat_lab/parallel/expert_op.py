"""A mixture whose experts are divided over the processes of a group: rows travel to their experts and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from longcat_lab.blocks.moe.experts_op import ZeroExpertType, experts, zero_experts
from longcat_lab.parallel.collectives import count_traffic, group_size, part_sizes, place_in
from longcat_lab.parallel.exchange import exchange_counts, post_exchange

Held = Callable[..., tuple[Tensor, ...]]  # held(use, *tokens): what `use` gives with the experts that are here; see `Picks.compute`


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
    and without 4 K. `Picks` of two chunks send the counts twice.
    """
    size = group_size(group)
    if len(gate_up) * size != n_routed:
        raise ValueError(f"{size} processes with {len(gate_up)} experts each do not make {n_routed} experts")
    if size == 1:
        return experts(u, slots, weights, gate_up, down, zero_expert_type)
    picks = Picks(u, slots, weights, len(gate_up), zero_expert_type, group, once)
    picks.compute(lambda use, *tokens: use(gate_up, down, *tokens))
    return picks.end()


class Picks:
    """`expert_parallel` in three steps, between which anything else may run: rows leave when this is made, `compute` waits for those of
    others and sends answers, `end` waits for the answers to this process's own. All of the group do each of them, once.

    A backward pass goes through them the other way round, and what was computed between two steps is differentiated while their
    gradients travel. Neither values nor gradients depend on what runs between.

    Args:
        held: experts of each process. chunks: parts of the tokens that travel one after the other, so that one part's rows are computed
            while another's are on their way; sums over all tokens (the experts' gradients) are sums of parts then.
        overlap: false: each exchange is waited for where it was begun, and nothing runs meanwhile.
    """

    def __init__(
        self,
        u: Tensor,
        slots: Tensor,
        weights: Tensor,
        held: int,
        zero_expert_type: ZeroExpertType,
        group: ProcessGroup,
        once: bool = False,
        chunks: int = 1,
        overlap: bool = True,
    ) -> None:
        parts, n_routed = [(u, slots, weights.to(u.dtype))], held * group.size()
        if chunks > 1:
            sizes = part_sizes(len(u), chunks)
            parts = list(zip(*(each.split(sizes) for each in parts[0]), strict=True))
        with count_traffic("expert"):
            kind = _OnceAProcess if once else _OnceAPick
            trips = Trip.plan([kind.keys(each, held, n_routed) for _, each, _ in parts], group.size() if once else n_routed, group)
            self.parts = [kind(*part, trip, held, group, not overlap) for part, trip in zip(parts, trips, strict=True)]
        self.tokens = tuple(part.there.token for part in self.parts)
        self.passed = zero_experts(u, slots, weights, n_routed, zero_expert_type)

    def compute(self, held: Held) -> None:
        """held(use, *tokens): what `use(gate_up, down, *tokens)` gives, gate_up [N / g, 2 F, H], down [N / g, H, F]. `tokens`, and what
        comes of them, stand in the graph for what has not come yet.
        """

        def use(gate_up: Tensor, down: Tensor, *tokens: Tensor) -> tuple[Tensor, ...]:
            with count_traffic("expert"):
                return tuple(part.compute(token, gate_up, down) for part, token in zip(self.parts, tokens, strict=True))

        self.tokens = held(use, *self.tokens)

    def end(self) -> Tensor:
        """[T, H], in u's dtype."""
        found = [part.end(token) for part, token in zip(self.parts, self.tokens, strict=True)]
        real = found[0] if len(found) == 1 else torch.cat(found)
        return real if self.passed is None else real + self.passed


class _OnceAPick:
    """Sorted by expert, and so by its owner. The counts by expert say at the other end which expert each row is for."""

    def __init__(self, u: Tensor, slots: Tensor, weights: Tensor, trip: Trip, held: int, group: ProcessGroup, at_once: bool) -> None:
        self.trip, self.held, self.group, self.at_once = trip, held, group, at_once
        self.weights: Tensor | None = weights
        self.there = post_exchange(self.rows(u), trip.send, trip.receive, group, at_once)

    @staticmethod
    def keys(slots: Tensor, held: int, n_routed: int) -> Tensor:
        """What `Trip.plan` sorts by."""
        return slots

    def rows(self, u: Tensor) -> Tensor:
        return _Spread.apply(u, self.trip.picks, self.trip.position)

    def compute(self, token: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        answers = _compute(*self.came(self.there.wait(token)), gate_up, down)
        self.back = post_exchange(answers, self.trip.receive, self.trip.send, self.group, self.at_once)
        return self.back.token

    def came(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of others, [P, H], their slots among the experts here, [P, K'], and their weights."""
        local = torch.arange(self.held, device=rows.device).repeat(self.group.size())
        local = local.repeat_interleave(self.trip.received.flatten(), output_size=len(rows))
        return rows, local[:, None], rows.new_ones(len(rows), 1)

    def end(self, token: Tensor) -> Tensor:
        return _Collect.apply(self.back.wait(token), self.weights, self.trip.picks, self.trip.position)


class _OnceAProcess(_OnceAPick):
    """The first of a token's picks at each owner stands for all of them there; slots and weights travel beside the row."""

    def __init__(self, u: Tensor, slots: Tensor, weights: Tensor, trip: Trip, held: int, group: ProcessGroup, at_once: bool) -> None:
        self.widths = u.shape[1], slots.shape[1]
        super().__init__(torch.cat((u, weights), 1), slots, weights, trip, held, group, at_once)
        self.weights = None  # are used where the experts are
        theirs = slots[trip.picks // self.widths[1]].to(torch.int32)
        self.slots = post_exchange(theirs, trip.send, trip.receive, group, at_once)

    @staticmethod
    def keys(slots: Tensor, held: int, n_routed: int) -> Tensor:
        nobody = n_routed // held
        owner = torch.where(slots < n_routed, slots // held, nobody)
        again = (owner[:, :, None] == owner[:, None, :]).tril(-1).any(-1)
        return owner.masked_fill(again, nobody)

    def came(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows, theirs = rows.split(self.widths, 1)
        local = self.slots.wait().long() - place_in(self.group) * self.held
        # Another owner's, or a zero-computation expert's: not computed.
        return rows, local.masked_fill((local < 0) | (local >= self.held), self.held), theirs


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
    def plan(keys: Sequence[Tensor], count: int, group: ProcessGroup) -> list[Trip]:
        """A trip for each of `keys`, int64 [T, K]: a pick with a key below `count` travels, to process key x g / count; equal keys in
        order of the tokens.
        """
        counts = [torch.bincount(each.flatten(), minlength=count)[:count].view(group.size(), -1) for each in keys]
        counts = torch.stack(counts, 1)  # [g, trips, keys a process]
        received = exchange_counts(counts, group)
        send, receive = torch.stack((counts.sum(-1), received.sum(-1))).transpose(1, 2).tolist()  # one wait for an accelerator
        return [Trip._plan(*each) for each in zip(keys, send, receive, received.unbind(1), strict=True)]

    @staticmethod
    def _plan(keys: Tensor, send: list[int], receive: list[int], received: Tensor) -> Trip:
        order = torch.argsort(keys.flatten(), stable=True)
        position = torch.empty_like(order)
        position[order] = torch.arange(len(order), device=order.device)
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
