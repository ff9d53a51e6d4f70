"""A whole optimizer step of a small run over real processes, and what each of them sent in it."""

import contextlib

import torch
import torch.distributed as dist

import longcat_lab as lab
from longcat_lab.blocks.context import in_backward
from longcat_lab.blocks.moe.module import MoE
from longcat_lab.blocks.table import Table
from longcat_lab.data import Batch
from longcat_lab.parallel import collectives, placement, wire
from longcat_lab.parallel.collectives import part_sizes
from longcat_lab.parallel.embedding_op import owner_and_offset
from longcat_lab.parallel.placement import build_part
from longcat_lab.parallel.planner import Travelled
from longcat_lab.parallel.world import World
from longcat_lab.training import mechanisms
from longcat_lab.training.loss import plan_step
from longcat_lab.training.optimizer import clip, make_optimizer
from longcat_lab.training.steps import Steps
from tests.parallel.planner.live import Live


class SmallRun:
    """Model, optimizer and step of `settings` on this process, as a session puts them together."""

    def __init__(self, settings):
        self.config = config = lab.load("tiny", *settings)
        self.world = World(config, torch.device("cpu"))
        self.model = (build_part(config, self.world) if self.world.size > 1 else lab.build(config)).train()
        self.model.recompute = config.training.recompute
        self.steps = Steps(self.model, config, self.world)
        self.optimizer = make_optimizer(self.model, config.training.optimizer, config.model.width_scale, self.world.stage)

    def batch(self, seed=0):
        """This process's part of a global batch of random tokens."""
        data, ways = self.config.data, self.world.layout.batch_ways
        generator = torch.Generator().manual_seed(1000 * seed + self.world.batch_place)
        tokens = torch.randint(0, self.config.model.vocab_size, (data.batch_size // ways, data.sequence_length + 1), generator=generator)
        return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), torch.zeros_like(tokens[:, 1:]))

    def step(self, batch):
        """From the plan of the step to the question whether to stop: what `Session` does with a batch that is no logged one."""
        plan = plan_step(batch, self.config, 0, world=self.world)
        self.steps.gradients(batch, plan)
        clip(self.optimizer, self.config.training.optimizer.clip_norm, self.steps.norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        mechanisms.after_step(self.model, self.steps.summed)
        self.world.any(False)


@contextlib.contextmanager
def travelling(run):
    """What the data decides in the steps in here: `found()` afterwards gives it. All processes come here and call that."""
    world, config = run.world, run.config
    picks, again, rows = (torch.zeros(world.size, dtype=torch.int64) for _ in range(3))
    summed, replaced = [], []

    def own(x):
        return x if world.tensor is None else x.split(part_sizes(len(x), world.tensor.size()))[world.tensor.rank()]

    def others(group, owner):
        """To whom (global ranks) entries go that others own."""
        ranks = torch.tensor(dist.get_process_group_ranks(group))[owner]
        return ranks[ranks != world.rank]

    def replace(module, name, function):
        replaced.append((module, name, module.__dict__.get(name)))
        setattr(module, name, function)

    for module in run.model.modules():
        if isinstance(module, MoE) and world.expert is not None:
            each = module.config.n_routed_experts // world.layout.expert

            def send(u, slots, *rest, inner=module.send, each=each):
                owner = own(slots) // each  # of a zero-expert's pick: nobody
                if config.parallel.dispatch == "process":
                    owner = torch.cat([row.unique() for row in owner])
                real = owner[owner < world.layout.expert].flatten()
                (again if in_backward() else picks).index_add_(0, to := others(world.expert, real), torch.ones_like(to))
                return inner(u, slots, *rest)

            replace(module, "send", send)
        elif isinstance(module, Table) and not module.idle and world.size > 1:

            def lookup(asked, inner=module.lookup, total=module.rows):
                ids = own(asked.flatten()).unique()
                if world.embedding is not None:
                    owner, _ = owner_and_offset(ids, total, world.layout.embedding)
                    rows.index_add_(0, to := others(world.embedding, owner), torch.ones_like(to))
                return inner(asked)

            replace(module, "lookup", lookup)
    if config.training.optimizer.table_optimizer != "adamw" and world.embedding_replicate is not None:
        plain = placement.sum_table_gradient

        def sum_table_gradient(module, copies):
            gradient = module.weight.grad
            summed.append(0 if gradient is None else len(gradient._indices()[0].unique()))
            plain(module, copies)

        placement.sum_table_gradient = sum_table_gradient

    def found():
        if world.size == 1:
            return Travelled()
        longest = torch.tensor(summed)
        if summed:
            dist.all_reduce(longest, dist.ReduceOp.MAX, world.embedding_replicate)
        (sent, answered), second, (asked, heard) = ((int(each.sum()), _meant_for(world.rank, each)) for each in (picks, again, rows))
        return Travelled(sent, answered, asked, heard, second, tuple(longest.tolist()))

    try:
        yield found
    finally:
        for module, name, before in replaced:
            delattr(module, name)
            if before is not None:
                setattr(module, name, before)
        if summed:
            placement.sum_table_gradient = plain


def _meant_for(rank, counts):
    """The sum of what all have at this one's place."""
    found = [torch.zeros_like(counts) for _ in range(dist.get_world_size())]
    dist.all_gather(found, counts)
    return sum(int(each[rank]) for each in found)


def one_step(settings):
    """(Travelled, bytes by purpose, Wire) of this process, of the second step of a run (the first one makes the optimizer's state)."""
    run = SmallRun(settings)
    run.step(run.batch(0))
    with travelling(run) as found:
        with wire.counted() as sent, collectives.counted() as traffic:
            run.step(run.batch(1))
        travelled = found()
    return travelled, dict(traffic), sent


def held_bytes(tensors):
    """Of different storages: what lies there, padding included."""
    local = [each.to_local() if hasattr(each, "to_local") else each for each in tensors]
    return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in local if each.numel()}.values())


def step_in_memory(settings):
    """Bytes of this process in the second step of a run: weights, gradients and optimizer state; `forward`: what the forward pass of the
    last micro-batch leaves; `peak`: the most that there was before the optimizer's step, all of these included.
    """
    run = SmallRun(settings)
    run.step(run.batch(0))
    parameters = list(run.model.parameters())
    state = [t for part in getattr(run.optimizer, "parts", {"": run.optimizer}).values() for s in part.state.values() for t in s.values()]
    state = [each for each in state if isinstance(each, torch.Tensor)]
    live, forward, grown = Live(*parameters, *state), run.steps.trainee.forward, []

    def watched(*args, **kwargs):
        before = live.now
        found = forward(*args, **kwargs)
        grown.append(live.now - before)
        return found

    run.steps.trainee.forward = watched
    batch = run.batch(1)
    with live:
        run.steps.gradients(batch, plan_step(batch, run.config, 0, world=run.world))
    local = [each.to_local() if hasattr(each, "to_local") else each for each in state]
    return {
        "weights": held_bytes(parameters),
        "gradients": held_bytes([each.grad for each in parameters if each.grad is not None]),
        "state": sum(each.nbytes for each in local),
        "forward": grown[-1],
        "peak": live.peak,
    }
