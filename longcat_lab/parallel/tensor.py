"""Tensor parallelism: each process has some heads of every attention, some inner columns of every dense network, some rows of the head.

    attention   c_q, c_kv, k_rope on all; W_qb, W_kvb by heads (rows), W_o by heads (columns); one sum at the end
    SwiGLU      gate and up by rows, down by columns; one sum at the end
    head        by rows of the vocabulary; the softmax's maximum and sum, and the label's logit, are reduced

What is not named here (norms, latents, indexer, router, embedding) is computed by all alike, and so are its gradients: the gradient that
enters a divided region's input is summed on its way out. Source: Shoeybi et al. 2019 (arXiv 1909.08053) section 3.
"""

from __future__ import annotations

import functools

import torch
import torch.distributed as dist
from torch import Tensor, nn

from longcat_lab.blocks.loss_op import Vocabulary
from longcat_lab.blocks.mla.module import MLA
from longcat_lab.blocks.sparse_attention.module import SparseAttention
from longcat_lab.blocks.swiglu.module import SwiGLU
from longcat_lab.errors import LabError
from longcat_lab.model import LongcatLM
from longcat_lab.parallel.collectives import add_traffic, count_traffic, gathered, place_in, reduce_bytes, sum_forward, sum_in_backward
from longcat_lab.parallel.locally import Weight, run_locally


def divided(model: LongcatLM) -> list[tuple[Weight, int]]:
    """Weights that are divided over the tensor axis, and in which dimension."""
    found: list[tuple[Weight, int]] = []
    for module in model.modules():
        if isinstance(module, MLA):
            names = [name for name in ("q_proj", "q_b_proj", "kv_b_proj") if hasattr(module, name)]
            found += [((getattr(module, name), "weight"), 0) for name in names] + [((module.o_proj, "weight"), 1)]
        elif isinstance(module, SwiGLU):
            found += [((module.gate_proj, "weight"), 0), ((module.up_proj, "weight"), 0), ((module.down_proj, "weight"), 1)]
    if isinstance(model.lm_head, nn.Linear):
        found.append(((model.lm_head, "weight"), 0))
    return found


def check(model: LongcatLM, ways: int) -> None:
    """Raises LabError where a width cannot be divided evenly over `ways` processes."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for (owner, name), dim in divided(model):
        weight = owner._parameters[name]
        if weight.shape[dim] % ways:
            raise LabError(
                f"parallel.tensor {ways} does not divide {weight.shape[dim]}, a width of {names[id(weight)]}: change one of them."
            )


def connect(model: LongcatLM, group: dist.ProcessGroup) -> None:
    """Lets the modules of `model`, whose weights are divided already, compute together."""
    for module in model.modules():
        if isinstance(module, MLA):
            _attention(module, group)
        elif isinstance(module, SwiGLU):
            _dense(module, group)
    if isinstance(model.lm_head, nn.Linear):
        rows = model.config.vocab_size // group.size()
        reduce = functools.partial(_reduced, group=group)
        model.vocabulary = Vocabulary(rows * place_in(group), reduce, functools.partial(reduce, how=dist.ReduceOp.MAX))


def _reduced(values: Tensor, group: dist.ProcessGroup, how: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    values = values.contiguous()
    dist.all_reduce(values, how, group)
    add_traffic(reduce_bytes(values.nbytes, group.size()), "tensor")
    return values


def _attention(module: MLA, group: dist.ProcessGroup) -> None:
    latent, latents = module.query_latent, module.latents
    module.heads //= group.size()

    def entering(x: Tensor) -> Tensor:
        with count_traffic("tensor"):
            return sum_in_backward(x, group)

    def leaving(_: nn.Module, __: tuple, out: Tensor) -> Tensor:
        with count_traffic("tensor"):
            return sum_forward(out, group)

    def all_heads(q: Tensor) -> Tensor:
        with count_traffic("tensor"):
            return gathered(q.detach(), group, 2)

    module.query_latent = lambda x: entering(latent(x))
    module.latents = lambda x, rope: tuple(entering(each) for each in latents(x, rope))
    module.o_proj.register_forward_hook(leaving)
    if isinstance(module, SparseAttention):
        module.over_heads = lambda mass: _reduced(mass.clone(), group) / group.size()
        module.all_heads = all_heads
    names = [name for name in ("q_proj", "q_b_proj", "kv_b_proj", "o_proj") if hasattr(module, name)]
    run_locally(module, [(getattr(module, name), "weight") for name in names])


def _dense(module: SwiGLU, group: dist.ProcessGroup) -> None:
    run_locally(module, [(each, "weight") for each in (module.gate_proj, module.up_proj, module.down_proj)])
    inner = module.forward

    def forward(x: Tensor) -> Tensor:
        with count_traffic("tensor"):
            return sum_forward(inner(sum_in_backward(x, group)), group)

    module.forward = forward


def columns(weight: torch.Size, dim: int, group: dist.ProcessGroup) -> tuple[int, int]:
    """First entry and number of entries of dimension `dim` that this process holds."""
    size = weight[dim] // group.size()
    return size * place_in(group), size
