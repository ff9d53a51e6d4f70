"""Training beside the kernel: real processes and threads, stopped, killed, followed and resumed; and a folder read while it is written."""

import os
import signal
import threading
import time
from typing import Literal

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

import longcat_lab as lab
from longcat_lab.blocks.interface import forget
from longcat_lab.blocks.swiglu.module import SwiGLU
from longcat_lab.files import write_json
from longcat_lab.notebook.panel.curves import Curves
from longcat_lab.notebook.panel.earlier import config_of, named, run_of
from longcat_lab.notebook.panel.ending import ending, figure
from longcat_lab.notebook.panel.follow import TITLES, Follower, read_all, thin
from longcat_lab.notebook.panel.trainer import Training, trains_in, travels
from longcat_lab.notebook.panel.words import summary
from longcat_lab.training.requests import ask_to_stop, is_training
from longcat_lab.training.trackers import FileTracker

LONG = ("training.steps=1000000", "training.checkpoint_every=1000000", "training.log_every=1")  # trains until somebody ends it


def until(condition, seconds=120):
    """Polls `condition` until it is true."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)
    return found


def end(training, phase, seconds=120):
    assert training.wait(seconds), (training.phase, training.log_tail())
    assert training.phase == phase, (training.phase, training.said, training.log_tail())
    return training


def at_work(training):
    """Waits until it has made a step."""
    follower = Follower(until(lambda: training.folder))
    until(lambda: training.ended or ((follower.refresh() or True) and follower.progress.get("step")))
    assert not training.ended, (training.said, training.log_tail())
    return follower


def process_of(folder):
    """The process that trains in `folder`."""
    found = [each for each in psutil.process_iter(["cmdline"]) if str(folder) in (each.info["cmdline"] or [])]
    assert len(found) == 1
    return found[0]


def test_a_run_stopped_before_its_process_trains_goes_on_to_the_same_bits(tmp_path):
    config = lab.load("tiny", "training.steps=24", "training.log_every=4", "training.evaluate_every=8")
    whole = lab.fit(config, tmp_path / "whole", progress=False)

    first = Training.start(config, tmp_path / "panel")
    until(lambda: first.phase == "starting")
    first.stop()  # its process imports libraries now; nobody holds the lock
    end(first, "interrupted")
    assert first.folder == (tmp_path / "panel" / lab.identity(config)).resolve()
    assert first.run.record["timings"]["steps_done"] < 24
    assert not (first.folder / "stop.json").exists() and list(first.folder.glob("checkpoint-*"))

    second = end(Training.start(config, tmp_path / "panel"), "finished")
    final = second.run.record["final"]
    assert final == whole.record["final"]
    rows = [[row for key, row in each.metrics.items() if key not in ("seconds", "tokens_per_second")] for each in (second.run, whole)]
    assert all(list(map(str, one)) == list(map(str, other)) for one, other in zip(*rows, strict=True))

    size = (second.folder / "train.log").stat().st_size
    third = end(Training.start(config, tmp_path / "panel"), "finished")
    assert third.run.record["final"] == final
    assert (second.folder / "train.log").stat().st_size == size  # no process was started


def test_stopped_while_the_text_is_prepared(tmp_path, monkeypatch):
    monkeypatch.setenv("LONGCAT_LAB_CACHE", str(tmp_path / "cache"))
    training = Training.start(lab.load("tiny"), tmp_path / "panel")
    until(lambda: training.said)
    assert training.phase == "preparing" and training.folder is None
    training.stop()
    end(training, "interrupted")
    assert training.run is None and "before the first step" in training.said
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_others_follow_and_stop_what_trains_and_a_killed_process_is_one_sentence(tmp_path):
    config = lab.load("tiny", *LONG)
    started = Training.start(config, tmp_path)
    at_work(started)
    assert trains_in(tmp_path) == [started.folder]
    attached, again = Training.attach(started.folder), Training.start(config, tmp_path)
    until(lambda: again.phase == "training")
    attached.stop()
    for each in (started, attached, again):
        end(each, "interrupted")
        assert each.said == "stopped as asked"
    assert trains_in(tmp_path) == []

    resumed = Training.start(config, tmp_path)
    before = started.run.record["timings"]["steps_done"]
    until(lambda: at_work(resumed).progress["step"] > before)
    watcher = Training.attach(resumed.folder)
    process_of(resumed.folder).send_signal(signal.SIGKILL)
    end(resumed, "failed")
    assert resumed.said.startswith("The training process was killed by SIGKILL, often for lack of memory: lower data.batch_size")
    assert "\n" not in resumed.said
    end(watcher, "failed")
    assert watcher.said.startswith("The training ended without a word") and not is_training(resumed.folder)
    gone = summary(read_all({"it": resumed.folder})["it"])
    assert gone.startswith("Its process is gone after step") and gone.endswith("Train goes on from the last checkpoint.")


def test_a_run_whose_folder_takes_no_request_is_followed_on_and_its_process_is_signalled(tmp_path):
    training = Training.start(lab.load("tiny", *LONG), tmp_path)
    at_work(training)
    attached = Training.attach(training.folder)
    for thread in threading.enumerate():  # a folder where the request is to be written first: it cannot be
        (training.folder / f".stop.json.{os.getpid()}-{thread.ident}.tmp").mkdir()
    attached.stop()
    until(lambda: attached.said.startswith("It cannot be asked to stop"))
    assert not attached.ended and is_training(training.folder)
    attached.leave()
    end(attached, "interrupted")
    assert is_training(training.folder)  # nobody looks on from there any more, and it goes on
    training.stop()
    end(training, "interrupted")
    assert list(training.folder.glob("checkpoint-*")) and training.run.record["status"] == "interrupted"


def test_a_failure_is_the_sentence_of_the_run_or_the_last_line_of_its_log(tmp_path):
    config = lab.load("tiny", "training.optimizer.learning_rate=1e30")
    failed = end(Training.start(config, tmp_path), "failed")
    assert failed.said.startswith("The loss is nan at step") and "lower training.optimizer.learning_rate" in failed.said
    until(lambda: "longcat-lab: The loss is nan" in failed.log_tail())

    record = (failed.folder / "run.json").read_text()  # of a former sitting now
    assert summary(Follower(failed.folder)) == "" and summary(read_all({"it": failed.folder})["it"]) == f"Failed: {failed.said}"
    before = sorted(failed.folder.rglob("*"))
    config = lab.load("tiny", "model.ffn.ffn_hidden_size=1_000_000_000_000")
    too_large = end(Training.start(config, tmp_path), "failed")
    assert "memory" in too_large.said.lower() and "\n" not in too_large.said
    assert not (too_large.folder / "run.json").exists()
    assert (failed.folder / "run.json").read_text() == record and sorted(failed.folder.rglob("*")) == before
    assert not list(failed.folder.glob("checkpoint-*"))  # weights that are no numbers are not worth going on from


WATCHED = {"threads": set(), "fail": False}


class Watched(SwiGLU):
    def forward(self, x):
        WATCHED["threads"].add((os.getpid(), threading.current_thread() is threading.main_thread()))
        if WATCHED["fail"]:
            raise ValueError("a mistake in the block\nand its second line")
        return super().forward(x)


@pytest.fixture
def own_block():
    """A network of one's own, as a notebook's cell would define it: no other process can import it."""

    @lab.register("ffn")
    class WatchedConfig(lab.BlockConfig):
        kind: Literal["watched"] = "watched"

        def budget(self, shape):
            return lab.Budget.of_weights(3 * shape.hidden_size * 48)

        def build(self, shape):
            return Watched(shape.hidden_size, 48)

    yield
    WATCHED.update(fail=False)
    WATCHED["threads"].clear()
    forget("ffn", "watched")


def test_a_block_of_the_notebook_trains_in_a_thread_of_the_kernel_and_stops_there(tmp_path, own_block):
    config = lab.load("tiny", "model.ffn={kind: watched}", *LONG)
    assert not travels(config) and travels(lab.load("tiny"))
    training = Training.start(config, tmp_path)
    at_work(training)
    assert is_training(training.folder)
    assert ask_to_stop(training.folder)  # as another process would
    end(training, "interrupted")
    resumed = Training.start(config, tmp_path)
    at_work(resumed)
    second = end(Training.start(lab.load("tiny", "model.ffn={kind: watched}"), tmp_path), "failed")
    assert second.said.startswith("Another model trains in this kernel already: wait for it") and not resumed.ended
    resumed.stop()
    end(resumed, "interrupted")
    assert resumed.run.record["timings"]["steps_done"] > training.run.record["timings"]["steps_done"] - 1 > 0
    assert WATCHED["threads"] == {(os.getpid(), False)}


def test_a_mistake_in_a_block_of_the_notebook_is_one_sentence_with_the_traceback_in_the_log(tmp_path, own_block):
    WATCHED["fail"] = True
    training = end(Training.start(lab.load("tiny", "model.ffn={kind: watched}"), tmp_path), "failed")
    assert training.said == "ValueError: a mistake in the block"
    assert "Traceback" in training.log_tail() and "and its second line" in training.log_tail()


def test_a_block_from_a_file_travels_until_the_file_is_edited(tmp_path):
    file = tmp_path / "narrow.py"
    text = """
