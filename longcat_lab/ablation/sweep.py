"""A sweep from its question to its noise floor: what must be known before it is solved, the jobs, and what is kept for the next one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from longcat_lab.ablation import executors, floor, match, measured, places, runner, store, tuning
from longcat_lab.ablation.outcome import JobsFailed, command
from longcat_lab.ablation.rooms import Rooms
from longcat_lab.ablation.spec import Ablation


def run(
    ablation_path: str | Path, out: str | Path | None = None, jobs: int | None = None, overrides: Iterable[str] = (), **more: Any
) -> Path:
    """Run every job of an ablation that is not finished yet, and return the sweep's folder.

    Before: steps are measured where time is held equal, and each arm is tuned where the question asks for it (FOLDER/tuning). After: what
    an A/A arm has measured is kept beside the sweeps (`floor`).

    Args and raises: see `runner.run`.
    """
    overrides, rooms = list(overrides), more.get("rooms") or Rooms()

    def settled(ablation: Ablation, folder: Path, notebook: Path, engine: executors.Executor) -> Ablation:
        say = _say(more.get("console"))
        for line in places.check(ablation):
            say(line)
        ablation = before(ablation, folder, rooms, jobs, say, executor=engine)
        if ablation.tune is not None:
            again = command(ablation_path, out, jobs, overrides, more.get("executor", "local"))
            ablation = tuning.tuned(ablation, match.solve(ablation, rooms), folder, sub, notebook, again)
        return ablation.model_copy(update={"noise": noise(ablation, folder, rooms)})

    def sub(path: Path, home: Path) -> Any:
        return runner.run(path, home, jobs, **more)

    try:
        folder = runner.run(ablation_path, out, jobs, overrides, settled=settled, **more)
    except tuning.TuningFailed:  # its folder is no sweep of the question
        raise
    except JobsFailed as error:
        floor.keep(error.folder)
        raise
    floor.keep(folder)
    return folder


def before(
    ablation: Ablation,
    folder: Path,
    rooms: Rooms,
    jobs: int | None,
    say: Callable[[str], None],
    measure: bool = True,
    executor: str | executors.Executor = "local",
) -> Ablation:
    """The question with what a sweep must know before it is solved: measured steps. What the folder has of these stays, so that going on
    solves nothing anew. Writes nothing.

    Raises:
        LabError: steps cannot be measured.
    """
    there = asked(folder, ablation.name)
    update: dict[str, Any] = {}
    if measure:
        update["measured"] = measured.clocks(
            ablation, rooms, threads(ablation, jobs, folder, rooms, executor), there.get("measured") or {}, say
        )
    elif not ablation.measured:
        update["measured"] = there.get("measured") or {}
    return ablation.model_copy(update=update)


def noise(ablation: Ablation, folder: Path, rooms: Rooms) -> dict[str, Any]:
    """The noise floor that was known when the sweep began: what its folder has of it, else what is known now."""
    if there := asked(folder, ablation.name):
        return there.get("noise") or {}
    return floor.known(folder, ablation, lambda: match.solve(ablation, rooms).configs[ablation.baseline], rooms.code)


def asked(folder: Path, name: str) -> dict[str, Any]:
    """What a sweep's folder holds of its question; empty where there is none of that name."""
    if not (folder / "ablation.yaml").is_file():
        return {}
    question = store.read_question(folder)
    return question if question.get("name") == name else {}


def threads(ablation: Ablation, jobs: int | None, folder: Path, rooms: Rooms, executor: str | executors.Executor = "local") -> int:
    """Of a job of this sweep."""
    engine = executors.make(executor, ablation.resources, jobs, folder, rooms)
    return int(getattr(engine, "threads", ablation.resources.cores or 1))


def _say(console: Any) -> Callable[[str], None]:
    def say(line: str) -> None:
        from rich.console import Console

        (console or Console()).print(line, highlight=False, markup=False, soft_wrap=True)

    return say


__all__ = ["asked", "before", "noise", "run", "threads"]
