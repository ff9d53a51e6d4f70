"""Pairs of calls timed in turn, so that a machine whose speed drifts moves both alike."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One comparison: medians of times in ms, of peak memory in MiB or of shares in % (`unit`); ratio is ours / peer, below 1 where ours
    takes less.
    """

    name: str
    ours: str
    peer: str
    ours_value: float
    peer_value: float
    ratio: float
    lowest: float
    highest: float
    pairs: int
    unit: str = "ms"


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
    return row_of(name, ours[0], peer[0], [(1e3 * a, 1e3 * b) for a, b in times], "ms")


def compare_memory(name: str, ours: tuple[str, Callable[[], object]], peer: tuple[str, Callable[[], object]], pairs: int = 5) -> Row:
    """The memory that each call adds at its peak to what the process had, in turn as `compare`. Linux only."""
    peaks = [(peak_memory(ours[1]), peak_memory(peer[1])) for _ in range(pairs)]
    return row_of(name, ours[0], peer[0], [(a / 2**20, b / 2**20) for a, b in peaks], "MiB")


def peak_memory(call: Callable[[], object]) -> int:
    """Bytes by which the process's resident memory rose at most while `call` ran."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what the allocator keeps for later would be used again unseen
    Path("/proc/self/clear_refs").write_text("5")  # the peak is from here on
    before = _resident("VmRSS")
    call()
    return max(_resident("VmHWM") - before, 0)


def _resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def row_of(name: str, ours: str, peer: str, pairs: list[tuple[float, float]], unit: str) -> Row:
    """From (ours, peer) of each pair."""
    ratios = [a / b for a, b in pairs]
    medians = [statistics.median(side) for side in zip(*pairs, strict=True)]
    return Row(name, ours, peer, *medians, statistics.median(ratios), min(ratios), max(ratios), len(pairs), unit)
