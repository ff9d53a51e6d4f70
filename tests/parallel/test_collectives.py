"""Collectives in real processes: values, gradients and bytes in closed form, over all processes and over groups of some of them."""

import datetime
import itertools
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from longcat_lab.parallel.collectives import (
    PURPOSES,
    add_traffic,
    count_traffic,
    counted,
    gathered,
    group_size,
    own_part,
    part_sizes,
    place_in,
    sum_forward,
    sum_in_backward,
    whole,
)
from longcat_lab.parallel.exchange import exchange, exchange_counts, post_exchange
from tests.parallel.processes import ProcessError, dist_run

DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def numbers(*shape, seed, dtype=torch.float64, integers=False):
    """The same in all processes. Small integers: sums of them are exact in each dtype."""
    generator = torch.Generator().manual_seed(seed)
    if integers:
        return torch.randint(-4, 5, shape, generator=generator).to(dtype)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def gradient_of(function, x, d):
    """Value and gradient, d being the gradient of the value."""
    x = x.clone().requires_grad_()
    y = function(x)
    return y.detach(), torch.autograd.grad(y, x, d)[0]


def same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def check_sums(group):
    size, place = group.size(), group.rank()
    for dtype in DTYPES:
        xs, ds = (numbers(size, 3, 5, seed=seed, dtype=dtype, integers=True) for seed in (1, 2))
        value, gradient = gradient_of(lambda x: sum_in_backward(x, group), xs[0], ds[place])
        same(value, xs[0])
        same(gradient, ds.sum(0))
        kept = xs[place].clone()
        value, gradient = gradient_of(lambda x: sum_forward(x, group), kept, ds[0])
        same(value, xs.sum(0))
        same(gradient, ds[0])
        same(kept, xs[place])
        value, gradient = gradient_of(lambda x: sum_forward(x, group), xs[place].mT, ds[0].mT)
        same(value, xs.sum(0).mT)


def check_slices(group):
    size, place = group.size(), group.rank()
    for dtype, dim, length in itertools.product(DTYPES, (0, 1, -1), (2 * size, 2 * size + 1, 1)):
        shape = [3, 4, 2]
        shape[dim] = length
        x, ds = (numbers(*some, *shape, seed=length, dtype=dtype, integers=True) for some in ((), (size,)))
        sizes = part_sizes(length, size)
        assert sizes == tuple(part.shape[dim] for part in x.tensor_split(size, dim))
        cut = [d.tensor_split(size, dim) for d in ds]

        value, gradient = gradient_of(lambda t, dim=dim: own_part(t, group, dim), x, cut[0][place])
        same(value, x.tensor_split(size, dim)[place])
        same(gradient, ds[0])

        mine = x.tensor_split(size, dim)[place]
        value, gradient = gradient_of(lambda t, dim=dim, sizes=sizes: whole(t, group, dim, sizes), mine, ds[0])
        same(value, x)
        same(gradient, cut[0][place])

        value, gradient = gradient_of(lambda t, dim=dim, sizes=sizes: gathered(t, group, dim, sizes), mine, ds[place])
        same(value, x)
        same(gradient, sum(parts[place] for parts in cut))
        if length == 2 * size:
            same(whole(mine, group, dim), x)
            same(gathered(mine, group, dim), x)
    with pytest.raises(ValueError, match="has a slice of 3, and sizes are"):
        whole(torch.zeros(3), group, 0, [2] * size)


def matrices(size):
    """[sender, receiver] numbers of rows: random with gaps, skewed to one receiver, from one sender alone, nothing at all."""
    some = torch.randint(0, 4, (size, size), generator=torch.Generator().manual_seed(size))
    skewed, lonely = torch.zeros_like(some), torch.zeros_like(some)
    skewed[:, -1], lonely[0] = 5, 2
    return [some, skewed, lonely, torch.zeros_like(some), torch.diag(torch.arange(size))]


def check_exchange(group):
    size, place = group.size(), group.rank()
    for counts, dtype, shape in itertools.product(matrices(size), (*DTYPES, torch.int64, torch.int32), ((), (3,), (2, 2))):
        send, receive = counts[place].tolist(), counts[:, place].tolist()
        # Rows say where they come from and where they go: 100 sender + 10 receiver + number.
        named = [(i, j, n) for i, j in itertools.product(range(size), repeat=2) for n in range(counts[i, j])]
        x, expected = (
            torch.tensor([100 * i + 10 * j + n for i, j, n in named if place == (i, j)[end]], dtype=dtype)
            .view(-1, *[1] * len(shape))
            .expand(-1, *shape)
            for end in (0, 1)
        )
        came = exchange(x, send, receive, group)
        same(came, expected.contiguous())
        same(exchange(came, receive, send, group), x.contiguous())
        if dtype.is_floating_point:  # the gradient of what came, 2 of it, goes back to where it was sent from
            same(gradient_of(lambda t, s=send, r=receive: exchange(t, s, r, group), x, 2 * expected)[1], 2 * x)
        for at_once in (False, True):  # two under way at a time, waited for in the other order
            ways = [post_exchange(t, *way, group, at_once) for t, way in ((x, (send, receive)), (expected, (receive, send)))]
            same(ways[1].wait(), x.contiguous())
            same(ways[0].wait(), came)
    each = torch.arange(size * size * 3).view(size, size, 3)
    same(exchange_counts(each[place], group), each[:, place])
    with pytest.raises(ValueError, match="cannot send"):
        exchange(torch.zeros(3), [1] * size, [1] * size, group)


