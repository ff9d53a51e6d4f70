"""What a notebook opens with: `lab.panel` and `lab.runs`, and what `lab.fit` shows there. Everything of Jupyter is imported inside, when it
is first asked for."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longcat_lab import training
from longcat_lab.errors import LabError

if TYPE_CHECKING:
    from longcat_lab.ablation import Ranks
    from longcat_lab.config import RunConfig
    from longcat_lab.notebook.panel import Panel
    from longcat_lab.notebook.runs import Runs
    from longcat_lab.training.launch import View


@functools.wraps(training.fit)
def fit(*arguments: Any, **settings: Any) -> training.Run:
    if settings.get("nproc") is not None and "ipykernel" in sys.modules:
        from longcat_lab.training import launch

        launch.view_of = _below_the_cell
    return training.fit(*arguments, **settings)


def _below_the_cell(folder: Path, nproc: int) -> View | None:
    try:
        from longcat_lab.notebook.panel.below import below
    except ImportError:  # the panel's packages are not installed: a bar is all that there is
        return None
    return below(folder, nproc)


def panel(
    config: RunConfig | str,
    path: str | Path = "runs/panel",
    compare: Iterable[Any] = (),
    interactive: bool | None = None,
    nproc: int | None = None,
) -> Panel:
    """Knobs made from the configuration, what they cost, training beside the kernel with live curves, Stop.

    The last line of a cell shows it. `run = await panel.train()` presses Train and waits for the end; without a browser (papermill) the
    same lines run to their end and leave static figures. Runs lie in `path`/IDENTITY, where a panel that is opened later finds them.

    Args:
        config: a configuration or a preset's name.
        path: folder of the runs.
        compare: runs, or folders of runs, to draw beside the live one.
        interactive: widgets (True) or static pictures (False); None finds out.
        nproc: processes that train, laid out as `parallel` says; beside Train it can be changed. None: one.

    Raises:
        LabError: Jupyter's packages are not installed.
    """
    _needs_jupyter()
    from longcat_lab.notebook.panel import Panel

    return Panel(config, path, compare, interactive, nproc)


def runs(folder: str | Path = "runs") -> Runs:
    """Every run below `folder`, those that train now included: `.frame` is a DataFrame, the last line of a cell shows a sortable table.

    `lab.runs()["demo/*"].compare()` draws curves on common axes beside the settings that differ and the summaries.

    Raises:
        LabError: there is no such folder, or Jupyter's packages are not installed.
    """
    _needs_jupyter()
    from longcat_lab.notebook.runs import runs as found

    return found(folder)


def rank_agreement(folder_a: str | Path, folder_b: str | Path, metric: str | None = None) -> Ranks:
    """How far two sweeps agree in the order of the arms that both have: Kendall's tau and Spearman's rho, with exact p for few arms.

    Args:
        metric: the first sweep's primary metric when left out.

    Raises:
        LabError: there is no sweep, or they do not have three arms in common with finished jobs.
    """
    from longcat_lab.ablation import rank_agreement as agreed

    return agreed(folder_a, folder_b, metric)


def _needs_jupyter() -> None:
    try:
        import ipywidgets  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise LabError(f"This needs the packages of Jupyter ({error.name} is missing): pip install 'longcat-lab[notebook]'.") from None