from typing import Literal
import longcat_lab as lab
from longcat_lab.blocks.swiglu.module import SwiGLU

@lab.register("ffn")
class Narrow(lab.BlockConfig):
    kind: Literal["narrow_of_the_panel"] = "narrow_of_the_panel"

    def budget(self, shape):
        return lab.Budget.of_weights(3 * shape.hidden_size * WIDTH)

    def build(self, shape):
        return SwiGLU(shape.hidden_size, WIDTH)

WIDTH = 8
"""
    file.write_text(text)
    try:
        config = lab.load("tiny", f"plugins=[{file}]", "model.ffn={kind: narrow_of_the_panel}")
        assert travels(config)
        training = end(Training.start(config, tmp_path), "finished")
        until(lambda: str(training.folder) in training.log_tail())  # a process printed it
        file.write_text(text.replace("WIDTH = 8", "WIDTH = 9"))
        assert not travels(config)  # another process would build another model
    finally:
        forget("ffn", "narrow_of_the_panel")


# --- the folder, read while it is written


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=600), st.integers(10, 60))
def test_thinned_curves_keep_extremes_ends_and_their_limit(values, limit):
    y = np.array(values)
    x = np.arange(len(y), dtype=float)
    thin_x, thin_y = thin(x, y, limit)
    assert thin_x.dtype == thin_y.dtype == np.float32
    assert len(thin_y) <= max(limit, 0) or len(thin_y) == len(y) <= limit
    assert thin_y.min() == np.float32(y.min()) and thin_y.max() == np.float32(y.max())
    assert (thin_x[0], thin_x[-1]) == (0, len(y) - 1) and (np.diff(thin_x) > 0).all()
    assert all(thin_y[i] == np.float32(y[int(at)]) for i, at in enumerate(thin_x))


def test_values_that_are_no_numbers_are_left_out():
    x, y = thin(np.arange(4.0), np.array([1.0, np.nan, np.inf, 2.0]))
    assert x.tolist() == [0, 3] and y.tolist() == [1, 2]


def test_half_a_line_waits_and_a_resumed_file_is_read_anew(tmp_path):
    follower = Follower(tmp_path)
    assert not follower.refresh() and follower.curves() == {}
    tracker = FileTracker(tmp_path, 0)
    for step in (1, 2, 3):
        tracker.log({"step": step, "tokens": 10 * step, "loss": float(step), "layers.0.mlp.router/max_violation": 0.5})
    assert follower.refresh() and not follower.refresh()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "tokens": 40, "lo')
        file.flush()
        follower.refresh()
        assert follower.curves()["loss"][1].tolist() == [1, 2, 3]
        file.write('ss": 4.0}\n')
    follower.refresh()
    assert follower.curves()["loss"][1].tolist() == [1, 2, 3, 4]
    assert follower.curves()["busiest_expert"][1].tolist() == [1.5] * 3

    resumed = FileTracker(tmp_path, 2)  # the checkpoint was at step 2
    for step in (3, 4, 5):  # as long as before and longer
        resumed.log({"step": step, "tokens": 10 * step, "loss": -float(step)})
    follower.refresh()
    assert follower.curves()["loss"][0].tolist() == [10, 20, 30, 40, 50]
    assert follower.curves()["loss"][1].tolist() == [1, 2, -3, -4, -5]


def test_the_mixture_that_has_collapsed_is_drawn_whatever_the_others_do(tmp_path):
    loads = {"layers.0.mlp.router": [0.5, 0.5, 0.5, 0.5], "layers.1.mlp.router": [1.9, 0.1], "own": [0.3, 0.3, 0.3]}
    row = {"step": 1, "tokens": 10, **{f"{block}/expert_load": load for block, load in loads.items()}}
    row |= {"layers.0.mlp.router/max_violation": 0.0, "layers.1.mlp.router/max_violation": 0.9}
    FileTracker(tmp_path, 0).log(row)
    follower = read_all({"it": tmp_path})["it"]
    assert (follower.load_of, follower.load, follower.real_experts()) == ("layer 1", [1.9, 0.1], 2)
    assert follower.last["busiest_expert"] == 1.9


def test_bits_per_byte_of_training_and_validation_share_a_panel_and_old_runs_keep_theirs(tmp_path):
    def run(name, *logged):
        tracker = FileTracker(folders.setdefault(name, tmp_path / name), 0)
        for step in range(1, 5):
            measured = {"train_bpb": 3.0 - step / 10, "validation_bpb": 3.5 - step / 10}
            row = {key: value for key, value in measured.items() if key in logged and (key == "train_bpb" or step % 2 == 0)}
            tracker.log({"step": step, "tokens": 10 * step, "loss": 4.0, **row})

    folders = {}
    for folder in ("live", "both", "old"):
        (tmp_path / folder).mkdir()
    run("live", "train_bpb")
    run("both", "train_bpb", "validation_bpb")
    run("old", "validation_bpb")
    runs = read_all(folders)

    def panels(name, *others):
        shown = Curves()
        shown.set_earlier({other: runs[other] for other in others})
        shown.show(runs[name], name)
        drawn = figure(runs[name], {other: runs[other] for other in others})
        return [(each["name"], each["points"], each["title"], each["unit"]) for each in shown.head["curves"]], drawn.axes

    def lines(axes):  # of a static figure: values and looks
        return [(line.get_ydata().round(6).tolist(), line.get_linestyle(), line.get_marker()) for line in axes.get_lines()]

    loss, training, validation = ("loss", "", "training loss", "nats a token"), [2.9, 2.8, 2.7, 2.6], [3.3, 3.1]
    alone, axes = panels("live")
    assert alone == [loss, ("train_bpb", "", "bits per byte", "of training text")]
    assert lines(axes[1]) == [(pytest.approx(training), "-", "None")] and axes[1].get_legend() is None
    before, axes = panels("old")
    assert before == [loss, ("validation_bpb", "", "validation", "bits per byte")]
    assert lines(axes[1]) == [(pytest.approx(validation), "-", "o")]
    together, axes = panels("both", "old", "live")
    assert together == [loss, ("train_bpb", "validation_bpb", "bits per byte", "")]
    of_old, of_live, *of_both = lines(axes[1])
    assert of_old == (pytest.approx(validation), ":", "o") and of_live == (pytest.approx(training), "-", "None")
    assert of_both == [(pytest.approx(training), "-", "None"), (pytest.approx(validation), ":", "o")]
    assert [text.get_text() for text in axes[1].get_legend().get_texts()] == ["training", "validation"]
    assert panels("old", "live")[0] == together

    for folder in folders.values():
        write_json(folder / "run.json", {"status": "interrupted", "config": lab.load("tiny").to_dict()})
    [found] = lab.runs(tmp_path).compare("train_bpb").figures["train_bpb"].axes
    assert found.get_ylabel() == "training bits per byte" and sorted(line.get_label() for line in found.get_lines()) == ["both", "live"]


ODD = ["null", "[]", '{"config": null}', '{"config": {"model": [], "data": 3, "plugins": ["x.py"]}, "provenance": [1], "final": [2]}']
ODD += ['{"status": "finished", "config": {"training": {"steps": "x"}}, "final": {"tokens": null, "validation_bpb": "low"}}', "half {"]


def test_records_and_rows_of_anybodys_take_nothing_down(tmp_path):
    config = lab.load("tiny")
    folders = [tmp_path / str(number) for number in range(len(ODD))]
    for folder, text in zip(folders, ODD, strict=True):
        folder.mkdir()
        (folder / "run.json").write_text(text)
        (folder / "progress.json").write_text('{"step": null}')
        (folder / "metrics.jsonl").write_text(
            '{"loss": 1}\n{"tokens": "x", "step": 1}\n{"tokens": 5, "step": 1, "a/expert_load": 3, "loss": 2}\n'
        )
    assert run_of(config, tmp_path) is None and len(named(folders, config)) == len(folders)
    for folder, each in zip(folders, read_all(dict(zip(map(str, folders), folders, strict=True))).values(), strict=True):
        assert config_of(folder) is None
        assert each.curves()["loss"][1].tolist() == [2] and each.progress == {} and each.asked() == {}
        assert "<svg" in ending(folder, {"a name": folders[0]})[2][0]["image/svg+xml"]
        Curves().show(each)
    assert "cannot be read here" in summary(read_all({"it": folders[4]})["it"])


def test_curves_of_real_runs(tmp_path, monkeypatch):
    """Every curve is there, under the names that blocks give their measures."""
    sparse = ("model.attention.kind=lsa", "model.attention.index_n_heads=2", "model.attention.index_head_dim=16")
    sparse += ("model.attention.index_topk=16", "model.attention.index_init_tokens=1", "model.attention.index_local_tokens=7")
    run = lab.fit(lab.load("tiny", "training.evaluate_every=10", *sparse), tmp_path, progress=False)
    follower = Follower(tmp_path)
    follower.refresh()
    curves, metrics = follower.curves(), run.metrics
    assert list(curves) == [name for name in TITLES if name != "train_bpb" or name in metrics]
    for name in ("loss", "learning_rate", "gradient_norm"):
        assert curves[name][1].tolist() == metrics[name].astype(np.float32).tolist()
    kl = metrics[[name for name in metrics if name.endswith("/index_kl")]].mean(axis=1)
    assert np.allclose(curves["index_kl"][1], kl, rtol=1e-6)
    assert curves["validation_bpb"][0].tolist() == [2560, 5120]
    assert curves["validation_bpb"][1][-1] == np.float32(run.record["final"]["validation_bpb"])
    assert len(follower.load) == 6 and follower.real_experts() == 4 and follower.asked() == {"real_experts_per_token": 1.5}
    assert follower.progress["step"] == 20 and follower.load_of.startswith("layer ")
    assert "<svg" in ending(tmp_path, {"a=$\\nothing$ $x$": tmp_path})[2][0]["image/svg+xml"]  # a name is no formula

    again = tmp_path / "again"
    again.mkdir()
    (again / "run.json").write_text((tmp_path / "run.json").read_text())
    assert run_of(run.config, tmp_path) == again.resolve()
    monkeypatch.setenv("LONGCAT_LAB_CACHE", str(tmp_path / "cache"))
    assert run_of(run.config, tmp_path) is None  # its text would have to be prepared first, which looking must not do
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
