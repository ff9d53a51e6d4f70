"""Who orthogonalises what, where several processes hold parts of matrices: arithmetic that all of them do alike."""

from __future__ import annotations

import dataclasses
import itertools
import math

Box = tuple[tuple[int, int], ...]  # (first, end) in each of three dimensions: matrix, row, column


@dataclasses.dataclass(frozen=True)
class Share:
    """Some matrices of one parameter that one process orthogonalises.

    matrices: (first, end). sources: who sends which part of them. holders: who gets which part of the result.
    """

    parameter: int
    owner: int
    matrices: tuple[int, int]
    sources: tuple[tuple[int, Box], ...]
    holders: tuple[tuple[int, Box], ...]


def box_size(box: Box) -> int:
    return math.prod(b - a for a, b in box)


def deal(shapes: list[tuple[int, ...]], boxes: list[list[Box]]) -> list[Share]:
    """Who orthogonalises what: each run of matrices that the same processes hold is dealt out among these, the least busy first.

    Args:
        shapes: of the whole parameters, two or more dimensions. boxes: what each process holds of each of them.
    """
    work, shares = [0.0] * len(boxes), []
    for number, shape in enumerate(shapes):
        held = [each[number] for each in boxes]
        edges = sorted({edge for box in held for edge in box[0] if box_size(box)})
        cost = float(shape[-1]) * shape[-2] * min(shape[-2:])
        for first, end in itertools.pairwise(edges):
            holders = [
                (rank, ((first, end), *box[1:])) for rank, box in enumerate(held) if box_size(box) and box[0][0] <= first < box[0][1]
            ]
            ways = min(end - first, len(holders))
            at = [first + (end - first) * k // ways for k in range(ways + 1)]
            for a, b in itertools.pairwise(at):
                owner = min((rank for rank, _ in holders), key=lambda rank: (work[rank], rank))
                work[owner] += cost * (b - a)
                parts = tuple((rank, ((a, b), *box[1:])) for rank, box in holders)
                shares.append(Share(number, owner, (a, b), _sources(parts, owner), parts))
    return shares


def _sources(parts: tuple[tuple[int, Box], ...], owner: int) -> tuple[tuple[int, Box], ...]:
    """One of those that hold the same part; the owner itself where it is one of them."""
    found: dict[Box, int] = {}
    for rank, box in parts:
        if box not in found or rank == owner:
            found[box] = rank
    return tuple((rank, box) for box, rank in found.items())
