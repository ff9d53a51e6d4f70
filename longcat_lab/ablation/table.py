"""What a person sees while a sweep runs: a live table on a terminal, a line per change elsewhere."""

from __future__ import annotations

import contextlib
import heapq
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

HEARTBEAT = 30.0  # seconds between lines when nothing changes and nobody sees a table
QUICK, CHANGED, SAME = 0.25, 50, 250  # a table is drawn again after so many seconds, and after so many times what drawing it took: the
# second where a job's status has changed, the third elsewhere, so that looking on takes half a hundredth of a core from the jobs
STYLE = {
    **{"finished": "green", "diverged": "magenta", "running": "cyan", "queued": "blue"},
    **{"failed": "red", "interrupted": "yellow", "planned": "dim"},
}


@dataclass
class Cell:
    """One job as the table shows it. Times in seconds."""

    name: str
    status: str = "planned"
    reason: str = ""
    step: int | None = None
    steps: int | None = None
    rate: float | None = None
    loss: float | None = None
    left: float | None = None
    seconds: float | None = None
    began: float | None = None

    def progress(self, data: dict[str, Any] | None) -> None:
        """Take over what the job says in progress.json."""
        data = data or {}
        self.step, self.steps, self.rate = data.get("step"), data.get("steps"), data.get("tokens_per_second")
        self.loss, self.left = data.get("loss"), data.get("seconds_left")


def time_left(cells: Sequence[Cell], slots: int, now: float | None = None) -> float | None:
    """Seconds until all jobs are done, or None while nothing is known.

    A running job counts what it says is left; one that has not started counts the mean duration of the finished ones.
    """
    now = time.monotonic() if now is None else now
    running = [cell for cell in cells if cell.status == "running"]
    waiting = sum(cell.status in ("planned", "queued") for cell in cells)
    lengths = [cell.seconds for cell in cells if cell.status == "finished" and cell.seconds]
    if not lengths:
        lengths = [now - cell.began + cell.left for cell in running if cell.left is not None and cell.began is not None]
    if not lengths:
        return 0.0 if not running and not waiting else None
    mean = sum(lengths) / len(lengths)
    ends = [max(0.0, cell.left if cell.left is not None else mean - (now - (cell.began or now))) for cell in running]
    ends += [0.0] * max(0, slots - len(ends))
    heapq.heapify(ends)
    for _ in range(waiting):
        heapq.heapreplace(ends, ends[0] + mean)
    return max(ends)


def span(seconds: float | None) -> str:
    """A duration in the two units that matter."""
    if seconds is None:
        return ""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days} d {h} h"
    return f"{h} h {m:02d} min" if hours else f"{m} min {s:02d} s" if m else f"{s} s"


def short(value: float | None) -> str:
    """A rate: 950, 12.3k, 4.5M."""
    if value is None:
        return ""
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g}{unit}"
    return f"{value:.0f}"


def short_count(said: Any) -> str:
    """What data preparation says of itself: numbers with their thousands apart, anything else as it is."""
    return f"{said:,}" if isinstance(said, int) else str(said)


class Display:
    """Shows the jobs' cells; `with` it open, call `update` as often as you like."""

    def __init__(self, cells: Sequence[Cell], slots: int, console: Console | None = None) -> None:
        self.cells, self.slots, self.console = cells, slots, console or Console()
        self.data = ""
        self._live: Live | None = None
        self._shown = {cell.name: cell.status for cell in cells}
        self._drawn = self._spoke = time.monotonic()
        self._cost = 0.0  # seconds of the last drawing

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._live = Live(self._table(), console=self.console, auto_refresh=False)
            self._live.start(refresh=True)
        return self

    def __exit__(self, *error: object) -> None:
        if self._live:
            with contextlib.suppress(OSError):
                self._live.update(self._table(), refresh=True)
                self._live.stop()
        else:
            self.update(force=True)

    def say(self, line: str) -> None:
        """One plain line, above the table when there is one."""
        with contextlib.suppress(OSError):  # the terminal is gone; the jobs are not
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)
        self._spoke = time.monotonic()

    def prepare(self, text: str) -> None:
        """What data preparation says; the first line of the table."""
        changed, self.data = text != self.data, text
        if self._live:
            self.update()
        elif changed and (text.endswith(".") or time.monotonic() - self._spoke > HEARTBEAT):
            self.say(text)

    def update(self, force: bool = False) -> None:
        now = time.monotonic()
        if self._live:
            changed = any(cell.status != self._shown[cell.name] for cell in self.cells)
            if force or now - self._drawn > max(QUICK, (CHANGED if changed else SAME) * self._cost):
                with contextlib.suppress(OSError):
                    self._live.update(self._table(), refresh=True)
                self._shown = {cell.name: cell.status for cell in self.cells}
                self._drawn, self._cost = time.monotonic(), time.monotonic() - now
            return
        for cell in self.cells:
            if cell.status != self._shown[cell.name]:
                self._shown[cell.name] = cell.status
                after = f" after {span(cell.seconds)}" if cell.seconds is not None and cell.status != "running" else ""
                self.say(f"{cell.name} {cell.status}{after}{': ' + cell.reason if cell.reason else ''}")
        if now - self._spoke > HEARTBEAT:
            running = [cell for cell in self.cells if cell.status == "running"]
            at = [f"{cell.name} {_step(cell)}{'' if cell.loss is None else f' loss {cell.loss:.4g}'}".rstrip() for cell in running]
            self.say("; ".join([self.counts(), ", ".join(at)] if at else [self.counts()]))

    def counts(self) -> str:
        """`3 of 9 finished, 2 running, about 4 min 10 s left`."""
        number = {status: sum(cell.status == status for cell in self.cells) for status in STYLE}
        parts = [f"{number['finished']} of {len(self.cells)} finished"]
        parts += [f"{number[status]} {status}" for status in ("diverged", "running", "queued", "failed", "interrupted") if number[status]]
        left = time_left(self.cells, self.slots)
        if left and (number["running"] or number["queued"] or number["planned"]):
            parts.append(f"about {span(left)} left")
        return ", ".join(parts)

    def _table(self) -> Group:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for title in ("job", "status", "step", "tokens/s", "loss", "left"):
            table.add_column(title, justify="left" if title in ("job", "status") else "right", no_wrap=True)
        order = ("running", "failed", "diverged", "interrupted", "queued", "finished", "planned")
        room = max(5, self.console.height - 6)
        ranked = sorted(self.cells, key=lambda cell: order.index(cell.status))
        for cell in ranked[:room]:
            end = span(cell.left) if cell.status == "running" else cell.reason
            if cell.status == "finished" and cell.seconds:
                end = f"took {span(cell.seconds)}"
            loss = "" if cell.loss is None else f"{cell.loss:.4f}"
            table.add_row(
                cell.name, Text(cell.status, style=STYLE[cell.status]), _step(cell), short(cell.rate), loss, Text(end, style="dim")
            )
        more = [Text(f"and {len(ranked) - room} more", style="dim")] if len(ranked) > room else []
        return Group(*([Text(self.data, style="dim")] if self.data else []), table, *more, Text(self.counts(), style="bold"))


def _step(cell: Cell) -> str:
    return "" if cell.step is None else f"{cell.step}/{cell.steps}" if cell.steps else str(cell.step)
