"""Pairs of calls timed in turn, so that a machine whose speed drifts moves both alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One comparison. Times in milliseconds (medians); ratio is ours / peer, below 1 where ours is faster."""

    name: str
    ours: str
    peer: str
    ours_ms: float
    peer_ms: float
    ratio: float
    lowest: float
    highest: float
    pairs: int


def compare(name: str, ours: tuple[str, Callable[[], object]], peer: tuple[str, Callable[[], object]], pairs: int = 15) -> Row:
    """Times both in turn, `pairs` times after one uncounted pair; the ratio is the median of the pairs' own ratios."""
    times: list[tuple[float, float]] = []
    for counted in range(-1, pairs):
        spent = []
        for _, call in (ours, peer):
            started = time.perf_counter()
            call()
            spent.append(time.perf_counter() - started)
        if counted >= 0:
            times.append((spent[0], spent[1]))
    ratios = [a / b for a, b in times]
    median = [1e3 * statistics.median(side) for side in zip(*times, strict=True)]
    return Row(name, ours[0], peer[0], *median, statistics.median(ratios), min(ratios), max(ratios), pairs)
