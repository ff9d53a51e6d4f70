"""The knobs of a configuration, read from its schema: what can be turned, within what bounds, and what it means. No widgets here."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator
from pydantic.fields import FieldInfo

from longcat_lab.blocks import BlockConfig, kinds
from longcat_lab.config import ConfigError, RunConfig, apply

SECTIONS = {  # what a person opens, and the nodes in it; a knob belongs to the longest of these prefixes
    "model": ("model",),
    "embedding": ("model.embedding",),
    "attention": ("model.attention",),
    "layers": ("model.layer", "model.ffn"),
    "moe": ("model.moe",),
    "mtp": ("model.mtp",),
    "data": ("data",),
    "training": ("training",),
    "optimizer": ("training.optimizer",),
    "schedule": ("training.schedule",),
    "parallel": ("parallel",),
    "tracking": ("tracking",),
    "run": ("",),
}
MISSING = dataclasses.MISSING


@dataclasses.dataclass(frozen=True)
class Knob:
    """One setting of a configuration.

    path: dotted name, as overrides write it. group: the node it belongs to. label: the field's own name.
    type: bool, int, float, choice, text, list (a list or mapping, written as YAML), kind (which of `choices` fills this place) or
        optional (whether the node at `path` is there).
    value, default: plain data; of a kind its name, or None where the place is empty; default MISSING: it must be written.
    lower, upper: bounds or None; lower_open, upper_open: the bound itself is not allowed. multiple_of: or None.
    nullable: may be empty (None). help: what it means; empty where the schema does not say.
    """

    path: str
    section: str
    group: str
    label: str
    type: str
    value: Any
    default: Any
    help: str
    lower: float | None = None
    upper: float | None = None
    lower_open: bool = False
    upper_open: bool = False
    multiple_of: float | None = None
    choices: tuple[Any, ...] = ()
    nullable: bool = False

    @property
    def range(self) -> str:
        """The bounds in words; empty where there are none."""
        low = "" if self.lower is None else f"{'above' if self.lower_open else 'from'} {self.lower:,}"
        high = "" if self.upper is None else f"{'below' if self.upper_open else 'up to'} {self.upper:,}"
        step = "" if self.multiple_of is None else f"multiple of {self.multiple_of:,}"
        return ", ".join(part for part in (low, high, step) if part)

    def alike(self, other: Knob | None) -> bool:
        """Whether both are the same knob, perhaps with another value."""
        return other is not None and dataclasses.replace(self, value=None, help="") == dataclasses.replace(other, value=None, help="")


def knobs(config: RunConfig) -> list[Knob]:
    """The knobs of the current configuration (of a block: its kind's); a node's own settings come before its inner nodes."""
    return list(_walk(config, config.to_dict(), ""))


def turn(config: RunConfig, path: str, value: Any) -> RunConfig:
    """`config` with one knob turned; see `turn_all`."""
    return turn_all(config, {path: value})


def turn_all(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """`config` with knobs turned together, each by its path.

    A new kind keeps the settings that it knows too. Those that stand at the old kind's default take its own default: LSA after DSA has
    LSA's sinks. An optional node is turned with True (or its settings) and False.

    Raises:
        ConfigError: one sentence: a setting does not fit, is unknown, or must be written together with its new kind.
    """
    known = {knob.path: knob for knob in knobs(config)}
    nodes: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    for path, value in sorted(changes.items(), key=lambda pair: pair[0].count(".")):
        knob = known.get(path)
        if knob is None or knob.type not in ("kind", "optional"):
            settings[path] = value
            continue
        place = path.removesuffix(".kind") if knob.type == "kind" else path
        if value is None or value is False:
            if not knob.nullable:
                raise ConfigError(f"'{path}' cannot be empty: choose one of {', '.join(map(str, knob.choices))}.")
            nodes[place] = None
            continue
        nodes[place] = _entered(config, place, value)
        absent = [each.path for each in needed(config, path, value) if each.path not in changes and each.label not in nodes[place]]
        if absent:
            what = f"'{path}' {value}" if knob.type == "kind" else f"'{path}'"
            raise ConfigError(f"{what} needs '{', '.join(absent)}', which has no default: write it too.")
    return apply(config, {**nodes, **settings})


def needed(config: RunConfig, path: str, value: Any) -> list[Knob]:
    """Settings without a default of the kind `value` (of the node, for an optional one) that the knob at `path` would choose."""
    place = path.removesuffix(".kind")
    name, field, current = _find(config, place)
    chosen = _kinds(name, field, current).get(value) if path != place else _nodes(field.annotation)[0]
    fields = chosen.model_fields.items() if chosen is not None and type(current) is not chosen else ()
    return [Knob(value=None, **_leaf(chosen, label, f"{place}.{label}")) for label, inner in fields if inner.is_required()]


def changed(config: RunConfig, baseline: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Path to (before, now) of every knob that differs. A knob that the baseline does not have is compared with its default."""
    before = {knob.path: knob.value for knob in knobs(baseline)}
    found = {}
    for knob in knobs(config):
        default = None if knob.default is MISSING else knob.default
        old = before.get(knob.path, default)
        if old != knob.value or type(old) is not type(knob.value):
            found[knob.path] = (old, knob.value)
    return found


def put_back(config: RunConfig, path: str, baseline: RunConfig) -> RunConfig:
    """`config` with one knob as in the baseline: of a kind or an optional node with all its settings, as they were.

    Raises:
        ConfigError: that does not fit the other settings.
    """
    place = path.removesuffix(".kind") if any(k.path == path and k.type == "kind" for k in knobs(config)) else path
    node: Any = baseline.to_dict()
    for part in place.split("."):
        if not isinstance(node, dict) or part not in node:  # a setting of a kind that the baseline does not have
            return turn(config, path, changed(config, baseline)[path][0])
        node = node[part]
    return apply(config, {place: node})


@lru_cache(maxsize=4096)
def section_of(path: str) -> str:
    """Name of the section that the knob at `path` stands in."""
    found = [(len(node), name) for name, nodes in SECTIONS.items() for node in nodes if not node or f"{path}.".startswith(f"{node}.")]
    return max(found)[1]


def _walk(node: BaseModel, plain: dict[str, Any], where: str) -> Iterator[Knob]:
    inner = []
    for name, field in type(node).model_fields.items():
        path = f"{where}.{name}" if where else name
        if _nodes(field.annotation):
            inner.append((path, name, field))
        elif not (name == "kind" and len(get_args(field.annotation)) == 1):  # a node's only kind: the knob of its place says it
            yield Knob(value=plain[name], **_leaf(type(node), name, path))
    for path, name, field in inner:
        value = getattr(node, name)
        found, nullable = _kinds(name, field, value), _members(field.annotation)[1]
        if found:
            yield _kind_knob(path, field, value, found, nullable)
        elif nullable:
            default = None if field.is_required() else field.get_default(call_default_factory=True)
            help = field.description or ""
            yield Knob(path, section_of(path), path, name, "optional", value is not None, default is not None, help, nullable=True)
        if value is not None:
            yield from _walk(value, plain[name], path)


def _kind_knob(path: str, field: FieldInfo, value: Any, found: dict[str, Any], nullable: bool) -> Knob:
    choices = (*([None] if nullable else []), *found)
    help, now = (field.description or "").strip(". "), None
    if value is not None:
        now, about = value.kind, (type(value).__doc__ or "").strip().partition("\n")[0]
        help = f"{help}. {now}: {about}" if about else help
    at = {"path": f"{path}.kind", "section": section_of(path), "group": path, "label": "kind", "type": "kind"}
    return Knob(**at, value=now, default=_default_kind(field), help=help, choices=choices, nullable=nullable)


def _default_kind(field: FieldInfo) -> Any:
    if field.is_required():
        return MISSING
    default = field.get_default(call_default_factory=True)
    chosen = next((each.func(default) for each in field.metadata if isinstance(each, BeforeValidator)), default)  # a slot's {} is a kind
    return getattr(chosen, "kind", None)


@lru_cache(maxsize=4096)  # a form asks for all knobs at each turn
def _leaf(node: type[BaseModel], name: str, path: str) -> dict[str, Any]:
    """What the schema says of a setting: a Knob without its value."""
    field = node.model_fields[name]
    members, nullable, constraints = _members(field.annotation)
    bounds: dict[str, Any] = {}
    for each in [*constraints, *field.metadata]:
        for mark, key, is_open in (("ge", "lower", False), ("gt", "lower", True), ("le", "upper", False), ("lt", "upper", True)):
            if getattr(each, mark, None) is not None:
                bounds |= {key: getattr(each, mark), f"{key}_open": is_open}
        if getattr(each, "multiple_of", None) is not None:
            bounds["multiple_of"] = each.multiple_of
    choices = tuple(choice for member in members if get_origin(member) is Literal for choice in get_args(member))
    plain = {bool: "bool", int: "int", float: "float", str: "text"}.get(members[0] if len(members) == 1 else None, "list")
    return {
        "path": path,
        "section": section_of(path),
        "group": path.rpartition(".")[0],
        "label": name,
        "type": "choice" if choices else plain,
        "default": _default(field),
        "help": field.description or "",
        "choices": choices,
        "nullable": nullable,
        **bounds,
    }


def _entered(config: RunConfig, place: str, value: Any) -> dict[str, Any]:
    """The node at `place` when its knob is turned to `value`: a kind, True, or settings."""
    name, field, current = _find(config, place)
    found = _kinds(name, field, current)
    old = {} if current is None else current.to_dict()
    if not found:
        return dict(value) if isinstance(value, Mapping) else old
    if value == old.get("kind") or value not in found or current is None:
        return {**old, "kind": value} if value in found else {"kind": value}
    was, now = type(current).model_fields, found[value].model_fields
    kept = {key: each for key, each in old.items() if key in now and not each == _default(was[key]) != _default(now[key])}
    return {**kept, "kind": value}


def _default(field: FieldInfo) -> Any:
    return MISSING if field.is_required() else _plain(field.get_default(call_default_factory=True))


def _find(config: RunConfig, place: str) -> tuple[str, FieldInfo, Any]:
    """(name, field, value) of the node at `place`."""
    *way, name = place.split(".")
    node: Any = config
    for part in way:
        node = getattr(node, part)
    return name, type(node).model_fields[name], getattr(node, name)


def _kinds(name: str, field: FieldInfo, value: Any) -> dict[str, type[BaseModel]]:
    """Kinds that may fill a field, by name; none where it is an ordinary node. A slot has the name of its role."""
    found = _nodes(field.annotation)
    if any(issubclass(each, BlockConfig) for each in found):
        roles = [known for role, known in kinds().items() if role == name or type(value) in known.values()]
        return kinds(name) or (roles[0] if roles else {})
    if len(found) > 1 or field.discriminator:
        return {each.model_fields["kind"].default: each for each in found}
    return {}


def _nodes(annotation: Any) -> list[type[BaseModel]]:
    return [each for each in _members(annotation)[0] if isinstance(each, type) and issubclass(each, BaseModel)]


def _members(annotation: Any) -> tuple[list[Any], bool, list[Any]]:
    """Types that a union is made of, whether None is among them, and constraints written inside `Annotated`."""
    if get_origin(annotation) is Annotated:
        inner, *notes = get_args(annotation)
        members, nullable, constraints = _members(inner)
        return members, nullable, [*constraints, *(m for note in notes for m in (note.metadata if isinstance(note, FieldInfo) else [note]))]
    if get_origin(annotation) in (Union, types.UnionType):
        parts = [_members(each) for each in get_args(annotation)]
        return [m for p in parts for m in p[0]], any(p[1] for p in parts), [c for p in parts for c in p[2]]
    return ([], True, []) if annotation is type(None) else ([annotation], False, [])


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value
