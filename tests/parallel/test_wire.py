"""What `wire.counted` counts, by closed forms of each kind of communication, on two processes."""

import contextlib

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from longcat_lab.parallel import wire
from longcat_lab.parallel.collectives import gathered
from longcat_lab.parallel.exchange import exchange
from tests.parallel.processes import dist_run


def counting(function):
    with wire.counted() as sent:
        function()
    return {kind: (sent.calls_by_kind()[kind], sent.by_kind().get(kind, 0)) for kind in sent.calls_by_kind()}


def everything():
    rank, group, other = dist.get_rank(), dist.group.WORLD, 1 - dist.get_rank()
    x = torch.arange(12.0)  # 48 bytes
    alone = dist.new_group([0]), dist.new_group([1])
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("shard",))

    def talk():
        if rank == 0:
            dist.send(x, 1)
        else:
            dist.recv(torch.empty(12), 0)

    def both_ways():
        """As pipelines do it."""
        works = dist.batch_isend_irecv([dist.P2POp(dist.isend, x, other), dist.P2POp(dist.irecv, torch.empty(12), other)])
        for work in works:
            work.wait()

    def backwards():
        y = torch.ones(6, requires_grad=True)
        gathered(exchange(y, (2, 4) if rank == 0 else (4, 2), (2, 4) if rank == 0 else (4, 2), group), group, 0).sum().backward()

    def of_dtensors():
        DTensor.from_local(x, mesh, [Shard(0)]).full_tensor()

    def lists():
        dist.all_gather([torch.empty(12), torch.empty(12)], x)
        dist.reduce_scatter(torch.empty(6), [x[:6].clone(), x[6:].clone()])

    found = {
        "sums": counting(lambda: (dist.all_reduce(x.clone()), dist.all_reduce(torch.ones(3, dtype=torch.int64)))),
        "slices": counting(
            lambda: (dist.all_gather_single(torch.empty(24), x), dist.reduce_scatter_single(torch.empty(6), x)),
        ),
        "lists": counting(lists),
        "rows": counting(
            lambda: dist.all_to_all_single(torch.empty(12), x, [4, 8] if rank == 0 else [8, 4], [4, 8] if rank == 0 else [8, 4])
        ),
        "from one": counting(lambda: (dist.broadcast(x.clone(), 0), dist.gather(x, [torch.empty(12)] * 2 if rank == 0 else None))),
        "a message": counting(talk),
        "both ways": counting(both_ways),
        "backward passes": counting(backwards),
        "functional": counting(lambda: funcol.wait_tensor(funcol.all_reduce(x, "sum", group))),
        "DTensors": counting(of_dtensors),
        "alone": counting(lambda: dist.all_reduce(x.clone(), group=alone[rank])),
        "nothing": counting(dist.barrier),
    }
    with wire.counted() as sent:
        dist.all_reduce(x.clone(), group=mesh["shard"].get_group())
        dist.all_reduce(x.clone())
    return found, sent.by_group(), sent.total


def test_every_kind_costs_what_it_should():
    (first, groups, total), (second, _, _) = dist_run(everything, 2)
    for found, rank in ((first, 0), (second, 1)):
        assert found["sums"] == {"all-reduce": (2, 48 + 24)}  # 2 (g - 1) n / g
        assert found["slices"] == found["lists"] == {"all-gather": (1, 48), "reduce-scatter": (1, 24)}
        assert found["rows"] == {"all-to-all": (1, 32)}  # 8 of 12 go to the other one
        assert found["from one"] == {"broadcast": (1, 0 if rank else 48), "gather": (1, 48 if rank else 0)}
        assert found["a message"] == ({} if rank else {"send": (1, 48)})
        assert found["both ways"] == {"send": (1, 48)}
        # Rows there and back (4 of 6 go), and the slices of the gathered whole, whose gradient is summed by slices.
        assert found["backward passes"] == {"all-gather": (1, 24), "all-to-all": (2, 32), "reduce-scatter": (1, 24)}
        assert found["functional"] == {"all-reduce": (1, 48)}
        assert found["DTensors"] == {"all-gather": (1, 48)}
        assert found["alone"] == found["nothing"] == {}
    assert sum(groups.values()) == total == 96


def test_nothing_is_missed_silently():
    """A communication operator that is not in the tables stops the count."""
    with contextlib.ExitStack() as left:
        library = left.enter_context(torch.library._scoped_library("_dtensor", "FRAGMENT"))
        library.define("made_for_a_test(Tensor x) -> Tensor")
        library.impl("made_for_a_test", lambda x: x.clone(), "CPU")
        with pytest.raises(NotImplementedError, match="_dtensor::made_for_a_test"), wire.counted():
            torch.ops._dtensor.made_for_a_test(torch.ones(2))


def test_all_of_torchs_operators_are_known():
    """Of its own space, and of the functional one but for batched messages, which no code here uses and which would raise."""
    names = {each.partition("::") for each in torch._C._dispatch_get_all_op_names()}
    own = {name.partition(".")[0] for space, _, name in names if space == "c10d"}
    functional = {name.partition(".")[0] for space, _, name in names if space in ("_c10d_functional", "_c10d_functional_autograd")}
    assert own - {*wire.OPERATORS, *wire.SILENT} == set()
    assert functional - {*wire.FUNCTIONAL, *wire.SILENT} <= {"batch_p2p_ops"}
