"""Experts divided over real processes: the same values and gradients as in one process, and exactly the bytes that picks cost."""

import datetime
import functools
import itertools

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from longcat_lab.blocks.moe.experts_op import experts, experts_reference
from longcat_lab.parallel.collectives import count_traffic, counted, sum_forward, sum_in_backward
from longcat_lab.parallel.expert_op import expert_parallel
from tests.parallel.processes import dist_run

ZERO = 3  # slots of zero-computation experts


def gradients_of(leaves):
    return [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]


class Problem:
    """A mixture over all tokens of a group, the same in all its processes, and this process's part of it."""

    def __init__(self, group, case="mixed", dtype=torch.float64, hidden=8, inner=4, held=3, topk=4, seed=0):
        size, self.place = group.size(), group.rank()
        self.group, self.n_routed, self.held, self.topk = group, held * size, held, topk
        generator = torch.Generator().manual_seed(seed)
        self.tokens = [0 if case == "a process without tokens" and i == 1 else 5 + 2 * i for i in range(size)]
        total = sum(self.tokens)
        slots = torch.rand(total, self.n_routed + ZERO, generator=generator).argsort(-1)[:, :topk]
        own = torch.arange(size).repeat_interleave(torch.tensor(self.tokens))  # whose token it is
        if case == "all to one expert":
            slots = torch.full_like(slots, self.n_routed - 1)
        elif case == "all to the last process":
            slots = slots % held + held * (size - 1)
        elif case == "all stays at home":
            slots = slots % held + held * own[:, None]
        elif case == "no real pick":
            slots = slots % ZERO + self.n_routed
        elif case == "a process without real picks":
            slots = torch.where(own[:, None] == 0, slots % ZERO + self.n_routed, slots)
        self.slots = slots
        shapes = ((total, hidden), (total, topk), (self.n_routed, 2 * inner, hidden), (self.n_routed, hidden, inner))
        self.whole = [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
        self.d = torch.randn(total, hidden, generator=generator, dtype=torch.float64).to(dtype)

    def mine(self, tensors):
        """This process's tokens of the first two, and its experts of the others."""
        by_token = [t.split(self.tokens)[self.place] for t in tensors[:2]]
        return by_token + [t.chunk(self.group.size())[self.place] for t in tensors[2:]]

    def own_slots(self):
        return self.slots.split(self.tokens)[self.place]

    def own_d(self):
        return self.d.split(self.tokens)[self.place]

    def leaves(self, tensors):
        return [t.detach().clone().requires_grad_() for t in tensors]

    def alone(self, kind="identity"):
        """(value, four gradients) in one process, this process's part of them."""
        u, *rest = leaves = self.leaves(self.whole)
        value = experts_reference(u, self.slots, *rest, kind)
        (value * self.d).sum().backward()
        return [value.detach().split(self.tokens)[self.place], *self.mine(gradients_of(leaves))]

    def together(self, kind="identity", once=False, leaves=None):
        leaves = self.leaves(self.mine(self.whole)) if leaves is None else leaves
        u, weights, gate_up, down = leaves
        value = expert_parallel(u, self.own_slots(), weights, gate_up, down, kind, self.group, self.n_routed, once)
        (value * self.own_d()).sum().backward()
        return [value.detach(), *(leaf.grad for leaf in leaves)]


CASES = (
    "mixed",
    "all to one expert",
    "all to the last process",
    "all stays at home",
    "no real pick",
    "a process without real picks",
    "a process without tokens",
)


def check_equality(group):
    for number, (case, once) in enumerate(itertools.product(CASES, (False, True))):
        for kind in ("identity", "copy", "drop") if case == "mixed" else ("identity",):
            problem = Problem(group, case, seed=number)
            for found, expected in zip(problem.together(kind, once), problem.alone(kind), strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
        for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 4e-2)) if case in ("mixed", "all to the last process") else ():
            problem = Problem(group, case, dtype, hidden=16, inner=8, seed=number)
            for found, expected in zip(problem.together(once=once), problem.alone(), strict=True):
                assert found.dtype == dtype
                scale = float(expected.abs().max()) if expected.numel() else 0.0
                torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * scale)


