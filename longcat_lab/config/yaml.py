"""YAML in and out: always the safe loader, with numbers such as 1e-3 read as numbers, and dates as the text that they are.

A file is text that somebody wrote: what is wrong in it is told with its line, and it may not grow beyond bounds in memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import yaml

from longcat_lab.node import ConfigError

MOST = 100_000  # values that a file may stand for: anchors within anchors make billions of a few lines
NO_TAG = "could not determine a constructor for the tag "


class _Loader(yaml.SafeLoader):
    """YAML 1.1 takes `1e-3` for a string and `2020-01-02` for a date; YAML 1.2 for a number and for text. So does this."""

    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, re.Pattern[str]]]]] = {
        first: [(tag, pattern) for tag, pattern in known if tag != "tag:yaml.org,2002:timestamp"]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep=deep)
        except (ValueError, LookupError, AttributeError, TypeError, ArithmeticError):  # `!!int foo`, `!!bool foo`, `!!timestamp foo`
            problem = f"this cannot be read as '!!{node.tag.rpartition(':')[2]}'"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789."))


def _no_duplicates(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    if not isinstance(node, yaml.MappingNode):  # `!!map foo`
        return loader.construct_mapping(node)
    seen: dict[Any, int] = {}
    for key in (key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"):
        name = loader.construct_object(key, deep=True)
        try:
            twice = name in seen
        except TypeError:  # `[a, b]: 1`
            raise yaml.constructor.ConstructorError(None, None, "a list or a mapping cannot be a key", key.start_mark) from None
        if twice:
            problem = f"the key '{name}' is there twice, first in line {seen[name]}"
            raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
        seen[name] = key.start_mark.line + 1
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _no_duplicates)


def _values(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node stands for, those behind an alias counted each time."""
    if id(node) in known:
        if not known[id(node)]:
            raise yaml.constructor.ConstructorError(None, None, "an alias stands within its own anchor", node.start_mark)
        return known[id(node)]
    known[id(node)] = 0
    parts = node.value if isinstance(node, yaml.SequenceNode) else ()
    if isinstance(node, yaml.MappingNode):
        parts = [part for pair in node.value for part in pair]
    known[id(node)] = 1 + sum(_values(part, known) for part in parts)
    if known[id(node)] > MOST:
        raise yaml.constructor.ConstructorError(None, None, f"with its aliases it stands for more than {MOST:,} values", node.start_mark)
    return known[id(node)]


def parse_yaml(text: str, where: str) -> Any:
    """The value written in `text`; `where` names it in the error.

    Raises:
        ConfigError: it is not YAML, or far larger than it looks, with line and column.
    """
    loader = None
    try:
        loader = _Loader(text)  # a subclass of SafeLoader
        node = loader.get_single_node()
        if node is None:
            return None
        _values(node, {})
        return loader.construct_document(node)
    except RecursionError:
        place = f", line {loader.line + 1}" if loader is not None and "\n" in text else ""
        raise ConfigError(f"{where}{place}: not valid YAML: it is nested too deeply, take out brackets or indentation.") from None
    except yaml.reader.ReaderError as error:
        before = text[: error.position].split("\n")
        place = f", line {len(before)}, column {len(before[-1]) + 1}"
        problem = f"the character #x{error.character:04x} is not allowed, remove it"
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        if problem.startswith(NO_TAG):
            tag = problem.removeprefix(NO_TAG).strip("'").replace("tag:yaml.org,2002:", "!!")
            problem = f"the tag '{tag}' is not known here, write a plain value"
    raise ConfigError(f"{where}{place}: not valid YAML: {problem}.")


def line_of(text: str, at: Iterable[Any]) -> int | None:
    """The line, counted from 1, of what `at` (keys and places in lists) leads to in `text`, or of the nearest thing around it.

    A value that a merge (`<<`) brings has the line at which it is written. None where the text is no YAML.
    """
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return 1
        line = node.start_mark.line + 1
        for key in at:
            found = _within(loader, node, key)
            if found is None:
                break
            name, node = found
            line = name.start_mark.line + 1
    except (yaml.YAMLError, RecursionError):
        return None
    return line


def _within(loader: _Loader, node: yaml.Node, key: Any) -> tuple[yaml.Node, yaml.Node] | None:
    """(where it is written, its value) of one key or place."""
    if isinstance(node, yaml.SequenceNode):
        place = int(key) if str(key).isdecimal() else len(node.value)
        return (node.value[place], node.value[place]) if place < len(node.value) else None
    if not isinstance(node, yaml.MappingNode):
        return None
    merged = []
    for name, value in node.value:
        if name.tag == "tag:yaml.org,2002:merge":
            merged += value.value if isinstance(value, yaml.SequenceNode) else [value]
        elif isinstance(name, yaml.ScalarNode) and (name.value == str(key) or loader.construct_object(name) == key):
            return name, value
    return next((found for each in merged if (found := _within(loader, each, key))), None)


def read_text(path: str | Path) -> str:
    """The text of the file at `path`.

    Raises:
        ConfigError: it cannot be read, or it is no text.
    """
    try:
        content = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path}, line {line}: this is not UTF-8 text (byte {content[error.start]:#04x}): save it as UTF-8.") from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in the file at `path`."""
    return mapping(read_text(path), path)


def mapping(text: str, where: str | Path) -> dict[str, Any]:
    """The mapping written in `text`, which is that of the file `where`."""
    data = parse_yaml(text, str(where))
    if not isinstance(data, dict):
        found = "nothing" if data is None else type(data).__name__
        raise ConfigError(f"{where}, line {line_of(text, ())}: expected 'key: value' lines, found {found}.")
    return data


def write_yaml(data: dict[str, Any]) -> str:
    """`data` as YAML text, keys in their own order."""
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=120)
