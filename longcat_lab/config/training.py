"""How a run is trained and where it is reported."""

from __future__ import annotations

import os
from typing import Any, Literal

from pydantic import Field, model_validator

from longcat_lab.node import ConfigError, Node, nearest


class OptimizerConfig(Node):
    """AdamW for everything, or Muon for the hidden matrices and AdamW for the rest; learning rates by role of parameter.

    N-gram tables can have an optimizer of their own (`table_optimizer`), whose step costs time by the row that was hit. It treats rows
    that are hit seldom differently from AdamW, whose moments go on moving a row that is hit no more: a run's optimizer.txt says how much.

    With `match_rms_adamw` (Moonlight, arXiv 2502.16982 section 2.2) a Muon update has the RMS of an AdamW update, so the two share
    `learning_rate` and `weight_decay`; `original` (Jordan 2024) wants a larger rate: set `muon_lr_multiplier`.
    """

    kind: Literal["adamw", "muon"] = Field("adamw", description="muon: for hidden matrices and experts; AdamW for everything else")
    learning_rate: float = Field(3e-3, gt=0, description="peak, for matrices, norms and the head")
    embedding_lr_multiplier: float = Field(1.0, ge=0, description="times learning_rate, for token embeddings")
    table_lr_multiplier: float = Field(1.0, ge=0, description="times learning_rate, for n-gram tables")
    muon_lr_multiplier: float = Field(1.0, ge=0, description="times learning_rate, for what Muon trains")
    index_lr_multiplier: float = Field(1.0, ge=0, description="times learning_rate, for lightning indexers, which AdamW trains")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW")
    beta2: float = Field(0.95, ge=0, lt=1, description="AdamW")
    eps: float = Field(1e-16, gt=0, description="AdamW; LongCat-Flash trains with 1e-16")
    momentum: float = Field(0.95, ge=0, lt=1, description="Muon")
    nesterov: bool = Field(True, description="Muon: look one step ahead of the momentum")
    ns_steps: int = Field(5, ge=1, lt=100, description="Muon: Newton-Schulz iterations")
    muon_eps: float = Field(1e-7, gt=0, description="Muon: smallest norm a matrix is divided by; a smaller gradient makes smaller steps")
    adjust_lr_fn: Literal["original", "match_rms_adamw"] = Field("match_rms_adamw", description="Muon: learning rate by a matrix's shape")
    table_optimizer: Literal["adamw", "lazy_adam", "row_wise", "sgd"] = Field(
        "adamw",
        description="n-gram tables. adamw: dense, every row in every step; the others step on the rows that were hit alone: Adam on them, "
        "one second moment a row and no first (4 bytes of state a row), plain SGD",
    )
    table_beta1: float | None = Field(None, ge=0, lt=1, description="n-gram tables, adamw and lazy_adam; empty: beta1")
    table_beta2: float | None = Field(None, ge=0, lt=1, description="n-gram tables, all but sgd; empty: beta2")
    table_momentum: float = Field(0.0, ge=0, lt=1, description="n-gram tables, sgd: from one hit of a row to the next; 0 keeps no state")
    weight_decay: float = Field(0.1, ge=0, description="decoupled; matrices only, never embeddings, tables or norms")
    table_weight_decay: float = Field(
        0.0,
        ge=0,
        description="n-gram tables, decoupled: with adamw on every row in every step, else on the rows that were hit alone",
    )
    clip_norm: float = Field(1.0, gt=0, description="largest L2 norm of the gradient of everything but `clip_without`")
    clip_without: list[str] = Field(
        ["table", "indexer"],
        description="roles (table, indexer, embedding, matrix, head, router, vector) or patterns of parameter names (such as *.tables.*) "
        "that are left out of the gradient's norm and not clipped; []: nothing is",
    )


class ScheduleConfig(Node):
    """Learning rate over the run, as a multiple of the peak."""

    kind: Literal["wsd", "cosine"] = Field("wsd", description="warm-up, stable, decay; or warm-up and cosine")
    warmup_steps: int = Field(10, ge=0, description="optimizer steps in which the learning rate rises from nothing to its peak")
    decay_fraction: float = Field(0.3, ge=0, le=1, description="share of the steps in which wsd decays (linearly)")
    final_fraction: float = Field(0.05, ge=0, le=1, description="learning rate at the end, as a share of the peak")


class GrowthConfig(Node):
    """Depth growth: train a shallow model first, then stack its layers (LongCat-Flash: 14 layers, then 28)."""

    at_step: int = Field(ge=1, description="optimizer step before which the layers are stacked; data and learning rate go on as they are")
    times: int = Field(2, ge=2, description="copies of the shallow stack; must divide model.num_layers")
    moments: Literal["stacked", "fresh"] = Field("stacked", description="the optimizer's state of the copies: copied too, or empty")


