"""Checkpoints of one process: whole or not there, checked when read, the same numbers after as before, no code in them."""

import json
import resource
import subprocess
import zipfile

import pytest
import torch
from torch import nn

import longcat_lab as lab
from longcat_lab.parallel.checkpoint import (
    Checkpoints,
    empty_optimizer_tensors,
    load_optimizer_tensors,
    model_tensors,
    optimizer_tensors,
)
from longcat_lab.training.optimizer import make_optimizer
from tests.parallel.checkpoint_kills import alone, kill, save, whole_step

MIXED = (
    "training.optimizer.kind=muon",
    "training.optimizer.table_optimizer=row_wise",
    "model.embedding.ngram.order=3",
)


def restore(checkpoints, model, optimizer):
    """What a run does when it goes on."""
    slots = {}

    def make(saved):
        slots.update(empty_optimizer_tensors(model, optimizer, saved))
        return {**model_tensors(model), **slots}

    restored = checkpoints.load(make)
    load_optimizer_tensors(model, optimizer, slots)
    return restored


@pytest.fixture
def three(tmp_path):
    """Steps 1, 2 and 3 were saved; the last two are there."""
    checkpoints = Checkpoints(tmp_path, "one")
    for step in (1, 2, 3):
        save(checkpoints, step)
    return tmp_path


def test_the_last_two_are_kept_and_all_can_be_removed(three):
    assert sorted(path.name for path in three.iterdir()) == ["checkpoint-00000002", "checkpoint-00000003"]
    assert Checkpoints(three, "one").latest_step() == whole_step(three) == 3
    Checkpoints(three, "one").remove_all()
    assert list(three.iterdir()) == []
    assert Checkpoints(three, "one").latest_step() == 0 and Checkpoints(three, "one").load(lambda _: {}) is None


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_run_with_all_optimizers_goes_on_bit_for_bit(tmp_path, asynchronous):
    """AdamW, Muon, stacked Muon and the tables' row-wise optimizer, whose counter is a plain number."""
    config = lab.load("tiny", *MIXED)

    def made():
        model = lab.build(config)
        return model, make_optimizer(model, config.training.optimizer)

    def steps(model, optimizer, seeds):
        for seed in seeds:
            drawn = torch.Generator().manual_seed(seed)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=drawn)
            optimizer.step()
            optimizer.zero_grad()

    model, optimizer = made()
    assert optimizer_tensors(model, optimizer) == {}  # before the first step there is nothing
    steps(model, optimizer, (1, 2))
    checkpoints = Checkpoints(tmp_path, "one", asynchronous=asynchronous)
    state = {"seconds": 0.1, "window": {"steps": 3}, "initial": {}}
    checkpoints.save(2, {**model_tensors(model), **optimizer_tensors(model, optimizer)}, state, {"random": torch.get_rng_state()})
    state["window"]["steps"] = 4  # what happens from here on is not what was saved
    drawn = torch.rand(3)
    steps(model, optimizer, (3, 4))
    checkpoints.wait()

    other, its = made()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    restored = restore(Checkpoints(tmp_path, "one"), other, its)
    assert restored.step == 2 and restored.state == {"seconds": 0.1, "window": {"steps": 3}, "initial": {}}
    torch.set_rng_state(restored.own["random"])
    assert torch.equal(torch.rand(3), drawn)
    kinds = {type(value) for part in its.parts.values() for kept in part.state.values() for value in kept.values()}
    assert kinds == {torch.Tensor, int} and {"adamw", "muon", "stacked_muon", "row_wise"} == set(its.parts)
    steps(other, its, (3, 4))
    same = optimizer_tensors(model, optimizer), optimizer_tensors(other, its)
    assert same[0].keys() == same[1].keys() and all(torch.equal(same[0][name], same[1][name]) for name in same[0])
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def test_every_kind_of_number_shape_and_view_comes_back(tmp_path):
    whole = torch.randn(6, 8)
    saved = {
        "flags": torch.tensor([True, False]),
        "half": torch.randn(3, dtype=torch.bfloat16),
        "double": torch.randn(2, 3, dtype=torch.float64),
        "scalar": torch.tensor(3.5),
        "none": torch.empty(0, 4),
        "columns": whole.T,
        "part": whole[2:4],
        "again": whole,
        "names/with dots.and[brackets]": torch.arange(5),
    }
    Checkpoints(tmp_path, "one").save(1, saved, {})
    found = {name: torch.zeros_like(tensor) for name, tensor in saved.items()}
    Checkpoints(tmp_path, "one").load(lambda _: found)
    assert all(torch.equal(found[name], tensor) for name, tensor in saved.items())
    assert not torch.equal(torch.zeros(1), whole[:1])


def test_what_is_saved_while_training_goes_on_is_what_was_there_when_it_was_asked_for(tmp_path):
    checkpoints = Checkpoints(tmp_path, "one", asynchronous=True)
    numbers = torch.zeros(2**20)
    for step in range(1, 5):
        numbers.fill_(step)
        checkpoints.save(step, {"numbers": numbers}, {})
        numbers.fill_(-1)
    checkpoints.wait()
    found = torch.zeros(2**20)
    assert Checkpoints(tmp_path, "one").load(lambda _: {"numbers": found}).step == 4
    assert (found == 4).all()


