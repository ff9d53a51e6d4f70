"""Which parameter is trained how: roles, optimizers, learning rates, decay and clipping.

A block says what a parameter is (`Block.roles`) and into how many matrices its rows divide (`Block.stacks`); the configuration says
what that means. `split` writes the outcome down parameter by parameter, and `make_optimizer` builds what `split` says.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from longcat_lab.blocks import Block
from longcat_lab.config import OptimizerConfig
from longcat_lab.errors import LabError
from longcat_lab.node import nearest
from longcat_lab.parallel.locally import local, placed
from longcat_lab.training.muon import StackedMuon
from longcat_lab.training.sharded_muon import ShardedMuon
from longcat_lab.training.table_optimizer import TableOptimizer, merge, table_betas, told

# Roles whose weights multiply activations: they decay, and their learning rate follows the width of the model.
PRODUCTS = ("matrix", "head", "router")
ROLES = (*PRODUCTS, "indexer", "embedding", "table", "vector")


@dataclasses.dataclass(frozen=True)
class Assignment:
    """How one parameter is trained.

    optimizer: `adamw`, `muon`, or for tables what `table_optimizer` names. stack: matrices one below the other in its last two
    dimensions, which Muon takes one by one. learning_rate: the peak, which the schedule multiplies; Muon multiplies it by a factor of
    the matrix's shape too. clipped: whether its gradient counts in the norm that is clipped, and is scaled with it.
    """

    name: str
    shape: tuple[int, ...]
    role: str
    stack: int
    optimizer: str
    learning_rate: float
    weight_decay: float
    clipped: bool = True


class Optimizers:
    """Several optimizers that share a model, with the face of one: what the loop and the checkpoints ask of it."""

    def __init__(self, parts: dict[str, torch.optim.Optimizer]) -> None:
        self.parts = parts

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups themselves, so that a learning rate set here is the one that is taken."""
        return [group for part in self.parts.values() for group in part.param_groups]

    def step(self) -> None:
        for part in self.parts.values():
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts.values():
            part.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises LabError where the state was saved by other optimizers; nothing has been loaded then."""
        if state.keys() != self.parts.keys():
            raise LabError(
                f"This optimizer state holds {', '.join(sorted(state))}, but the run trains with {', '.join(sorted(self.parts))}: "
                "set training.optimizer.kind and table_optimizer as they were, or delete the checkpoint."
            )
        for name, part in self.parts.items():
            part.load_state_dict(state[name])


def roles(model: nn.Module) -> dict[str, str]:
    """Role of each parameter by name: what its block declares, `head` for the output head, else `matrix` or `vector` by its shape."""
    # The head is a plain linear map of the model, which is no block that could declare it, and has this name in every checkpoint.
    declared = {"lm_head.weight": "head", **_declared(model, "roles")}
    return {name: declared.get(name, "matrix" if p.ndim > 1 else "vector") for name, p in model.named_parameters()}


def split(model: nn.Module, config: OptimizerConfig, width_scale: float = 1.0) -> list[Assignment]:
    """How each parameter is trained, in the model's order.

    Muon, if chosen, takes the role `matrix`: a parameter [m, n] as one matrix, [..., m, n] as a stack of them, and where its block
    declares `stacks` the rows of each as so many matrices one below the other. Tables have what `table_optimizer` names; embeddings,
    vectors, head and router have AdamW.

    Args:
        width_scale: s = hidden size / the width at which the learning rate was tuned. AdamW's rate of matrices, head and router is
            divided by it; decay, which is rate times `weight_decay`, shrinks along. Embeddings and tables keep theirs, as do vectors
            (norm gains, which the source does not name). Muon's is not scaled: the rule is Adam's, and rules for the spectral
            size of an update do not compose with it. (`original` makes steps whose spectral size does not grow with the width.)

    Raises:
        LabError: a block declares a role that does not exist, or a division or an optimizer that its parameter does not allow; an entry
            of `clip_without` is no role and matches no parameter.

    Source of the rule for the width: "Adam LR Full Align" in LongCat-Flash (arXiv 2509.01322); the initial weights have theirs.
    """
    declared, stacks = roles(model), _declared(model, "stacks")
    for entry in config.clip_without:
        if entry not in ROLES and not any(fnmatchcase(name, entry) for name in declared):
            hint = nearest(entry, list(ROLES))
            raise LabError(f"training.optimizer.clip_without: '{entry}' matches no parameter of this model and is no role{hint}")
    return [_assign(name, tuple(p.shape), declared[name], stacks.get(name, 1), config, width_scale) for name, p in model.named_parameters()]


def _assign(name: str, shape: tuple[int, ...], role: str, stack: int, config: OptimizerConfig, width_scale: float) -> Assignment:
    if role not in ROLES:
        raise LabError(f"{name}: its block declares the role '{role}'{nearest(role, list(ROLES))}")
    optimizer = "muon" if config.kind == "muon" and role == "matrix" else config.table_optimizer if role == "table" else "adamw"
    if optimizer == "muon" and (len(shape) < 2 or stack < 1 or shape[-2] % stack):
        raise LabError(
            f"{name}: {list(shape)} does not divide into {stack} matrices one below the other: correct `stacks` or `roles` of its block."
        )
    if role == "table" and optimizer != "adamw" and len(shape) != 2:
        raise LabError(f"{name}: a table of shape {list(shape)} has no rows for {optimizer}: make it [rows, width] in its block.")
    multiplier = {
        "embedding": config.embedding_lr_multiplier,
        "table": config.table_lr_multiplier,
        "indexer": config.index_lr_multiplier,
    }.get(role, 1.0)
    if optimizer == "muon":
        multiplier = config.muon_lr_multiplier
    product = role in PRODUCTS or (role == "indexer" and len(shape) > 1)
    if product and optimizer != "muon":
        multiplier = multiplier / width_scale
    decay = config.weight_decay if product else config.table_weight_decay if role == "table" else 0.0
    clipped = not any(entry == role or fnmatchcase(name, entry) for entry in config.clip_without)
    return Assignment(name, shape, role, stack, optimizer, config.learning_rate * multiplier, decay, clipped)


def _declared(model: nn.Module, attribute: str) -> dict[str, Any]:
    """What blocks declare of their parameters, by the parameters' names in the model."""
    return {
        f"{prefix}.{name}" if prefix else name: value
        for prefix, module in model.named_modules()
        if isinstance(module, Block)
        for name, value in getattr(module, attribute, {}).items()
    }


