"""Over which link classes the bytes of a group of ranks go: inside a server, inside a superpod, between superpods."""

from __future__ import annotations

import dataclasses
import math
from functools import cache

from longcat_lab.parallel.planner.hardware import LEVELS, Network

Bytes = tuple[float, float, float]  # by link class, in the order of LEVELS


@dataclasses.dataclass(frozen=True)
class Fabric:
    """A network as ranks see it: ranks a server and a superpod, bandwidths that collectives reach (bytes/s), start times (s)."""

    server: int
    superpod: int
    bandwidth: Bytes
    latency: Bytes

    @classmethod
    def of(cls, network: Network, dies: int) -> Fabric:
        links = [getattr(network, level) for level in LEVELS]
        reached = tuple(link.bandwidth.value * network.efficiency.value for link in links)
        latency = tuple(link.latency.value for link in links)
        return cls(network.ranks("server", dies), network.ranks("superpod", dies), reached, latency)

    def seconds(self, sent: Bytes, calls: float, hidden: float) -> float:
        """Time of `calls` collectives that send these bytes in all: classes are different wires and work side by side."""
        farthest = max((level for level in range(3) if sent[level]), default=0)
        return max(b / speed for b, speed in zip(sent, self.bandwidth, strict=True)) + calls * self.latency[farthest] * (1 - hidden)


@cache
def near(server: int, superpod: int, stride: int, degree: int) -> tuple[int, int]:
    """Ranks of a group (`stride` between neighbours) that share a server, and that share a superpod, in its worst-placed group.

    Ranks are numbered through; a group whose span does not divide a superpod straddles two of them.
    """
    found = []
    for size in (server, superpod):
        together = max(1, math.gcd(stride * degree, size) // stride)
        while degree % together:
            together -= 1
        found.append(together)
    return found[0], max(found)


def to_all(size: float, stride: int, degree: int, fabric: Fabric) -> Bytes:
    """All-to-all: `size` bytes of a rank, spread evenly over the group, itself among it."""
    if degree == 1:
        return 0.0, 0.0, 0.0
    server, superpod = near(fabric.server, fabric.superpod, stride, degree)
    return size * (server - 1) / degree, size * (superpod - server) / degree, size * (degree - superpod) / degree


def gather(slice_size: float, stride: int, degree: int, fabric: Fabric) -> Bytes:
    """All-gather of a slice from each rank (or reduce-scatter into such slices), level by level: between superpods first, each slice once
    to the rank's counterparts; then, what has come, inside the superpod; then inside the server. (degree - 1) slices in all.
    """
    if degree == 1:
        return 0.0, 0.0, 0.0
    server, superpod = near(fabric.server, fabric.superpod, stride, degree)
    pods, servers = degree / superpod, superpod / server
    return slice_size * (server - 1) * servers * pods, slice_size * (servers - 1) * pods, slice_size * (pods - 1)


def reduce(size: float, stride: int, degree: int, fabric: Fabric) -> Bytes:
    """All-reduce of `size` bytes: reduce-scatter and all-gather."""
    return scaled(gather(size / degree, stride, degree, fabric), 2)


def send(size: float, distance: int, fabric: Fabric) -> Bytes:
    """Point to point over `distance` ranks."""
    if distance < fabric.server:
        return size, 0.0, 0.0
    return (0.0, size, 0.0) if distance < fabric.superpod else (0.0, 0.0, size)


def scaled(sent: Bytes, times: float) -> Bytes:
    return sent[0] * times, sent[1] * times, sent[2] * times


def added(*flows: Bytes) -> Bytes:
    return tuple(sum(level) for level in zip(*flows, strict=True)) if flows else (0.0, 0.0, 0.0)