class ConversionConfig(Node):
    """From dense to sparse attention within the run: `dense_steps`, then `warmup_steps` of the indexers alone, then sparse to the end."""

    dense_steps: int = Field(ge=0, description="optimizer steps with dense attention; the indexers do not learn")
    warmup_steps: int = Field(
        0,
        ge=0,
        description="optimizer steps in which the indexers learn from dense attention and everything else is frozen; they count in "
        "`steps`, read batches of their own, and the learning rate's schedule stands still",
    )
    warmup_learning_rate: float = Field(1e-3, gt=0, description="of the indexers in the warm-up, constant; DeepSeek-V3.2: 1e-3")


class TrainingConfig(Node):
    """The loop."""

    steps: int = Field(100, ge=1, description="optimizer steps")
    micro_batch_size: int | None = Field(None, ge=1, description="sequences a forward pass; empty: the whole batch at once")
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    z_loss_weight: float = Field(
        0.0, ge=0, description="of the hidden z-loss on the last layer's output; LongCat-Flash: very small, about 1e-7"
    )
    growth: GrowthConfig | None = Field(None, description="depth growth; empty: all layers from the start")
    conversion: ConversionConfig | None = Field(None, description="from dense to sparse attention; empty: as configured from the start")
    recompute: bool = Field(False, description="layers run again in backward instead of keeping their activations")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 autocast where the device computes in bf16")
    device: str = Field("auto", description="auto: the accelerator at hand, else cpu")
    threads: int = Field(1, ge=1, description="CPU threads; small models are fastest with one, and the bits follow the number")
    log_every: int = Field(10, ge=1, description="steps between rows of metrics.parquet")
    diverged_factor: float | None = Field(
        3.0, gt=1, description="a loss above so many times its first logged value for 5 rows ends the run as diverged; empty: never"
    )
    evaluate_every: int | None = Field(None, ge=1, description="steps between validations; empty: only at the end")
    evaluation_sequences: int = Field(128, ge=1, description="sequences of each held-out split, always the same ones")
    attention_measures: int = Field(
        0, ge=0, description="sequences of the validation split on which attention is measured at the end (overlap, coverage); 0: not"
    )
    checkpoint_every: int = Field(100, ge=1, description="steps between checkpoints")
    keep_model: bool = Field(True, description="leave the trained weights in the run's folder")
    evaluations: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="name -> dotted settings of the model under which the trained weights are evaluated too: metrics NAME/METRIC",
    )

    @model_validator(mode="after")
    def _ordered(self) -> TrainingConfig:
        if self.schedule.warmup_steps >= self.steps:
            raise ValueError(f"schedule.warmup_steps is {self.schedule.warmup_steps}, not below steps {self.steps}: lower it")
        if self.growth and self.growth.at_step >= self.steps:
            raise ValueError(f"growth.at_step is {self.growth.at_step}, not below steps {self.steps}: lower it")
        plan = self.conversion
        if plan and plan.dense_steps + plan.warmup_steps >= self.steps:
            raise ValueError(
                f"conversion.dense_steps + warmup_steps is {plan.dense_steps + plan.warmup_steps}, not below steps {self.steps}: lower them"
            )
        if plan and self.schedule.warmup_steps >= self.steps - plan.warmup_steps:
            raise ValueError("schedule.warmup_steps must be below steps without conversion.warmup_steps: lower one of them")
        return self


class TrackingConfig(Node):
    """Where metrics go beside the run's own folder, which always has them. Not part of a run's identity.

    As an override `track=wandb` is short for `tracking.wandb`: the mode of the environment variable WANDB_MODE, else online where
    WANDB_API_KEY is set, else offline; `track=off` switches it off again.
    """

    wandb: Literal["off", "offline", "online"] = Field(
        "off",
        description="needs the extra `wandb`; offline needs no network and no account and leaves wandb/offline-run-* in the run's folder, "
        "which `wandb sync` sends later; a failure never stops the run",
    )
    wandb_project: str = Field("longcat_lab", min_length=1, description="where runs are gathered; a sweep is a group in it")


def tracked(value: Any) -> str:
    """The mode that `track=VALUE` stands for.

    Raises:
        ConfigError: there is no such tracker.
    """
    if value in (None, False, "off", "none"):
        return "off"
    if value != "wandb":
        raise ConfigError(f"'track': there is no tracker {value!r}{nearest(str(value), ['wandb', 'off'])}")
    mode = os.environ.get("WANDB_MODE", "").strip().lower()
    known = {"offline": "offline", "dryrun": "offline", "online": "online", "run": "online", "shared": "online", "disabled": "off"}
    return known.get(mode) or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
