"""A question file becomes jobs, jobs become results with error bars, results become a page.

Names load on first use, so importing this package stays light: nothing of papermill, nbconvert, scipy, pandas or torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longcat_lab.ablation.executors import Executor, Handle, register_executor
    from longcat_lab.ablation.executors.local import LocalExecutor
    from longcat_lab.ablation.jobs import Job, plan
    from longcat_lab.ablation.match import Solution, solve
    from longcat_lab.ablation.outcome import JobsFailed, LabInterrupted
    from longcat_lab.ablation.planned import Forecast, forecast
    from longcat_lab.ablation.ranks import Ranks, rank_agreement
    from longcat_lab.ablation.report import check, render
    from longcat_lab.ablation.resources import Resources
    from longcat_lab.ablation.rooms import Rooms
    from longcat_lab.ablation.spec import Ablation, Claim, Evaluation, Match, Tune, Vanishes, read
    from longcat_lab.ablation.statistics import Contrast, Summary, Verdict, contrast, judge, noise, summary
    from longcat_lab.ablation.store import Sweep, load_results, read_sweep
    from longcat_lab.ablation.sweep import run

_HOME = {
    "spec": ("Ablation", "Claim", "Evaluation", "Match", "Tune", "Vanishes", "read"),
    "match": ("Solution", "solve"),
    "jobs": ("Job", "plan"),
    "rooms": ("Rooms",),
    "store": ("Sweep", "load_results", "read_sweep"),
    "executors": ("Executor", "Handle", "register_executor"),
    "executors.local": ("LocalExecutor",),
    "outcome": ("JobsFailed", "LabInterrupted"),
    "resources": ("Resources",),
    "planned": ("Forecast", "forecast"),
    "ranks": ("Ranks", "rank_agreement"),
    "statistics": ("Contrast", "Summary", "Verdict", "contrast", "judge", "noise", "summary"),
    "sweep": ("run",),
    "report": ("check", "render"),
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "Ablation",
    "Claim",
    "Contrast",
    "Evaluation",
    "Executor",
    "Forecast",
    "Handle",
    "Job",
    "JobsFailed",
    "LabInterrupted",
    "LocalExecutor",
    "Match",
    "Ranks",
    "Resources",
    "Rooms",
    "Solution",
    "Summary",
    "Sweep",
    "Tune",
    "Vanishes",
    "Verdict",
    "check",
    "contrast",
    "forecast",
    "judge",
    "load_results",
    "noise",
    "plan",
    "rank_agreement",
    "read",
    "read_sweep",
    "register_executor",
    "render",
    "run",
    "solve",
    "summary",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE})
