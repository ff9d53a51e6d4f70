"""How a run is trained and where it is reported."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from longcat_lab.node import Node


class OptimizerConfig(Node):
    """AdamW with a learning rate for each role of parameter: matrices and vectors, token embeddings, n-gram tables."""

    learning_rate: float = Field(3e-3, gt=0, description="peak, for matrices, norms and the head")
    embedding_lr_multiplier: float = Field(1.0, ge=0, description="times learning_rate, for token embeddings")
    table_lr_multiplier: float = Field(1.0, ge=0, description="times learning_rate, for n-gram tables")
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1e-16, gt=0, description="LongCat-Flash trains with 1e-16")
    weight_decay: float = Field(0.1, ge=0, description="decoupled; matrices only, never embeddings, tables or norms")
    clip_norm: float = Field(1.0, gt=0, description="largest L2 norm of the gradient of everything but n-gram tables")


class ScheduleConfig(Node):
    """Learning rate over the run, as a multiple of the peak."""

    kind: Literal["wsd", "cosine"] = Field("wsd", description="warm-up, stable, decay; or warm-up and cosine")
    warmup_steps: int = Field(10, ge=0)
    decay_fraction: float = Field(0.3, ge=0, le=1, description="share of the steps in which wsd decays (linearly)")
    final_fraction: float = Field(0.05, ge=0, le=1, description="learning rate at the end, as a share of the peak")


class TrainingConfig(Node):
    """The loop."""

    steps: int = Field(100, ge=1, description="optimizer steps")
    micro_batch_size: int | None = Field(None, ge=1, description="sequences a forward pass; empty: the whole batch at once")
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 autocast where the device computes in bf16")
    device: str = Field("auto", description="auto: the accelerator at hand, else cpu")
    threads: int = Field(1, ge=1, description="CPU threads; small models are fastest with one, and the bits follow the number")
    log_every: int = Field(10, ge=1, description="steps between rows of metrics.parquet")
    evaluate_every: int | None = Field(None, ge=1, description="steps between validations; empty: only at the end")
    evaluation_sequences: int = Field(128, ge=1, description="sequences of each held-out split, always the same ones")
    checkpoint_every: int = Field(100, ge=1, description="steps between checkpoints")
    keep_model: bool = Field(True, description="leave the trained weights in the run's folder")

    @model_validator(mode="after")
    def _ordered(self) -> TrainingConfig:
        if self.schedule.warmup_steps >= self.steps:
            raise ValueError(f"schedule.warmup_steps is {self.schedule.warmup_steps}, not below steps {self.steps}: lower it")
        return self


class TrackingConfig(Node):
    """Where metrics go beside the run's own folder, which always has them. Not part of a run's identity."""

    wandb: Literal["off", "offline", "online"] = Field("off", description="needs the extra `wandb`; a failure never stops the run")
    wandb_project: str = "longcat_lab"
