"""Stand-in rooms with a loop and an order of data, for questions that need them: steps to free, seeds of the data, times to measure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fake_rooms
import yaml
from pydantic import Field

from longcat_lab.ablation.measured import Measured
from longcat_lab.ablation.rooms import Rooms
from longcat_lab.node import ConfigError, Node, validate_node


class Data(Node):
    seed: int | None = None
    batch_size: int = 4
    sequence_length: int = 8


class Loop(Node):
    steps: int = Field(200, ge=1)
    rate: float = 1.0
    threads: int = 1


class Worded(fake_rooms.Config):
    data: Data = Field(default_factory=Data)
    training: Loop = Field(default_factory=Loop)


def load(base: str) -> Worded:
    if base == "gone":
        raise ConfigError("There is no preset 'gone'.")
    return validate_node(Worded, {})


def apply(config: Worded, values: dict[str, Any]) -> Worded:
    data = config.to_dict()
    for key, value in values.items():
        *parts, last = key.split(".")
        node = data
        for part in parts:
            node = node[part]
        node[last] = value
    return validate_node(Worded, data)


def measure(config: Worded, threads: int, processes: int = 1) -> Measured:
    """A machine on which a step takes a fixed part and one for each unit of width; the first step of three is slower."""
    step = 0.01 + 0.0002 * config.model.width * config.model.depth
    return Measured(5.0, (1.1 * step, step, step), 2.0, 10**8, imports=4.0)


ROOMS = Rooms(
    load=load,
    apply=apply,
    totals=fake_rooms.totals,
    identity=fake_rooms.identity,
    code=lambda: "c0de",
    data_key=lambda config: "one",
    prepare=lambda config, progress: None,
    check_portable=lambda config: None,
    check_layout=lambda config, processes: None,
    measure=measure,
)
JOB = """
import json, os
from pathlib import Path
folder = Path(job_folder)
run = json.loads((folder / "run.json").read_text())
config = run["config"]
own = config["seed"] if config["data"]["seed"] is None else config["data"]["seed"]
noise = [0.0, 0.013, -0.007, 0.004][config["seed"] % 4] + [0.0, 0.1, 0.3, 0.2][own % 4]
best = 2.0 if config["effect"] else 1.0  # each arm has a best rate of its own
value = 2.0 + config["effect"] + noise + (config["training"]["rate"] - best) ** 2
run |= {"status": "finished", "final": {"validation_bpb": value, "shuffled_bpb": 8.0 + noise}, "provenance": {"code": "c0de"}}
(folder / "part").write_text(json.dumps(run))
os.replace(folder / "part", folder / "run.json")
"""


def write(folder: Path, variants: dict[str, Any], **more: Any) -> Path:
    """A question file, with the notebook of its jobs beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    notebook = folder / "job.ipynb"
    if not notebook.exists():
        fake_rooms.write_notebook(notebook, 'job_folder = ""', JOB)
    path = folder / "demo.yaml"
    path.write_text(yaml.safe_dump(fake_rooms.question(variants, notebook=str(notebook), **more), sort_keys=False))
    return path


def finish(folder: Path, values: dict[str, list[float]]) -> None:
    """results.parquet and run.json as finished jobs of the question in `folder` leave them, without running any."""
    from longcat_lab.ablation import read, solve, store
    from longcat_lab.ablation.jobs import cells

    rows: list[dict[str, Any]] = []
    there = folder / "ablation.yaml"
    configs = cells(read(there), solve(read(there), ROOMS), ROOMS) if there.is_file() else {}
    for variant, each in values.items():
        for seed, value in enumerate(each):
            config = configs[variant, seed].to_dict() if (variant, seed) in configs else {"training": {"steps": 7}}
            run = {"status": "finished", "identity": "i", "final": {"validation_bpb": value}, "config": config}
            run |= {"provenance": {"code": "c0de"}, "job": {"attempts": 1}}
            place = store.job_folder(folder, variant, seed)
            place.mkdir(parents=True, exist_ok=True)
            (place / "run.json").write_text(json.dumps(run))
            rows.append(store.result_row(run, variant, seed, "i"))
    store.write_results(folder, rows)
