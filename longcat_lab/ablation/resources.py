"""What one job of a sweep may take: cards, cores, memory, time; and which ends are tried again."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from longcat_lab.node import Node

_TIME = {"s": 1, "min": 60, "h": 3600, "d": 86400}
_MEMORY = {"MB": 1e6, "GB": 1e9, "TB": 1e12, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
LONGEST = 100  # characters of an amount
Retried = Literal["dead kernel", "killed", "node lost", "preempted", "out of memory", "time-out", "disk full", "error", "not started"]


def seconds(text: str) -> float:
    """`2 h`, `1 h 30 min`, `45 s` as seconds. Raises ValueError for anything else."""
    return _sum(text, _TIME, "a time such as '2 h', '1 h 30 min' or '45 s'", 10_000 * _TIME["d"], "10,000 d")


def number_of_bytes(text: str) -> int:
    """`8 GB` (10^9 bytes), `512 MiB` (2^20) as bytes. Raises ValueError for anything else."""
    return int(_sum(text, _MEMORY, "an amount of memory such as '8 GB' or '512 MB'", 10_000 * _MEMORY["TB"], "10,000 TB"))


def _sum(text: str, units: dict[str, float], wanted: str, most: float, said: str) -> float:
    if len(text) > LONGEST:
        raise ValueError(f"should be {wanted}, got {len(text)} characters")
    parts = re.findall(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    if not parts or "".join(f"{n}{u}" for n, u in parts) != re.sub(r"\s", "", text) or not all(u in units for _, u in parts):
        raise ValueError(f"should be {wanted}, got '{text}'")
    found = sum(float(number) * units[unit] for number, unit in parts)
    if found <= 0:
        raise ValueError(f"should be more than nothing, got '{text}'")
    if found > most:
        raise ValueError(f"should be at most {said}, got '{text}'")
    return found


def _readable(read: Any) -> AfterValidator:
    def check(text: str) -> str:
        read(text)
        return text

    return AfterValidator(check)


Time, Memory = Annotated[str, _readable(seconds)], Annotated[str, _readable(number_of_bytes)]


class Resources(Node):
    """What each job asks for. It decides where and how fast a job runs, and no number of it."""

    cards: int = Field(default=0, ge=0, description="accelerator cards of a job, its own; 0: none is asked for, jobs share what there is")
    card: str = Field(
        default="gpu",
        pattern=r"^[a-z][A-Za-z0-9_.:-]*$",
        description="what a queue calls them: gpu, npu, gpu:a100 (--gres=CARD:CARDS)",
    )
    cores: int | None = Field(
        default=None,
        ge=1,
        description="cores of a job; when left out, the machine's, shared out among the jobs, and in a queue one for each thread of each "
        "process (training.threads)",
    )
    memory: Memory | None = Field(default=None, description="of all processes of a job together, such as 8 GB; above it the job is ended")
    time: Time | None = Field(default=None, description="of one attempt, such as 2 h; then the job saves a checkpoint and ends")
    grace: Time = Field(default="10 s", description="how long a job that must end has to finish its step and save a checkpoint")
    processes: int | None = Field(default=None, ge=1, description="that train one run together (torchrun); as many as cards when left out")
    warm: bool = Field(
        default=True,
        description="jobs here are forks of a process that has imported what they need; false: each starts from nothing",
    )
    retries: int = Field(
        default=0,
        ge=0,
        le=1000,
        description="how often a failed job is tried again within one `run`; one that lost its place (node, preemption) always is",
    )
    retry: list[Retried] = Field(
        default=["dead kernel", "killed", "node lost", "preempted"],
        description="the ends that are tried again; errors in a cell are not unless 'error' is among them, divergence never is",
    )
    slurm: dict[str, str | int | bool] = Field(
        default_factory=dict, description="more options of sbatch for each job, such as {partition: long, account: lab}"
    )

    @property
    def together(self) -> int:
        """Processes that train one run."""
        return self.processes or max(1, self.cards)

    @property
    def bytes(self) -> int | None:
        """The memory that a job may take."""
        return number_of_bytes(self.memory) if self.memory else None

    @property
    def seconds(self) -> float | None:
        """How long one attempt may take."""
        return seconds(self.time) if self.time else None

    @property
    def grace_seconds(self) -> float:
        return seconds(self.grace)
