"""The live panel: knobs, budget, picture, training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longcat_lab.notebook.panel.panel import Panel

__all__ = ["Panel"]


def __getattr__(name: str) -> Any:
    """On first use: the parts of the panel that need no widgets load none."""
    if name != "Panel":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from longcat_lab.notebook.panel.panel import Panel

    return Panel
