"""The loop on real text: determinism, exact resume, accumulation, schedules, optimizer roles, provenance, bad ends."""

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time

import pandas
import pytest
import torch

import longcat_lab as lab
from longcat_lab.config import ScheduleConfig, load
from longcat_lab.data import prepare
from longcat_lab.errors import Diverged
from longcat_lab.files import read_json
from longcat_lab.model import build
from longcat_lab.training import identity
from longcat_lab.training.divergence import stays_above
from longcat_lab.training.optimizer import clip, make_optimizer, roles
from longcat_lab.training.schedule import learning_rate_factor
from longcat_lab.training.weights import WEIGHTS

NGRAM = "model.embedding.ngram.order=3"


def weights(run):
    return {name: value.clone() for name, value in run.model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return lab.fit(load("tiny", NGRAM), tmp_path_factory.mktemp("runs") / "finished", progress=False)


def test_a_run_leaves_what_the_layout_promises(finished):
    record = read_json(finished.path / "run.json")
    assert record["status"] == "finished" and record["reason"] is None
    assert load(record["config"]) == finished.config
    assert {"commit", "dirty", "code", "data", "versions", "device", "python"} <= set(record["provenance"])
    assert record["provenance"]["data"] == finished.corpus.hash
    metrics = pandas.read_parquet(finished.path / "metrics.parquet")
    assert metrics["step"].tolist() == [5, 10, 15, 20]
    assert finished.metrics.equals(metrics)
    assert {"validation_bpb", "out_of_distribution_bpb", "shuffled_bpb", "real_experts_per_token", "rows_touched"} <= set(record["final"])
    assert not list(finished.path.glob("checkpoint-*")) and not list(finished.path.glob(".*tmp"))
    progress = read_json(finished.path / "progress.json")
    assert progress["step"] == progress["steps"] == 20 and progress["seconds_left"] == 0


def test_the_logged_learning_rate_is_that_of_the_matrices():
    """Also where the embedding, the model's first parameter, has its own multiplier."""
    config = load("tiny", "training.optimizer.embedding_lr_multiplier=40")
    factors = [learning_rate_factor(step - 1, 20, config.training.schedule) for step in (5, 10, 15, 20)]
    with tempfile.TemporaryDirectory() as folder:
        logged = lab.fit(config, folder, progress=False).metrics["learning_rate"].tolist()
    assert logged == [config.training.optimizer.learning_rate * factor for factor in factors]


def test_training_learns(finished):
    losses = finished.metrics["loss"]
    assert losses.iloc[-1] < losses.iloc[0] - 0.2 and losses.iloc[0] < math.log(512) + 1


def test_the_same_configuration_gives_the_same_bits(finished, tmp_path):
    again = lab.fit(load("tiny", NGRAM), tmp_path / "again", progress=False)
    assert same(weights(finished), weights(again))
    numbers = ["loss", "gradient_norm"]
    assert again.metrics[numbers].equals(finished.metrics[numbers])
    assert again.record["final"] == finished.record["final"]
    other = lab.fit(load("tiny", NGRAM, "seed=1"), tmp_path / "other", progress=False)
    assert not same(weights(finished), weights(other))


@pytest.mark.parametrize("at", [10, 13])
def test_a_stopped_run_goes_on_with_the_same_bits(finished, tmp_path, at):
    asked = []
    stopped = lab.fit(load("tiny", NGRAM), tmp_path / "run", progress=False, stop=lambda: asked.append(1) or len(asked) == at)
    assert stopped.record["status"] == "interrupted" and stopped.record["timings"]["steps_done"] == at
    resumed = lab.fit(load("tiny", NGRAM), tmp_path / "run", progress=False)
    assert same(weights(finished), weights(resumed))
    assert resumed.metrics["loss"].tolist() == finished.metrics["loss"].tolist()
    assert resumed.record["final"] == finished.record["final"]


def test_kill_minus_9_loses_nothing_before_the_checkpoint(finished, tmp_path):
    """A real process is killed after its first checkpoint; the next one repeats the uninterrupted run bit for bit."""
    folder = tmp_path / "run"
    slowly = "lambda: time.sleep(0.1)"  # None: go on; the pause leaves time to kill it between two checkpoints
    code = f"import time, longcat_lab as lab; lab.fit(lab.load('tiny', '{NGRAM}'), {str(folder)!r}, progress=False, stop={slowly})"
    process = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 120
    while not list(folder.glob("checkpoint-*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert read_json(folder / "run.json")["status"] == "running"
    resumed = lab.fit(load("tiny", NGRAM), folder, progress=False)
    assert same(weights(finished), weights(resumed))
    assert resumed.metrics["loss"].tolist() == finished.metrics["loss"].tolist()


def test_the_keyboard_ends_a_run_between_two_steps(finished, tmp_path):
    folder, sent = tmp_path / "run", []

    def interrupt():
        if not sent:
            sent.append(os.kill(os.getpid(), signal.SIGINT))
        return False

    with pytest.raises(KeyboardInterrupt):
        lab.fit(load("tiny", NGRAM), folder, progress=False, stop=interrupt)
    assert lab.Run(folder).record["status"] == "interrupted"
    assert same(weights(finished), weights(lab.fit(load("tiny", NGRAM), folder, progress=False)))


def test_a_finished_run_is_not_run_again(finished):
    before = (finished.path / "run.json").stat().st_mtime_ns
    again = lab.fit(load("tiny", NGRAM), finished.path, progress=False)
    assert (finished.path / "run.json").stat().st_mtime_ns == before and again.record == finished.record


def test_a_folder_of_another_run_is_left_alone(finished):
    before = (finished.path / "run.json").read_bytes()
    with pytest.raises(lab.LabError, match="holds another run"):
        lab.fit(load("tiny", NGRAM, "seed=5"), finished.path, progress=False)
    assert (finished.path / "run.json").read_bytes() == before


def test_micro_batches_give_the_gradient_of_the_whole_batch(tmp_path):
    whole = lab.fit(load("tiny", "training.steps=3"), tmp_path / "whole", progress=False)
    parts = lab.fit(load("tiny", "training.steps=3", "training.micro_batch_size=1"), tmp_path / "parts", progress=False)
    for name, value in weights(whole).items():
        torch.testing.assert_close(value, weights(parts)[name], rtol=1e-3, atol=2e-4)
    assert whole.metrics["gradient_norm"].iloc[0] == pytest.approx(parts.metrics["gradient_norm"].iloc[0], rel=1e-4)


def test_bf16_autocast_trains_to_nearly_the_same_loss(finished, tmp_path):
    low = lab.fit(load("tiny", NGRAM, "training.precision=bf16"), tmp_path / "low", progress=False)
    assert low.metrics["loss"].iloc[-1] == pytest.approx(finished.metrics["loss"].iloc[-1], rel=0.02)
    assert low.metrics["loss"].iloc[-1] != finished.metrics["loss"].iloc[-1]
    assert {p.dtype for p in low.model.parameters()} == {torch.float32}


def test_identity_follows_configuration_and_data_and_not_tracking():
    base = identity(load("tiny"))
    assert base == identity(load("tiny", "tracking.wandb=offline"))
    others = {identity(load("tiny", change)) for change in ("seed=1", "training.steps=21", "data.train_bytes=200000", NGRAM)}
    assert base not in others and len(others) == 4


def test_schedules_in_closed_form():
    wsd = ScheduleConfig(kind="wsd", warmup_steps=4, decay_fraction=0.5, final_fraction=0.1)
    factors = [learning_rate_factor(step, 20, wsd) for step in range(20)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0] and factors[4:10] == [1.0] * 6
    assert factors[-1] == pytest.approx(0.1) and factors[14] == pytest.approx(1 - 0.9 * 0.5)
    cosine = ScheduleConfig(kind="cosine", warmup_steps=0, final_fraction=0.0)
    assert [learning_rate_factor(step, 5, cosine) for step in range(5)] == pytest.approx([1, 0.5 + 8**-0.5, 0.5, 0.5 - 8**-0.5, 0])


def test_roles_decide_rate_decay_and_clipping():
    config = load("tiny", NGRAM, "training.optimizer.table_lr_multiplier=5", "training.optimizer.embedding_lr_multiplier=2")
    model = build(config)
    found = roles(model)
    assert found["embed_tokens.tables.weight"] == "table" and found["embed_tokens.weight"] == "embedding"
    assert found["lm_head.weight"] == "head" and found["norm.weight"] == "vector"
    optimizer = make_optimizer(model, config.training.optimizer)
    groups = {group["role"]: group for group in optimizer.param_groups}
    assert sum(p.numel() for g in groups.values() for p in g["params"]) == sum(p.numel() for p in model.parameters())
    peak = config.training.optimizer.learning_rate
    assert {role: group["lr"] / peak for role, group in groups.items()} == pytest.approx(
        {"table": 5, "embedding": 2, "matrix": 1, "vector": 1}
    )
    assert {role for role, group in groups.items() if group["weight_decay"]} == {"matrix"}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    clip(optimizer, 1.0)
    assert float(groups["table"]["params"][0].grad.min()) == 1.0
    dense = [p.grad for role, g in groups.items() if role != "table" for p in g["params"]]
    assert float(torch.cat([g.flatten() for g in dense]).norm()) == pytest.approx(1.0, rel=1e-4)


def test_a_loss_that_is_no_number_ends_the_run_with_its_reason(tmp_path):
    bad = load("tiny", "training.optimizer.learning_rate=1e30", "training.schedule.warmup_steps=0", "training.log_every=1")
    with pytest.raises(Diverged, match=r"The loss is (nan|inf) at step"):
        lab.fit(bad, tmp_path / "run", progress=False)
    record = read_json(tmp_path / "run/run.json")
    assert record["status"] == "diverged" and "learning_rate" in record["reason"]
    rows = lab.Run(tmp_path / "run").metrics
    assert len(rows) >= 1 and record["final"]["train_loss"] == rows["loss"].iloc[-1]
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    with pytest.raises(Diverged, match="So it ended before"):  # it would only do so again
        lab.fit(bad, tmp_path / "run", progress=False)


def test_a_loss_that_stays_far_above_its_start_ends_the_run():
    rows = [{"loss": loss} for loss in (6.0, 5.0, 19.0, 30.0, 18.5, 20.0)]
    assert not stays_above(rows, 3.0)  # one of the last five is not above
    assert stays_above([*rows, {"loss": 18.01}], 3.0)
    assert not stays_above([*rows, {"loss": 18.0}], 3.0) and not stays_above([*rows, {"loss": 18.01}], None)


def test_a_run_that_climbs_is_ended_and_a_healthy_one_is_not(tmp_path):
    often = ("training.log_every=1", "training.schedule.warmup_steps=0", "training.steps=60", "training.evaluation_sequences=2")
    climbs = load("tiny", *often, "training.optimizer.learning_rate=1", "training.optimizer.clip_norm=1000", "training.diverged_factor=1.2")
    with pytest.raises(Diverged, match=r"for 5 rows above 1.2 times the first one: lower training.optimizer.learning_rate"):
        lab.fit(climbs, tmp_path / "climbs", progress=False)
    losses = lab.Run(tmp_path / "climbs").metrics["loss"]
    assert (losses.iloc[-5:] > 1.2 * losses.iloc[0]).all() and len(losses) < 60


def test_a_cut_checkpoint_is_named_and_not_trained_on(tmp_path):
    lab.fit(load("tiny"), tmp_path / "run", progress=False, stop=lambda: True)
    cut(next((tmp_path / "run").glob("checkpoint-*/*.safetensors")))
    with pytest.raises(lab.LabError, match="checkpoint") as caught:
        lab.fit(load("tiny"), tmp_path / "run", progress=False)
    assert "\n" not in str(caught.value) and not (tmp_path / "run" / WEIGHTS).exists()


def test_the_checkpoint_before_a_cut_one_is_taken_and_ends_at_the_same_bits(tmp_path):
    often = load("tiny", "training.checkpoint_every=3")
    asked = iter([False] * 6 + [True])
    lab.fit(often, tmp_path / "run", progress=False, stop=lambda: next(asked))
    newest = sorted((tmp_path / "run").glob("checkpoint-*"))[-1]
    assert newest.name == "checkpoint-00000007"
    cut(next(newest.glob("*.safetensors")))
    with pytest.warns(UserWarning, match="checkpoint-00000007"):
        again = lab.fit(often, tmp_path / "run", progress=False)
    whole = lab.fit(often, tmp_path / "whole", progress=False)
    assert again.metrics["loss"].tolist() == whole.metrics["loss"].tolist()
    assert (again.path / WEIGHTS).read_bytes() == (whole.path / WEIGHTS).read_bytes()


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    """Also when the record that would have said so is gone."""
    lab.fit(load("tiny"), tmp_path / "run", progress=False, stop=lambda: True)
    (tmp_path / "run/run.json").unlink()
    with pytest.raises(lab.LabError, match="belongs to another run"):
        lab.fit(load("tiny", "training.optimizer.learning_rate=1e-4"), tmp_path / "run", progress=False)


def test_two_processes_do_not_train_in_one_folder(tmp_path):
    from longcat_lab.training.sitting import alone_in

    with alone_in(tmp_path / "run"):
        fit = f"lab.fit(lab.load('tiny'), {str(tmp_path / 'run')!r}, progress=False)"
        code = f"import longcat_lab as lab\ntry: {fit}\nexcept lab.LabError as error: print(error)"
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "Another process trains in" in other.stdout
    assert lab.fit(load("tiny"), tmp_path / "run", progress=False).record["status"] == "finished"


def test_what_a_killed_run_was_writing_is_removed(tmp_path):
    left = tmp_path / "run/.checkpoint-00000010.99999.tmp"
    left.mkdir(parents=True)
    (left / "optimizer.pt").write_bytes(b"half")
    lab.fit(load("tiny"), tmp_path / "run", progress=False)
    assert not left.exists()


@pytest.mark.parametrize("split", ["validation", "out_of_distribution"])
def test_text_that_is_too_short_is_named_before_training(tmp_path, split):
    with pytest.raises(lab.LabError, match=f"The {split} split has .* too few for one sequence"):
        lab.fit(load("tiny", f"data.{split}_bytes=40"), tmp_path / "run", progress=False)
    assert not (tmp_path / "run/metrics.jsonl").exists()


OWN_BLOCK = """
SHIFT = SHIFTED

class Own(lab.Block):
    def forward(self, x):
        return helper(x)

def helper(x, power=POWER):
    return x ** power * FACTOR + SHIFT if "a" not in {"b", "c", "d", "e", "f"} else x

@lab.register("ffn")
class OwnConfig(lab.BlockConfig):
    kind: Literal["own"] = "own"
    def budget(self, shape):
        return lab.Budget()
    def build(self, shape):
        return Own()
"""


def own_block(factor="0.0", power="1", shift="0"):
    return OWN_BLOCK.replace("FACTOR", factor).replace("POWER", power).replace("SHIFTED", shift)


def test_a_block_of_ones_own_is_part_of_the_identity():
    """Defined as in a notebook cell, where no source file exists: a change in the class or in what it uses is another run."""
    from typing import Literal

    from longcat_lab.blocks.interface import _KINDS

    found = []
    try:
        for code in (own_block(), own_block(), own_block(factor="0.5"), own_block(power="2"), own_block(shift="1")):
            exec(code, {"lab": lab, "Literal": Literal, "__name__": "__main__"})
            found.append(identity(load("tiny", "model.ffn.kind=own")))
    finally:
        _KINDS["ffn"].pop("own", None)
    assert found[0] == found[1] and len(set(found)) == 4


def test_the_identity_of_a_block_of_ones_own_is_the_same_in_every_process():
    code = (
        f"import longcat_lab as lab\nfrom typing import Literal\n{own_block()}\nprint(lab.identity(lab.load('tiny', 'model.ffn.kind=own')))"
    )
    found = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONHASHSEED": seed}).stdout
        for seed in "123"
    }
    assert len(found) == 1 and len(found.pop().strip()) == 16


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("training.device=meta", "cannot be used on this machine"),
        (
            "model.hidden_size=100000000",
            r"To (build|train) this model takes .* of memory and .* are free here: `longcat-lab budget` shows which part",
        ),
    ],
)
def test_what_cannot_be_trained_here_is_one_sentence(tmp_path, override, sentence):
    with pytest.raises(lab.LabError, match=sentence):
        lab.fit(load("tiny", override), tmp_path / "run", progress=False)


