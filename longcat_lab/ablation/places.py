"""Where a question says what: lines of its file, or the override that said it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from longcat_lab.config.yaml import line_of


@dataclass
class Places:
    """Of one question.

    Attributes:
        name: the file, as it was given.
        text: its content; None for a question from plain data.
        overridden: keys -> the override that has said it.
    """

    name: str = "ablation"
    text: str | None = None
    overridden: dict[tuple[str, ...], str] = field(default_factory=dict)

    def of(self, keys: Sequence[Any]) -> str:
        """The start of a sentence about what `keys` lead to: `demo.yaml, line 12: `."""
        for start, override in self.overridden.items():
            if tuple(keys[: len(start)]) == start:
                return f"Override '{override}': "
        line = line_of(self.text, keys) if self.text is not None else None
        return f"{self.name}, line {line}: " if line else f"{self.name}: "
