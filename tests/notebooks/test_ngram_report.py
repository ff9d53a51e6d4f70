"""What notebooks say of an n-gram embedding beyond counts: its text, its start, its rows, a slope over sizes."""

import numpy as np
import pandas
import pytest
import torch

import longcat_lab as lab
from longcat_lab.data import prepare
from longcat_lab.errors import LabError
from longcat_lab.notebook import corpus_stream, displacement_table, slope_by_seed, starting_scale, table_rows, training_stream

NODE = "model.embedding.ngram"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    settings = (f"{NODE}.order=3", f"{NODE}.table_init_ratio=0", "training.steps=3", "training.evaluation_sequences=2")
    config = lab.load("tiny", *settings, "training.schedule.warmup_steps=0", "training.optimizer.table_optimizer=row_wise")
    return lab.fit(config, tmp_path_factory.mktemp("runs") / "a", progress=False)


def test_documents_of_the_stream_end_with_the_end_token():
    config = lab.load("tiny")
    corpus = prepare(config.data, config.model.vocab_size)
    stream, documents = corpus_stream(corpus, tokens=20_000)
    assert stream.dtype == np.int64 and len(stream) == len(documents) == 20_000
    assert documents[0] == 1 and set(np.diff(documents)) == {0, 1}
    assert np.array_equal(np.flatnonzero(np.diff(documents)), np.flatnonzero(stream[:-1] == corpus.eos_id))


def test_rows_that_training_read_are_those_of_its_stream_and_no_others(run):
    """Tables started empty: exactly the rows that the replayed batches read are not."""
    tokens, documents = training_stream(run)
    assert tokens.shape == (3 * 4, 64)
    tables = run.model.embed_tokens.tables
    read = tables.addresses(torch.from_numpy(tokens), torch.from_numpy(documents)).unique()
    assert torch.equal(tables.weight.detach().abs().sum(1).nonzero()[:, 0], read)
    norms = table_rows(run.model)
    assert list(norms) == ["2-grams", "3-grams"]
    sizes = tables.addresses.plan.moduli
    assert [len(each) for each in norms.values()] == [sizes[0], sizes[2]]
    start = sizes[0] + sizes[1]
    assert norms["3-grams"] == pytest.approx(tables.weight[start : start + sizes[2]].detach().norm(dim=1).numpy())


def test_starting_scale_is_that_of_the_arms():
    arms = {"plain": lab.load("tiny", "model.hidden_size=128")}
    arms["mean"] = lab.load(arms["plain"], f"{NODE}.order=3", f"{NODE}.normalised_init=none")
    table = starting_scale(arms, torch.randint(0, 512, (8, 64)))
    assert table.loc["mean", "embedding RMS"] / table.loc["plain", "embedding RMS"] == pytest.approx(5**-0.5, rel=0.05)
    assert table["token's share of the variance"].tolist() == pytest.approx([1.0, 0.2], rel=0.1)


def test_displacements_are_those_of_the_specification():
    table = displacement_table().pivot(index="mode", columns="beta2", values="displacement")
    assert table.loc["adamw"].tolist() == pytest.approx([5.8, 10.5, 31.8], rel=0.01)
    assert table.loc["lazy_adam"].tolist() == pytest.approx([0.45, 1.0, 3.2], rel=0.02)


def test_a_slope_is_fitted_for_each_seed():
    sizes = {"s": 10.0, "m": 100.0, "l": 1000.0}
    rows = [
        {"variant": name, "seed": seed, "status": "finished", "validation_bpb": 3 - (0.1 + 0.01 * seed) * np.log10(size)}
        for seed in range(3)
        for name, size in sizes.items()
    ]
    slope, low, high = slope_by_seed(pandas.DataFrame(rows), sizes)
    assert slope == pytest.approx(-0.11) and (high - low) / 2 == pytest.approx(4.302653 * 0.01 / 3**0.5, rel=1e-4)
    with pytest.raises(LabError, match="1 seeds have all of s, m, l; at least 2"):
        slope_by_seed(pandas.DataFrame(rows[:3]), sizes)
