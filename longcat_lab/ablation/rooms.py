"""What this room needs of the other rooms, gathered in one place so that each is imported late and can be stood in for."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# What hides cards from a process: CUDA's and AMD's, and Ascend's. Which of them a machine listens to does not matter here.
VISIBLE = ("CUDA_VISIBLE_DEVICES", "ASCEND_RT_VISIBLE_DEVICES")


def _load(base: str) -> Any:
    from longcat_lab.config import load

    return load(base)


def _use_plugins(files: list[str]) -> None:
    from longcat_lab.config.plugins import use

    use(files)


def _contents(files: list[str]) -> dict[str, bytes]:
    from longcat_lab.config.plugins import contents

    return contents(files)


def _check_portable(config: Any) -> None:
    from longcat_lab.config.plugins import check_portable

    check_portable(config)


def _apply(config: Any, values: dict[str, Any]) -> Any:
    from longcat_lab.config import apply

    return apply(config, values)


def _totals(config: Any) -> dict[str, float]:
    from longcat_lab.budget import totals

    return totals(config)


def _identity(config: Any, known: dict[str, Any]) -> str:
    from longcat_lab.training import identity

    return identity(config, known)


def _code() -> str:
    from longcat_lab.training.provenance import code_hash

    return code_hash()


def _data_key(config: Any) -> str:
    from longcat_lab.training.provenance import data_key

    return data_key(config)


def _prepare(config: Any, progress: Callable[..., None]) -> None:
    from longcat_lab.data import prepare

    prepare(config.data, config.model.vocab_size, progress=progress)


def _check_evaluations(config: Any) -> None:
    from longcat_lab.training.evaluation_arms import check

    check(config)


def _cards() -> list[str]:
    for variable in VISIBLE:
        if variable in os.environ:
            return [name.strip() for name in os.environ[variable].split(",") if name.strip()]
    import torch

    return [str(number) for number in range(torch.accelerator.device_count())]


def _check_layout(config: Any, processes: int) -> None:
    from longcat_lab.parallel.layout import make_layout

    make_layout(config, processes)


def _measure(config: Any, threads: int, processes: int) -> Any:
    from longcat_lab.ablation.measured import measure

    return measure(config, threads, processes)


@dataclass(frozen=True)
class Rooms:
    """The functions of other rooms that a sweep calls. The defaults are the real ones.

    Attributes:
        load: preset name or YAML path -> configuration.
        apply: configuration, {dotted key: value} -> changed configuration; raises `LabError` for a key or type that is wrong.
        totals: configuration -> {quantity: number}, without building a model.
        identity: configuration -> hash of resolved configuration, data and code; calls of one plan share a dictionary of what is alike.
        code: hash of the code that decides a run's numbers.
        data_key: configurations with equal keys share one prepared corpus.
        prepare: makes that corpus, calling `progress` now and then.
        check_evaluations: raises `LabError` where `training.evaluations` needs weights that are not trained.
        use_plugins: imports files of blocks of one's own, so that configurations can name their kinds.
        contents: path -> what was imported from it.
        measure: configuration, threads, processes -> what a few real steps of it took (`measured.Measured`).
        check_portable: raises `LabError` where a job's own process could not make the configuration.
        cards: what the environment calls the accelerator cards that this process may use.
        check_layout: raises `LabError` where so many processes cannot train the configuration together.
    """

    load: Callable[[str], Any] = _load
    apply: Callable[[Any, dict[str, Any]], Any] = _apply
    totals: Callable[[Any], dict[str, float]] = _totals
    identity: Callable[[Any, dict[str, Any]], str] = _identity
    code: Callable[[], str] = _code
    data_key: Callable[[Any], str] = _data_key
    prepare: Callable[[Any, Callable[..., None]], None] = _prepare
    check_evaluations: Callable[[Any], None] = _check_evaluations
    use_plugins: Callable[[list[str]], None] = _use_plugins
    contents: Callable[[list[str]], dict[str, bytes]] = _contents
    check_portable: Callable[[Any], None] = _check_portable
    cards: Callable[[], list[str]] = _cards
    check_layout: Callable[[Any, int], None] = _check_layout
    measure: Callable[[Any, int, int], Any] = _measure
