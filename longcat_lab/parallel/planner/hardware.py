"""Cards and networks as data files: figures with where each is from. A file of one's own is named by its path."""

from __future__ import annotations

from functools import cache
from importlib import resources
from pathlib import Path
from typing import Literal

from pydantic import Field

from longcat_lab.config import read_yaml
from longcat_lab.node import ConfigError, Node, nearest, validate_node

LEVELS = ("server", "superpod", "between")  # link classes, nearest first
Source = Literal["datasheet", "paper", "specification", "assumed"]


class Figure(Node):
    """A number and where it is from. `assumed`: from nowhere that could be quoted."""

    value: float = Field(ge=0, description="in the unit that the field's name ends with")
    source: Source = Field(description="kind of source; assumed where there is none")
    note: str = Field("", description="which document, or why this value")


class Card(Node):
    """One card: what a rank (a die) of it has."""

    name: str = Field(description="as on the command line")
    dies: int = Field(1, ge=1, description="ranks a card")
    network: str = Field(description="network it stands in, where none is named: a name or a path")
    memory_bytes: Figure = Field(description="of a die")
    matmul_flops: Figure = Field(description="peak of a die in bf16, dense, FLOP/s")
    matmul_efficiency: Figure = Field(description="share of the peak that a layer's whole chain of operations reaches")
    memory_bandwidth: Figure = Field(description="of a die, bytes/s")
    buffer_bytes: Figure = Field(description="that a communicator of the collective library takes of a die's memory")
    reserve: Figure = Field(description="share of the memory that is left free: runtime, fragments, workspace, uneven routing")


class Link(Node):
    """A level of the network."""

    cards: int = Field(ge=1, description="cards that reach one another at this level or a nearer one; ignored for `between`")
    bandwidth: Figure = Field(description="a die's, one direction, bytes/s")
    latency: Figure = Field(description="seconds that a collective takes beside its bytes, each call")


class Network(Node):
    """Three levels: inside a server, inside a superpod (as large as a server where there is none), between superpods."""

    name: str = Field(description="as on the command line")
    server: Link
    superpod: Link
    between: Link
    efficiency: Figure = Field(description="share of a link's bandwidth that collectives reach")

    def ranks(self, level: str, dies: int) -> int:
        """Ranks in one group of `level` (server or superpod), of cards of `dies` dies."""
        return getattr(self, level).cards * dies


class Assumption(Figure):
    """A figure of the planner itself."""


class Assumptions(Node):
    """What the planner takes for granted beside cards and networks; printed with every plan."""

    latency_hidden: Assumption = Field(description="share of collectives' start times that lie behind work")
    overlap_chunks: Assumption = Field(description="chunks of a micro-batch's tokens, whose dispatch and combine hide behind one another")
    overlap_window: Assumption = Field(description="dense parts of a shortcut layer behind which they hide: 1 the first network, 2 all")
    forward_share: Assumption = Field(description="forward's share of a training step's FLOPs")
    loss_chunk_tokens: Assumption = Field(description="tokens whose logits are laid out at a time, with their gradient, in fp32")
    optimizer_passes: Assumption = Field(description="times that the optimizer reads or writes its bytes")
    newton_schulz_steps: Assumption = Field(description="of Muon")
    rows_distinct: Assumption = Field(description="share of n-gram rows that travel, of those that are looked up")


def folder(kind: Literal["cards", "networks", "setups"]) -> dict[str, Path]:
    """Names and files of what comes with the package."""
    found = resources.files("longcat_lab.parallel") / kind
    return {path.name.removesuffix(".yaml"): Path(str(path)) for path in found.iterdir() if path.name.endswith(".yaml")}


def read_description(kind: Literal["cards", "networks", "setups"], name: str | Path, node: type[Node]) -> Node:
    """The description called `name`, or the one in the file `name`.yaml.

    Raises:
        ConfigError: no such name or file, or what is in it is not a `node`.
    """
    known = folder(kind)
    if str(name) in known:
        return validate_node(node, read_yaml(known[str(name)]), f"{kind}/{name}")
    if Path(name).suffix in (".yaml", ".yml"):
        return validate_node(node, read_yaml(name), str(name))
    raise ConfigError(f"There is no {kind[:-1]} '{name}'{nearest(str(name), list(known))} (a file's name ends in .yaml).")


def card(name: str | Path) -> Card:
    return read_description("cards", name, Card)


def network(name: str | Path) -> Network:
    return read_description("networks", name, Network)


@cache
def assumptions(path: str | Path | None = None) -> Assumptions:
    """The planner's own figures, or those of a file of the same form."""
    own = Path(str(resources.files("longcat_lab.parallel.planner") / "assumptions.yaml"))
    return validate_node(Assumptions, read_yaml(path or own), str(path or "assumptions"))
