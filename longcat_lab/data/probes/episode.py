"""One probe: a row of tokens, the places of its answers, and where each answer was told. The functions below are the tasks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from longcat_lab.config.data import Copy, Needle, ProbeConfig, Recall
from longcat_lab.data.probes.alphabet import Alphabet


@dataclass(frozen=True, eq=False)
class Episode:
    """A sequence of T tokens and the label of its last one, with Q questions of A answer tokens each.

    The token before an answer is its query: there the model has to predict the answer's first token.
    """

    tokens: np.ndarray  # int64 [T + 1]
    answers: np.ndarray  # int64 [Q, A]: places of the answers' tokens, 1 to T
    sources: np.ndarray  # int64 [Q]: place where the answer's first token was told
    counted: np.ndarray  # bool [Q]: told there alone; not where the same was asked and answered before
    depths: np.ndarray  # float64 [Q]: 0 is told at the very beginning, towards 1 as late as the task allows

    @property
    def distances(self) -> np.ndarray:
        """int64 [Q]: tokens from the query back to what it asks for."""
        return self.answers[:, 0] - 1 - self.sources


def draw(probe: ProbeConfig, alphabet: Alphabet, length: int, random: np.random.RandomState, text: np.ndarray) -> Episode:
    """A probe of `length` tokens, drawn from `random` alone.

    Args:
        text: int64 [length + 1], what `filler: text` takes its tokens from, in their order.
    """
    if probe.filler == "text":
        filler = text
    elif probe.filler == "random":
        filler = random.choice(alphabet.rest, size=length + 1)
    else:
        filler = np.full(length + 1, alphabet.blank)
    task = {Recall: _recall, Copy: _copy}.get(type(probe), _needle)
    return task(probe, alphabet, length, random, filler)


def _recall(probe: Recall, alphabet: Alphabet, length: int, random: np.random.RandomState, filler: np.ndarray) -> Episode:
    pairs, queries = probe.pairs, probe.queries
    keys = random.permutation(alphabet.own[: probe.key_tokens])[:pairs]
    values = random.choice(alphabet.own[probe.key_tokens :], size=pairs)
    # With each key asked for once, models learn what is left over long before they learn to look keys up.
    asked = random.randint(0, pairs, size=queries)
    counted = np.array([key not in asked[:i] for i, key in enumerate(asked)])
    room = length + 1 - 2 * queries
    starts = 2 * np.arange(pairs) if probe.places == "front" else _spread(pairs, 2, room, random)
    # A key in the filler would be told another value by what stands after it.
    filler = np.where(np.isin(filler, alphabet.own), alphabet.blank, filler)
    told = _insert(np.stack([keys, values], axis=1), starts, filler, room)
    tokens = np.concatenate([told, np.stack([keys[asked], values[asked]], axis=1).ravel()])
    answers = room + 1 + 2 * np.arange(queries)[:, None]
    return Episode(tokens, answers, starts[asked] + 1, counted, starts[asked] / (room - 1))


def _needle(probe: Needle, alphabet: Alphabet, length: int, random: np.random.RandomState, filler: np.ndarray) -> Episode:
    keys = _distinct(alphabet.own[: probe.key_tokens], probe.key_length, probe.others + 1, random)
    values = random.choice(alphabet.own[probe.key_tokens :], size=(probe.others + 1, probe.value_length))
    needles = np.concatenate([np.full((probe.others + 1, 1), alphabet.mark), keys, values], axis=1)
    size, room = probe.length, length + 1 - probe.length
    start = random.randint(0, room - size + 1)  # of the one that is asked for: every depth is as likely
    left = sum(_shares(probe.others, [start, room - size - start], size, random))
    starts = np.concatenate(
        [[start], _spread(left, size, start, random), start + size + _spread(probe.others - left, size, room - size - start, random)]
    ).astype(np.int64)
    tokens = np.concatenate([_insert(needles, starts, filler, room), needles[0]])
    answers = np.arange(length + 1 - probe.value_length, length + 1)[None]
    return Episode(tokens, answers, starts[:1] + 1 + probe.key_length, np.array([True]), np.array([start / (room - size + 1)]))


def _copy(probe: Copy, alphabet: Alphabet, length: int, random: np.random.RandomState, filler: np.ndarray) -> Episode:
    size = probe.string_length
    string = random.permutation(alphabet.own)[:size]
    marked = np.concatenate([[alphabet.mark], string])
    places = length - size - max(probe.distance, size)
    start = random.randint(0, places)
    tokens = np.concatenate([_insert(marked[None], np.array([start]), filler, length - size), marked])
    answers = np.arange(length + 1 - size, length + 1)[None]
    return Episode(tokens, answers, np.array([start + 1]), np.array([True]), np.array([start / places]))


def _insert(pieces: np.ndarray, starts: np.ndarray, filler: np.ndarray, room: int) -> np.ndarray:
    """int64 [room]: the pieces [N, size] at their starts, and around them as much of the filler as there is place for, in its order."""
    places = starts[:, None] + np.arange(pieces.shape[1])
    free = np.ones(room, dtype=bool)
    free[places] = False
    tokens = np.empty(room, dtype=np.int64)
    tokens[free] = filler[: free.sum()]
    tokens[places] = pieces
    return tokens


def _spread(count: int, size: int, room: int, random: np.random.RandomState) -> np.ndarray:
    """int64 [count], rising: starts of `count` pieces in `room` places that do not overlap, each way of placing them as likely."""
    if not count:
        return np.zeros(0, dtype=np.int64)
    return np.sort(random.permutation(room - count * (size - 1))[:count]) + np.arange(count) * (size - 1)


def _shares(count: int, rooms: list[int], size: int, random: np.random.RandomState) -> list[bool]:
    """For each of `count` pieces, whether it goes into the first of two rooms; by the places that are free there."""
    rooms, first = list(rooms), []
    for _ in range(count):
        free = [room if room >= size else 0 for room in rooms]
        first.append(bool(random.random_sample() * sum(free) < free[0]))
        rooms[0 if first[-1] else 1] -= size
    return first


def _distinct(ids: np.ndarray, length: int, count: int, random: np.random.RandomState) -> np.ndarray:
    """int64 [count, length]: different strings of `ids`."""
    found: dict[tuple[int, ...], None] = {}
    while len(found) < count:
        found[tuple(int(each) for each in random.choice(ids, size=length))] = None
    return np.array(list(found), dtype=np.int64)
