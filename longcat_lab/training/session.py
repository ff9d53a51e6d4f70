"""The loop: from a configuration to a trained model in a folder, resumable at any checkpoint with the same bits."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from longcat_lab.config import RunConfig
from longcat_lab.data import bits_per_byte, prepare
from longcat_lab.data.batch import window_count
from longcat_lab.errors import Diverged, LabError, is_out_of_memory
from longcat_lab.model import build
from longcat_lab.model.memory import check_memory
from longcat_lab.parallel import faults
from longcat_lab.parallel.checkpoint import Checkpoints
from longcat_lab.parallel.placement import build_part
from longcat_lab.parallel.world import World
from longcat_lab.training import conversion, device, divergence, evaluation_arms, growth, mechanisms, out_of_memory, requests
from longcat_lab.training.batches import Batches
from longcat_lab.training.checkpoint import restore, store, table_rows
from longcat_lab.training.divided_weights import save_divided
from longcat_lab.training.evaluation import evaluate
from longcat_lab.training.final import conclude, entry_of
from longcat_lab.training.loss import plan_step
from longcat_lab.training.optimizer import added_bytes, clip, make_optimizer, set_learning_rate, split, split_table
from longcat_lab.training.record import PEAK, Record
from longcat_lab.training.schedule import learning_rate_factor
from longcat_lab.training.sitting import finish_the_step
from longcat_lab.training.steps import Steps
from longcat_lab.training.trackers import FileTracker, WandbTracker
from longcat_lab.training.weights import WEIGHTS, save_weights


def begin(config: RunConfig, *rest: Any) -> Session:
    """A sitting that is set up; see `Session`."""
    try:
        return Session(config, *rest)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        place = device.choose(config.training.device)
        out_of_memory.let_go(error, place)
        raise out_of_memory.sentence(config, place, None) from None


class Session:
    """One sitting of a run: set-up, loop, end. What must survive it is in the run's folder."""

    def __init__(
        self,
        config: RunConfig,
        world: World,
        folder: Path,
        identity: str,
        before: dict[str, Any],
        progress: bool,
        stop: Callable[[], bool] | None,
    ) -> None:
        self.config, self.world, self.folder, self.progress, self.stop = config, world, folder, progress, stop
        self.identity = identity
        self.corpus = prepare(config.data, config.model.vocab_size)
        for held in self.corpus.splits:  # now, and not when training is over
            window_count(self.corpus.split(held), config.data.sequence_length)
        self.device = world.device
        if config.training.growth:
            growth.check(config)
            if world.size > 1:
                raise LabError(f"training.growth stacks layers in one process, and there are {world.size}: start one, or leave growth out.")
        conversion.check(config)
        evaluation_arms.check(config)
        if world.size == 1:
            with torch.device("meta"):
                whole = build(config)
            check_memory(whole, device.free_bytes(self.device), "train", added_bytes(whole, config.training.optimizer))
        self.record = Record(folder, config, identity, before, self.corpus.hash, self.device, world)
        device.start_peak(self.device)
        torch.manual_seed(config.seed)  # for blocks that draw while they train; initial weights have generators of their own
        asynchronous = {"auto": world.size > 1, "always": True, "never": False}[config.parallel.checkpoint_async]
        self.checkpoints = Checkpoints(folder, identity, asynchronous=asynchronous, timeout=config.parallel.timeout)
        self._assemble(self.checkpoints.latest_step())
        self.batches = Batches(config, self.corpus, world.batch_place, world.layout.batch_ways)
        # Since the last logged row: summed losses, steps, seconds.
        self.window = {"sums": {}, "steps": 0, "seconds": 0.0}
        self.seconds, self.step, self.initial = 0.0, 0, {}
        self.stage = ""
        self._resume()
        self.sinks: list[FileTracker | WandbTracker] = [FileTracker(folder, self.step)] if world.first else []
        self.record.begin(split_table(split(self.model, config.training.optimizer, config.model.width_scale), config.training.optimizer))
        if config.tracking.wandb != "off" and world.first:
            self.sinks.append(WandbTracker(config.tracking, folder))

    def _assemble(self, step: int) -> None:
        """Model and optimizer as they are when `step` steps are done: shallow until the step at which the layers are stacked."""
        config, growing = self.config, self.config.training.growth
        self.shallow = growing is not None and step <= growing.at_step
        at_first = growth.shallow(config) if self.shallow else config
        self.model = (build(at_first).to(self.device) if self.world.size == 1 else build_part(at_first, self.world)).train()
        self.model.recompute = config.training.recompute
        self.steps = Steps(self.model, config, self.world)
        self.optimizer = make_optimizer(self.model, config.training.optimizer, config.model.width_scale, self.world.stage)
        conversion.enter(self.model, conversion.stage_at(config, step))
        self._matrix_rate = next(group["peak"] for group in self.optimizer.param_groups if group["role"] == "matrix")

    def _grow(self) -> None:
        small, before, at = self.model, self.optimizer, self.config.training.growth.at_step
        self._assemble(at + 1)
        self.stage = ""  # the new model enters its stage at its first step
        growth.stack(small, self.model)
        if self.config.training.growth.moments == "stacked":
            growth.stack_moments(small, before, self.model, self.optimizer)

    def _resume(self) -> None:
        restored = restore(self.checkpoints, self.model, self.optimizer, self.world)
        if restored is None:
            self.initial = {f"{key}_initial": value for key, value in entry_of(self.steps, self.corpus, self.config).items()}
            return
        if restored.passed_over:
            self.record.content["passed_over"] = restored.passed_over
        self.step, state = restored.step, restored.state
        self.seconds, self.window, self.initial = (state[key] for key in ("seconds", "window", "initial"))
        self.batches.load_state_dict(state["loader"])
        self.record.peak_before = max(self.record.peak_before, state.get(PEAK, 0))  # of a sitting that could not write run.json

    def run(self) -> None:
        """Trains to the end, or records why not."""
        try:
            with finish_the_step() as asked:
                self.asked = asked
                stopped = self._train()
            if not stopped:
                self._finish()
            self._close("interrupted" if stopped else "finished", "stopped as asked" if stopped else None)
        except KeyboardInterrupt:  # the second one: this step is lost, the last checkpoint is not
            self._close("interrupted", "stopped by the keyboard")
            raise
        except Diverged as error:
            rows = self.sinks[0].rows if self.sinks else []
            self.record.content["final"] = {"train_loss": rows[-1]["loss"], "tokens": rows[-1]["tokens"]} if rows else {}
            self._close("diverged", str(error))
            self.checkpoints.remove_all()
            raise
        except Exception as error:
            if is_out_of_memory(error):
                self.model = self.optimizer = None  # a notebook keeps this object for as long as it keeps the traceback
                out_of_memory.let_go(error, self.device)
                told = out_of_memory.sentence(self.config, self.device, self.step)
                self._close("failed", str(told))
                raise told from None
            told = faults.explained(error, f" at step {self.step + 1}", self.folder)
            self._close("failed", f"{type(told).__name__}: {told}" if not isinstance(told, LabError) else str(told))
            if told is error:
                raise
            raise told from error
        if not stopped:
            self.checkpoints.remove_all()
        elif self.world.any(self.asked.is_set()):
            raise KeyboardInterrupt

    def _train(self) -> bool:
        """Steps until the last one; True if it was stopped before."""
        from tqdm.auto import tqdm

        training, shown, asked_here = self.config.training, 0.0, requests.asked_in(self.folder)
        tokens = self.config.data.batch_size * self.config.data.sequence_length
        with tqdm(total=training.steps, initial=self.step, disable=not self.progress, unit="step", mininterval=0.5) as bar:
            while self.step < training.steps:
                if self.shallow and self.step == training.growth.at_step:
                    self._grow()
                started = time.perf_counter()
                told, norm = self._one_step()
                loss = told["loss"]
                self.step += 1
                spent = time.perf_counter() - started
                self.seconds += spent
                for key, value in told.items():
                    self.window["sums"][key] = self.window["sums"].get(key, 0.0) + value
                self.window["steps"] += 1
                self.window["seconds"] += spent
                divergence.check_number(loss, self.step)
                bar.update()
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                if self.step % training.log_every == 0 or self.step == training.steps or self._validates():
                    self._log(norm, tokens)
                if time.monotonic() - shown > 1 or self.step == training.steps:
                    shown = time.monotonic()
                    self.record.tell(self.step, loss, self.seconds)
                if self.step % training.checkpoint_every == 0 and self.step < training.steps:
                    self._checkpoint()
                if self.step < training.steps and self.world.any(
                    self.asked.is_set() or asked_here() or (self.stop is not None and self.stop())
                ):
                    self._checkpoint()
                    self.checkpoints.wait()
                    return True
        return False

    def _learning_rate_factor(self, step: int) -> float:
        return learning_rate_factor(*conversion.schedule_clock(self.config, step), self.config.training.schedule)

    def _one_step(self) -> tuple[dict[str, float], float]:
        """One optimizer step on a global batch: its losses (`loss`: nats a label) and its gradient norm before clipping."""
        training, stage = self.config.training, conversion.stage_at(self.config, self.step)
        batch = self.batches.next(self.step, stage)
        if stage == "warmup" or stage != self.stage:  # evaluation puts all of the model into training again
            conversion.enter(self.model, stage)
            self.stage = stage
        set_learning_rate(self.optimizer, self._learning_rate_factor(self.step))
        if stage == "warmup":
            for group in (each for each in self.optimizer.param_groups if each["role"] == "indexer"):
                group["lr"] = training.conversion.warmup_learning_rate
        plan = plan_step(batch, self.config, self.step, self.corpus.token_bytes, self.world)
        told = self.steps.gradients(batch, plan)
        for key, value in (("nats", told["loss"] * plan.labels[0]), ("text", plan.text)):
            self.window[key] = self.window.get(key, 0) + value
        norm = clip(self.optimizer, training.optimizer.clip_norm, self.steps.norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        mechanisms.after_step(self.model, self.steps.summed)
        return told, norm

    def _validates(self) -> bool:
        every = self.config.training.evaluate_every
        return every is not None and self.step % every == 0

    def _log(self, norm: float, tokens: int) -> None:
        window = self.window
        sums = {key: value / window["steps"] for key, value in window["sums"].items()}
        row = {
            "step": self.step,
            "tokens": self.step * tokens,
            "loss": sums.pop("loss"),
            **({"train_bpb": bits_per_byte(window["nats"], window["text"])} if window.get("text") else {}),
            "learning_rate": self._matrix_rate * self._learning_rate_factor(self.step - 1),
            "gradient_norm": norm,
            "tokens_per_second": window["steps"] * tokens / window["seconds"],
            "seconds": self.seconds,
            **sums,
            **self.steps.statistics(),
        }
        if self._validates():
            row["validation_bpb"] = evaluate(self.model, self.corpus, self.config, "validation", over=self.steps.over)
        self.window = {"sums": {}, "steps": 0, "seconds": 0.0}
        for sink in self.sinks:
            sink.log(row)
        factor = self.config.training.diverged_factor
        if self.world.any(bool(self.sinks) and divergence.stays_above(self.sinks[0].rows, factor)):
            raise divergence.too_high(row["loss"], factor, self.step)

    def _checkpoint(self) -> None:
        state = {"seconds": self.seconds, "window": self.window, "initial": self.initial, "loader": self.batches.state_dict()}
        state[PEAK] = self.record.peak()
        store(self.checkpoints, self.step, self.model, self.optimizer, self.world, state)
        self.sinks[0].save() if self.sinks else None

    def _finish(self) -> None:
        rows, content = self.sinks[0].rows if self.sinks else [], self.record.content
        found = conclude(self.steps, self.corpus, self.config, rows)
        content["timings"]["evaluation_seconds"] = found.seconds
        content["not_engaged"] = found.not_engaged
        if found.left_out:
            content["left_out"] = found.left_out
        content["final"] = {
            **found.measures,
            **({"train_loss": rows[-1]["loss"], "tokens": rows[-1]["tokens"]} if rows else {}),
            "epochs": self.batches.epoch,
            **self.initial,
            **{f"{key}_final": value for key, value in found.entry.items()},
            **found.late,
        }
        if not self.config.training.keep_model:
            return
        if self.world.size == 1:
            save_weights(self.model, self.folder / WEIGHTS)
        else:
            rows_of = table_rows(self.model, self.world)
            save_divided(self.model, self.folder / WEIGHTS, self.world, rows_of, self.config.parallel.timeout)

    def _close(self, status: str, reason: str | None) -> None:
        with contextlib.suppress(Exception) if status == "failed" else contextlib.nullcontext():  # told is what came first
            self.sinks[0].finish() if self.sinks else None
        self.record.close(status, reason, self.step, self.seconds)
        for tracker in self.sinks[1:]:  # which read what the record says
            tracker.finish()
