"""What a real run comes to on one process: the bytes that it sends in an optimizer step, as `wire` counts them, and its memory.

Conventions are those of `parallel.collectives`. What depends on the data (which picks travel, which rows are asked for) is an argument.
fp32 runs (`training.precision: fp32`, or auto on a CPU), even cuts of layers, attention in its sparse stage (no `training.conversion`).
"""

from __future__ import annotations

import dataclasses
from collections import Counter

import torch

from longcat_lab.blocks.moe.router import Router
from longcat_lab.blocks.sparse_attention.module import SparseAttention
from longcat_lab.blocks.table import Table
from longcat_lab.config import RunConfig
from longcat_lab.errors import LabError
from longcat_lab.model import LongcatLM
from longcat_lab.parallel.collectives import reduce_bytes
from longcat_lab.parallel.embedding_op import shard_size
from longcat_lab.parallel.layout import DENSE, Layout
from longcat_lab.parallel.planner.activations import CPU, Keeping
from longcat_lab.parallel.planner.hardware import assumptions
from longcat_lab.parallel.planner.inside import put_head, put_passes, put_tables
from longcat_lab.parallel.planner.memory import StageMemory, stage_memory
from longcat_lab.parallel.planner.place import FP32, FP64, INT64, Place, Sent, Tally
from longcat_lab.parallel.planner.setup import Setup, take_apart
from longcat_lab.parallel.planner.weights import put_muon, put_sharding


@dataclasses.dataclass(frozen=True)
class Travelled:
    """What the data decides, of one process, in a step.

    picks_sent: real picks of its tokens whose expert another process holds, in all forward passes but those that run again;
    picks_answered: such picks of others that it computed; picks_again: both, in forward passes that run again. Where
    `parallel.dispatch` is `process`, a token's picks of experts of one process count once.
    rows_asked: different table rows that it asked others for, each pass counted apart; rows_answered: rows that others asked it for.
    rows_summed: with a table optimizer that steps on the rows that were hit, for each table the most rows for which one of the processes
    that hold copies of these rows has a gradient.
    """

    picks_sent: int = 0
    picks_answered: int = 0
    rows_asked: int = 0
    rows_answered: int = 0
    picks_again: tuple[int, int] = (0, 0)
    rows_summed: tuple[int, ...] = ()


def predict_step(config: RunConfig, layout: Layout, travelled: Travelled = Travelled(), rank: int = 0) -> list[Sent]:
    """What process `rank` of `layout` sends in one optimizer step of `config`: from the counting of labels, over all passes, sums of
    gradients, clipping, the optimizer and the blocks' own steps, to the question whether anybody asked to stop.

    Not in it: what is sent when a row is logged (`predict_marks` says a part of it), evaluation and checkpoints; of the first
    step of a pipeline a message of 4 bytes, with which torch tries the way.

    Raises:
        LabError: something whose traffic is not reckoned (bf16, a conversion, n-gram kinds but one, an oracle's heads).
    """
    if config.training.precision == "bf16" or config.training.conversion is not None:
        what = "training.conversion" if config.training.conversion is not None else "training.precision bf16"
        raise LabError(f"The exact traffic of a step is not reckoned under {what}: leave it out, or take `plan` for an estimate.")
    with torch.device("meta"):
        model = LongcatLM(config.model)
    here, tally = Place(config, layout, model, rank), Tally()
    put_passes(here, (travelled.picks_sent, travelled.picks_answered), travelled.picks_again, tally)
    put_tables(here, (travelled.rows_asked, travelled.rows_answered), travelled.rows_summed, tally)
    put_head(here, tally)
    put_sharding(here, tally)
    _put_ends(here, tally)
    put_muon(here, tally)
    _put_counts(here, tally)
    _put_loop(here, tally)
    return tally.found()


def predict_marks(config: RunConfig, layout: Layout, rank: int = 0) -> list[Sent]:
    """Of a logged row, what merging the marks of table rows that were read sends (`placement.merge_marks`)."""
    with torch.device("meta"):
        model = LongcatLM(config.model)
    here, tally = Place(config, layout, model, rank), Tally()
    for table in model.modules():
        if isinstance(table, Table) and not table.idle and here.first and layout.stage_size > 1:
            tally.put("loop", "all-reduce", "marks of rows", 1, reduce_bytes(len(table.weight), layout.stage_size))
    return tally.found()


