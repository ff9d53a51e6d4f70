"""A run is its folder."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longcat_lab.config import RunConfig, load
from longcat_lab.config.plugins import known_here
from longcat_lab.data import Corpus, prepare
from longcat_lab.errors import LabError
from longcat_lab.files import read_json
from longcat_lab.model import LongcatLM, build, generate
from longcat_lab.training.weights import WEIGHTS, load_weights

if TYPE_CHECKING:
    import pandas


class Run:
    """What was trained, read from its folder: `run.json`, `metrics.parquet`, `model.safetensors`.

    path: the folder. Everything else is read from there when first asked for.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.record: dict[str, Any] = read_json(self.path / "run.json") or {}
        if not self.record or not isinstance(self.record, dict):
            raise LabError(f"{self.path}: there is no run here (no readable run.json).")

    @functools.cached_property
    def config(self) -> RunConfig:
        return load(known_here(self.record))

    @property
    def summary(self) -> dict[str, Any]:
        """Status, budget, final metrics, seconds, and which mechanisms did not engage, in one flat mapping.

        Where there are any: `left_out`, what could not be measured, and `passed_over`, damaged checkpoints that were not gone on from.
        """
        record = self.record
        return {
            "status": record.get("status"),
            "not_engaged": record.get("not_engaged", []),
            **{key: record[key] for key in ("left_out", "passed_over") if key in record},
            **record.get("budget", {}),
            **record.get("final", {}),
            **record.get("timings", {}),
        }

    @functools.cached_property
    def metrics(self) -> pandas.DataFrame:
        """One row a logged step."""
        import pandas

        path = self.path / "metrics.parquet"
        return pandas.read_parquet(path) if path.exists() else pandas.DataFrame()

    @functools.cached_property
    def corpus(self) -> Corpus:
        return prepare(self.config.data, self.config.model.vocab_size)

    @functools.cached_property
    def model(self) -> LongcatLM:
        """The trained model, on the CPU, in evaluation mode."""
        if not (self.path / WEIGHTS).exists():
            status = self.record.get("status")
            fix = "delete its folder and train it with training.keep_model=true" if status == "finished" else "train it to its end"
            raise LabError(f"{self.path}: the run has no weights (status '{status}'): {fix}.")
        model = build(self.config)
        load_weights(model, self.path / WEIGHTS)
        return model.eval()

    def generate(self, prompt: str, count: int = 64, temperature: float = 0.0, seed: int = 0) -> str:
        """`prompt` continued by up to `count` tokens."""
        import torch

        tokens = torch.tensor(self.corpus.tokenizer.encode(prompt).ids or [self.corpus.eos_id])
        return self.corpus.tokenizer.decode(generate(self.model, tokens, count, temperature, seed, self.corpus.eos_id).tolist())

    def __repr__(self) -> str:
        shown = {key: value for key, value in self.summary.items() if key in ("status", "validation_bpb", "total_params")}
        return f"Run({str(self.path)!r}, {', '.join(f'{key}={value}' for key, value in shown.items())})"
