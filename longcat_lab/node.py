"""The base of every configuration node: strict keys, strict types, errors that name the fix."""

from __future__ import annotations

import difflib
import reprlib
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError

from longcat_lab.errors import LabError


class ConfigError(LabError):
    """A configuration cannot be used; the message names the key, what is wrong with it and what to write instead.

    The message stays one line also where it quotes text with line breaks or characters that do not print.

    Attributes:
        at: the keys down to what is wrong, for those that know where it is written; empty where it is nothing of its own.
    """

    def __init__(self, message: str, at: tuple[Any, ...] = ()) -> None:
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))
        self.at = at


class InnerNodeError(ValueError):
    """Carries the error of a node that was chosen at run time (a block kind) up to the outer node's error."""

    def __init__(self, kind: type[BaseModel], error: ValidationError) -> None:
        super().__init__(str(error))
        self.kind, self.error = kind, error


class Node(BaseModel):
    """One node of a configuration tree. Unknown keys, wrong types, inf and nan are errors, values are immutable."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True, allow_inf_nan=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain data (JSON types only), from which `validate_node` makes an equal node again."""
        return self.model_dump(mode="json")


def nearest(word: str, known: list[str]) -> str:
    """`, did you mean 'x'?`, or the list of what there is when nothing is near."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return f", did you mean '{close[0]}'?"
    return f"; known here: {', '.join(sorted(known))}" if known else ""


def validate_node(kind: type[Node], data: Any, where: str = "") -> Any:
    """`data` (a mapping) as a `kind`.

    Raises:
        ConfigError: one sentence naming the dotted key, relative to `where`.
    """
    if not isinstance(data, dict | Node):
        raise ConfigError(f"{where or kind.__name__}: expected keys and values, got {data!r}.")
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        sentence, at = _sentence(error, kind, where)
        raise ConfigError(sentence, at) from None


def _sentence(error: ValidationError, kind: type[BaseModel], where: str) -> tuple[str, tuple[str, ...]]:
    """What is wrong, and the keys down to it."""
    errors = error.errors()
    # A misspelt key is missing under its own name too: the misspelling is what a person wants to hear of.
    first = next((each for each in errors if each["type"] == "extra_forbidden"), errors[0])
    parts, parent = _walk(kind, first["loc"])
    if named := parts[-1:] == ["[key]"]:  # the name itself is wrong, not what it holds
        parts = parts[:-1]
    at = tuple(parts)
    key = ".".join(([where] if where else []) + parts)
    if first["type"] == "extra_forbidden":
        return f"Unknown key '{key}'{nearest(parts[-1], list(parent.model_fields))}", at
    if first["type"] == "missing":
        return f"'{key}' is missing.", at
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, InnerNodeError):
        sentence, inner = _sentence(cause.error, cause.kind, key)
        return sentence, at + inner
    message = first["msg"].removeprefix("Value error, ")
    got = "" if first["type"] == "value_error" else f", got {_shown(first['input'])}"
    end = "" if (message + got).endswith(("?", ".")) else "."
    if not key:  # settings of several sections disagree: the message names them itself
        return f"{message}{got}{end}", at
    return f"'{key}'{' as a name' if named else ''}: {message[0].lower()}{message[1:]}{got}{end}", at


def _shown(value: Any) -> str:
    """What was written, on one line and readable however long or deep it is."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 80
    try:
        return short.repr(value)
    except ValueError:  # Python writes no integer of more than 4300 digits
        return "a very long number"


def _walk(kind: type[BaseModel], path: tuple[Any, ...]) -> tuple[list[str], type[BaseModel]]:
    """The keys that a person wrote on `path` (pydantic adds the tag of a chosen union member), and the node that holds the last."""
    keys, node, choices = [], kind, [kind]
    for part in path:
        tagged = [choice for choice in choices if part in _tags(choice)]
        if len(choices) > 1 and tagged:
            node, choices = tagged[0], tagged
            continue
        keys.append(str(part))
        node = choices[0] if choices else node
        field = node.model_fields.get(part) if choices else None
        choices = _nodes(field.annotation) if field else []
    return keys, node


def _nodes(annotation: Any) -> list[type[BaseModel]]:
    candidates = [annotation, *getattr(annotation, "__args__", ())]
    return [each for each in candidates if isinstance(each, type) and issubclass(each, BaseModel)]


def _tags(node: type[BaseModel]) -> tuple[Any, ...]:
    kind = node.model_fields.get("kind")
    return getattr(kind.annotation, "__args__", ()) if kind else ()
