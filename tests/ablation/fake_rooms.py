"""Stand-ins for the rooms that a sweep calls, and a notebook that does what its configuration says; neither needs torch."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import nbformat
import yaml
from pydantic import Field

from longcat_lab.ablation.rooms import Rooms
from longcat_lab.node import Node, validate_node


class Shape(Node):
    width: int = Field(64, ge=8, multiple_of=8)
    experts: int = Field(4, ge=1, le=5000)
    depth: int = Field(2, ge=1)
    frozen: int = 3
    kind: str = "plain"


class Config(Node):
    seed: int = Field(0, ge=0)
    model: Shape = Field(default_factory=Shape)
    behaviour: str = "ok"
    effect: float = 0.0


def load(base: str) -> Config:
    return validate_node(Config, {} if base == "small" else yaml.safe_load(Path(base).read_text()))


def apply(config: Config, values: dict[str, Any]) -> Config:
    data = config.to_dict()
    for key, value in values.items():
        *parts, last = key.split(".")
        node = data
        for part in parts:
            node = node.setdefault(part, {})
        node[last] = value
    return validate_node(Config, data)


def totals(config: Config) -> dict[str, float]:
    m = config.model
    return {
        "total_params": m.depth * (1000 * m.width + 700 * m.experts),
        "active_params": m.depth * 1000 * m.width,
        "flops_per_token": m.depth * (2000 * m.width + 12 * m.experts),
        "state_bytes_per_token": 8 * m.width,
    }


def identity(config: Config, known: Any = None) -> str:
    return hashlib.sha256((json.dumps(config.to_dict(), sort_keys=True) + os.environ.get("FAKE_CODE", "")).encode()).hexdigest()[:12]


def prepare(config: Config, progress: Any) -> None:
    progress("1 of 2 files")
    progress("2 of 2 files")


FAKE = Rooms(
    load=load,
    apply=apply,
    totals=totals,
    identity=identity,
    data_key=lambda config: "one",
    prepare=prepare,
    cards=lambda: ["4", "5"],
    check_layout=lambda config, processes: None,
)

PARAMETERS = 'job_folder = ""'
HELLO = """
import fcntl, os
print("threads", os.environ["OMP_NUM_THREADS"])
if "CARD_LOCKS" in os.environ:  # fails where another job has the same card
    held = open(os.path.join(os.environ["CARD_LOCKS"], os.environ["CUDA_VISIBLE_DEVICES"]), "w")
    fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
"""
CODE = """
import json, os, signal, time
from pathlib import Path
folder = Path(job_folder)
run = json.loads((folder / "run.json").read_text())
config = run["config"]
with open(folder / "count.txt", "a") as file:
    file.write("x")

def save(status, **more):
    text = json.dumps({**json.loads((folder / "run.json").read_text()), "status": status, **more})
    (folder / "part").write_text(text)
    os.replace(folder / "part", folder / "run.json")

def finish():
    noise = [0.0, 0.013, -0.007, 0.004][config["seed"] % 4] * (1 + abs(config["effect"]))
    save("finished", final={"validation_bpb": 2.0 + config["effect"] + noise, "shuffled_bpb": 8.0 + noise})

behaviour = config["behaviour"]
if behaviour == "raise":
    raise ValueError("boom\\nsecond line")
if behaviour == "die":
    os._exit(9)
if behaviour == "killed once" and len((folder / "count.txt").read_text()) == 1:
    os.kill(os.getpid(), signal.SIGKILL)
if behaviour == "memory":
    raise MemoryError("Unable to allocate 9.1 TiB")
if behaviour == "nan":
    save("diverged", reason="diverged at step 120: loss nan", final={"train_loss": 3.5})
    raise ArithmeticError("The loss is nan at step 120.")
if behaviour == "eat":  # neither of the two takes too much alone
    import subprocess, sys
    grow = "held = [bytearray(b'x' * (1 << 20)) for _ in range(%d)]; import time; time.sleep(300)"
    (folder / "eater").write_text(str(subprocess.Popen([sys.executable, "-c", grow % 600], start_new_session=True).pid))
    exec(grow % int(os.environ.get("EATEN", 600)))
if behaviour == "fill" and not (folder / "freed").exists():
    with open(folder / "big", "wb") as file:
        while True:
            file.write(bytes(4096))
            file.flush()
if behaviour == "stubborn":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
if behaviour in ("wait", "stubborn"):
    said = {"step": 3, "steps": 10, "tokens_per_second": 1234.5, "seconds_left": 7.0, "loss": 2.5}
    (folder / "progress.json").write_text(json.dumps(said))
    (folder / "started").touch()
    try:
        deadline = time.monotonic() + 180
        while not (folder / "release").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
    except KeyboardInterrupt:
        (folder / "saved").touch()
        raise
if behaviour != "nothing":
    finish()
if behaviour == "late":
    raise RuntimeError("a figure failed")
"""


def write_notebook(path: Path, *cells: str) -> Path:
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nb.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(nb, path)
    return path


def question(variants: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "name": "demo",
        "question": "is b better than a?",
        "hypothesis": "b is better",
        "base": "small",
        "baseline": next(iter(variants)),
        "variants": variants,
        "seeds": [0],
        "smallest_effect": 0.01,
        **more,
    }


def write_question(folder: Path, variants: dict[str, Any], **more: Any) -> Path:
    notebook = folder / "job.ipynb"
    if not notebook.exists():
        write_notebook(notebook, PARAMETERS, HELLO, CODE)
    path = folder / "demo.yaml"
    path.write_text(yaml.safe_dump(question(variants, notebook=str(notebook), **more), sort_keys=False))
    return path


if __name__ == "__main__":  # a driver that can be killed: python fake_rooms.py QUESTION OUT JOBS [EXECUTOR]
    import sys

    from longcat_lab.ablation import run
    from longcat_lab.errors import LabError

    try:
        run(sys.argv[1], sys.argv[2], int(sys.argv[3]), rooms=FAKE, executor=(*sys.argv, "local")[4])
    except LabError as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        sys.exit(2)
