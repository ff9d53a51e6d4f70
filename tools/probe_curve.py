"""The learning curve of a probe, as CSV: stops a run every so many steps, answers the probe, goes on.

    python tools/probe_curve.py probe-recall --every 25 --out docs/probes/recall_dense.csv [key=value ...]

A run that is stopped and resumed has the bits of one that is not, so this is the curve of `lab.fit` itself. Seconds are processor
seconds of the training alone, in steps of a stop.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import longcat_lab as lab
from longcat_lab.data import prepare
from longcat_lab.training import checkpoint
from longcat_lab.training.probe_evaluation import evaluate_probe

COLUMNS = ("probe_accuracy", "probe_loss", "probe_error_far")


def curve(config: lab.RunConfig, every: int) -> list[dict[str, float]]:
    """One row every `every` steps and at the end: step, processor seconds so far, and what `evaluate_probe` finds."""
    corpus, rows, spent = prepare(config.data, config.model.vocab_size), [], 0.0
    with tempfile.TemporaryDirectory() as folder:
        while True:
            steps = iter(range(1, every + 1))
            started = time.process_time()
            run = lab.fit(config, folder, progress=False, stop=lambda steps=steps: next(steps) == every)
            spent += time.process_time() - started
            if run.record["status"] == "finished":
                return [*rows, {"step": config.training.steps, "seconds": spent, **run.record["final"]}]
            step = run.record["timings"]["steps_done"]
            model = lab.build(config)
            checkpoint.load_weights(model, Path(folder) / f"checkpoint-{step:08d}" / checkpoint.WEIGHTS)
            rows.append({"step": step, "seconds": spent, **evaluate_probe(model, corpus, config)})


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("config", help="preset or YAML file with data.probe")
    arguments.add_argument("overrides", nargs="*", help="key=value")
    arguments.add_argument("--every", type=int, default=25, help="steps between rows")
    arguments.add_argument("--out", type=Path, required=True)
    given = arguments.parse_args()
    config = lab.load(given.config, *given.overrides)
    if config.data.probe is None:
        raise SystemExit(f"{given.config} has no data.probe: name one, such as probe-recall.")
    rows = curve(config, given.every)
    columns = [key for key in COLUMNS if key in rows[-1]]
    lines = [",".join(["step", "seconds", *columns])]
    lines += [",".join([str(row["step"]), f"{row['seconds']:.1f}", *(f"{row[key]:.4f}" for key in columns)]) for row in rows]
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