def check_traffic(group):
    """Real picks of other processes' experts, there and back, and the counts; picks of zero-computation experts cost nothing."""
    others = group.size() - 1
    for case, dtype in itertools.product(CASES, (torch.float64, torch.float32)):
        problem = Problem(group, case, dtype, hidden=16, inner=8)
        b, place, topk = dtype.itemsize, problem.place, problem.topk
        home = [i for i, count in enumerate(problem.tokens) for _ in range(count)]
        # (token, where it is, process whose expert it picked), of real picks that leave their process
        owners = [[slot // problem.held for slot in row if slot < problem.n_routed] for row in problem.slots.tolist()]
        away = [(t, home[t], owner) for t, row in enumerate(owners) for owner in row if owner != home[t]]
        with counted() as traffic:
            problem.together()
        sent, answered = sum(i == place for _, i, _ in away), sum(o == place for _, _, o in away)
        # Forward: picks out, answers back. Backward: the answers' gradients out, the picks' back.
        assert traffic == {"expert": 2 * (sent + answered) * 16 * b + others * problem.held * 8}, case

        with counted() as traffic:
            problem.together(once=True)
        sent, answered = sum(i == place for _, i, _ in set(away)), sum(o == place for _, _, o in set(away))
        rows = (sent + answered) * ((16 + topk) * b + 16 * b)
        assert traffic == {"expert": rows + sent * 4 * topk + others * 8}, case


def check_everybody_takes_part(group):
    """Two mixtures and a sum over all processes in one graph, where some process has nothing to send or to receive in one of them or
    in both; plain and with recomputed activations. A process that did not come would make the others fail after the timeout."""
    for number, (first, second) in enumerate([(case, "mixed") for case in CASES[:-1]] + [("mixed", CASES[4]), (CASES[5], CASES[2])]):
        a, b = Problem(group, first, seed=1), Problem(group, second, seed=2)
        factor = torch.linspace(0.5, 1.5, 8, dtype=torch.float64)

        def mixture(problem, once, u, *rest):
            return torch.tanh(expert_parallel(u, problem.own_slots(), *rest, "identity", group, problem.n_routed, once))

        found = []
        for again in (False, True):
            leaves, more = a.leaves(a.mine(a.whole)), b.leaves(b.mine(b.whole))[1:]
            call = functools.partial(checkpoint, mixture, use_reentrant=False) if again else mixture
            mid = call(a, number % 2 == 0, *leaves)
            with count_traffic("tensor"):
                beside = sum_forward(sum_in_backward(factor.clone().requires_grad_(), group) * (group.rank() + 1), group)
            out = call(b, number % 2 == 0, mid + beside, *more) + mid
            (out * a.own_d()).sum().backward()
            found.append([t.grad for t in leaves + more])
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)

        leaves, more = a.leaves(a.whole), b.leaves(b.whole)[1:]
        mid = torch.tanh(experts_reference(leaves[0], a.slots, *leaves[1:]))
        out = torch.tanh(experts_reference(mid + factor * sum(range(1, group.size() + 1)), b.slots, *more)) + mid
        (out * a.d).sum().backward()
        expected = [*a.mine(gradients_of(leaves)), *b.mine([b.whole[0], *gradients_of(more)])[1:]]
        for one, other in zip(found[0], expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def check_what_is_frozen(group):
    """Without a gradient of the tokens, the weights or the experts the others' are as they were, and nobody waits."""
    for case, once in itertools.product(("mixed", "all to the last process", "no real pick"), (False, True)):
        problem = Problem(group, case)
        truth = problem.together(once=once)
        for wanted in ((0,), (1,), (2, 3), (0, 1), (1, 2, 3)):
            leaves = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(problem.mine(problem.whole))]
            found = problem.together(once=once, leaves=leaves)
            for i in range(4):
                if i in wanted:
                    torch.testing.assert_close(found[1 + i], truth[1 + i], rtol=0, atol=0)
                else:
                    assert found[1 + i] is None


def check_finite_differences(group):
    """The gradient of the sum of all processes' losses, by every number that any of them holds."""
    for once in (False, True):
        problem = Problem(group, hidden=3, inner=1, held=1, topk=2, seed=4)
        problem.tokens, size = [2] * group.size(), group.size()
        problem.slots, problem.d = problem.slots[: 2 * size], problem.d[: 2 * size]
        problem.whole[:2] = [t[: 2 * size] for t in problem.whole[:2]]

        def loss(tensors, problem=problem, once=once):
            out = expert_parallel(tensors[0], problem.own_slots(), *tensors[1:], "identity", problem.group, problem.n_routed, once)
            return out.square().sum() * (1 + problem.place)

        leaves = problem.leaves(problem.mine(problem.whole))
        loss(leaves).backward()
        for who, which in itertools.product(range(size), range(4)):
            for at in itertools.product(*map(range, leaves[which].shape)):
                values = []
                for step in (1e-5, -1e-5):
                    moved = [t.detach().clone() for t in leaves]
                    if who == problem.place:
                        moved[which][at] += step
                    values.append(loss(moved))
                difference = (values[0] - values[1]) / 2e-5
                dist.all_reduce(difference, group=problem.group)
                if who == problem.place:
                    torch.testing.assert_close(leaves[which].grad[at], difference, rtol=1e-6, atol=1e-8)


def check_bits(group):
    for once in (False, True):
        problem = Problem(group, dtype=torch.float32, hidden=32, inner=16, topk=8, seed=7)
        first, *others = (problem.together(once=once) for _ in range(3))
        assert all(torch.equal(a, b) for again in others for a, b in zip(first, again, strict=True))


def check_errors(group):
    problem = Problem(group)
    u, weights, gate_up, down = problem.mine(problem.whole)
    with pytest.raises(ValueError, match=f"{group.size()} processes with 3 experts each do not make 7 experts"):
        expert_parallel(u, problem.own_slots(), weights, gate_up, down, "identity", group, 7)


CHECKS = [check_equality, check_traffic, check_what_is_frozen, check_bits, check_errors, check_everybody_takes_part]


def run_all():
    """Over all four processes, and over two groups of two whose ranks are not their places."""
    pairs = [dist.new_group(ranks, timeout=datetime.timedelta(seconds=60)) for ranks in ((0, 2), (1, 3))]
    mine = pairs[dist.get_rank() % 2]
    for group, check in itertools.product((dist.group.WORLD, mine), CHECKS):
        check(group)
    check_finite_differences(mine)
    return True


def test_over_four_processes_and_over_pairs_of_them():
    assert dist_run(run_all, 4) == [True] * 4


def test_one_process_needs_no_group():
    u, weights = torch.randn(6, 8), torch.rand(6, 2)
    slots, gate_up, down = torch.randint(0, 5, (6, 2)), torch.randn(4, 8, 8), torch.randn(4, 8, 4)
    for kind in ("identity", "copy", "drop"):
        found = expert_parallel(u, slots, weights, gate_up, down, kind, None, 4)
        torch.testing.assert_close(found, experts(u, slots, weights, gate_up, down, kind), rtol=0, atol=0)
