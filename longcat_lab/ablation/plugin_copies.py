"""The plugins of a sweep, copied into its folder: what its jobs import, so that the sweep is whole by itself. Its page imports none.

FOLDER/plugins/NAME.py                       a copy; ablation.yaml says of which file, and its hash
FOLDER/superseded/plugins/HASH-NAME.py       a copy that an edited file has replaced
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from longcat_lab.errors import LabError
from longcat_lab.files import write_whole

HOME = "plugins"


def names(contents: dict[str, bytes]) -> dict[str, str]:
    """Path of a plugin -> name of its copy; files of one content share one, others of one name are numbered."""
    found: dict[str, str] = {}
    by_content: dict[bytes, str] = {}
    for path, source in contents.items():
        if source not in by_content:
            name, number = Path(path).name, 1
            while name in by_content.values():
                number += 1
                name = f"{Path(path).stem}-{number}.py"
            by_content[source] = name
        found[path] = by_content[source]
    return found


def moved(config: Any, folder: Path, contents: dict[str, bytes]) -> Any:
    """`config`, naming the copies in the sweep's folder in place of the files they are of. They need not be there yet."""
    if not contents:
        return config
    return config.model_copy(update={"plugins": _paths(folder, names(contents).values())})


def _paths(folder: Path, copies: Any) -> list[str]:
    return [str(folder.resolve() / HOME / name) for name in dict.fromkeys(copies)]


def write(folder: Path, contents: dict[str, bytes]) -> dict[str, dict[str, str]]:
    """Makes the copies; a copy of another content is kept in `superseded`. Returns what ablation.yaml says of them (`copied`)."""
    copied: dict[str, dict[str, str]] = {}
    for path, name in names(contents).items():
        source, place = contents[path], folder / HOME / name
        if place.is_file() and (old := place.read_bytes()) != source:
            aside = folder / "superseded" / HOME / f"{hashlib.sha256(old).hexdigest()[:16]}-{name}"
            aside.parent.mkdir(parents=True, exist_ok=True)
            place.replace(aside)
        if not place.is_file():
            write_whole(place, lambda part, source=source: part.write_bytes(source))
        copied.setdefault(f"{HOME}/{name}", {"of": path, "sha256": hashlib.sha256(source).hexdigest()})
    return copied


def kept(folder: Path, copied: dict[str, dict[str, str]]) -> list[str]:
    """Paths of the copies in a sweep's folder, which are the very files that ablation.yaml tells of; nothing is imported.

    Raises:
        LabError: one is not there, is another file, or lies elsewhere.
    """
    home, found = folder.resolve() / HOME, []
    for name, told in copied.items():
        place = (folder / name).resolve()
        if place.parent != home or place.suffix != ".py":
            raise LabError(f"{folder / 'ablation.yaml'}: 'copied' names {name}, which is not in the sweep's own folder {HOME}.")
        if not place.is_file():
            raise LabError(f"{place} is not there, and without it the sweep's configurations cannot be read: put it back.")
        if hashlib.sha256(place.read_bytes()).hexdigest() != told.get("sha256"):
            raise LabError(
                f"{place} is not the file that the sweep ran with (its hash is not the one in ablation.yaml), so it is not imported: "
                "put the right one back, or run the sweep again."
            )
        found.append(str(place))
    return found


def take_over(folder: Path, copied: dict[str, dict[str, str]], runs: Iterable[dict[str, Any]]) -> None:
    """Lets configurations in records name the sweep's own copies and nothing else, whatever file they named: loading them imports it.

    Raises:
        LabError: see `kept`.
    """
    if configs := [config for run in runs if isinstance(config := run.get("config"), dict) and config.get("plugins")]:
        paths = kept(folder, copied)
        for config in configs:
            config["plugins"] = paths


def here(folder: Path, run: dict[str, Any]) -> None:
    """Lets the configuration in a job's record name the copies in the sweep's folder, which may have moved since it was written."""
    config = run.get("config") or {}
    if config.get("plugins"):
        config["plugins"] = _paths(folder, (Path(path).name for path in config["plugins"]))
