"""A table of rows that are looked up, most of which no step touches."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from longcat_lab.blocks.interface import Block


class Table(Block):
    """`count` rows of `width`, read by number. Nothing here costs time by the row but initialising and saving them, and
    one count of `touched` for a logged row.

    Its gradient is sparse where the optimizer asks for that. `touched` marks rows that training has read.
    """

    roles: ClassVar[dict[str, str]] = {"weight": "table"}
    idle = False  # carried along and never read (LongCat-2.0's prediction module)

    def __init__(self, count: int, width: int, std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, width))
        self.std = std
        self.register_buffer("touched", torch.zeros(count, dtype=torch.bool), persistent=False)
        self._last: Tensor | None = None

    def initial_std(self) -> dict[str, float]:
        return {"weight": self.std}

    def read(self, rows: Tensor) -> Tensor:
        """rows int64 [...] to [..., width]."""
        if self.training:
            self.touched[rows.flatten()] = True
            self._last = rows.detach()
        return self.lookup(rows)

    def lookup(self, rows: Tensor) -> Tensor:
        """As `read`, without notes. Where others hold a part of the rows, replaced by a function that asks them."""
        return nn.functional.embedding(rows, self.weight, sparse=self.sparse_gradients)

    @torch.no_grad()
    def statistics(self) -> dict[str, float]:
        """Of the last pass: distinct rows that it read, their RMS; and the share of all rows that were ever read."""
        if self.idle or self._last is None:
            return {}
        rows = self._last.unique()
        return {
            "rows_touched": float(self.touched.count_nonzero()) / len(self.touched),
            "rows_in_step": float(len(rows)),
            "table_rms": float(self.lookup(rows).square().mean().sqrt()),
        }

    def not_engaged(self, measured: dict[str, float]) -> list[str]:
        return [] if self.idle or measured.get("table_rms") else ["its tables are still empty"]
