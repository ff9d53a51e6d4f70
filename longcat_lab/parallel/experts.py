"""Expert and embedding parallelism in the model: what asks the holders of experts, and of table rows."""

from __future__ import annotations

import dataclasses

import torch
import torch.distributed as dist
from torch import Tensor

from longcat_lab.blocks.moe.experts_op import ZeroExpertType
from longcat_lab.blocks.moe.module import MoE
from longcat_lab.blocks.table import Table
from longcat_lab.config.parallel import ParallelConfig
from longcat_lab.parallel.collectives import count_traffic, own_part, part_sizes, sum_forward, whole
from longcat_lab.parallel.embedding_op import sharded_rows, sum_over_copies
from longcat_lab.parallel.expert_op import Held, Picks
from longcat_lab.parallel.locally import run_locally
from longcat_lab.parallel.world import Group


@dataclasses.dataclass
class _OfAll:
    """Picks of this process's part (`sizes`) of the tokens that a tensor group shares."""

    picks: Picks
    tensor: Group
    sizes: tuple[int, ...] | None

    def compute(self, held: Held) -> None:
        self.picks.compute(held)

    def end(self) -> Tensor:
        out = self.picks.end()
        with count_traffic("tensor"):
            return whole(out, self.tensor, 0, self.sizes)


def connect_experts(module: MoE, group: dist.ProcessGroup, tensor: Group, how: ParallelConfig) -> None:
    """Lets `module`, which holds its part of the experts, ask the others. The processes of a tensor group have the same tokens: each
    sends a part of them, and all get all answers.
    """
    held = module.config.n_routed_experts // group.size()

    def send(u: Tensor, slots: Tensor, weights: Tensor, zero_expert_type: ZeroExpertType) -> _OfAll:
        sizes = None if tensor is None else part_sizes(len(u), tensor.size())
        with count_traffic("tensor"):
            here = [own_part(each, tensor, 0) for each in (u, slots, weights)]
        picks = Picks(*here, held, zero_expert_type, group, how.dispatch == "process", how.moe_chunks, how.overlap)
        if hasattr(module, "unshard"):  # FSDP2's: weights come while rows travel, to be waited for where they are used
            module.unshard(async_op=True)
        return _OfAll(picks, tensor, sizes)

    module.send = send
    for method in ("forward", "apart"):
        run_locally(module, [(module, "gate_up_proj"), (module, "down_proj")], method)


def connect_table(module: Table, total: int, group: Group, tensor: Group) -> None:
    """Lets a table of `total` rows, of which `module` holds a part, be read by all."""

    def lookup(rows: Tensor) -> Tensor:
        flat = rows.flatten()
        sizes = None if tensor is None else part_sizes(len(flat), tensor.size())
        with count_traffic("tensor"):
            own = own_part(flat, tensor, 0)
        with count_traffic("embedding"):
            found = sharded_rows(module.weight, own, total, group, module.sparse_gradients)
        with count_traffic("tensor"):
            return whole(found, tensor, 0, sizes).view(*rows.shape, -1)

    module.lookup = lookup


@torch.no_grad()
def sum_table_gradient(module: Table, copies: Group) -> None:
    """Adds up the gradients of the processes that hold the same rows."""
    weight = module.weight
    if copies is None:
        return
    if not module.sparse_gradients:
        weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        with count_traffic("data"):
            weight.grad = sum_forward(weight.grad, copies)
        return
    if weight.grad is None:
        none = torch.zeros(1, 0, dtype=torch.int64, device=weight.device), weight.new_zeros(0, weight.shape[1])
        weight.grad = torch.sparse_coo_tensor(*none, weight.shape)
    weight.grad = sum_over_copies(weight.grad, copies)