def split_table(rows: list[Assignment], config: OptimizerConfig | None = None) -> str:
    """`split` as text: one line for what is alike in all layers (numbers in names become `*`), then a line of sums.

    Further lines where they say something: what is not clipped, and (with `config`) how tables are trained.
    """
    alike: dict[tuple[str, ...], int] = {}
    size: dict[str, int] = {}
    for row in rows:
        line = (_pattern(row.name), _shape(row), row.role, row.optimizer, f"{row.learning_rate:g}", f"{row.weight_decay:g}")
        alike[line] = alike.get(line, 0) + 1
        size[row.optimizer] = size.get(row.optimizer, 0) + torch.Size(row.shape).numel()
    lines = [("parameter", "tensors", "shape", "role", "optimizer", "learning rate", "weight decay")]
    lines += [(line[0], str(count), *line[1:]) for line, count in alike.items()]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    text.append(", ".join(f"{name}: {count:,} parameters" for name, count in sorted(size.items())))
    free = dict.fromkeys(_pattern(row.name) for row in rows if not row.clipped)
    if free:
        text.append(f"outside the gradient's norm, and not clipped: {', '.join(free)}")
    if config and any(row.role == "table" for row in rows):
        text.append(told(config))
    return "\n".join(text)


def _pattern(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def _shape(row: Assignment) -> str:
    sizes = [str(size) for size in row.shape]
    if row.stack > 1:
        sizes[-2] = f"{row.stack}x{row.shape[-2] // row.stack}"
    return f"[{', '.join(sizes)}]"


def make_optimizer(
    model: nn.Module, config: OptimizerConfig, width_scale: float = 1.0, stage: ProcessGroup | None = None
) -> torch.optim.Optimizer | Optimizers:
    """What `split` says, as one AdamW or as Optimizers; `group["peak"]` is a group's peak learning rate, `group["role"]` its role.

    Where AdamW trains all, head and router stand in the group of the matrices: they are trained alike, and the order in which
    `clip` sums (hence the last bit of the norm) is that of the groups. `group["clipped"]`: whether `clip` minds it.

    Blocks that declare a table are told whether its gradient is to be sparse.

    stage: the processes that hold parts of the model's matrices, if there are several.
    """
    for module in model.modules():
        if isinstance(module, Block) and "table" in module.roles.values():
            module.sparse_gradients = config.table_optimizer != "adamw"
    parts: dict[str, dict[Any, dict[str, Any]]] = {}
    parameters = dict(model.named_parameters())
    for row in split(model, config, width_scale):
        role = "matrix" if config.kind == "adamw" and row.role in PRODUCTS else row.role
        stack = row.stack if row.optimizer == "muon" else 1
        part = "stacked_muon" if row.optimizer == "muon" and (stack > 1 or len(row.shape) > 2) else row.optimizer
        rates = {"role": role, "peak": row.learning_rate, "lr": row.learning_rate, "weight_decay": row.weight_decay}
        # Fused steps take tensors that lie alike over the processes.
        alike = (role, stack, row.clipped, row.weight_decay, placed(parameters[row.name]))
        group = parts.setdefault(part, {}).setdefault(alike, {"params": [], "clipped": row.clipped, **rates})
        group["params"].append(parameters[row.name])
        if role == "table":
            group["betas"] = table_betas(config)
        if part == "stacked_muon":
            group["stack"] = stack
    if stage is not None and "muon" in parts:  # one exchange for all
        parts["stacked_muon"] = {**parts.pop("muon"), **{(*key, "stacked"): group for key, group in parts.get("stacked_muon", {}).items()}}
    made = {part: _make(part, list(groups.values()), config, stage) for part, groups in parts.items()}
    return next(iter(made.values())) if len(made) == 1 else Optimizers(made)


def _make(part: str, groups: list[dict[str, Any]], config: OptimizerConfig, stage: ProcessGroup | None) -> torch.optim.Optimizer:
    if part == "adamw":
        return torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)
    if part == config.table_optimizer:
        return TableOptimizer(groups, part, eps=config.eps, momentum=config.table_momentum)
    kind = {"muon": torch.optim.Muon, "stacked_muon": StackedMuon}[part]
    return (kind if stage is None else functools.partial(ShardedMuon, group=stage))(
        groups,
        momentum=config.momentum,
        nesterov=config.nesterov,
        ns_steps=config.ns_steps,
        eps=config.muon_eps,
        adjust_lr_fn=config.adjust_lr_fn,
    )


