"""Threads that jobs compute with, against the cores that they have: two jobs must not fight for one core."""

from __future__ import annotations

from longcat_lab.ablation.executors import Executor
from longcat_lab.ablation.match import Solution
from longcat_lab.ablation.quantities import setting
from longcat_lab.ablation.spec import Ablation
from longcat_lab.errors import LabError

THREADS = "training.threads"  # it decides bits, so it is the configuration's, and a job takes no other number


def reserve(engine: Executor, ablation: Ablation, solution: Solution) -> None:
    """Tells the engine the most threads of a job, so that it runs fewer jobs at a time where they would share cores.

    Raises:
        LabError: jobs have fewer cores by the question than threads by their configuration.
    """
    asked = ablation.resources
    for name, config in solution.configs.items():
        threads = (setting(config, THREADS) or 1) * asked.together
        if asked.cores and threads > asked.cores:
            each = "" if asked.together == 1 else f" in each of {asked.together} processes"
            raise LabError(
                f"{ablation.at('variants', name)}Variant '{name}' has {THREADS}={setting(config, THREADS)}{each}, and resources.cores "
                f"gives its jobs {asked.cores}: raise the one or lower the other."
            )
    if hasattr(engine, "reserve"):
        engine.reserve(max((setting(config, THREADS) or 1) * asked.together for config in solution.configs.values()))
