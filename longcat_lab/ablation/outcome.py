"""How a sweep can end other than well."""

from __future__ import annotations

from pathlib import Path

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
