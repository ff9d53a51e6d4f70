"""Bytes that one process sends in one optimizer step of a real run, exactly, by purpose: to hold against what the collectives counted.

Conventions are those of `parallel.collectives`: bytes that leave the process, a purpose each. What depends on the data (which picks
travel, which rows are asked for) is an argument. fp32 runs (`training.precision: fp32`), even cuts of layers.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator

import torch
from torch import nn

from longcat_lab.blocks.mla.module import MLA
from longcat_lab.blocks.moe.module import MoE
from longcat_lab.blocks.swiglu.module import SwiGLU
from longcat_lab.blocks.table import Table
from longcat_lab.config import RunConfig
from longcat_lab.model import LongcatLM
from longcat_lab.parallel.collectives import gather_bytes, part_sizes, reduce_bytes
from longcat_lab.parallel.layout import Layout
from longcat_lab.parallel.planner.parts import TENSOR_PARTS
from longcat_lab.parallel.planner.pipeline import fixed_order

FP32, INT64, FP64 = 4, 8, 8


@dataclasses.dataclass(frozen=True)
class Sent:
    """bytes: sent by this process in one step; calls: collectives it takes part in. what: in words."""

    purpose: str
    what: str
    calls: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Travelled:
    """What the data decides, of one process, in all forward passes of a step but those that run again.

    picks_sent: real picks of its tokens whose expert another process holds; picks_answered: such picks of others that it computed.
    rows_asked: different table rows that it asked others for, each pass counted apart; rows_answered: rows that others asked it for.
    """

    picks_sent: int = 0
    picks_answered: int = 0
    rows_asked: int = 0
    rows_answered: int = 0


def predict_step(config: RunConfig, layout: Layout, travelled: Travelled = Travelled(), rank: int = 0) -> list[Sent]:
    """What process `rank` of `layout` sends in one optimizer step of `config`.

    Not in it: evaluation, checkpoints, logging, Muon's gathering, and reductions of single numbers a token (the divided softmax of the
    head, the index KL's mean over heads), which are not counted by purpose either. FSDP2's part (`data`) is exact without
    `training.recompute`.
    """
    with torch.device("meta"):
        model = LongcatLM(config.model)
    here = _Here(config, layout, model, layout.coordinates(rank)["pipeline"])
    return [each for each in (*_inside(here, travelled), *_data(here), *_outside(here)) if each.calls]


def by_purpose(sent: list[Sent]) -> Counter[str]:
    """Bytes by purpose, as `collectives.counted` gives them."""
    return sum((Counter({each.purpose: each.bytes}) for each in sent), Counter())


@dataclasses.dataclass(frozen=True)
class _Here:
    config: RunConfig
    layout: Layout
    model: LongcatLM
    number: int  # of the stage

    @property
    def stage(self) -> tuple[int, int]:
        return self.layout.stages[self.number]

    @property
    def first(self) -> bool:
        return self.number == 0

    @property
    def last(self) -> bool:
        return self.number == self.layout.pipeline - 1

    @property
    def rows(self) -> int:
        """Sequences of a micro-batch."""
        return self.config.training.micro_batch_size or self.config.data.batch_size // self.layout.batch_ways

    @property
    def micros(self) -> int:
        return self.config.data.batch_size // self.layout.batch_ways // self.rows

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch here."""
        return self.rows * self.config.data.sequence_length // self.layout.context

    def runs(self) -> Iterator[tuple[nn.Module, int, int]]:
        """What runs here: (module, forward passes, backward passes) a micro-batch; a pass that runs again counts twice."""
        again = 2 if self.config.training.recompute else 1
        for layer in self.model.layers[self.stage[0] : self.stage[1]]:
            yield layer, again, 1
        mtp = self.config.model.mtp
        if self.last and mtp is not None and mtp.weight_at(0.0):
            for step in range(1, mtp.num_nextn_predict_layers + 1):
                yield self.model.mtp.block(step), 2 if mtp.recompute else 1, 1