def test_a_folder_below_a_file_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(lab.LabError, match=r"Failed while opening .*: (Not a directory|File exists)"):
        lab.fit(load("tiny"), tmp_path / "file/run", progress=False)


def test_a_full_disk_is_one_sentence_and_keeps_what_was_whole(tmp_path):
    """The operating system itself refuses to write more than 200 kB a file; the checkpoint is larger."""
    folder = tmp_path / "run"
    prepare(load("tiny").data, 512)
    code = (
        "import resource, signal, sys, longcat_lab as lab\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"
        f"try: lab.fit(lab.load('tiny'), {str(folder)!r}, progress=False)\n"
        "except lab.LabError as error: sys.exit(str(error))\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 1 and found.stderr.startswith("No space left while writing")
    assert len(found.stderr.strip().splitlines()) == 1
    assert [p.name for p in folder.iterdir() if "checkpoint" in p.name or p.suffix == ".tmp"] == []
    assert lab.fit(load("tiny"), folder, progress=False).record["status"] == "finished"


def test_the_negative_control_is_worse_than_the_text(tmp_path):
    """After steps enough to learn that order matters."""
    settings = ("training.steps=120", "training.optimizer.learning_rate=1e-2", "training.optimizer.embedding_lr_multiplier=5")
    final = lab.fit(load("tiny", *settings), tmp_path, progress=False).record["final"]
    assert final["shuffled_bpb"] > final["validation_bpb"] + 0.1


def test_a_run_generates_text_and_an_unfinished_one_says_why_not(finished, tmp_path):
    assert finished.generate("import ", 8).startswith("import ")
    stopped = lab.fit(load("tiny"), tmp_path / "run", progress=False, stop=lambda: True)
    with pytest.raises(lab.LabError, match="has no weights"):
        _ = stopped.model
    with pytest.raises(lab.LabError, match="there is no run here"):
        lab.Run(tmp_path)


def test_wandb_that_is_absent_or_broken_never_stops_a_run(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.warns(UserWarning, match="wandb is off for this run"):
        run = lab.fit(load("tiny", "tracking.wandb=offline"), tmp_path / "run", progress=False)
    assert run.record["status"] == "finished"


def test_metrics_rows_are_json_lines_while_the_run_lives(finished):
    rows = [json.loads(line) for line in (finished.path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [5, 10, 15, 20]
