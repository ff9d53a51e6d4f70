"""Predicted bytes of a step against those that real processes send: counted by the collectives, and FSDP2's at torch's own operators."""

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import longcat_lab as lab
from longcat_lab.blocks.context import in_backward
from longcat_lab.blocks.moe.module import MoE
from longcat_lab.blocks.table import Table
from longcat_lab.config import ParallelConfig
from longcat_lab.data import Batch
from longcat_lab.parallel.collectives import counted, part_sizes
from longcat_lab.parallel.embedding_op import owner_and_offset
from longcat_lab.parallel.layout import make_layout
from longcat_lab.parallel.planner import Travelled, by_purpose, predict_step
from tests.parallel.processes import dist_run

PLAIN = [
    *("model.num_layers=2", "data.sequence_length=16", "data.batch_size=8", "training.precision=fp32", "model.moe.n_routed_experts=4"),
    *("training.micro_batch_size=1", "model.mtp.num_nextn_predict_layers=1", "training.optimizer.table_optimizer=adamw"),
]
TABLES = ["model.embedding.ngram.order=3", "model.embedding.ngram.splits=2", "model.embedding.ngram.table_rows=101"]
LAYOUTS = {
    "tensor, expert, embedding": (*TABLES, "parallel.tensor=2", "parallel.expert=2", "parallel.embedding=4"),
    "context, expert, recomputed": ("parallel.context=2", "parallel.expert=4", "training.recompute=true"),
    "tensor, expert, recomputed": ("parallel.tensor=2", "parallel.expert=2", "training.recompute=true"),
    "copies of tables": (*TABLES, "parallel.data_replicate=2", "parallel.embedding=2"),
    "data_shard": (),
    "data_shard, expert": ("parallel.expert=2",),
    "pipeline": ("parallel.pipeline=2",),
}


class Sharding(TorchDispatchMode):
    """Bytes that this process sends in FSDP2's own collectives (all gathers and reduce-scatters that are not counted by purpose)."""

    def __init__(self):
        super().__init__()
        self.sent = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        if "_allgather_base_" in name or "_reduce_scatter_base_" in name:
            self.sent += abs(args[0].nbytes - args[1].nbytes)
        elif name.startswith("c10d.allreduce_") and args[0][0].numel() > 4:
            group = dist._get_default_group() if len(args) < 2 else args[1]
            size = group.size() if hasattr(group, "size") else dist.ProcessGroup.unbox(group).size()
            self.sent += 2 * (size - 1) * args[0][0].nbytes // size
        return function(*args, **(kwargs or {}))


def measured(settings):
    """(Travelled of this process, bytes by purpose, bytes that FSDP2 sent) of one step's gradients in a real layout."""
    from longcat_lab.parallel.placement import build_part
    from longcat_lab.parallel.world import World
    from longcat_lab.training.loss import plan_step
    from longcat_lab.training.steps import Steps

    config = lab.load("tiny", *PLAIN, *settings)
    world = World(config, torch.device("cpu"))
    model = build_part(config, world).train()
    model.recompute = config.training.recompute
    picks = torch.zeros(world.size, dtype=torch.int64)
    rows = torch.zeros(world.size, dtype=torch.int64)

    def own(x):
        if world.tensor is None:
            return x
        sizes = part_sizes(len(x), world.tensor.size())
        return x.split(sizes)[world.tensor.rank()]

    def others(group, owner):
        """To whom (global ranks) entries go that others own."""
        ranks = torch.tensor(dist.get_process_group_ranks(group))[owner]
        return ranks[ranks != world.rank]

    for module in model.modules():
        if isinstance(module, MoE) and world.expert is not None:
            each, inner = module.config.n_routed_experts // world.layout.expert, module.compute

            def compute(u, slots, *rest, inner=inner, each=each):
                if not in_backward():  # passes that run again are counted once
                    real = own(slots).flatten()
                    real = real[real < each * world.layout.expert]
                    picks.index_add_(0, to := others(world.expert, real // each), torch.ones_like(to))
                return inner(u, slots, *rest)

            module.compute = compute
        elif isinstance(module, Table) and world.embedding is not None:
            inner = module.lookup

            def lookup(asked, inner=inner, total=module.rows):
                owner, _ = owner_and_offset(own(asked.flatten()).unique(), total, world.layout.embedding)
                rows.index_add_(0, to := others(world.embedding, owner), torch.ones_like(to))
                return inner(asked)

            module.lookup = lookup
    steps = Steps(model, config, world)
    generator = torch.Generator().manual_seed(world.batch_place)
    tokens = torch.randint(0, config.model.vocab_size, (8 // world.layout.batch_ways, 17), generator=generator)
    batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), torch.zeros_like(tokens[:, 1:]))
    plan = plan_step(batch, config, 0)
    with Sharding() as sharding, counted() as traffic:
        steps.gradients(batch, plan)
    all_picks, all_rows = (torch.stack(dist_all(each)) for each in (picks, rows))
    me = world.rank
    travelled = Travelled(int(picks.sum()), int(all_picks[:, me].sum()), int(rows.sum()), int(all_rows[:, me].sum()))
    return travelled, dict(traffic), sharding.sent


def dist_all(x):
    found = [torch.zeros_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(found, x)
    return found


def all_layouts():
    return {name: measured(settings) for name, settings in LAYOUTS.items()}


@pytest.fixture(scope="module")
def runs():
    return dist_run(all_layouts, 4)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_bytes_are_those_that_the_collectives_counted(runs, name):
    config = lab.load("tiny", *PLAIN, *LAYOUTS[name])
    layout = make_layout(config, 4)
    for rank, found in enumerate(runs):
        travelled, traffic, _ = found[name]
        predicted = by_purpose(predict_step(config, layout, travelled, rank))
        for purpose in ("expert", "embedding", "context", "tensor"):
            assert predicted[purpose] == traffic.get(purpose, 0), (purpose, rank)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["data_shard", "data_shard, expert", "pipeline"])
def test_bytes_of_sharded_weights_are_those_that_fsdp_sends(runs, name):
    config = lab.load("tiny", *PLAIN, *LAYOUTS[name])
    layout = make_layout(config, 4)
    for rank, found in enumerate(runs):
        sent = predict_step(config, layout, found[name][0], rank)
        ends = sum(each.bytes for each in sent if each.what == "gradient of the token rows of both ends")  # the other large all-reduce
        assert by_purpose(sent)["data"] + ends == found[name][2], rank


@pytest.mark.slow
def test_something_travels(runs):
    travelled, traffic, _ = runs[0]["tensor, expert, embedding"]
    assert travelled.picks_sent and travelled.picks_answered and travelled.rows_asked and travelled.rows_answered
    assert all(traffic[purpose] for purpose in ("expert", "embedding", "tensor"))
    assert ParallelConfig() == lab.load("tiny", *PLAIN).parallel
