"""What does not fit into memory: said before it is taken, with how much it needs, how much there is, and what would fit."""

import pytest
import torch

import longcat_lab as lab
from longcat_lab.errors import LabError
from longcat_lab.model import build
from longcat_lab.model.memory import check_memory, free_memory
from longcat_lab.training.optimizer import added_bytes

NGRAM = ("model.embedding.ngram.order=3", "model.embedding.ngram.table_rows=1000000")
FREE = 100_000_000


def meta(*overrides):
    config = lab.load("tiny", *overrides)
    with torch.device("meta"):
        return config, build(config)


def refused(*overrides, doing="train", free=FREE):
    config, model = meta(*overrides)
    with pytest.raises(LabError) as error:
        check_memory(model, free, doing, added_bytes(model, config.training.optimizer))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_free_memory_is_some():
    assert 10**8 < free_memory() < 2**50


def test_a_containers_limit_counts_its_file_cache_as_free(tmp_path, monkeypatch):
    for name, text in (("memory.max", "900"), ("memory.current", "700"), ("memory.stat", "anon 300\ninactive_file 150\nactive_file 50\n")):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr("longcat_lab.model.memory.CGROUPS", ((tmp_path, "memory.max", "memory.current", ("inactive_file", "active_file")),))
    assert free_memory() == 900 - 700 + 200
    (tmp_path / "memory.max").write_text("max")
    assert free_memory() > 10**8


def test_tables_are_named_with_what_would_fit():
    """4 M rows of 8 in fp32 with gradient and two moments: 512 MB, and the share that fits leaves a tenth for activations."""
    said = refused(*NGRAM)
    assert "To train this model takes 517 MB" in said and "and 100 MB are free here, of which tables take 516 MB" in said
    assert "embed_tokens.tables.weight: 4,000,012 rows of 8" in said and "vocab_ratio or table_rows times 0.17" in said
    assert "row_wise keeps 4 bytes a row" in said
    config, smaller = meta(NGRAM[0], "model.embedding.ngram.table_rows=170000")
    check_memory(smaller, FREE, "train", added_bytes(smaller, config.training.optimizer))


def test_the_optimizer_decides_what_training_takes():
    row_wise = (*NGRAM, "training.optimizer.table_optimizer=row_wise")
    said = refused(*row_wise)
    assert "of which tables take 148 MB" in said and "row_wise keeps" not in said  # 128 of rows, 16 of state, 4 of marks
    config, model = meta(*row_wise)
    check_memory(model, 160_000_000, "train", added_bytes(model, config.training.optimizer))


def test_tables_of_single_tokens_have_other_settings():
    said = refused("model.embedding.ngram.kind=ple", "model.embedding.ngram.per_layer_width=60000", doing="build")
    assert "a smaller vocabulary or narrower rows" in said and "vocab_ratio" not in said


def test_what_is_not_the_tables_fault_is_said_otherwise():
    assert refused("model.hidden_size=8192").endswith("`longcat-lab budget` shows which part to make smaller.")
    said = refused(*NGRAM, "model.hidden_size=1024", free=1000)
    assert "and the rest of it does not fit either" in said


def test_building_asks_first(monkeypatch):
    monkeypatch.setattr("longcat_lab.model.memory.free_memory", lambda: FREE)
    with pytest.raises(LabError, match=r"To build this model takes 13.* MB of memory and 100 MB are free here, of which tables take"):
        build(lab.load("tiny", *NGRAM))
    with torch.device("meta"):
        assert build(lab.load("tiny", *NGRAM))
