"""Figures of hashed n-grams, and the tables behind them."""

import numpy as np
import pandas
import pytest

from longcat_lab.blocks.ngram_embedding.analyse import analyse, hit_rates
from longcat_lab.blocks.ngram_embedding.config import NgramEmbeddingConfig
from longcat_lab.notebook import (
    collision_lattice,
    collision_spikes,
    collision_sweep,
    hit_rate,
    joint_sweep,
    joint_uniqueness,
    once_hit_displacements,
    row_counts,
    row_norm_by_frequency,
    row_use,
    table_load,
)
from longcat_lab.notebook.figures_ngram import _fractions, lattice
from longcat_lab.notebook.style import svg

VOCAB = 64
SETTINGS = NgramEmbeddingConfig(order=3, splits=2, vocab_ratio=12.567)


@pytest.fixture(scope="module")
def text():
    rng = np.random.default_rng(0)
    return np.minimum(rng.zipf(1.3, 4000) - 1, VOCAB - 1), np.arange(4000) // 100


def test_a_sweep_is_one_analysis_a_size(text):
    table = collision_sweep(SETTINGS, *text, VOCAB, [12.0, 12.567], ["polynomial", "permuted"])
    assert list(table["family"]) == ["polynomial", "polynomial", "permuted", "permuted"]
    for row in table.itertuples():
        settings = SETTINGS.model_copy(update={"hash": row.family, "vocab_ratio": row.ratio, "order": 2})
        own = analyse(settings, *text, VOCAB)
        assert row.collisions == own.table["colliding"].sum() and row.relative == pytest.approx(own.relative())


def test_joint_sweep_of_each_number_of_tables(text):
    table = joint_sweep(SETTINGS, *text, VOCAB, 3)
    assert list(table["tables"]) == [1, 1, 2, 2, 3, 3] and list(table["order"]) == [2, 3] * 3
    for row in table.itertuples():
        own = analyse(SETTINGS.model_copy(update={"splits": row.tables}), *text, VOCAB).orders.loc[row.order]
        assert (row.collisions, row.ngrams) == (own["colliding"], own["ngrams"])
    assert (table[table["tables"] >= table["needed"]]["collisions"] == 0).all()


def test_row_counts_add_up_to_the_tokens(text):
    counts = row_counts(SETTINGS, *text, VOCAB)
    assert list(counts) == ["2-grams", "3-grams"]
    for table, hits in zip((0, 2), counts.values(), strict=True):
        assert hits.sum() == 4000 and (hits > 0).sum() == analyse(SETTINGS, *text, VOCAB).tables[table].rows_used


@pytest.mark.parametrize(("base", "rows"), [(10, 41), (10, 37), (7, 5), (64, 805)])
def test_lattice_holds_every_difference_that_collides(base, rows):
    everywhere = {(t, p) for t in range(-30, 31) for p in range(-30, 31) if (t + base * p) % rows == 0}
    assert set(map(tuple, lattice(base, rows, 30).tolist())) == everywhere


def test_fractions_in_lowest_terms():
    assert _fractions(30, 31, 3) == {(30, 1): 30.0, (31, 1): 31.0, (61, 2): 30.5, (91, 3): 91 / 3, (92, 3): 92 / 3}


def test_every_figure_is_drawn(text):
    counts = row_counts(SETTINGS, *text, VOCAB)
    norms = {name: np.sqrt(1.0 + hits) for name, hits in counts.items()}
    modes = [("dense", 0.95, 5.8), ("dense", 0.999, 31.8), ("lazy", 0.95, 0.45), ("lazy", 0.999, 3.2)]
    figures = [
        collision_spikes(collision_sweep(SETTINGS, *text, VOCAB, np.arange(11.9, 14.1, 0.1))),
        collision_spikes(collision_sweep(SETTINGS, *text, VOCAB, range(1, 60, 5), ["polynomial"])),
        hit_rate(hit_rates(SETTINGS, *text, 8, VOCAB)),
        table_load(analyse(SETTINGS, *text, VOCAB)),
        joint_uniqueness(joint_sweep(SETTINGS, *text, VOCAB, 3)),
        collision_lattice({"12 V": (VOCAB, 12 * VOCAB + 1), "12.567 V": (VOCAB, 805)}),
        row_use(counts),
        row_use({"none": np.zeros(5, dtype=int)}),
        row_norm_by_frequency(counts, norms),
        row_norm_by_frequency(counts["2-grams"], norms["2-grams"]),
        once_hit_displacements(pandas.DataFrame(modes, columns=["mode", "beta2", "displacement"])),
    ]
    for figure in figures:
        drawn = svg(figure)
        assert drawn.startswith("<svg") and len(drawn) < 300_000
        assert figure.get_facecolor()[3] == 0  # nothing is painted behind it, so that it serves on white and on black


def test_bins_of_row_norms_are_by_powers_of_two():
    """Rows hit 0, 1, 2, 3, 4 and 7 times: bins never, 1, 2-3, 4-7, whose medians are drawn."""
    figure = row_norm_by_frequency(np.array([0, 1, 2, 3, 4, 7]), np.array([0.0, 1.0, 2.0, 4.0, 6.0, 7.0]))
    (line,) = figure.axes[0].get_lines()
    assert line.get_xdata().tolist() == [0, 1, 2, 3] and line.get_ydata().tolist() == [0.0, 1.0, 3.0, 6.5]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["never", "1", "2", "4"]
