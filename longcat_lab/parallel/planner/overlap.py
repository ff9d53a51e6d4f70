"""A shortcut layer on two lanes, arithmetic and network: how much of dispatch and combine is not hidden."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Lane:
    """One block on the lane `compute` or `network`, in seconds from the fork."""

    lane: str
    what: str
    start: float
    end: float


def shortcut(dispatch: float, combine: float, experts: float, dense: list[tuple[str, float]], chunks: int, window: int) -> list[Lane]:
    """From the fork to where the mixture's result is needed.

    The mixture's tokens are cut into chunks: dispatches, then combines go over the network in order; arithmetic does the first dense
    part, then the chunks' experts. With window 2 the other dense parts follow between the chunks and the join; with window 1 the branch
    must have ended when they begin, so that they are not part of the picture.

    Args:
        dispatch, combine, experts: seconds of the whole micro-batch; dense: (name, seconds) of the dense branch's parts, in order.
    """
    parts = dense if window > 1 else dense[:1]
    lanes, network, compute, arrived = [], 0.0, 0.0, []
    for chunk in range(chunks):
        lanes.append(Lane("network", f"dispatch {chunk + 1}", network, network + dispatch / chunks))
        network += dispatch / chunks
        arrived.append(network)
    rest = list(parts)
    if rest:
        name, seconds = rest.pop(0)
        lanes.append(Lane("compute", name, 0.0, seconds))
        compute = seconds
    for chunk in range(chunks):
        while rest and arrived[chunk] > compute:  # nothing to compute for the mixture yet: go on with the dense branch
            name, seconds = rest.pop(0)
            lanes.append(Lane("compute", name, compute, compute + seconds))
            compute += seconds
        start = max(compute, arrived[chunk])
        compute = start + experts / chunks
        lanes.append(Lane("compute", f"experts {chunk + 1}", start, compute))
        begin = max(network, compute)
        network = begin + combine / chunks
        lanes.append(Lane("network", f"combine {chunk + 1}", begin, network))
    for name, seconds in rest:
        lanes.append(Lane("compute", name, compute, compute + seconds))
        compute += seconds
    return lanes


def exposed(dispatch: float, combine: float, experts: float, dense: list[tuple[str, float]], chunks: int, window: int) -> float:
    """Seconds by which the layer takes longer than its arithmetic."""
    lanes = shortcut(dispatch, combine, experts, dense, chunks, window)
    work = sum(lane.end - lane.start for lane in lanes if lane.lane == "compute")
    return max(lane.end for lane in lanes) - work


def in_line(dispatch: float, combine: float, experts: float, dense: list[tuple[str, float]]) -> list[Lane]:
    """The same without overlap: dispatch, experts, combine, and the dense parts after them."""
    lanes, now = [], 0.0
    steps = [("network", "dispatch", dispatch), ("compute", "experts", experts), ("network", "combine", combine)]
    for lane, what, seconds in [*steps, *(("compute", *part) for part in dense)]:
        lanes.append(Lane(lane, what, now, now + seconds))
        now += seconds
    return lanes


def exposed_alone(dispatch: float, combine: float) -> float:
    """The same without overlap: nothing is computed meanwhile."""
    return dispatch + combine
