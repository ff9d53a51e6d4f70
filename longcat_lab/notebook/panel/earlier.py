"""Runs that lie in folders: which there are, what each is called, which one a configuration has already."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from longcat_lab.config import RunConfig, load
from longcat_lab.config.plugins import known_here
from longcat_lab.data import prepare
from longcat_lab.errors import LabError
from longcat_lab.files import read_json
from longcat_lab.notebook.listing.found import run_folders
from longcat_lab.notebook.panel.follow import part, state_of
from longcat_lab.notebook.panel.knobs import changed
from longcat_lab.training import Run, code_hash, identity

MOST = 40  # runs that a list shows, the newest


def runs_in(path: str | Path, most: int | None = MOST) -> list[Path]:
    """Folders of runs directly in `path`, the newest first."""
    return _newest(record.parent for record in Path(path).glob("*/run.json"))[:most]


def compared(compare: Iterable[Any]) -> list[Path]:
    """Folders of the runs to compare with: of each a run, its folder, or a folder with runs somewhere below.

    Raises:
        LabError: there is no run in one of them.
    """
    found = []
    for each in [compare] if isinstance(compare, str | Path | Run) else compare:
        folder = Path(each.path if isinstance(each, Run) else each)
        below = _newest(run_folders(folder)[0])
        if not below:
            raise LabError(f"compare: there is no run in {folder}; give a run, its folder, or a folder that holds runs.")
        found += below
    return list(dict.fromkeys(found))


def _newest(folders: Iterable[Path]) -> list[Path]:
    times = {}
    for folder in folders:
        try:
            times[folder.resolve()] = (folder / "run.json").stat().st_mtime
        except OSError:  # deleted meanwhile
            continue
    return sorted(times, key=times.__getitem__, reverse=True)


def config_of(folder: Path) -> RunConfig | None:
    """The run's configuration; None where it cannot be made here (blocks that this session does not know, another version)."""
    try:
        return _config_at(folder, state_of(folder / "run.json"))
    except (LabError, KeyError, TypeError, AttributeError, ValueError):
        return None


# A list of runs is named anew whenever it is shown: what was read counts until the file is written again. Failures are not kept, because
# a cell may register the block that was missing.
@lru_cache(maxsize=1024)
def _record_at(folder: Path, state: Any) -> dict[str, Any]:
    record = read_json(folder / "run.json")
    return record if isinstance(record, dict) else {}


@lru_cache(maxsize=1024)
def _config_at(folder: Path, state: Any) -> RunConfig:
    return load(known_here(_record_at(folder, state)))


def _record(folder: Path) -> dict[str, Any]:
    return _record_at(folder, state_of(folder / "run.json"))


def run_of(config: RunConfig, path: str | Path) -> Path | None:
    """The run in `path` that training `config` would go on with or give back; None if there is none. No text is prepared for this."""
    return next((folder for folder in runs_in(path, None) if is_of(folder, config)), None)


def is_of(folder: Path, config: RunConfig) -> bool:
    """Whether the run in `folder` is what training `config` would go on with or give back. No text is prepared for this."""
    record = _record(folder)
    if _deciding(part(record, "config")) != _deciding(config.to_dict()) or part(record, "provenance").get("code") != code_hash():
        return False

    def refuse(line: str) -> None:
        raise LabError(f"The text is not prepared: {line}")

    try:
        prepare(config.data, config.model.vocab_size, progress=refuse)
        return record.get("identity") == identity(config)
    except Exception:  # text that is gone, somebody's block that cannot be built: what is wrong is said when it is trained
        return False


def same(one: RunConfig | None, other: RunConfig) -> bool:
    """Whether both train the same run."""
    return one is not None and _deciding(one.to_dict()) == _deciding(other.to_dict())


def _deciding(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in ("tracking", "parallel", "plugins")}


def named(folders: Iterable[Path], config: RunConfig) -> dict[str, Path]:
    """A name of its own for each run, see `name_of`."""
    found: dict[str, Path] = {}
    for folder in folders:
        name = name_of(folder, config)
        found[name if name not in found else f"{name} ({folder})"] = folder
    return found


def name_of(folder: Path, config: RunConfig) -> str:
    """A run in a few words: how it differs from `config`, how it ended, its folder's name."""
    record, own = _record(folder), config_of(folder)
    if own is None:
        said = "other blocks"
    else:
        said = differences(own, config) or "the same settings"
    bpb = part(record, "final").get("validation_bpb")
    bpb = f"{bpb:.3f} bits per byte" if isinstance(bpb, int | float) else record.get("status", "?")
    place = folder.name[:8] if len(folder.name) == 16 else f"{folder.parent.name}/{folder.name}"
    return f"{said} · {bpb} · {place}"


def differences(config: RunConfig, other: RunConfig, most: int = 3) -> str:
    """What `config` has otherwise than `other`, as `name=value`, the first few."""
    found = [f"{path.removesuffix('.kind').rpartition('.')[2]}={_short(now)}" for path, (_, now) in changed(config, other).items()]
    return ", ".join(found[:most]) + (f" and {len(found) - most} more" if len(found) > most else "")


def _short(value: Any) -> str:
    text = "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 24 else text[:23] + "…"
