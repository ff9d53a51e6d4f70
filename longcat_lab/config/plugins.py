"""Blocks of one's own in Python files that a configuration names under `plugins`: imported before anything else of it is validated.

A file is imported once per content, under a module name that follows from both, so that an edited file is imported anew in the same
process and a copy of it is the same plugin. What a path means to a run is nothing: the classes' code is part of its identity.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import sys
import threading
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from longcat_lab.blocks import BlockConfig, kinds, register
from longcat_lab.blocks.interface import file_of, forget, registering
from longcat_lab.node import ConfigError, Node

CONSTANTS = "__longcat_constants__"  # in a plugin's module: its lists and dictionaries of plain values as text, as they were imported
PLAIN = (int, float, complex, str, bytes, bool, type(None))


@dataclass(frozen=True, eq=False)
class Plugin:
    """One content that has been imported.

    Attributes:
        path: where it was when it was imported.
        kinds: what it registered, by role and name.
    """

    path: str
    sha256: str
    source: bytes
    kinds: dict[tuple[str, str], type[BlockConfig]]


_IMPORTED: dict[str, Plugin] = {}  # by content
_AT: dict[str, Plugin] = {}  # by path: the content that it had when it was last named
_LOCK = threading.RLock()


def located(names: Any, beside: Path | None = None) -> list[str]:
    """Absolute paths: a relative name is looked for in the folder `beside`, if there is one, then in the working folder.

    Raises:
        ConfigError: `names` is no list of Python files.
    """
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) and name.endswith(".py") for name in names):
        raise ConfigError(f"'plugins': write a list of Python files, as in plugins: [rules.py], got {names!r}.")
    found = []
    for name in names:
        places = [folder / Path(name).expanduser() for folder in (beside, Path.cwd()) if folder is not None]
        found.append(str(next((place for place in places if place.is_file()), places[0]).resolve()))
    return list(dict.fromkeys(found))


def use(names: Any, beside: Path | None = None) -> list[str]:
    """Imports the files of `names` (see `located`) as far as this process has not, so that their kinds are known; returns their paths.

    Raises:
        ConfigError: a file is not there, cannot be imported (with its line), registers nothing, or a name that is taken.
    """
    paths = located(names, beside)
    with _LOCK:
        for path in paths:
            _bring(path)
    return paths


def _bring(path: str) -> None:
    try:
        source = Path(path).read_bytes()
    except OSError as error:
        hint = " (a relative name is looked for beside the file that names it, then in the working folder)"
        raise ConfigError(f"'plugins' names {path}, which cannot be read: {error.strerror}{hint}.") from None
    sha256 = hashlib.sha256(source).hexdigest()
    before, plugin = _AT.get(path), _IMPORTED.get(sha256)
    if plugin is None:
        plugin = _IMPORTED[sha256] = _import(path, source, sha256)
    with registering():
        for (role, name), kind in plugin.kinds.items():
            if kinds(role).get(name) is not kind:  # another content of the file has taken its place, or a cell
                register(role)(kind)
    if before is not None and before is not plugin:  # edited: what it no longer has goes
        for (role, name), kind in before.kinds.items():
            if (role, name) not in plugin.kinds and kinds(role).get(name) is kind:
                forget(role, name)
    _AT[path] = plugin


def _import(path: str, source: bytes, sha256: str) -> Plugin:
    stem = re.sub(r"\W", "_", Path(path).stem)
    name = f"plugin_{stem}_{sha256[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    # Before it runs: annotations are looked up there. No byte code is read or written: within one second Python would take an edited
    # file of the same length for the old one.
    sys.modules[name] = module
    try:
        with registering() as found:
            exec(compile(source, path, "exec", dont_inherit=True), module.__dict__)
            if not found:
                raise ConfigError(f"The plugin {path} registers no block: put @lab.register(ROLE) above a class in it.")
    except BaseException as error:
        del sys.modules[name]
        if not isinstance(error, Exception | SystemExit) or (isinstance(error, ConfigError) and not _line(error, path)):
            raise
        raise ConfigError(_sentence(error, path)) from error
    module.__dict__[CONSTANTS] = _constants(module)
    return Plugin(path, sha256, source, dict(found))


def _line(error: BaseException, path: str) -> int:
    """The line of the file at which it went wrong; 0 where it was none of its lines."""
    if isinstance(error, SyntaxError) and error.filename == path:
        return error.lineno or 1
    return next((frame.lineno for frame in reversed(traceback.extract_tb(error.__traceback__)) if frame.filename == path), 0)


def _sentence(error: BaseException, path: str) -> str:
    line = _line(error, path)
    said = next((text.strip() for text in str(error).splitlines() if text.strip()), "")
    if isinstance(error, SyntaxError):
        said = error.msg
    if not isinstance(error, ConfigError):
        said = f"{type(error).__name__}: {said}" if said else type(error).__name__
    missing = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
    if missing and (Path(path).parent / f"{missing.partition('.')[0]}.py").is_file():
        said += f" (a plugin is one file: take in what it needs of {missing.partition('.')[0]}.py)"
    return f"The plugin {path}{f', line {line}' if line else ''}: {said.removesuffix('.')}."


def _constants(module: ModuleType) -> dict[str, str]:
    """Lists, tuples, sets and dictionaries of plain values, as text that is the same in every process."""
    found = {name: _text(value) for name, value in vars(module).items() if isinstance(value, list | tuple | set | frozenset | dict)}
    return {name: text for name, text in found.items() if text is not None and not name.startswith("__")}


def _text(value: Any) -> str | None:
    if isinstance(value, PLAIN):
        return repr(value)
    if isinstance(value, dict):
        value, name = [each for pair in value.items() for each in pair], "dict"
    elif isinstance(value, list | tuple | set | frozenset):
        name = type(value).__name__
    else:
        return None
    inner = [_text(each) for each in value]
    if None in inner:
        return None
    return f"{name}({', '.join(sorted(inner) if name in ('set', 'frozenset') else inner)})"


# ---- what others ask


def stated(paths: Iterable[str]) -> list[dict[str, str]]:
    """For a record: path and content hash of each file, as it was imported last."""
    return [{"path": path, "sha256": _AT[path].sha256} for path in paths if path in _AT]


def contents(paths: Iterable[str]) -> dict[str, bytes]:
    """Path -> the content that was imported from it last, whatever has become of the file."""
    return {path: _AT[path].source for path in paths if path in _AT}


def known_here(record: dict[str, Any]) -> dict[str, Any]:
    """The configuration in a run's record (run.json), with plugins that this process has imported already.

    A record is data, perhaps somebody else's: it never makes code run.

    Raises:
        ConfigError: it names a file that has not been imported here.
    """
    config = record["config"]
    if not config.get("plugins"):
        return config
    told = record.get("provenance", {}).get("plugins") or []
    hashes, found = {each.get("path"): each.get("sha256") for each in told}, []
    for path in config["plugins"]:
        plugin = _IMPORTED.get(hashes[path]) if hashes.get(path) else _AT.get(path)
        if plugin is None and path not in _AT:
            raise ConfigError(
                f"The run uses blocks from {path}, which this session has not imported, and a run's record may not import it: "
                f"if you trust that file, say lab.load({{'plugins': [{path!r}]}}) first."
            )
        place = next((at for at, each in _AT.items() if each is plugin and _unchanged(at, each)), None)
        if place is None:
            raise ConfigError(f"The run used {path} as it was before it was edited: put that content back, or train anew with the new one.")
        found.append(place)
    return {**config, "plugins": found}


def _unchanged(path: str, plugin: Plugin) -> bool:
    try:
        return Path(path).read_bytes() == plugin.source
    except OSError:
        return False


def check_portable(config: Any) -> None:
    """That another process can make this configuration from its plain data.

    Raises:
        ConfigError: a kind in it is from a notebook's cell, or from a file that it does not name under `plugins`.
    """
    named = [_AT[path] for path in getattr(config, "plugins", []) if path in _AT]
    for key, node in _blocks(config):
        kind = type(node)
        if kind.__module__.partition(".")[0] == "longcat_lab" or any(kind in plugin.kinds.values() for plugin in named):
            continue
        what = f"'{key}' is of the kind '{node.kind}', whose class {kind.__qualname__}"
        plugin = next((each for each in _IMPORTED.values() if kind in each.kinds.values()), None)
        if plugin is None:
            home = file_of(kind) or "this session, such as a notebook's cell"
            raise ConfigError(
                f"{what} is only known in {home}: put it into a Python file and name that under 'plugins', so that other processes find it."
            )
        if any(each.path == plugin.path for each in named):
            raise ConfigError(f"{what} has been edited in {plugin.path} since this configuration was loaded: load it again.")
        raise ConfigError(f"{what} is from {plugin.path}: name that file under 'plugins', so that other processes find it.")


def _blocks(node: Node, key: str = "") -> Iterator[tuple[str, BlockConfig]]:
    if isinstance(node, BlockConfig):
        yield key, node
    for name in type(node).model_fields:
        value = getattr(node, name)
        if isinstance(value, Node):
            yield from _blocks(value, f"{key}.{name}" if key else name)
