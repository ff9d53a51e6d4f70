"""YAML in and out: always the safe loader, with numbers such as 1e-3 read as numbers, and dates as the text that they are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

import yaml

from longcat_lab.node import ConfigError


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
    keys = [loader.construct_object(key) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
    twice = next((key for i, key in enumerate(keys) if key in keys[:i]), None)
    if twice is not None:
        raise yaml.constructor.ConstructorError(None, None, f"the key '{twice}' is there twice", node.start_mark)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _no_duplicates)


def parse_yaml(text: str, where: str) -> Any:
    """The value written in `text`; `where` names it in the error.

    Raises:
        ConfigError: it is not YAML, with line and column.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # a subclass of SafeLoader
    except RecursionError:
        raise ConfigError(f"{where}: not valid YAML: it is nested too deeply, take out brackets or indentation.") from None
    except yaml.reader.ReaderError as error:
        before = text[: error.position].split("\n")
        place = f", line {len(before)}, column {len(before[-1]) + 1}"
        problem = f"the character #x{error.character:04x} is not allowed, remove it"
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
    raise ConfigError(f"{where}{place}: not valid YAML: {problem}.")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in the file at `path`."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    data = parse_yaml(text, str(path))
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected 'key: value' lines, found {type(data).__name__}.")
    return data


def write_yaml(data: dict[str, Any]) -> str:
    """`data` as YAML text, keys in their own order."""
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=120)
