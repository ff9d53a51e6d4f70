"""A sweep's result page: what it says (`content`), how it is made (`rendering`), and whether it still agrees with the folder (`checking`).

Names load on first use: a notebook that draws curves needs nothing of the statistics.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longcat_lab.ablation.report.checking import check
    from longcat_lab.ablation.report.rendering import render

_HOME = {"check": "checking", "render": "rendering"}
__all__ = ["check", "render"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
