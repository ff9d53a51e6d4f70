"""A small sweep for the result page: real jobs in real kernels, of stand-in rooms, so that none of them needs torch."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import yaml
from fake_rooms import FAKE, question, write_notebook
from filelock import FileLock
from rich.console import Console

from longcat_lab.ablation import JobsFailed, render, run

ARMS: dict[str, Any] = {"a": {}, "b": {"effect": -0.1, "model.experts": 12, "behaviour": "raise"}}
JOB = """
import json
from pathlib import Path
from types import SimpleNamespace
import pyarrow
from pyarrow import parquet
folder = Path(job_folder)
record = json.loads((folder / "run.json").read_text())
config = record["config"]
seed = config["seed"]
def log(rows):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "metrics.parquet")

budget = ["params", "active params", "FLOPs/token", "bytes/token"]
totals = ["total_params", "active_params", "flops_per_token", "state_bytes_per_token"]
rows = [["block", *budget], ["all", *(record["budget"][key] for key in totals)]]
rows.append(["total", *rows[1][1:]])
table = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
text = "\\n".join(" ".join(map(str, row)) for row in rows)
display({"text/html": f"<table>{table}</table>", "text/plain": text}, raw=True)
if config["behaviour"] == "raise" and seed == 3:
    log([{"step": 1, "tokens": 9600, "loss": 8.0, "validation_bpb": None}])
    raise ValueError("loss is not finite at step 3")
noise = [0.0, 0.013, -0.007, 0.004][seed]
value = 2.0 + (config["effect"] + noise) * (1 + 0.05 * seed)
rows = [{"step": s, "tokens": 64 * s, "loss": 9.0 / s + value, "validation_bpb": None} for s in range(1, 301)]
for row in rows[9::10]:
    row["validation_bpb"] = value + 1 / row["step"]
log(rows)
final = {"validation_bpb": value, "shuffled_bpb": 8.0 + noise, "tokens": 19200, "train_loss": float("nan")}
timings = {"training_seconds": 5.0 + seed, "tokens_per_second": 3840.0, "steps_done": 300, "peak_memory_bytes": 123456789}
made = {"commit": "c0ffee" * 6 + "c0ff", "dirty": True, "untracked": ["notes.txt", "try.py"], "data": "d" * 64}
made |= {"versions": {"torch": "2"}, "python": "3", "device": "cpu"}
(folder / "uncommitted.diff").write_text("- old line\\n+ new line\\n")
record |= {"status": "finished", "reason": None, "final": final, "timings": timings, "provenance": made, "not_engaged": []}
(folder / "part").write_text(json.dumps(record))
(folder / "part").replace(folder / "run.json")
run = SimpleNamespace(record=record)
"""
SHOWN = 'run.record["final"]'


def answered(home: Path) -> Path:
    """The folder of a sweep of two arms and four seeds: the last job of one arm failed, the hypothesis was edited afterwards."""
    notebook = write_notebook(home / "job.ipynb", 'job_folder = ""', JOB, SHOWN)
    asked = {**question(ARMS), "seeds": [0, 1, 2, 3], "claims": [{"better": "b", "than": "a"}], "notebook": str(notebook)}
    asked["match"] = [{"quantity": "active_params", "reference": "a"}]
    for hypothesis in ("b is better", "b is better & cheaper"):
        (home / "demo.yaml").write_text(yaml.safe_dump({**asked, "hypothesis": hypothesis}, sort_keys=False))
        try:
            run(home / "demo.yaml", home / "out", 2, rooms=FAKE, console=Console(file=io.StringIO()))
        except JobsFailed as error:
            assert "7 of 8 jobs finished" in str(error)
    return home / "out"


def rendered(base: Path) -> Path:
    """The folder of `answered` with its page, to be read only; made once for all processes of a test session.

    base: the process's own temporary folder, `tmp_path_factory.getbasetemp()`.
    """
    home = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "answered"
    home.mkdir(exist_ok=True)
    with FileLock(home / "lock"):
        if not (home / "out" / "report.html").is_file():
            render(answered(home))
    return home / "out"
