"""A sweep's result page: what it says (`content`), how it is made (`render`), and whether it still agrees with the folder (`check`).

Names load on first use: a notebook that draws curves needs nothing of the statistics.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longcat_lab.ablation.report.check import check
    from longcat_lab.ablation.report.render import render

__all__ = ["check", "render"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(f"{__name__}.{name}"), name)  # in place of the module, which has its name
    return found
