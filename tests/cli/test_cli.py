"""The commands as a person runs them: real processes, exit codes, one sentence for each mistake."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def command(*arguments, cwd=ROOT):
    return subprocess.run([sys.executable, "-m", "longcat_lab", *map(str, arguments)], capture_output=True, text=True, cwd=cwd)


def test_help_names_the_commands():
    shown = command("--help").stdout
    assert all(name in shown for name in ("run", "report", "train", "budget", "ngrams", "doctor"))


def test_budget_prints_the_table():
    done = command("budget", "tiny", "model.embedding.ngram.order=3")
    *table, activated = done.stdout.splitlines()
    assert done.returncode == 0 and table[-1].split()[0] == "total" and "ngram_embedding" in done.stdout
    assert "34,198 at 1.5" in activated and "n-gram projections" in activated


def test_ngrams_counts_warns_and_recommends():
    node = "model.embedding.ngram"
    done = command("ngrams", "tiny", f"{node}.order=3", f"{node}.vocab_ratio=8.0", "--tokens", 3000)
    assert done.returncode == 0, done.stderr
    assert f"{node}.vocab_ratio: 8.0 is 8/1: frequent 2-grams share rows" in done.stdout
    assert "Recommended:" in done.stdout and "order 3 needs 3 tables" in done.stdout
    network = command("ngrams", "tiny", "model.ffn.kind=plne_swiglu", "--tokens", 500)
    assert network.returncode == 0 and "model.ffn.splits: order 3 needs 3 tables" in network.stdout
    plain = command("ngrams", "tiny")
    assert plain.returncode == 2 and plain.stderr.count("\n") == 1 and "has no hashed n-gram tables" in plain.stderr


def test_doctor_finds_what_is_here():
    done = command("doctor")
    assert done.returncode == 0 and "ok      torch" in done.stdout and "npu" in done.stdout
    rows, _, never = done.stdout.partition("never exercised here")
    told = {line[8:].split("  ")[0]: line for line in rows.splitlines()}  # behind `ok` or `missing`
    assert told["backend"].endswith("gloo") or ":gloo," in told["backend"]
    assert {"bf16", "grouped product", "sparse attention"} <= told.keys()
    assert all(what in never for what in ("HCCL", "NCCL", "torch_npu", "several machines"))


def test_train_trains_goes_on_and_prints_the_folder(tmp_path):
    first = command("train", "tiny", "training.steps=4", "training.schedule.warmup_steps=1", "--out", tmp_path / "run")
    assert first.returncode == 0, first.stderr
    assert first.stdout.splitlines()[-1] == str(tmp_path / "run")
    again = command("train", "tiny", "training.steps=4", "training.schedule.warmup_steps=1", "--out", tmp_path / "run")
    assert again.stdout == first.stdout


GOOD = """
name: small
question: Is it so?
hypothesis: It is.
base: tiny
baseline: a
variants: {a: {}, b: {model.num_layers: 2}}
seeds: [0, 1, 2]
smallest_effect: 0.1
"""


@pytest.mark.parametrize(
    ("arguments", "text", "sentence"),
    [
        (["budget", "tiny", "model.num_layer=2"], None, "Unknown key 'model.num_layer', did you mean 'num_layers'?"),
        (["budget", "tiny", "model.num_layers=x"], None, "'model.num_layers': input should be a valid integer, got 'x'."),
        (["train", "nosuch"], None, "There is no preset 'nosuch'"),
        (["report", "nowhere"], None, "There is no sweep in"),
        (["run", "nowhere.yaml"], None, "cannot be read"),
        (["run", "q.yaml"], "name: [", "not valid YAML"),
        (["run", "q.yaml"], GOOD.replace("seeds:", "seed:"), "Unknown key 'seed', did you mean 'seeds'?"),
        (["run", "q.yaml"], GOOD.replace("baseline: a", "baseline: c"), "'c', which is not a variant"),
        (["run", "q.yaml"], GOOD.replace("num_layers: 2", "num_layer: 2"), "Unknown key 'model.num_layer', did you mean 'num_layers'?"),
        (["run", "q.yaml"], GOOD.replace("[0, 1, 2]", "[0, 1, 1]"), "one seed twice"),
        (["run", "q.yaml", "--executor", "ray"], GOOD, "Unknown executor 'ray'"),
        (["run", "q.yaml", "data.source.kind=files", "data.source.path=empty"], GOOD, "empty"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(tmp_path, arguments, text, sentence):
    (tmp_path / "empty").mkdir()
    if text is not None:
        (tmp_path / "q.yaml").write_text(text)
    before = sorted(p.name for p in tmp_path.iterdir())
    done = command(*arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("longcat-lab: ") and sentence in last and "Traceback" not in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == before