def added_bytes(model: nn.Module, config: OptimizerConfig) -> Callable[[str, nn.Parameter], float]:
    """What training keeps beside a parameter, in bytes: its gradient (of tables that are stepped on row by row: none) and its state."""
    modes = {row.name: row.optimizer for row in split(model, config)}
    copies = {"adamw": 3, "muon": 2, "lazy_adam": 2, "sgd": 1 if config.table_momentum else 0}

    def added(name: str, parameter: nn.Parameter) -> float:
        if modes[name] == "row_wise":
            return parameter.shape[0] * parameter.element_size()
        return copies[modes[name]] * parameter.nbytes

    return added


def set_learning_rate(optimizer: torch.optim.Optimizer | Optimizers, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor


@torch.no_grad()
def clip(
    optimizer: torch.optim.Optimizer | Optimizers, largest: float, norm_of: Callable[[list[nn.Parameter]], Tensor] | None = None
) -> float:
    """Scales the gradients of everything but `clip_without` to an L2 norm of at most `largest`; the norm before.

    Tables stay out unless asked for: their gradient's norm follows the number of rows hit, and would set the step of all others.
    Sparse gradients that count are left merged, so that the optimizer need not do it again.

    norm_of: the norm of these parameters' gradients where other processes have parts of them; all call it.
    """
    counted = [p for group in optimizer.param_groups if group["clipped"] for p in group["params"] if p.grad is not None]
    gradients = []
    for parameter in counted:
        if parameter.grad.is_sparse:
            parameter.grad = merge(parameter.grad)
        gradients.append(parameter.grad._values() if parameter.grad.is_sparse else local(parameter.grad))
    norm = nn.utils.get_total_norm(gradients) if norm_of is None else norm_of(counted)
    # What torch's clip_grad_norm_ does, which takes no sparse gradients: the bits are the same.
    scale = torch.clamp(largest / (norm + 1e-6), max=1.0)
    for gradient in gradients:
        gradient.mul_(scale)
    return float(norm)
