"""A table divided over real processes: the same rows and gradients as in one process, each row number sent once, and exact bytes."""

import datetime
import itertools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from longcat_lab.parallel.collectives import counted
from longcat_lab.parallel.embedding_op import look_up, owner_and_offset, shard_size, sharded_rows, sum_by_row, sum_over_copies
from longcat_lab.training.table_optimizer import TableOptimizer, hit_rows, merge
from tests.parallel.processes import ProcessError, dist_run

CASES = ("mixed", "one row", "one owner", "a process asks nothing", "nobody asks", "its own rows")


class Problem:
    """A table and the rows that each process asks for, the same in all processes."""

    def __init__(self, group, case="mixed", total=37, width=6, dtype=torch.float64, seed=0):
        self.group, self.size, self.place, self.total = group, group.size(), group.rank(), total
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.randn(total, width, generator=generator, dtype=torch.float64).to(dtype)
        self.rows = [torch.randint(0, total, (2, 5 + i), generator=generator) for i in range(self.size)]
        longest = -(-total // self.size)
        if case == "one row":
            self.rows = [torch.full_like(rows, total - 1) for rows in self.rows]
        elif case == "one owner":
            self.rows = [rows % min(longest, total) for rows in self.rows]
        elif case == "a process asks nothing":
            self.rows[-1] = self.rows[-1][:, :0]
        elif case == "nobody asks":
            self.rows = [rows[:, :0] for rows in self.rows]
        elif case == "its own rows":
            self.rows = [(rows % longest + i * longest).clamp(max=total - 1) for i, rows in enumerate(self.rows)]
        self.ds = [torch.randn(*rows.shape, width, generator=generator, dtype=torch.float64).to(dtype) for rows in self.rows]

    def shard(self, table=None):
        first = sum(shard_size(self.total, self.size, i) for i in range(self.place))
        return (self.table if table is None else table)[first : first + shard_size(self.total, self.size, self.place)].clone()

    def alone(self):
        """Gradient of the whole table in one process, this place's shard."""
        table = self.table.clone().requires_grad_()
        sum((F.embedding(rows, table) * d).sum() for rows, d in zip(self.rows, self.ds, strict=True)).backward()
        return self.shard(table.grad)

    def together(self, sparse):
        weight = torch.nn.Parameter(self.shard())
        values = sharded_rows(weight, self.rows[self.place], self.total, self.group, sparse)
        (values * self.ds[self.place]).sum().backward()
        return values.detach(), weight.grad

    def asked_of(self, place):
        """(asking process, row), each once, of the rows that `place` holds."""
        longest = -(-self.total // self.size)
        return sorted({(i, row) for i, rows in enumerate(self.rows) for row in rows.flatten().tolist() if row // longest == place})


def check_equality(group):
    for case, total, sparse in itertools.product(CASES, (37, group.size() + 1, 1, 64), (True, False)):
        problem = Problem(group, case, total, seed=total)
        values, gradient = problem.together(sparse)
        torch.testing.assert_close(values, F.embedding(problem.rows[problem.place], problem.table), rtol=0, atol=0)
        assert gradient.is_sparse == sparse
        torch.testing.assert_close(gradient.to_dense(), problem.alone(), rtol=1e-12, atol=1e-12)
        if sparse:
            first = sum(shard_size(total, problem.size, i) for i in range(problem.place))
            assert gradient._indices()[0].tolist() == sorted({row - first for _, row in problem.asked_of(problem.place)})
            assert gradient._values().shape == (gradient._nnz(), 6)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        for sparse in (True, False):
            problem = Problem(group, dtype=dtype)
            values, gradient = problem.together(sparse)
            assert values.dtype == gradient.dtype == dtype
            torch.testing.assert_close(values, F.embedding(problem.rows[problem.place], problem.table), rtol=0, atol=0)
            torch.testing.assert_close(gradient.to_dense(), problem.alone(), rtol=tolerance, atol=4 * tolerance)


def check_traffic_and_statistics(group):
    for case, total, sparse in itertools.product(CASES, (37, group.size() + 1), (True, False)):
        problem = Problem(group, case, total, dtype=torch.float32)
        place, others, own = problem.place, problem.size - 1, problem.asked_of(problem.place)
        asks = sum(i == place for j in range(problem.size) if j != place for i, _ in problem.asked_of(j))
        answers = sum(i != place for i, _ in own)
        weight = torch.nn.Parameter(problem.shard())
        with counted() as traffic:
            found = look_up(weight, problem.rows[place], total, group, sparse)
            assert traffic == {"embedding": others * 8 + asks * 8 + answers * 6 * 4}
            found.values.sum().backward()
        assert traffic == {"embedding": others * 8 + asks * 8 + answers * 6 * 4 + asks * 6 * 4}
        assert found.distinct == len(problem.rows[place].unique())
        first = sum(shard_size(total, problem.size, i) for i in range(place))
        assert found.asked.tolist() == [row - first for _, row in own]


def check_twice_in_a_graph_and_recomputed(group):
    """One table read twice, the second time with rows of its own, beside one process; with and without recomputed activations."""
    a, b = Problem(group, seed=1), Problem(group, "a process asks nothing", seed=2)
    found = []
    for again, sparse in itertools.product((False, True), (True, False)):
        weight = torch.nn.Parameter(a.shard())

        def read(problem, weight=weight, sparse=sparse):
            return torch.tanh(sharded_rows(weight, problem.rows[problem.place], problem.total, group, sparse))

        values = [checkpoint(read, p, use_reentrant=False) if again else read(p) for p in (a, b)]
        sum((value * p.ds[p.place]).sum() for value, p in zip(values, (a, b), strict=True)).backward()
        assert weight.grad.is_sparse == sparse
        found.append(weight.grad.to_dense())
    table = a.table.clone().requires_grad_()
    pairs = [(rows, d) for p in (a, b) for rows, d in zip(p.rows, p.ds, strict=True)]
    sum((torch.tanh(F.embedding(rows, table)) * d).sum() for rows, d in pairs).backward()
    for gradient in found:
        torch.testing.assert_close(gradient, a.shard(table.grad), rtol=1e-12, atol=1e-12)


def check_finite_differences(group):
    problem = Problem(group, total=5, width=2, seed=3)

    def loss(weight):
        return sharded_rows(weight, problem.rows[problem.place], 5, group).sin().square().sum() * (1 + problem.place)

    leaf = problem.shard().requires_grad_()
    loss(leaf).backward()
    for who in range(problem.size):
        for at in itertools.product(range(shard_size(5, problem.size, who)), range(2)):
            values = []
            for step in (1e-5, -1e-5):
                moved = problem.shard()
                if who == problem.place:
                    moved[at] += step
                values.append(loss(moved))
            difference = (values[0] - values[1]) / 2e-5
            dist.all_reduce(difference, group=group)
            if who == problem.place:
                torch.testing.assert_close(leaf.grad[at], difference, rtol=1e-6, atol=1e-8)


def check_bits_and_order(group):
    """The same bits each time; and in the sparse gradient each row stands once, in ascending order, so that `merge` changes nothing."""
    for sparse in (True, False):
        problem = Problem(group, "one owner", total=8, width=33, dtype=torch.float32)
        found = [problem.together(sparse)[1].to_dense() for _ in range(3)]
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    gradient = Problem(group, dtype=torch.float32).together(True)[1]
    merged = merge(gradient)
    assert torch.equal(merged._indices(), gradient._indices()) and torch.equal(merged._values(), gradient._values())


def check_optimizer_at_the_owner(group):
    """Three steps of each rule on shards move the rows as in one process."""
    for mode in ("lazy_adam", "row_wise", "sgd"):
        problem = Problem(group)
        table, weight = torch.nn.Parameter(problem.table.clone()), torch.nn.Parameter(problem.shard())
        optimizers = [TableOptimizer([p], mode, lr=0.1, momentum=0.9, weight_decay=0.1) for p in (table, weight)]
        for step in range(3):
            asked = Problem(group, seed=step)
            table.grad = weight.grad = None
            sum((F.embedding(r, table, sparse=True) * d).sum() for r, d in zip(asked.rows, asked.ds, strict=True)).backward()
            (sharded_rows(weight, asked.rows[asked.place], 37, group, True) * asked.ds[asked.place]).sum().backward()
            for optimizer in optimizers:
                optimizer.step()
        torch.testing.assert_close(weight.detach(), problem.shard(table.detach()), rtol=1e-10, atol=1e-10)


def check_sum_over_copies(group):
    """Copies of a shard, each with gradients of other rows: all get the sum, and all the same bits."""
    place, size = group.rank(), group.size()
    sizes = ([7 + i for i in range(size)], [0] + [3] * (size - 1), [0] * size)
    for dtype, counts in itertools.product((torch.float64, torch.float32), sizes):
        generator = torch.Generator().manual_seed(11)
        rows = [torch.randint(0, 9, (1, n), generator=generator) for n in counts]
        values = [torch.randn(n, 4, generator=generator, dtype=torch.float64).to(dtype) for n in counts]
        parts = [torch.sparse_coo_tensor(*pair, (9, 4), check_invariants=False) for pair in zip(rows, values, strict=True)]
        with counted() as traffic:
            total = sum_over_copies(parts[place], group)
        most = max(part._indices()[0].unique().numel() for part in parts)
        assert traffic == {"data": (size - 1) * (8 + most * (8 + 4 * dtype.itemsize))}
        torch.testing.assert_close(total.to_dense(), sum(part.to_dense() for part in parts), rtol=1e-5, atol=1e-6)
        assert total.is_coalesced() and hit_rows(total)[0].tolist() == sorted({r for part in parts for r in part._indices()[0].tolist()})
        everyone = [torch.empty(9, 4, dtype=dtype) for _ in range(size)]
        dist.all_gather(everyone, total.to_dense(), group=group)
        assert all(torch.equal(each, everyone[0]) for each in everyone)


def check_errors(group):
    with pytest.raises(IndexError, match="rows -1 to 40 are asked for, and the table has 37: 0 to 36"):
        problem = Problem(group)
        sharded_rows(problem.shard(), torch.tensor([[3, -1], [40, 5]]), 37, group)
    with pytest.raises(ValueError, match=f"place {group.rank()} of {group.size()} holds 1 rows of a table of 37, and should hold"):
        sharded_rows(torch.zeros(1, 6), torch.tensor([3]), 37, group)


CHECKS = [
    check_equality,
    check_traffic_and_statistics,
    check_twice_in_a_graph_and_recomputed,
    check_finite_differences,
    check_bits_and_order,
    check_optimizer_at_the_owner,
    check_sum_over_copies,
    check_errors,
]


def run_all():
    """Over all four processes, and over two groups of two whose ranks are not their places."""
    pairs = [dist.new_group(ranks, timeout=datetime.timedelta(seconds=60)) for ranks in ((0, 2), (1, 3))]
    for group, check in itertools.product((dist.group.WORLD, pairs[dist.get_rank() % 2]), CHECKS):
        check(group)
    return True


def test_over_four_processes_and_over_pairs_of_them():
    assert dist_run(run_all, 4) == [True] * 4


def asks_for_what_is_not_there():
    rows = torch.tensor([3, 99 if dist.get_rank() == 1 else 4])
    return sharded_rows(torch.zeros(5, 2), rows, 10, dist.group.WORLD)


def test_a_row_that_is_not_there_is_told_and_nobody_waits():
    with pytest.raises(ProcessError, match=r"(?s)rank 1 of 2 failed first:.*IndexError: rows 3 to 99 are asked for, and the table has 10"):
        dist_run(asks_for_what_is_not_there, 2)


def test_shards_are_those_of_torch_chunk():
    for total, processes in itertools.product((1, 2, 5, 7, 8, 64, 65), (1, 2, 3, 4, 8)):
        parts = [len(part) for part in torch.arange(total).chunk(processes)]
        assert [shard_size(total, processes, i) for i in range(processes)] == parts + [0] * (processes - len(parts))
        owner, offset = owner_and_offset(torch.arange(total), total, processes)
        assert torch.equal(owner, torch.arange(len(parts)).repeat_interleave(torch.tensor(parts)))
        assert torch.equal(offset, torch.cat([torch.arange(n) for n in parts]))


def test_sums_by_row_keep_the_order():
    rows, values = torch.tensor([5, 2, 5, 5]), torch.tensor([[2.0**24], [3.0], [1.0], [-(2.0**24)]])
    found, sums = sum_by_row(rows, values)
    assert found.tolist() == [2, 5] and sums.tolist() == [[3.0], [0.0]]  # 2^24 + 1 is 2^24 in float32
    assert [t.shape for t in sum_by_row(rows[:0], values[:0])] == [(0,), (0, 1)]


def test_one_process_needs_no_group():
    weight, rows = torch.randn(7, 3), torch.randint(0, 7, (2, 4))
    found = look_up(weight, rows, 7, None)
    assert torch.equal(found.values, F.embedding(rows, weight)) and torch.equal(sharded_rows(weight, rows, 7, None), found.values)
    assert found.distinct == len(rows.unique()) and torch.equal(found.asked, rows.unique())
    gradient = torch.sparse_coo_tensor(torch.tensor([[1]]), torch.ones(1, 3), (7, 3), check_invariants=False)
    assert sum_over_copies(gradient, None) is gradient