@pytest.mark.parametrize("file", ["part-00000.safetensors", "manifest.json"])
@pytest.mark.parametrize("fault", ["cut", "changed", "missing"])
def test_a_damaged_checkpoint_is_passed_over_with_a_word(three, file, fault):
    path = three / "checkpoint-00000003" / file
    content = bytearray(path.read_bytes())
    if fault == "missing":
        path.unlink()
    elif fault == "cut":
        path.write_bytes(content[:-1])
    else:
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
    checkpoints = Checkpoints(three, "one")
    assert checkpoints.latest_step() == 2
    found = {"model/a": torch.zeros(64, 32), "model/b": torch.tensor(0)}
    with pytest.warns(UserWarning, match="checkpoint-00000003 is damaged") as told:
        restored = checkpoints.load(lambda _: found)
    assert len(told) == 1 and restored.passed_over == str(told[0].message)
    assert restored.passed_over.endswith("going on from checkpoint-00000002.") and (found["model/a"] == 2).all()
    save(checkpoints, 3)  # takes the place of the damaged one
    assert whole_step(three) == 3 and len(list(three.iterdir())) == 2


def test_a_damaged_checkpoint_does_not_count_among_the_last_two(three):
    (three / "checkpoint-00000003" / "manifest.json").write_text("{}")
    checkpoints = Checkpoints(three, "one")
    assert checkpoints.latest_step() == 2
    save(checkpoints, 4)
    assert sorted(path.name for path in three.iterdir()) == ["checkpoint-00000002", "checkpoint-00000004"]


def test_what_cannot_be_loaded_is_said(three):
    def refused(found, identity="one"):
        with pytest.raises(lab.LabError) as error:
            Checkpoints(three, identity).load(lambda _: found)
        assert "\n" not in str(error.value) and str(three) in str(error.value)
        return str(error.value)

    a, b = torch.zeros(64, 32), torch.tensor(0)
    assert "belongs to another run (one, this one is two)" in refused({}, "two")
    assert "holds model/b, which this run has not" in refused({"model/a": a})
    assert "does not hold model/c, which this run has" in refused({"model/a": a, "model/b": b, "model/c": a})
    assert "holds model/a as [64, 32] torch.float32, this run has [32, 64]" in refused({"model/a": a.T, "model/b": b})
    assert "this run has [64, 32] torch.bfloat16" in refused({"model/a": a.bfloat16(), "model/b": b})
    assert not a.any()
    for path in three.iterdir():
        (path / "part-00000.safetensors").write_bytes(b"")
    assert "no checkpoint is whole" in refused({"model/a": a, "model/b": b})


def test_reading_runs_no_code_of_whoever_wrote(three):
    """There is nothing that unpickles, and a manifest that is made by hand names no file outside its folder."""
    for path in three.rglob("*.*"):
        assert path.suffix in (".json", ".safetensors") and not zipfile.is_zipfile(path)
    path = three / "checkpoint-00000003" / "manifest.json"
    whole = json.loads(path.read_text())
    whole["content"]["files"] = {"../checkpoint-00000002/part-00000.safetensors": [0, 0]}
    from longcat_lab.parallel.checkpoint.manifest import _checksum_of

    path.write_text(json.dumps({**whole, "checksum": _checksum_of(whole["content"])}))
    with pytest.warns(UserWarning, match="names files elsewhere"):
        assert Checkpoints(three, "one").load(lambda s: {n: torch.empty(e.size, dtype=e.properties.dtype) for n, e in s.items()}).step == 2


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_is_one_sentence_and_the_checkpoint_before_is_whole(three, asynchronous):
    checkpoints = Checkpoints(three, "one", asynchronous=asynchronous)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(lab.LabError, match=r"^No space left while writing .*checkpoint-00000004: free some") as error:
            save(checkpoints, 4, size=2**12)
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(error.value)
    assert whole_step(three) == 3 and len(list(three.iterdir())) == 2  # what was half written is gone, its space is free
    save(checkpoints, 4)
    checkpoints.wait()
    assert whole_step(three) == 4


def test_a_disk_that_is_really_full(tmp_path):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(tmp_path)], capture_output=True).returncode:
        pytest.skip("no right to mount a small disk")
    try:
        for asynchronous in (False, True):
            checkpoints = Checkpoints(tmp_path, "one", asynchronous=asynchronous)
            save(checkpoints, 1)
            with pytest.raises(lab.LabError, match=r"^No space left while writing"):
                save(checkpoints, 2, size=2**15)
                checkpoints.wait()
            assert whole_step(tmp_path) == 1 and len(list(tmp_path.iterdir())) == 1
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    for at_each, in_the_middle in alone(kill, str(tmp_path), 6, 1).values():
        assert at_each[0] == 2 and at_each[-1] == 3 and at_each == sorted(at_each) and len(at_each) > 10
        assert in_the_middle > 0


@pytest.mark.slow
def test_many_kills_at_random_moments(tmp_path):
    for _, in_the_middle in alone(kill, str(tmp_path), 120, 2).values():
        assert in_the_middle > 12


def test_state_of_an_unknown_kind_is_refused():
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    optimizer.state[model.weight]["history"] = [1, 2]
    with pytest.raises(lab.LabError, match="weight/history: a checkpoint holds tensors and whole numbers, not list"):
        optimizer_tensors(model, optimizer)
