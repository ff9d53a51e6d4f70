"""Finished results that are about to be replaced, because configuration, data or code changed: kept aside, never deleted.

FOLDER/superseded/OLD_IDENTITY/VARIANT/seed-S   what FOLDER/jobs/VARIANT/seed-S held
"""

from __future__ import annotations

from pathlib import Path

from longcat_lab.ablation import store

NAME = "superseded"
LOG = "finished.log"  # the finished run's job.log, until its folder is set aside


def keep_log(folder: Path) -> None:
    """Save the log of a finished job before the next process overwrites it."""
    if (folder / "job.log").is_file() and not (folder / LOG).exists():
        (folder / "job.log").replace(folder / LOG)


def set_aside(folder: Path, identity: str, stay: tuple[str, ...]) -> Path:
    """Move what is in a finished job's folder, except the names in `stay`; returns where it is. The caller holds the folder's lock."""
    sweep, variant, seed = folder.parents[2], folder.parent.name, folder.name
    home, number = sweep / NAME / identity / variant, 1
    while (place := home / (seed if number == 1 else f"{seed}-{number}")).joinpath("run.json").exists():
        number += 1  # this identity has been replaced before
    place.mkdir(parents=True, exist_ok=True)
    # run.json goes last: whoever is killed in between is gone on with from here.
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name == "run.json"):
        if entry.name not in stay and entry.name != store.LOCK:
            entry.replace(place / ("job.log" if entry.name == LOG else entry.name))
    return place