def _inside(here: _Here, travelled: Travelled) -> list[Sent]:
    """Collectives inside the forward and backward passes: of attentions, networks, mixtures, tables."""
    found, calls = Counter(), Counter()

    def put(purpose: str, what: str, times: int, size: int) -> None:
        found[purpose, what] += times * size
        calls[purpose, what] += times

    passes = 1
    for module, forward, backward in here.runs():
        times = forward * here.micros, backward * here.micros
        within = list(module.modules())
        for inner in within:
            if isinstance(inner, MLA):
                _attention(here, inner, *times, put)
            elif isinstance(inner, SwiGLU) and here.layout.tensor > 1:
                size = reduce_bytes(here.tokens * inner.down_proj.out_features * FP32, here.layout.tensor)
                put("tensor", "sums of dense networks", sum(times), size)
            elif isinstance(inner, MoE):
                _mixture(here, inner, *times, put)
                passes = max(passes, forward)
        if forward > 1 and here.layout.tensor > 1:  # a pass that runs again ends where nothing more is kept: before its last sum
            hidden, ways = here.config.model.hidden_size, here.layout.tensor
            if any(isinstance(inner, SwiGLU) for inner in within):
                put("tensor", "sums of dense networks", -here.micros, reduce_bytes(here.tokens * hidden * FP32, ways))
            elif here.layout.expert > 1:
                put("tensor", "mixtures' outputs", -here.micros, gather_bytes(max(part_sizes(here.tokens, ways)) * hidden * FP32, ways))
    if here.layout.expert > 1:  # the data's part: what was sent comes back, and both go again backwards
        rows = (passes + 1) * (travelled.picks_sent + travelled.picks_answered)
        put("expert", "tokens to experts and back", 1, rows * here.config.model.hidden_size * FP32)
    if here.first:
        _tables(here, travelled, put)
    return [Sent(purpose, what, calls[purpose, what], size) for (purpose, what), size in found.items()]


def _attention(here: _Here, module: MLA, forward: int, backward: int, put) -> None:
    c, tokens, layout = module.config, here.tokens, here.layout
    latent = c.kv_lora_rank + c.qk_rope_head_dim
    if layout.context > 1:
        put("context", "latents of the whole row", forward + backward, gather_bytes(tokens * latent * FP32, layout.context))
    if layout.tensor > 1:
        hidden = module.o_proj.out_features
        put("tensor", "sums of attentions", forward, reduce_bytes(tokens * hidden * FP32, layout.tensor))
        for width in (c.q_lora_rank or hidden, c.kv_lora_rank, c.qk_rope_head_dim):
            put("tensor", "gradients of latents", backward, reduce_bytes(tokens * width * FP32, layout.tensor))


