"""How a sweep can end other than well, and the command that goes on with it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longcat_lab.errors import LabError


class LabInterrupted(LabError):
    """The sweep was stopped and is in order; the sentence says how to go on. `folder` is the sweep's."""

    def __init__(self, sentence: str, folder: Path) -> None:
        super().__init__(sentence)
        self.folder = folder


class JobsFailed(LabError):
    """The sweep ran to its end and some jobs failed; the sentence says which and why. `folder` is the sweep's."""

    def __init__(self, sentence: str, folder: Path) -> None:
        super().__init__(sentence)
        self.folder = folder


def command(question: str | Path, out: str | Path | None, jobs: int | None, overrides: Sequence[str], executor: Any) -> str:
    """What a person types to go on; an executor that is an object has no name there."""
    words: list[str] = ["longcat-lab", "run", str(question)]
    for option, value in (("--out", out), ("--jobs", jobs), ("--executor", executor)):
        if isinstance(value, str | Path | int) and value != "local":
            words += [option, str(value)]
    return shlex.join([*words, *overrides])
