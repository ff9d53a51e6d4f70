"""What a finished run says: how good the model is, which mechanisms took no part, and what could not be found out."""

from __future__ import annotations

import dataclasses
import time
import warnings
from typing import Any

from longcat_lab.config import RunConfig
from longcat_lab.data import Corpus, Loader
from longcat_lab.training import mechanisms
from longcat_lab.training.evaluation import entry_measures, evaluate_all, evaluate_in_place, evaluate_whole
from longcat_lab.training.evaluation_arms import evaluate_arms
from longcat_lab.training.steps import Steps


@dataclasses.dataclass(frozen=True)
class Final:
    """measures: of `evaluate_all` and of the arms; entry: `entry_measures`; late: means over blocks in the run's last fifth.

    not_engaged: a sentence for each mechanism that took no part. left_out: one for what could not be measured here. seconds: it took.
    """

    measures: dict[str, float]
    entry: dict[str, float]
    late: dict[str, float]
    not_engaged: list[str]
    left_out: list[str]
    seconds: float


def conclude(steps: Steps, corpus: Corpus, config: RunConfig, rows: list[dict[str, Any]]) -> Final:
    """rows: logged in the run, on the first process, which alone has all of the answer. All call it."""
    started = time.perf_counter()
    measures, left_out = _measures(steps, corpus, config)
    entry = entry_of(steps, corpus, config)
    seconds = time.perf_counter() - started
    means = mechanisms.late_means(rows)
    return Final(measures, entry, mechanisms.over_blocks(means), steps.not_engaged(means), left_out, seconds)


def entry_of(steps: Steps, corpus: Corpus, config: RunConfig) -> dict[str, float]:
    """`entry_measures` of the model as it is, always on the same batch. All call it."""
    batch = next(Loader(corpus.split("train"), config.data.sequence_length, config.data.batch_size, 0))
    return entry_measures(steps.model, batch, steps.over)


def _measures(steps: Steps, corpus: Corpus, config: RunConfig) -> tuple[dict[str, float], list[str]]:
    if steps.over is None:
        return {**evaluate_all(steps.model, corpus, config), **evaluate_arms(steps.model, corpus, config)}, []
    found, wanted = evaluate_in_place(steps.model, corpus, config, steps.over), _take_a_whole_model(config)
    why = steps.no_room() if wanted else None
    if why is not None:
        said = f"{', '.join(wanted)}: left out, for {why} on the first process; evaluate the kept weights where it fits."
        if steps.world.first:
            warnings.warn(said, stacklevel=2)
        return found, [said]
    if wanted:
        with steps.whole() as model:
            if model is not None:
                found.update({**evaluate_whole(model, corpus, config), **evaluate_arms(model, corpus, config)})
    return found, []


def _take_a_whole_model(config: RunConfig) -> list[str]:
    """Names of the measures for which one process must hold all of the model."""
    found = ["accepted_length", "speculation_rounds"] if config.model.mtp is not None else []
    found += ["the probe's measures"] if config.data.probe is not None else []
    attention = config.training.attention_measures and getattr(config.model.attention, "index_topk", None) is not None
    found += ["attention measures"] if attention else []
    return found + [f"{name}/..." for name in config.training.evaluations]