def check_finite_differences(group):
    """A function of all processes' inputs, nonlinear between its collectives: the gradient of the sum of all losses, by differences."""
    size, place = group.size(), group.rank()
    counts = matrices(size)[0]
    send, receive = counts[place].tolist(), counts[:, place].tolist()

    def loss(x):
        x = x + gathered(x.sin(), group, 0).pow(2).mean(0)
        rows = x.repeat(sum(send), 1)[: sum(send)]
        came = exchange(rows.cos(), send, receive, group)
        return (came.exp().sum() * (place + 1) + gathered(came.sum(0).tanh(), group, 0).prod()) / 10

    def total(x):
        value = loss(x).detach()
        dist.all_reduce(value, group=group)
        return float(value)

    x = numbers(size, 2, 3, seed=5)[place]
    leaf = x.clone().requires_grad_()
    loss(leaf).backward()
    for i in range(size):
        estimate = torch.zeros_like(x)
        for at in itertools.product(range(2), range(3)):
            step = torch.zeros_like(x)
            step[at] = 1e-5 if i == place else 0.0
            estimate[at] = (total(x + step) - total(x - step)) / 2e-5
        if i == place:
            torch.testing.assert_close(leaf.grad, estimate, rtol=1e-6, atol=1e-8)


class Network(nn.Module):
    """Rows of the first product and columns of the second divided over a group; the same weights in all processes."""

    def __init__(self, group, first, second):
        super().__init__()
        self.group = group
        size, place = group_size(group), place_in(group)
        self.first = nn.Parameter(first.chunk(size, 0)[place].clone())
        self.second = nn.Parameter(second.chunk(size, 1)[place].clone())

    def forward(self, x):
        with count_traffic("tensor"):
            inner = torch.tanh(sum_in_backward(x, self.group) @ self.first.T)
            return torch.tanh(sum_forward(inner @ self.second.T, self.group))


def check_two_layers_and_recomputation(group):
    """A tensor-parallel network twice in one graph, with and without recomputed activations, beside the whole one in one process."""
    size, place = group.size(), group.rank()
    x, first, second = numbers(5, 6, seed=1), numbers(4 * size, 6, seed=2), numbers(6, 4 * size, seed=3)
    found = []
    for over, again in ((None, False), (group, False), (group, True)):
        network, leaf = Network(over, first, second), x.clone().requires_grad_()
        call = (lambda t, n=network: checkpoint(n, t, use_reentrant=False)) if again else network
        with counted() as traffic:
            out = call(leaf + call(leaf))
            out.square().sum().backward()
        found.append([out, leaf.grad, network.first.grad, network.second.grad])
        one = 2 * (size - 1) * out.nbytes // size
        assert traffic["tensor"] == (0 if over is None else (6 if again else 4) * one)
        assert set(traffic) <= {"tensor"}
    alone = [*found[0][:2], found[0][2].chunk(size, 0)[place], found[0][3].chunk(size, 1)[place]]
    for a, b, c in zip(alone, *found[1:], strict=True):
        torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12)
        same(b, c)


def check_traffic(group):
    """Bytes of each collective, by purpose, also of what runs outside of the context in which its forward pass ran."""
    size, place, others = group.size(), group.rank(), group.size() - 1
    for dtype in DTYPES:
        b = dtype.itemsize
        x = torch.ones(size, 3, dtype=dtype, requires_grad=True)
        counts = matrices(size)[0]
        send, receive = counts[place].tolist(), counts[:, place].tolist()
        rows = torch.ones(sum(send), 3, dtype=dtype, requires_grad=True)
        cases = {
            "tensor": (lambda x=x: sum_in_backward(x, group), 0, 2 * others * 3 * b),
            "norm": (lambda x=x: sum_forward(x, group), 2 * others * 3 * b, 0),
            "data": (lambda x=x: own_part(x, group, 0), 0, others * 3 * b),
            "context": (lambda x=x: whole(x, group, 0), others * size * 3 * b, 0),
            "pipeline": (lambda x=x: gathered(x, group, 1), others * size * 3 * b, others * size * 3 * b),
            "expert": (
                lambda r=rows, s=send, c=receive: exchange(r, s, c, group),
                (sum(send) - send[place]) * 3 * b,
                (sum(receive) - receive[place]) * 3 * b,
            ),
        }
        for purpose, (call, forward, backward) in cases.items():
            with counted() as traffic:
                with count_traffic(purpose), counted() as first:
                    out = call()
                out.sum().backward()
            assert first[purpose] == forward, purpose
            assert dict(traffic) == {purpose: forward + backward}
    with counted() as traffic:
        own_part(torch.ones(size + 1, requires_grad=True), group, 0).sum().backward()
        exchange_counts(torch.ones(size, 2, dtype=torch.int64), group)
    assert traffic == {"other": others * 2 * 4 + others * 2 * 8}  # the longest slice has two; counts of 8 bytes
    exchange_counts(torch.ones(size, 2, dtype=torch.int64), group)
    assert traffic["other"] == others * 24