def _mixture(here: _Here, module: MoE, forward: int, backward: int, put) -> None:
    """Counts of picks, and what tensor ranks hand each other because each sends its part of the tokens."""
    layout, c = here.layout, module.config
    if layout.expert == 1:
        return
    put("expert", "counts of picks", forward, gather_bytes(c.n_routed_experts // layout.expert * INT64, layout.expert))
    if layout.tensor > 1:
        longest = max(part_sizes(here.tokens, layout.tensor))
        hidden = here.config.model.hidden_size
        put("tensor", "mixtures' outputs", forward, gather_bytes(longest * hidden * FP32, layout.tensor))
        for width in (hidden, c.moe_topk):
            put("tensor", "gradients of mixtures' inputs", backward, gather_bytes(longest * width * FP32, layout.tensor))


def _tables(here: _Here, travelled: Travelled, put) -> None:
    tables = [each for each in here.model.embed_tokens.modules() if isinstance(each, Table) and not each.idle]
    ways, ngram = here.layout.embedding, getattr(here.config.model.embedding, "ngram", None)
    for table in tables:
        width = table.weight.shape[1]
        if here.layout.tensor > 1:
            longest = max(part_sizes(here.tokens * ngram.tables, here.layout.tensor))
            put("tensor", "table rows", here.micros, gather_bytes(longest * width * FP32, here.layout.tensor))
        if ways > 1:
            put("embedding", "counts of rows", here.micros, gather_bytes(INT64, ways))
    if tables and ways > 1:
        width = tables[0].weight.shape[1]
        rows = travelled.rows_asked * (INT64 + width * FP32) + travelled.rows_answered * width * FP32
        put("embedding", "row numbers, rows, and their gradients", 1, rows)
    copies = here.layout.embedding_replicate
    if tables and copies > 1 and here.config.training.optimizer.table_optimizer == "adamw":
        for table in tables:
            shard = -(-len(table.weight) // ways)
            put("data", "sum of table gradients", 1, reduce_bytes(shard * table.weight.shape[1] * FP32, copies))


def _data(here: _Here) -> list[Sent]:
    """FSDP2: each unit's weights gathered for forward and for backward, gradients reduce-scattered once a step, then summed over copies."""
    layout = here.layout
    copies = layout.data_replicate
    found, calls = Counter(), Counter()
    for shapes, ways, root in _units(here):
        if ways * copies == 1 or not shapes:
            continue
        own = sum(_shard(shape, ways) for shape in shapes) * FP32
        gathers = _gathers(here, root)
        found["all-gather of weights"] += gathers * gather_bytes(own, ways)
        calls["all-gather of weights"] += gathers if ways > 1 else 0
        found["reduce-scatter of gradients"] += gather_bytes(own, ways)
        calls["reduce-scatter of gradients"] += ways > 1
        found["all-reduce of gradients over copies"] += reduce_bytes(own, copies)
        calls["all-reduce of gradients over copies"] += copies > 1
    return [Sent("data", what, calls[what], size) for what, size in found.items()]


def _units(here: _Here) -> Iterator[tuple[list[tuple[int, ...]], int, bool]]:
    """(local shapes, ranks that share them, whether it is the root) of FSDP2's units, as `placement.shard` makes them."""
    layout, model = here.layout, here.model
    dense, experts = layout.data_shard * layout.context, layout.expert_shard
    taken: set[nn.Parameter] = {m.weight for m in model.modules() if isinstance(m, Table)}
    layers = [*model.layers[here.stage[0] : here.stage[1]]]
    mtp = model.mtp if here.last else None
    blocks = list(mtp.layers) if mtp is not None else []
    for mixture in (m for each in (*layers, *blocks) for m in each.modules() if isinstance(m, MoE)) if layout.expert > 1 else ():
        held = [mixture.gate_up_proj, mixture.down_proj]
        taken |= set(held)
        if experts * layout.data_replicate == 1:
            continue
        for inner in (mixture.router, mixture.shared_experts):
            if inner is not None and dense * layout.data_replicate > 1:
                yield _shapes(here, inner, taken), dense, False
        local = [(p.shape[0] // layout.expert, *p.shape[1:]) for p in held]
        by_rows = [shape if shape[0] % experts == 0 or shape[1] % experts else (shape[1], shape[0], *shape[2:]) for shape in local]
        yield by_rows, experts, False
    for unit in (*layers, *(block.layer for block in blocks)):
        yield _shapes(here, unit, taken), dense, False
    root = [model.embed_tokens] if here.first or (here.last and mtp is not None and mtp.embed_tokens is None) else []
    root += [model.norm, model.lm_head, *([mtp] if mtp is not None else [])] if here.last else []
    shapes = [shape for each in root for shape in _shapes(here, each, taken, "lm_head" if each is model.lm_head else "")]
    yield shapes, dense, True


def _shapes(here: _Here, module: nn.Module, taken: set[nn.Parameter], name: str = "") -> list[tuple[int, ...]]:
    """Shapes on one tensor rank of the parameters of `module` that are in no unit yet; they are now."""
    found = []
    for each, parameter in module.named_parameters(prefix=name):
        if parameter in taken:
            continue
        taken.add(parameter)
        shape, parts = list(parameter.shape), each.split(".")
        if here.layout.tensor > 1 and "indexer" not in parts and TENSOR_PARTS & set(parts):
            shape[1 if parts[-2] in ("o_proj", "down_proj") else 0] //= here.layout.tensor
        found.append(tuple(shape))
    return found


def _shard(shape: tuple[int, ...], ways: int) -> int:
    """Elements of a shard in a collective: rows are padded to a multiple of the ranks."""
    return -(-shape[0] // ways) * math.prod(shape[1:])


def _gathers(here: _Here, root: bool) -> int:
    """All-gathers of one unit in a step: a unit is freed behind its forward pass, the root is not; both behind their backward pass, in
    a pipeline only at the end of the step."""
    if here.layout.pipeline == 1:
        return here.micros * (1 if root else 2)
    whole, gathers = False, 0
    for what, _, _ in fixed_order(here.config.parallel.schedule.lower(), here.layout.pipeline, here.micros, 1, here.number):
        gathers += not whole
        whole = root or what == "B"
    return gathers


def _outside(here: _Here) -> list[Sent]:
    """The pipeline's states, and the gradient's norm."""
    layout, times = here.layout, here.micros * (2 - here.first - here.last)
    state = here.tokens * here.config.model.hidden_size * FP32
    norm = reduce_bytes(FP64, layout.world)
    tied = layout.pipeline > 1 and (here.first or here.last) and here.model.mtp is not None and here.model.mtp.embed_tokens is None
    rows = _shard(tuple(here.model.embed_tokens.weight.shape), layout.data_shard * layout.context) * FP32
    return [
        Sent("pipeline", "states forward and gradients back", times if layout.pipeline > 1 else 0, times * state),
        Sent("pipeline", "gradient of the token rows of both ends", int(tied), reduce_bytes(rows, 2) if tied else 0),
        Sent("norm", "the gradient's norm", int(layout.world > 1), norm),
    ]


def even(config: RunConfig, layout: Layout) -> Travelled:
    """What travels where routing is even and no row is asked for twice: an expectation, for plans before there is a run."""
    here = config.data.batch_size // layout.batch_ways * config.data.sequence_length // layout.context
    first, end = layout.stages[0]
    places = [dataclasses.replace(config.model.shape(), layer_index=index) for index in range(first, end)]
    mixtures = sum(config.model.layer.mixtures(place) for place in places)
    away = 1 - 1 / layout.expert
    picks = round(here / layout.tensor * config.model.moe.real_experts * mixtures * away)
    ngram = getattr(config.model.embedding, "ngram", None)
    rows = round(here / layout.tensor * ngram.tables * (1 - 1 / layout.embedding)) if ngram else 0
    return Travelled(picks, picks, rows, rows)
