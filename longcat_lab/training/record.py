"""What a run's folder says of the run: run.json from its first sitting to its last, progress.json while one lasts."""

from __future__ import annotations

import datetime
import time
from collections import deque
from pathlib import Path
from typing import Any

import torch

from longcat_lab.budget import totals
from longcat_lab.config import RunConfig, plugins
from longcat_lab.files import write_json, write_whole
from longcat_lab.parallel.world import World
from longcat_lab.training import device as devices
from longcat_lab.training import provenance

PEAK = "peak_memory_bytes"
LATELY = 30  # of what is told once a second: growth, conversion and another machine change a run's speed


class Record:
    """One sitting's hand on run.json. Of several processes the first one writes.

    before: what run.json held when the sitting began; keys that are not training's own (a sweep's) stay as they are.
    content: what it holds now.
    """

    def __init__(
        self,
        folder: Path,
        config: RunConfig,
        identity: str,
        before: dict[str, Any],
        data_hash: str,
        device: torch.device,
        world: World,
    ) -> None:
        self.folder, self.device, self.steps, self.writes = folder, device, config.training.steps, world.first
        self.tokens_a_step = config.data.batch_size * config.data.sequence_length
        self._told: deque[tuple[int, float]] = deque(maxlen=LATELY)
        past = before.get("timings", {})
        self.peak_before = past.get(PEAK) or 0
        self.content: dict[str, Any] = {
            **before,
            "status": "running",
            "reason": None,
            "identity": identity,
            "config": config.to_dict(),
            "provenance": {**provenance.provenance(data_hash, device), "plugins": plugins.stated(config.plugins)},
            "budget": totals(config),
            "layout": world.layout.told(),
            "timings": {"started": past.get("started") or _now()},
            "final": {},
        }

    def begin(self, optimizer_table: str) -> None:
        """The run is running now: its record, which parameter is trained how, and what of the code is in no commit."""
        if not self.writes:
            return
        write_json(self.folder / "run.json", self.content)
        write_whole(self.folder / "optimizer.txt", lambda path: path.write_text(optimizer_table + "\n", encoding="utf-8"))
        difference = provenance.uncommitted_changes()
        if difference:
            write_whole(self.folder / "uncommitted.diff", lambda path: path.write_text(difference, encoding="utf-8"))

    def peak(self) -> int:
        """Highest memory of all sittings up to now, in bytes; see `device.peak_bytes` for what is counted."""
        return max(self.peak_before, devices.peak_bytes(self.device))

    def tell(self, step: int, loss: float, seconds: float) -> None:
        """progress.json: what a live table shows. Rate and time left are those of the last half minute of this sitting."""
        if not self.writes:
            return
        self._told.append((step, time.monotonic()))
        (first, then), (_, now) = self._told[0], self._told[-1]
        rate = (step - first) * self.tokens_a_step / (now - then) if step > first else step * self.tokens_a_step / seconds
        left = (self.steps - step) * self.tokens_a_step / rate
        write_json(
            self.folder / "progress.json",
            {"step": step, "steps": self.steps, "tokens_per_second": rate, "seconds_left": left, "seconds": seconds, "loss": loss},
        )

    def close(self, status: str, reason: str | None, step: int, seconds: float) -> None:
        """How the sitting ended, after `step` steps and `seconds` of training in all sittings."""
        timings = {**self.content["timings"], "ended": _now(), "training_seconds": seconds, "steps_done": step, PEAK: self.peak()}
        if seconds:
            timings["tokens_per_second"] = step * self.tokens_a_step / seconds
        self.content |= {"status": status, "reason": reason, "timings": timings}
        if self.writes:
            write_json(self.folder / "run.json", self.content)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
