"""N-gram embeddings: addresses, fusion, whole training steps with and without tables, and one step of each table optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import Row, compare, compare_memory
from longcat_lab.blocks import NgramEmbeddingConfig
from longcat_lab.blocks.interface import Block
from longcat_lab.blocks.ngram_embedding.hash_op import ngram_rows_reference
from longcat_lab.blocks.ngram_embedding.op import fuse
from longcat_lab.blocks.ngram_embedding.tables import NgramAddresses
from longcat_lab.config import OptimizerConfig, RunConfig, load
from longcat_lab.data import Batch
from longcat_lab.model import build
from longcat_lab.training.loss import plan_step, step_loss
from longcat_lab.training.mechanisms import after_step
from longcat_lab.training.optimizer import clip, make_optimizer

TOKENS = 8192
SPARSE = ("lazy_adam", "row_wise")
PLAN = NgramEmbeddingConfig(order=5, splits=4, vocab_ratio=100.567)  # LongCat-2.0's


def ngram_addresses() -> Iterator[Row]:
    """Rows of 16 tables (orders 2 to 5, 4 a order) for 8192 packed tokens: against one [8192, 512] x [512, 512] product, and a loop."""
    vocab = 163840
    addresses, plan = NgramAddresses(PLAN, vocab), PLAN.plan(vocab)
    tokens, documents = torch.randint(0, vocab, (8, TOKENS // 8)), (torch.arange(TOKENS // 8) // 300).expand(8, -1)
    x, weight = torch.randn(TOKENS, 512), torch.randn(512, 512)
    ours = ("addresses", lambda: addresses(tokens, documents))
    yield compare("ngram_addresses/product", ours, ("a matrix product", lambda: x @ weight))
    yield compare("ngram_addresses/loop", ours, ("loop over tables", lambda: ngram_rows_reference(tokens, documents, plan)))


class _Branches:
    """The usual form: a projection a table, all E + 1 branches laid out as [E + 1, T, H] and averaged."""

    def __init__(self, tables: Tensor, projection: Tensor, width: int) -> None:
        self.tables, self.projections = tables, [p.detach().clone().requires_grad_() for p in projection.split(width, 1)]

    def __call__(self, token: Tensor, rows: Tensor) -> Tensor:
        read = [F.linear(F.embedding(rows[..., i], self.tables), w) for i, w in enumerate(self.projections)]
        return torch.stack([token, *read]).mean(0)


def ngram_fusion() -> Iterator[Row]:
    """Gather, project and average at hidden 512 and 8192 tokens, forward and backward (tables apart: their gradient is the optimizer's)."""
    for count, width in ((12, 42), (16, 32)):
        tables, rows = torch.randn(count * 100_000, width), torch.randint(0, count * 100_000, (1, TOKENS, count))
        token = torch.randn(1, TOKENS, 512, requires_grad=True)
        projection = torch.randn(512, count * width, requires_grad=True)
        branches = _Branches(tables, projection, width)
        scale = 1 / (count + 1)

        def ours(token=token, rows=rows, tables=tables, projection=projection, scale=scale) -> None:
            fuse(token, F.embedding(rows, tables), projection, scale, scale).sum().backward()

        def peer(token=token, rows=rows, branches=branches) -> None:
            branches(token, rows).sum().backward()

        sides = ("one product", ours), ("[E + 1, T, H] branches", peer)
        yield compare(f"ngram_fusion/{count}", *sides)
        yield compare_memory(f"ngram_fusion/{count}/memory", *sides)


def _step(config: RunConfig) -> Callable[[], None]:
    """A whole training step as `fit` takes it, on other random tokens each time."""
    model = build(config).train()
    optimizer = make_optimizer(model, config.training.optimizer)
    generator = torch.Generator().manual_seed(0)
    shape = (config.data.batch_size, config.data.sequence_length + 1)

    def step() -> None:
        # Zipf's law, as text has it: most reads go to few rows, and many rows are read for the first time.
        ranks = torch.rand(shape, generator=generator).mul(torch.log(torch.tensor(float(config.model.vocab_size)))).exp()
        tokens = ranks.long().sub(1).clamp(0, config.model.vocab_size - 1)
        batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), torch.zeros_like(tokens[:, 1:]))
        loss, _ = step_loss(model, batch.tokens, batch.labels, batch.document_ids, config, plan_step(batch, config, 0), 1.0)
        loss.backward()
        clip(optimizer, config.training.optimizer.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        after_step(model)

    return step


def ngram_step() -> Iterator[Row]:
    """Training steps: 12 tables of 1 M rows against none at hidden 512, and 10 M rows x 32 against 0.1 M at hidden 128."""
    node, optimizer = "model.embedding.ngram", "training.optimizer.table_optimizer"
    wide = ("micro", "data.sequence_length=512", "data.batch_size=4", "training.micro_batch_size=4", "model.num_layers=2")
    tables = (f"{node}.order=4", f"{node}.splits=4", f"{node}.table_width=42", f"{node}.table_rows=1000000")
    narrow = ("nano", "data.batch_size=32", f"{node}.order=3", f"{node}.splits=2")
    off = _step(load(*wide))
    for mode in SPARSE:
        on = _step(load(*wide, *tables, f"{optimizer}={mode}"))
        yield compare(f"ngram_step/on/{mode}", ("12 tables of 1 M rows", on), ("no tables", off), pairs=9)
        del on
    del off
    for mode in SPARSE:
        many, few = (_step(load(*narrow, f"{node}.table_rows={rows}", f"{optimizer}={mode}")) for rows in (2_500_000, 25_000))
        yield compare(f"ngram_step/rows/{mode}", ("10 M rows x 32", many), ("0.1 M rows x 32", few), pairs=9)
        del many, few


class _Tables(Block):
    roles = {"weight": "table"}

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(rows, width))


def table_optimizers() -> Iterator[Row]:
    """One optimizer step over 10 M rows x 32 of which 31 k were read, its gradient's merging included; the peer is fused dense AdamW."""
    rows, width, read = 10_000_000, 32, 31_000
    values = torch.randn(read, width)

    def step(mode: str) -> Callable[[], None]:
        model = _Tables(rows, width)
        optimizer = make_optimizer(model, OptimizerConfig(table_optimizer=mode))

        def once() -> None:
            found = torch.randint(0, rows, (1, read))
            gradient = torch.sparse_coo_tensor(found, values, (rows, width), check_invariants=False)
            model.weight.grad = gradient.to_dense() if mode == "adamw" else gradient
            optimizer.step()

        return once

    dense = step("adamw")
    for mode in (*SPARSE, "sgd"):
        yield compare(f"table_optimizers/{mode}", (mode, step(mode)), ("fused dense AdamW", dense), pairs=5)
