"""What every block kind answers, and the registry in which kinds are found by role and name.

A *role* is a place in the model (attention, ffn, moe, ...); a *kind* is one way to fill it (`mla`, `swiglu`, ...).
A kind is one class: its configuration, which can say what it costs and can build its module. A new kind is:

    @register("ffn")
    class MyFfn(BlockConfig):
        kind: Literal["mine"] = "mine"
        def build(self, shape): ...       # an nn.Module
        def budget(self, shape): ...      # a Budget
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable, Iterator
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BeforeValidator, SerializeAsAny, ValidationError
from torch import Tensor, nn

from longcat_lab.node import ConfigError, InnerNodeError, Node, nearest

STATE_ELEMENT_BYTES = 2  # decoding caches are kept in bf16


@dataclasses.dataclass(frozen=True)
class Budget:
    """What one block costs.

    params: elements in the checkpoint (trained parameters and persistent buffers such as the router's selection bias).
    active_params: weights that one token multiplies with, on average. Rows that are only looked up do not count (the
        convention behind LongCat's published activated sizes, which leave out the input embedding).
    flops_per_token: forward floating-point operations a token, 2 a multiply-add, matrix products only; causal attention is
        counted over the tokens that are really visible, (T + 1) / 2 on average. Training is three times this.
    state_bytes_per_token: bytes that one more token adds to the decoding cache (bf16).
    """

    params: int = 0
    active_params: int = 0
    flops_per_token: float = 0.0
    state_bytes_per_token: int = 0

    def __add__(self, other: Budget) -> Budget:
        return Budget(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def __mul__(self, times: int) -> Budget:
        return Budget(*(a * times for a in dataclasses.astuple(self)))

    __rmul__ = __mul__

    @classmethod
    def of_weights(cls, count: int) -> Budget:
        """`count` weights, each used in one multiply-add per token."""
        return cls(params=count, active_params=count, flops_per_token=2.0 * count)


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """What a block may know of the model it stands in: sizes, its place, and the configurations that fill the other roles.

    layer_index: number of the layer that is built; attention_index: of the attention inside all layers (2 l + s in a layer of two).
    """

    hidden_size: int
    vocab_size: int
    sequence_length: int
    initializer_range: float = 0.02
    num_layers: int = 1
    layer_index: int = 0
    attention_index: int = 0
    norm: BlockConfig | None = None
    rope: BlockConfig | None = None
    attention: BlockConfig | None = None
    ffn: BlockConfig | None = None
    moe: BlockConfig | None = None
    layer: BlockConfig | None = None
    embedding: BlockConfig | None = None


class BlockConfig(Node):
    """A block kind: its settings, what it costs, and how it is built."""

    kind: str

    def check(self, shape: ModelShape) -> None:
        """Raise ConfigError where these settings and the model's do not fit together."""

    def budget(self, shape: ModelShape) -> Budget:
        raise NotImplementedError

    def build(self, shape: ModelShape) -> nn.Module:
        raise NotImplementedError


def attentions_of(layer: BlockConfig | None) -> int:
    """Attentions in a layer of this kind: one in a plain decoder layer, two in a shortcut layer and in the same parts in serial order."""
    return 1 if layer is not None and layer.kind == "decoder" else 2


class Block(nn.Module):
    """Base of the blocks' modules: what the model's initialisation, the optimizer and the logs may ask of a module.

    roles: parameter name (relative to this module) to what the optimizer takes it for: `embedding`, `table`, `router`, `indexer` or
        `head`. Others are `matrix` (two or more dimensions) or `vector`.
    stacks: parameter name (relative) to the number of matrices that lie one below the other in it (gate and up rows: 2).
    initial_std: parameter name (relative) to the standard deviation it starts with, where the model's own does not serve.
    initial_value: parameter name (relative) to the one value it starts with everywhere (vectors without one start as ones).
    sparse_gradients: set by the optimizer: gradients of parameters of the role `table` are to be sparse (the rows that were read,
        torch's COO layout), because it steps on those rows alone.
    reads_context: for dense networks: `forward(x, context)` in place of `forward(x)`.
    serves_parts: for blocks of one's own: they compute each position alone, or go through `ForwardContext.chunks`, and so serve a part of
        a row under context parallelism. Without it such a layout is refused.
    """

    roles: ClassVar[dict[str, str]] = {}
    stacks: ClassVar[dict[str, int]] = {}
    sparse_gradients = False
    reads_context = False
    serves_parts = False

    def initial_std(self) -> dict[str, float]:
        return {}

    def initial_value(self) -> dict[str, float]:
        return {}

    def after_step(self) -> None:
        """Called once after each optimizer step, outside autograd."""

    def counters(self) -> list[Tensor]:
        """Integer tensors counted since the last step, to be summed over the ranks that hold other parts of the batch."""
        return []

    def combine(self, summed: Callable[[Tensor], Tensor]) -> None:
        """Called before `after_step` where others hold other parts of the batch: what was gathered on tokens becomes that of all.

        summed: the sum over the holders, in place; all of them call it in the same order.
        """
        for counted in self.counters():
            summed(counted)

    def statistics(self) -> dict[str, float]:
        """Measures of the block's mechanism at the last step, for the log."""
        return {}

    def distributions(self) -> dict[str, list[float]]:
        """Measures that are a list, such as the load of each expert, for the log."""
        return {}

    def not_engaged(self, measured: dict[str, float]) -> list[str]:
        """Sentences about a mechanism that was asked for and took no part; `measured`: late means of `statistics`."""
        return []


_KINDS: dict[str, dict[str, type[BlockConfig]]] = {}
_DEFAULTS: dict[str, str] = {}
Kind = TypeVar("Kind", bound=type[BlockConfig])


def register(role: str, default: bool = False) -> Any:
    """Class decorator: makes a BlockConfig known under `role` and the default of its `kind` field.

    A class that is registered again, as by a cell that is run or edited again, replaces what it was. A name that longcat_lab itself or
    another file has taken is an error.

    default: this kind is taken where a configuration names none; the first one registered is, where no kind says so. Only for kinds of
        longcat_lab: a class from elsewhere must not change what configurations mean that do not name it.

    Raises:
        ConfigError: the class has no `kind` or one that is taken, or there is no such role.
    """

    def add(kind: Kind) -> Kind:
        name = _name_of(kind, role, default)
        known = _KINDS.get(role, {}).get(name)
        if known is not None and (holder := _holder(known, kind)):
            raise ConfigError(f"The {role} kind '{name}' is taken by {holder}: give the `kind` of {kind.__qualname__} another name.")
        _KINDS.setdefault(role, {})[name] = kind
        if default or role not in _DEFAULTS:
            _DEFAULTS[role] = name
        for watching in _WATCHING:
            watching[role, name] = kind
        return kind

    return add


def _built_in(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "longcat_lab"


def _name_of(kind: Any, role: str, default: bool) -> str:
    """The name under which `kind` is to be known."""
    if not (isinstance(kind, type) and issubclass(kind, BlockConfig)):
        raise ConfigError(f"register('{role}') is for a class that inherits from BlockConfig, not for {kind!r}.")
    name = kind.model_fields["kind"].default
    if not isinstance(name, str):
        raise ConfigError(f'The class {kind.__qualname__} has no name: write `kind: Literal["my_name"] = "my_name"` in it.')
    if not _built_in(kind) and role not in _KINDS:
        raise ConfigError(f"There is no role '{role}'{nearest(role, list(_KINDS))}: change register('{role}') at {kind.__qualname__}.")
    if not _built_in(kind) and default:
        raise ConfigError(f"{kind.__qualname__} cannot be a default: take `default=True` away and name its kind in the configuration.")
    return name


def file_of(kind: type) -> str:
    """The Python file that a class is from; empty for a notebook's cell."""
    return str(getattr(sys.modules.get(kind.__module__), "__file__", None) or "")


def _holder(known: type, new: type) -> str:
    """Who holds a kind's name against the class `new`; empty where `new` may have it."""
    if (known.__module__, known.__qualname__) == (new.__module__, new.__qualname__):
        return ""
    if _built_in(known):
        return f"longcat_lab's own {known.__qualname__}"
    file = file_of(known)
    if not file or not os.path.exists(file):  # a notebook's cell, or a file that has moved
        return ""
    if file != file_of(new):
        return file
    return f"the class {known.__qualname__} of the same file" if known.__module__ == new.__module__ else ""


_WATCHING: list[dict[tuple[str, str], type[BlockConfig]]] = []


@contextlib.contextmanager
def registering() -> Iterator[dict[tuple[str, str], type[BlockConfig]]]:
    """Gathers the kinds that are registered inside, by role and name. None of them stays where an error ends it."""
    before, defaults = kinds(), dict(_DEFAULTS)
    gathered: dict[tuple[str, str], type[BlockConfig]] = {}
    _WATCHING.append(gathered)
    try:
        yield gathered
    except BaseException:
        for known, was in ((_KINDS, before), (_DEFAULTS, defaults)):
            known.clear()
            known.update(was)
        raise
    finally:
        _WATCHING.remove(gathered)


def forget(role: str, name: str) -> None:
    """Takes a kind away again."""
    _KINDS[role].pop(name, None)
    if _DEFAULTS.get(role) == name:  # of a role that has no kinds of longcat_lab
        del _DEFAULTS[role]


def kinds(role: str | None = None) -> dict[str, Any]:
    """Kinds of a role by name; without a role, the same for every role."""
    return dict(_KINDS.get(role, {})) if role else {name: dict(found) for name, found in _KINDS.items()}


def _choose(role: str, value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    found = _KINDS.get(role, {})
    name = value.get("kind", _DEFAULTS.get(role))
    if not isinstance(name, str) or name not in found:
        near = nearest(str(name), list(found))
        own = "One of your own must be in a Python file that 'plugins' names"
        raise ValueError(f"there is no {role} kind {name!r}{near}{'' if near.endswith('?') else '.'} {own}")
    try:
        return found[name].model_validate(value)
    except ValidationError as error:
        raise InnerNodeError(found[name], error) from None


def slot(role: str) -> Any:
    """The type of a configuration field that any registered kind of `role` can fill."""
    _KINDS.setdefault(role, {})
    return Annotated[SerializeAsAny[BlockConfig], BeforeValidator(lambda value: _choose(role, value))]
