"""A whole run as one configuration; presets, files and dotted overrides become one."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, get_args

from pydantic import Field, model_validator

from longcat_lab.blocks import kinds
from longcat_lab.config import plugins as plugin_files
from longcat_lab.config.data import DataConfig
from longcat_lab.config.model import ModelConfig
from longcat_lab.config.parallel import ParallelConfig
from longcat_lab.config.training import TrackingConfig, TrainingConfig, tracked
from longcat_lab.config.yaml import parse_yaml, read_yaml
from longcat_lab.node import ConfigError, Node, nearest, validate_node


class RunConfig(Node):
    """Everything that decides a run's numbers (and `tracking` and `parallel`, which do not; of `plugins` the classes' code does, and no
    path)."""

    plugins: list[str] = Field(
        default_factory=list,
        description="Python files with blocks of your own, imported before anything else is read; relative to the file that names them, "
        "or to the working folder",
    )
    seed: int = Field(
        0, ge=0, lt=2**31, description="paired seed: initial weights follow it, and the data's order where data.seed is empty"
    )
    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)

    @model_validator(mode="before")
    @classmethod
    def _import_plugins(cls, data: Any) -> Any:
        """Before any kind is looked up; whatever way plain data takes to become a RunConfig."""
        if isinstance(data, Mapping) and data.get("plugins"):
            return {**data, "plugins": plugin_files.use(data["plugins"])}
        return data

    @model_validator(mode="after")
    def _agree(self) -> RunConfig:
        if self.data.sequence_length > self.model.max_position_embeddings:
            raise ValueError(
                f"data.sequence_length {self.data.sequence_length} is above model.max_position_embeddings "
                f"{self.model.max_position_embeddings}: make one fit the other"
            )
        longest = max(self.data.probe_lengths(), default=0)
        if longest > self.model.max_position_embeddings:
            raise ValueError(
                f"data.probe.evaluation_lengths {longest} is above model.max_position_embeddings {self.model.max_position_embeddings}: "
                "make one fit the other"
            )
        growth = self.training.growth
        if growth and self.model.num_layers % growth.times:
            raise ValueError(f"training.growth.times {growth.times} does not divide model.num_layers {self.model.num_layers}")
        micro = self.training.micro_batch_size
        if micro and self.data.batch_size % micro:
            raise ValueError(f"training.micro_batch_size {micro} does not divide data.batch_size {self.data.batch_size}")
        return self


def presets() -> dict[str, Path]:
    """Names and files of the configurations that come with the package."""
    folder = resources.files("longcat_lab.config") / "presets"
    return {path.name.removesuffix(".yaml"): Path(str(path)) for path in folder.iterdir() if path.name.endswith(".yaml")}


def load(base: str | Path | Mapping[str, Any] | RunConfig, *overrides: str) -> RunConfig:
    """A run from a preset's name, a YAML file, a mapping or another run, then overrides such as `model.moe.moe_topk=4`.

    Values of overrides are YAML (`null`, `true`, `[1, 2]`, `1e-3`).

    Raises:
        ConfigError: unknown preset or key (naming the nearest), wrong type, settings that do not fit together.
    """
    pairs: dict[str, Any] = {}
    for text in overrides:
        key, equals, value = str(text).partition("=")
        where = f"Override '{text}'" if len(str(text)) <= 100 else f"Override '{str(text)[:100]}...'"
        if not equals or not key.strip():
            raise ConfigError(f"{where}: write it as dotted.key=value.")
        pairs[key.strip()] = parse_yaml(value, where)
    return apply(base, pairs)


def apply(base: str | Path | Mapping[str, Any] | RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """As `load`, with overrides as a mapping from dotted key to a value that has its type already."""
    data = _plain(base)
    if "plugins" in changes:
        data["plugins"] = changes["plugins"]
    if data.get("plugins"):  # now: what a kind's settings are is asked of its class below
        data["plugins"] = plugin_files.use(data["plugins"])
    settings = {key: value for key, value in changes.items() if key != "plugins"}
    for key, value in sorted(settings.items(), key=lambda pair: not pair[0].endswith(".kind")):  # a kind before its settings
        if key == "track":
            key, value = "tracking.wandb", tracked(value)
        path = key.split(".")
        if not all(part.strip() for part in path):
            raise ConfigError(f"'{key}': the dotted key has an empty part; write names with one dot between them, as in model.num_layers.")
        _set(data, path, value, key)
    return validate_node(RunConfig, data)


def _plain(base: str | Path | Mapping[str, Any] | RunConfig) -> dict[str, Any]:
    if isinstance(base, RunConfig):
        return base.to_dict()
    if isinstance(base, Mapping):
        return _copy(base)
    if str(base) in presets():
        return read_yaml(presets()[str(base)])
    if Path(base).suffix in (".yaml", ".yml"):
        data = read_yaml(base)
        if data.get("plugins"):
            data["plugins"] = plugin_files.located(data["plugins"], Path(base).resolve().parent)
        return data
    raise ConfigError(f"There is no preset '{base}'{nearest(str(base), list(presets()))} (a file's name ends in .yaml).")


def _copy(value: Any) -> Any:
    return {key: _copy(inner) for key, inner in value.items()} if isinstance(value, Mapping) else value


def _set(data: dict[str, Any], path: list[str], value: Any, key: str) -> None:
    """Sets one dotted key. Nodes on the way that are empty are made; a new `kind` drops settings that only the old kind knew."""
    node = data
    for part in path[:-1]:
        if node.get(part) is None:
            node[part] = {}
        if not isinstance(node[part], dict):
            raise ConfigError(f"'{key}': '{part}' is a value, not a node with keys below it.")
        node = node[part]
    if path[-1] == "kind" and isinstance(value, str) and value in _kinds_at(path[:-1]):
        for stale in [name for name in node if name not in _kinds_at(path[:-1])[value].model_fields]:
            del node[stale]
    node[path[-1]] = _copy(value)


def _kinds_at(path: list[str]) -> dict[str, type[Node]]:
    """Kinds that the node at `path` may be: blocks by their role, sources of text, probe tasks."""
    if path[:1] == ["model"]:
        return kinds(path[-1])
    if path in (["data", "source"], ["data", "probe"]):
        found = get_args(DataConfig.model_fields[path[1]].annotation)
        return {kind.model_fields["kind"].default: kind for kind in found if kind is not type(None)}
    return {}
