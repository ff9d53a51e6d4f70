"""What the panel says of a training, in one line."""

from __future__ import annotations

import html
from typing import Any, Protocol

from longcat_lab.config import RunConfig
from longcat_lab.notebook.panel.follow import Follower, part
from longcat_lab.training.requests import is_training

GUEST = "This run, which trains here, is not the configuration of this cell; Train starts that one."
GUEST_ENDED = "It was not the configuration of this cell; Train starts that one."


class Sitting(Protocol):
    """What is known of who trains now, beside the folder; see `trainer.Training`."""

    phase: str
    said: str
    nproc: int

    @property
    def stopping(self) -> bool: ...


def clock(seconds: float) -> str:
    """3725 -> 1:02:05, 65 -> 1:05."""
    whole = max(0, round(seconds))
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def count(number: float) -> str:
    """1234567 -> 1.23 M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {letter}"
    return f"{number:g}"


def several(run: Follower) -> str:
    """How the processes of the run are laid out; empty where one trains alone."""
    layout = run.record.get("layout")
    return layout if isinstance(layout, str) and not layout.startswith("1 ") else ""


def progress(training: Sitting, run: Follower | None) -> str:
    """How far it is: what is done now, the step, the speed, the time left."""
    if training.phase == "preparing":
        return f"Preparing the text, once for all runs on it{f': {training.said}' if training.said else ' …'}"
    if training.phase == "starting":
        what = f"{training.nproc} training processes" if training.nproc > 1 else "the training process"
        return "Stopping as soon as it has begun …" if training.stopping else f"Starting {what} …"
    told = run.progress if run else {}
    if not told:
        return "Stopping after the first step …" if training.stopping else "Building the model …"
    line = f"Step {told['step']:,} of {told['steps']:,}"
    if told["step"] >= told["steps"]:
        return f"{line} · evaluating …"
    line += f" · {told['tokens_per_second']:,.0f} tokens/s · {clock(told['seconds_left'])} left · loss {told['loss']:.3f}"
    line += f" · {several(run)}" if several(run) else ""
    return f"{line} · {training.said or 'stopping after this step …'}" if training.stopping else line


def summary(run: Follower, go_on: str = "Train") -> str:
    """One line on a run that has ended (or has not): its status, size, speed and final metrics. Empty where there is none or it trains."""
    try:
        return _summary(run, go_on)
    except (TypeError, ValueError, KeyError):
        return "Its record is not what a training writes: it cannot be read here."


def _summary(run: Follower, go_on: str) -> str:
    record = run.record
    final, timings = part(record, "final"), part(record, "timings")
    steps, layout = part(record, "config", "training").get("steps"), several(run)
    if record.get("status") == "finished":
        tokens, seconds = final.get("tokens", 0), timings.get("training_seconds", 0.0)
        line = f"Finished: {steps:,} steps, {count(tokens)} tokens in {clock(seconds)}"
        line += f" ({timings['tokens_per_second']:,.0f} tokens/s)" if timings.get("tokens_per_second") else ""
        parts = [("training loss", "train_loss"), ("validation", "validation_bpb"), ("out of distribution", "out_of_distribution_bpb")]
        told = [f"{name} {final[key]:.4f}{' bits per byte' if key == 'validation_bpb' else ''}" for name, key in parts if key in final]
        line += f" on {layout}" if layout else ""
        return f"{line}; {', '.join(told)}." if told and layout else f"{line}: {', '.join(told)}." if told else f"{line}."
    if record.get("status") == "interrupted":
        loss = f", training loss {run.last['loss']:.4f}" if "loss" in run.last else ""
        done = f"Stopped at step {timings.get('steps_done', 0):,} of {steps:,}{loss}" + (f" ({layout})" if layout else "")
        return f"{done}: checkpoint and metrics are kept, {go_on} goes on from there."
    if record.get("status") in ("failed", "diverged"):
        return f"Failed: {record.get('reason') or 'without a word.'}"
    if record.get("status") == "running" and not is_training(run.folder):
        done = f" after step {int(run.last['step']):,} of {steps:,}" if "step" in run.last else ""
        return f"Its process is gone{done} (killed, or the machine went down): {go_on} goes on from the last checkpoint."
    return ""


def idle(config: RunConfig) -> str:
    steps, data = config.training.steps, config.data
    return f"Ready: {steps:,} steps, {count(steps * data.batch_size * data.sequence_length)} tokens."


def failed(sentence: str, log: str) -> str:
    """The sentence as HTML; the end of the log is folded below it."""
    said = f'<span class="longcat-panel-wrong">{html.escape(sentence)}</span>'
    folded = f"<details><summary>the end of its log</summary><pre>{html.escape(log)}</pre></details>" if log.strip() else ""
    return said + folded


def not_engaged(record: dict[str, Any]) -> str:
    """Mechanisms that were asked for and took no part; empty where all did."""
    found = record.get("not_engaged")
    return f"Took no part: {'; '.join(map(str, found))}." if found and isinstance(found, list) else ""
