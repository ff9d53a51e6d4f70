"""Where a question says what: lines of its file, or the override that said it; and where the files are that it names."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longcat_lab.ablation.lock import LOCK
from longcat_lab.config.plugins import located
from longcat_lab.config.yaml import line_of
from longcat_lab.errors import LabError
from longcat_lab.node import ConfigError

if TYPE_CHECKING:
    from longcat_lab.ablation.spec import Ablation

REPOSITORY = Path(__file__).resolve().parents[2]
FILES = ("notebook", "base", "compare_with", "plugins")  # keys of a question that name files
LEAVES = (
    "which leads out of the question's folder, the working folder and the one that holds longcat_lab: put the file into one of them, or "
    "write its path in full, from / on."
)


@dataclass
class Places:
    """Of one question.

    Attributes:
        name: the file, as it was given.
        text: its content; None for a question from plain data.
        overridden: keys -> the override that has said it.
        leaving: keys -> what is wrong with a relative path there, which leads to where nobody who reads the question would look. It
            can be read nevertheless, but not run: see `check`.
    """

    name: str = "ablation"
    text: str | None = None
    overridden: dict[tuple[str, ...], str] = field(default_factory=dict)
    leaving: dict[tuple[Any, ...], str] = field(default_factory=dict)

    def of(self, keys: Sequence[Any]) -> str:
        """The start of a sentence about what `keys` lead to: `demo.yaml, line 12: `."""
        for start, override in self.overridden.items():
            if tuple(keys[: len(start)]) == start:
                return f"Override '{override}': "
        line = line_of(self.text, keys) if self.text is not None else None
        return f"{self.name}, line {line}: " if line else f"{self.name}: "

    def find(self, data: dict[str, Any]) -> dict[str, Any]:
        """The content of the question with its files by their full paths, as far as they are there; what is no text stays as it is.

        Raises:
            ConfigError: a path that no file can have, or plugins that are no list of Python files.
        """
        data = dict(data)
        for key in FILES:
            for i, name in enumerate(data[key] if isinstance(data.get(key), list) else [data.get(key)]):
                if isinstance(name, str) and "\0" in name:
                    raise ConfigError(f"'{key}' names {name!r}, and no path holds that character.", (key, i))
        beside = [] if self.text is None else [Path(self.name).resolve().parent]
        if beside and isinstance(base := data.get("base"), str) and Path(base).suffix in (".yaml", ".yml"):
            data["base"] = str(first(self._at(base, [*beside, Path.cwd()], ("base",))) or base)
        if beside and isinstance(other := data.get("compare_with"), str):
            folders = (folder / other for folder in (*beside, Path.cwd()))
            data["compare_with"] = next((str(folder.resolve()) for folder in folders if os.path.isdir(folder)), other)
        if isinstance(files := data.get("plugins"), list) and all(isinstance(name, str) for name in files):
            # Without a file of the question's own the working folder alone is left: nobody is led astray there.
            names = [os.path.expanduser(name) for name in files]
            found = [self._at(name, [*beside, Path.cwd()], ("plugins", i)) if beside else [Path(name)] for i, name in enumerate(names)]
            data["plugins"] = [str(first(each) or each[0]) for each in found]
        if data.get("plugins"):
            try:
                data["plugins"] = located(data["plugins"])
            except ConfigError as error:
                raise ConfigError(str(error), ("plugins",)) from None
            except OSError as error:
                raise ConfigError(f"'plugins' cannot be looked for: {error.strerror}.", ("plugins",)) from None
        return data

    def _at(self, name: str, folders: Sequence[Path], keys: tuple[Any, ...]) -> list[Path]:
        places = inside(name, folders, Path(self.name))
        if not places:
            self.leaving[keys] = f"'{keys[0]}' names {name}, {LEAVES}"
            places = [Path(os.path.realpath(folder / name)) for folder in folders]
        return places


def inside(name: str, folders: Sequence[Path], question: Path | None) -> list[Path]:
    """Where a file of a question may be: its path in full as it is, a relative one below each of `folders`, without the places that are
    neither in the question's folder, nor in the working folder, nor in the folder that holds this package. Empty where nothing is left,
    or where the file is only there where it may not be."""
    if os.path.isabs(name):
        return [Path(os.path.realpath(name))]
    known = [*([question.resolve().parent] if question is not None else []), Path.cwd().resolve(), REPOSITORY]
    every = dict.fromkeys(Path(os.path.realpath(folder / name)) for folder in folders)
    found = [place for place in every if any(place.is_relative_to(each) for each in known)]
    return found if first(found) or not first([*every]) else []


def first(places: Sequence[Path]) -> Path | None:
    """The first that is there."""
    return next((place for place in places if os.path.isfile(place)), None)


def check(ablation: Ablation) -> list[str]:
    """Of a question that is to be run or planned, what must be said of the files that it names.

    Raises:
        LabError: a relative path leads outside, or what it is to be compared with is no sweep.
    """
    for keys, said in ablation._places.leaving.items():
        raise LabError(f"{ablation.at(*keys)}{said}")
    if ablation.compare_with is None or os.path.isfile(other := Path(ablation.compare_with) / "ablation.yaml"):
        return []
    folder = other.parent
    try:  # a sweep that is still tuning has no question in its folder yet
        begun = not os.path.lexists(folder) or {*os.listdir(folder)} <= {LOCK, "tuning"}
    except OSError:  # a file, or nobody may look into it
        begun = False
    if not begun:
        raise LabError(f"{ablation.at('compare_with')}'compare_with' names {folder}, which is no sweep's folder: it has no {other.name}.")
    return [f"compare_with: {folder} holds no sweep yet; the order of the arms is compared once it has results."]
