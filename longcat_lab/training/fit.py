"""`lab.fit`: one run in its folder, on the processes that there are."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from longcat_lab.config import RunConfig
from longcat_lab.errors import Diverged, LabError
from longcat_lab.files import read_json
from longcat_lab.training import device
from longcat_lab.training.run import Run
from longcat_lab.training.sitting import alone_in

HELD = "LONGCAT_LAB_HELD"  # environment variable: the folder whose lock the process that started this one holds


def fit(
    config: RunConfig,
    path: str | Path | None = None,
    *,
    progress: bool = True,
    stop: Callable[[], bool] | None = None,
    nproc: int | None = None,
) -> Run:
    """Trains `config` and returns its run.

    A finished run of the same identity in `path` is returned as it is; an unfinished one goes on from its checkpoint.

    Args:
        path: the run's folder; None takes `runs/single/IDENTITY`.
        progress: a progress bar on the terminal or in the notebook.
        stop: asked after each step; True ends the run there, with a checkpoint and status `interrupted`. From another process
            `training.requests.ask_to_stop(folder)` does the same.
        nproc: starts as many processes on this machine (torchrun), laid out as `parallel` says, and waits for them; what they print is
            in the folder's train.log. One that dies is started again with the others, from the last checkpoint. They end with this
            process, however it ends. A run may go on with another number, or with None: in this process, or in those that a launcher
            has started.

    Raises:
        Diverged: the loss is no number any more, or stays far above where it began (`training.diverged_factor`); the run is over.
        LabError: the folder holds another run or another process trains in it, the text is too short, memory or disk is full, a block
            of the model is known in this process alone (with `nproc`), another process failed.
        KeyboardInterrupt: as ever, but at the end of the step and after a checkpoint; a second one raises at once.
    """
    if nproc is not None:
        from longcat_lab.training import launch

        return launch.fit(config, path, nproc, progress, stop)
    from longcat_lab.parallel.faults import shared
    from longcat_lab.parallel.world import World, start  # here: what many processes need takes seconds to load
    from longcat_lab.training import provenance
    from longcat_lab.training.session import begin

    place = device.choose(config.training.device)
    start(config.parallel, device.backend(place))
    with shared():
        world = World(config, place)
        identity = world.first_of_all(lambda: provenance.identity(config))  # prepares the data, which the others then find
        world.alike("data or code", provenance.identity(config))
    folder = Path(path) if path is not None else Path("runs/single") / identity
    with shared(folder), contextlib.ExitStack() as held:
        before = world.first_of_all(lambda: take(folder, identity, held))
        if before.get("status") != "finished":
            with device.deterministic(config.training.threads):
                begin(config, world, folder, identity, before, progress and world.first, stop).run()
        world.from_first(None)  # the others do not read the record before it is written
    return Run(folder)


def take(folder: Path, identity: str, held: contextlib.ExitStack) -> dict[str, Any]:
    """Takes the folder's lock, unless the process that started this one holds it; what its run.json says."""
    from longcat_lab.training.checkpoint import remove_leftovers

    if os.environ.get(HELD) != str(folder.resolve()):
        held.enter_context(alone_in(folder))
    before = read_json(folder / "run.json")
    before = before if isinstance(before, dict) else {}
    if before.get("identity", identity) != identity:
        raise LabError(f"{folder} holds another run ({before['identity']}, this one is {identity}): give another folder or delete it.")
    if before.get("status") == "diverged":
        raise Diverged(f"{before['reason']} (So it ended before; to train it once more all the same, delete {folder}.)")
    if before.get("status") != "finished":
        remove_leftovers(folder)
    return before