def predict_memory(config: RunConfig, layout: Layout, keeping: Keeping = CPU) -> list[StageMemory]:
    """What a process of each stage of `layout` holds in a step of `config` at its peak: of those that hold the same, the first one, whose
    shards are never the shorter ones. By the planner's own arithmetic, for a run of this library.

    Weights and gradients (FSDP2's padding included) and optimizer state are exact; activations and work are sums of tensors, with K_e
    experts a token; tables are reckoned as AdamW trains them.
    Not in it: workspaces inside operators, the process itself (interpreter, libraries), buffers of the backend.
    `StageMemory.total` is what a step of several micro-batches comes to: with one, gradients come as activations go.

    Args:
        keeping: of the operators that run; `CPU` with fp32, `ACCELERATOR` with bf16.

    Raises:
        LabError: tables that another optimizer trains.
    """
    kind = config.training.optimizer.table_optimizer
    if getattr(config.model.embedding, "ngram", None) is not None and kind != "adamw":
        raise LabError(
            f"Memory is reckoned for tables that AdamW trains, and training.optimizer.table_optimizer is {kind}: set it to adamw."
        )
    model = take_apart(config, config.data.sequence_length, keeping)
    degrees = {axis: getattr(layout, axis) for axis in (*DENSE, "expert", "embedding")}
    setup = Setup(
        **degrees,
        schedule=config.parallel.schedule.lower(),
        layers_per_stage=[end - first for first, end in layout.stages],
        weights="sharded",
        recompute="full" if config.training.recompute else "none",
        fold=False,
        optimizer=config.training.optimizer.kind,
        sequence_length=config.data.sequence_length,
        batch=config.data.batch_size,
        micro_batch=config.training.micro_batch_size or config.data.batch_size // layout.batch_ways,
        buffers=0.0,
    )
    return stage_memory(model, setup, None, assumptions())


def by_purpose(sent: list[Sent]) -> Counter[str]:
    """Bytes by purpose; those that `collectives.counted` knows are what it gives."""
    return sum((Counter({each.purpose: each.bytes}) for each in sent), Counter())


def by_kind(sent: list[Sent]) -> dict[str, tuple[int, int]]:
    """(calls, bytes) by kind, as `wire.counted` counts them."""
    kinds = sorted({each.kind for each in sent})
    return {kind: tuple(sum(pair) for pair in zip(*((s.calls, s.bytes) for s in sent if s.kind == kind), strict=True)) for kind in kinds}


def _put_ends(here: Place, tally: Tally) -> None:
    """The pipeline's states, and the token's rows that both of its ends have."""
    layout = here.layout
    if layout.pipeline == 1:
        return
    state = here.tokens * here.config.model.hidden_size * FP32
    times = here.micros * (2 - here.first - here.last)
    tally.put("pipeline", "send", "states forward and gradients back", times, times and state)
    mtp = here.config.model.mtp
    if (here.first or here.last) and mtp is not None and not mtp.own_embedding:
        weight = here.model.embed_tokens.weight
        place = here.at["data_shard"] * layout.context + here.at["context"]
        held = shard_size(len(weight), here.dense_ways, place) * weight.shape[1]
        tally.put("pipeline", "all-reduce", "gradient of the token rows of both ends", 1, reduce_bytes(held * FP32, 2))


def _put_counts(here: Place, tally: Tally) -> None:
    """What blocks counted on tokens, summed over the other parts of the batch: picks, the balance loss's gradients, indexers' losses."""
    ways = here.layout.batch_ways * here.layout.context
    if ways == 1:
        return
    for owner in (*here.layers, *here.blocks):
        runs = owner not in here.blocks or here.prediction_weight > 0
        for block in owner.modules():
            if isinstance(block, Router):
                c = block.config
                slots = c.n_routed_experts + c.zero_expert_num
                tally.put("loop", "all-reduce", "counts of picks", 1, reduce_bytes(slots * INT64, ways))
                if c.balance_loss_alpha and runs:
                    tally.put("loop", "all-reduce", "gradients of mean probabilities", 2, reduce_bytes(slots * FP32, ways))
            elif isinstance(block, SparseAttention) and runs:
                _put_taught(here, block, ways, tally)


def _put_taught(here: Place, block: SparseAttention, ways: int, tally: Tally) -> None:
    c = block.config
    if not (c.selection.selects and here.config.data.sequence_length > c.index_topk):
        return
    if c.selection.uses_indexer and c.distill.weight > 0:
        tally.put("loop", "all-reduce", "indexers' losses", 1, reduce_bytes(2 * FP64, ways))
    if block.place == 0:
        tally.put("loop", "all-reduce", "pairs selected and visible", 1, reduce_bytes(2 * INT64, ways))


def _put_loop(here: Place, tally: Tally) -> None:
    """Numbers that the loop sums up: labels, losses, the gradient's norm, and who asked to stop."""
    layout, config = here.layout, here.config
    steps = config.model.mtp.num_nextn_predict_layers if here.prediction_weight else 0
    told = 1 + steps + (3 if config.training.z_loss_weight else 0)
    for what, kind, count, ways in (
        ("labels and bytes of text", INT64, 2 + steps, layout.batch_ways * layout.context),
        ("losses", FP64, told, layout.batch_ways * layout.context),
        ("losses of the last stage", FP64, told, layout.pipeline),
        ("who asked to stop", INT64, 1, layout.world),
    ):
        tally.put("loop", "all-reduce", what, int(ways > 1), reduce_bytes(count * kind, ways))
    tally.put("norm", "all-reduce", "the gradient's norm", int(layout.world > 1), reduce_bytes(FP64, layout.world))


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
    return Travelled(picks, picks, rows, rows, (picks, picks) if config.training.recompute else (0, 0))