def check_bits(group):
    """Sums whose rounding shows: the same bits each time, and the same on all processes."""
    size, place = group.size(), group.rank()
    x = (numbers(size, 1001, seed=9) * 10 ** numbers(size, 1001, seed=10)).float()[place]
    found = []
    for _ in range(3):
        leaf = x.clone().requires_grad_()
        total = sum_forward(leaf, group)
        (gathered(leaf * total, group, 0).square().sum() + sum_in_backward(leaf, group).square().sum()).backward()
        found.append((total.detach(), leaf.grad))
    for again in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], again, strict=True))
    everyone = whole(found[0][0], group, 0).view(size, -1)
    assert all(torch.equal(row, everyone[0]) for row in everyone)


CHECKS = [
    check_sums,
    check_slices,
    check_exchange,
    check_finite_differences,
    check_two_layers_and_recomputation,
    check_traffic,
    check_bits,
]


def run_all():
    """Over all four processes, and over two groups of two whose ranks are not their places."""
    pairs = [dist.new_group(ranks, timeout=datetime.timedelta(seconds=60)) for ranks in ((0, 2), (1, 3))]
    mine = pairs[0] if dist.get_rank() in (0, 2) else pairs[1]
    for group, check in itertools.product((dist.group.WORLD, mine), CHECKS):
        check(group)
    return place_in(mine), group_size(mine)


def test_over_four_processes_and_over_pairs_of_them():
    assert dist_run(run_all, 4) == [(0, 2), (0, 2), (1, 2), (1, 2)]


def test_one_process_needs_no_group():
    x = torch.randn(4, 3)
    with counted() as traffic:
        for same_object in (
            sum_in_backward(x, None),
            sum_forward(x, None),
            own_part(x, None, 0),
            whole(x, None, 1),
            gathered(x, None, -1),
            exchange(x, [4], [4], None),
            exchange_counts(x, None),
            post_exchange(x, [4], [4], None).wait(),
        ):
            assert same_object is x
    assert not traffic and group_size(None) == 1 and place_in(None) == 0


def test_traffic_of_others_is_added_and_purposes_are_known():
    with counted() as outer, count_traffic("norm"):
        add_traffic(3)
        with counted() as inner, count_traffic("data"):
            add_traffic(5)
            add_traffic(7, "pipeline")
        add_traffic(11)
    assert outer == {"norm": 14, "data": 5, "pipeline": 7} and inner == {"data": 5, "pipeline": 7}
    with pytest.raises(ValueError, match=f"counted for {', '.join(PURPOSES)}, and not for 'experts'"), count_traffic("experts"):
        pass


def fails_before(rank):
    if dist.get_rank() == rank:
        raise LookupError("a row that is not there")
    return sum_forward(torch.ones(2), dist.group.WORLD)


def never_comes(folder, backward):
    """Rank 1 lives and stays away (from the backward pass alone, if so), until rank 0 has said that it waited in vain."""
    if backward:
        came = exchange(torch.ones(2, 3, requires_grad=True), [1, 1], [1, 1], dist.group.WORLD)
    if dist.get_rank() == 0:
        try:
            came.sum().backward() if backward else exchange_counts(torch.ones(2, 1, dtype=torch.int64), dist.group.WORLD)
        finally:
            Path(folder, "gave up").touch()
    end = time.monotonic() + 60
    while not Path(folder, "gave up").exists() and time.monotonic() < end:
        time.sleep(0.05)  # between two looks
    return time.monotonic() < end


def dies():
    if dist.get_rank() == 1:
        import os
        import signal

        os.kill(os.getpid(), signal.SIGKILL)
    return sum_forward(torch.ones(2), dist.group.WORLD)


def test_what_one_process_raises_is_what_is_told():
    with pytest.raises(ProcessError, match=r"(?s)rank 1 of 2 failed first:.*LookupError: a row that is not there") as told:
        dist_run(fails_before, 2, 1)
    assert 1 in told.value.reports


@pytest.mark.parametrize("backward", [False, True])
def test_a_process_that_stays_away_becomes_an_error_and_no_hang(tmp_path, backward):
    with pytest.raises(ProcessError, match=r"(?s)rank 0 of 2 failed first:.*(Timed out|timed out|timeout)") as told:
        dist_run(never_comes, 2, str(tmp_path), backward, timeout=2)
    assert ("in backward" if backward else "exchange_counts") in told.value.reports[0]


def test_a_process_that_dies_is_an_error_too():
    with pytest.raises(ProcessError):
        dist_run(dies, 2, timeout=20)
