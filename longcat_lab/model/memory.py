"""Whether a model fits into memory, asked before anything is allocated: systems that overcommit kill a process instead of refusing."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from longcat_lab.blocks.table import Table
from longcat_lab.errors import LabError

# Of a container, in the second and the first form of control groups: folder, limit, use, and what of the use is file cache that can go.
CGROUPS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current", ("inactive_file", "active_file")),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
)


def free_memory() -> int:
    """Bytes that this process may still take on the host: what the system can give, within the container's limit where there is one."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 2**62
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))  # counts caches that can go
    except (OSError, StopIteration, ValueError):
        pass
    return max(min([free, *_container_limits()]), 0)


def _container_limits() -> list[int]:
    """What each control group leaves, in bytes."""
    found = []
    for folder, limit, used, cached in CGROUPS:
        try:
            numbers = dict(line.split() for line in (Path(folder) / "memory.stat").read_text().splitlines())
            cache = sum(int(numbers.get(name, 0)) for name in cached)
            found.append(int((Path(folder) / limit).read_text()) - int((Path(folder) / used).read_text()) + cache)
        except (OSError, ValueError):  # no such group, or its limit is `max`
            continue
    return found


def check_memory(
    model: nn.Module, free: int, doing: str, added: Callable[[str, nn.Parameter], float] = lambda name, parameter: 0.0
) -> None:
    """Raises LabError where parameters (with what is `added` to each, in bytes) and buffers of `model` do not fit into `free` bytes.

    Args:
        model: may be on the meta device.
        doing: `build` or `train`, for the sentence.
        added: bytes beside a parameter: its gradient and its optimizer's state.
    """
    need = sum(p.nbytes + added(name, p) for name, p in model.named_parameters()) + sum(b.nbytes for b in model.buffers())
    if need <= free:
        return
    tables = {f"{name}.weight": table for name, table in model.named_modules() if isinstance(table, Table)}
    parts = {name: t.weight.nbytes + added(name, t.weight) + t.touched.nbytes for name, t in tables.items()}
    of_tables = sum(parts.values())
    sentence = f"To {doing} this model takes {_size(need)} of memory and {_size(free)} are free here"
    if of_tables < need / 2:
        raise LabError(f"{sentence}: `longcat-lab budget` shows which part to make smaller.")
    largest = max(parts, key=parts.__getitem__)
    rows, width = tables[largest].weight.shape
    fits = 0.9 * (free - (need - of_tables)) / of_tables  # some room for activations
    hashed = hasattr(tables[largest], "addresses")
    setting = f"vocab_ratio or table_rows times {fits:.2g}" if hashed else "a smaller vocabulary or narrower rows"
    cure = f"with {fits:.1%} of the rows they would fit ({setting})" if fits > 0 else "and the rest of it does not fit either"
    state = added(largest, tables[largest].weight) / tables[largest].weight.nbytes
    more = "; training.optimizer.table_optimizer row_wise keeps 4 bytes a row beside them" if state > 1 / width else ""
    raise LabError(f"{sentence}, of which tables take {_size(of_tables)} ({largest}: {rows:,} rows of {width}): {cure}{more}.")


def check_model(make: Callable[[], nn.Module]) -> None:
    """`check_memory` for a model that `make` builds, where it would be built on the host."""
    if torch.get_default_device().type == "cpu":
        with torch.device("meta"):
            check_memory(make(), free_memory(), "build")


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB" if count < 1000 else f"{count:,.0f} TB"
