"""YAML in and out: always the safe loader, with numbers such as 1e-3 read as numbers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from longcat_lab.node import ConfigError


class _Loader(yaml.SafeLoader):
    """YAML 1.1 takes `1e-3` for a string; YAML 1.2, and every person, for a number."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789."))


def _no_duplicates(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
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
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{where}{place}: not valid YAML: {getattr(error, 'problem', None) or error}.") from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in the file at `path`."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    data = parse_yaml(text, str(path))
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected 'key: value' lines, found {type(data).__name__}.")
    return data


def write_yaml(data: dict[str, Any]) -> str:
    """`data` as YAML text, keys in their own order."""
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=120)
