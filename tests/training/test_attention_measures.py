"""What attention looks at: every measure against its definition, in plain loops over queries and sets, and in closed form."""

import itertools
import re

import numpy as np
import pytest
import torch

import longcat_lab as lab
from longcat_lab.blocks.mla.module import MLA
from longcat_lab.blocks.sparse_attention.op import index_scores
from longcat_lab.data import Batch
from longcat_lab.errors import LabError
from longcat_lab.training import attention_measures as module
from longcat_lab.training.attention_measures import attention_measures
from longcat_lab.training.attention_record import look, record

LENGTH, TOPK = 48, 12
SMALL = ["model.num_layers=2", f"model.attention.index_topk={TOPK}", "model.attention.index_head_dim=12", "model.attention.index_n_heads=4"]
LSA = [*SMALL, "model.attention.kind=lsa", "model.attention.index_init_tokens=2", "model.attention.index_local_tokens=4"]
DSA = [*SMALL, "model.attention.kind=dsa"]
RULE = "model.attention.selection.kind="


def model(*overrides, std=0.25):
    built = lab.build(lab.load("tiny", *overrides)).double()
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return built.eval()


def a_batch(rows=2, documents=True, length=LENGTH):
    """Rows of two documents each, with boundaries at different places."""
    tokens = torch.randint(0, 500, (rows, length))
    ids = torch.zeros_like(tokens)
    for row in range(rows if documents else 0):
        ids[row, 15 + 9 * row :] = 1
    return Batch(tokens, torch.full_like(tokens, -100), ids)


def inputs(built, batch):
    """What enters each attention, and the shared context, by a way of its own."""
    seen = []
    modules = [m for layer in built.layers for m in layer.modules() if isinstance(m, MLA)]
    hooks = [m.register_forward_pre_hook(lambda m, given: seen.append((m, *given))) for m in modules]
    built.hidden(batch.tokens, batch.document_ids)
    for hook in hooks:
        hook.remove()
    return seen


def dense_weights(attention, x, context):
    """Softmax of every head from expanded keys, mean over heads: [B, T, T], keys ahead and of other documents 0."""
    c = attention.config
    q = torch.cat(attention.queries(attention.query_latent(x), context.rope), -1)
    c_kv, k_rope = attention.latents(x, context.rope)
    kv = attention.kv_b_proj(c_kv).unflatten(-1, (c.num_attention_heads, -1)).transpose(1, 2)
    k = torch.cat((kv[..., : c.qk_nope_head_dim], k_rope[:, None].expand(-1, c.num_attention_heads, -1, -1)), -1)
    scores = torch.einsum("bhtd,bhsd->bhts", q, k) * attention.softmax_scale
    position = torch.arange(x.shape[1])
    start = torch.zeros(x.shape[:2], dtype=torch.int64) if context.first is None else context.first
    seen = (position <= position[:, None]) & (position >= start[..., None])
    return scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1).mean(1), seen


def best(values, keys, count):
    return set(sorted(keys, key=lambda s: (-float(values[s]), s))[:count])


def by_hand(built, batch, topk, sinks, window):
    """All measures as dictionaries of lists, one entry for each query that counts."""
    seen_in = inputs(built, batch)
    found = [dense_weights(*each) for each in seen_in]
    c, scores = built.config.attention, {}
    for attention, x, context in seen_in:
        if getattr(attention, "indexer", None) is not None:
            vectors = attention.indexer(x, attention.query_latent(x) / attention.index_q_scale, context)
            scores[attention.group] = index_scores(*vectors)
    count = len(found)
    told = {"uncovered": [[] for _ in range(count)], "missed": [[] for _ in range(count)], "fixed": [[] for _ in range(count)]}
    overlap, coverage, numbers = np.zeros((count, count)), np.zeros((count, count)), []
    rows, length = batch.tokens.shape
    for b in range(rows):
        for t in range(length):
            keys = found[0][1][b, t].nonzero().ravel().tolist()
            if len(keys) <= topk:
                continue
            numbers.append(len(keys))
            fixed = {*keys[:sinks], *keys[len(keys) - window :]}
            tops = [best(mass[b, t], keys, topk) for mass, _ in found]
            for i, (mass, _) in enumerate(found):
                told["fixed"][i].append(1 - sum(float(mass[b, t, s]) for s in fixed))
                for j, (other, _) in enumerate(found):
                    overlap[i, j] += len(tops[i] & tops[j]) / topk
                    coverage[i, j] += sum(float(other[b, t, s]) for s in tops[i])
                if scores:
                    rank = scores[seen_in[i][0].group][b, t]
                    always = {*keys[: c.index_init_tokens], *keys[len(keys) - c.index_local_tokens :]}
                    used = always | best(rank, [s for s in keys if s not in always], c.index_topk - len(always))
                    told["uncovered"][i].append(1 - sum(float(mass[b, t, s]) for s in used))
                    told["missed"][i].append(1 - len(used & tops[i]) / topk)
    return told, overlap / len(numbers), coverage / len(numbers), np.array(numbers)


@pytest.mark.parametrize("documents", [True, False])
@pytest.mark.parametrize(
    ("overrides", "topk"),
    [(DSA, TOPK), (LSA, TOPK), (LSA, 7), ([*LSA, "model.attention.cli_factor=3"], TOPK), (["model.num_layers=1"], 9)],
    ids=["dsa", "lsa", "lsa, other K", "groups of three", "mla"],
)
def test_every_measure_is_its_definition(overrides, topk, documents):
    built, batch = model(*overrides), a_batch(documents=documents)
    with torch.no_grad():
        told, overlap, coverage, numbers = by_hand(built, batch, topk, 2, 4)
    found = attention_measures(built, [batch], topk, 2, 4)
    assert found.queries == len(numbers) > 0
    np.testing.assert_allclose(found.overlap, overlap, atol=1e-12)
    np.testing.assert_allclose(found.coverage, coverage, atol=1e-9)
    np.testing.assert_allclose(found.fixed_uncovered, [np.mean(each) for each in told["fixed"]], atol=1e-9)
    part = np.floor((numbers - topk - 1) / (LENGTH - topk) * 8)
    for attention, each in enumerate(told["fixed"]):
        expected = [np.mean(np.array(each)[part == i]) if (part == i).any() else np.nan for i in range(8)]
        np.testing.assert_allclose(found.fixed_by_position[attention], expected, atol=1e-9)
    if built.config.attention.kind == "mla":
        assert np.isnan(found.uncovered).all() and np.isnan(found.missed).all() and "uncovered" not in found.summary
    else:
        np.testing.assert_allclose(found.uncovered, [np.mean(each) for each in told["uncovered"]], atol=1e-9)
        np.testing.assert_allclose(found.missed, [np.mean(each) for each in told["missed"]], atol=1e-12)


def test_the_summary_is_means_of_it():
    found = attention_measures(model(*LSA), [a_batch()])
    told = found.summary
    assert found.places == [0, 1, 0, 1] and (found.topk, found.sinks, found.window) == (TOPK, 2, 4)
    assert told["uncovered"] == pytest.approx(found.uncovered.mean()) and told["topk_missed"] == pytest.approx(found.missed.mean())
    assert told["uncovered_place_1"] == pytest.approx((found.uncovered[1] + found.uncovered[3]) / 2)
    assert told["topk_missed_attention_2"] == found.missed[2]
    assert told["topk_uncovered"] == pytest.approx(1 - found.coverage.diagonal().mean())
    pairs = [(0, 1), (1, 2), (2, 3)]
    assert told["overlap_distance_1"] == pytest.approx(np.mean([found.overlap[i, j] for i, j in pairs]))
    assert told["overlap_distance_1_min"] == min(found.overlap[i, j] for i, j in pairs)
    assert told["reuse_uncovered_distance_1"] == pytest.approx(np.mean([1 - found.coverage[i, j] for i, j in pairs]))
    assert told["reuse_uncovered_distance_1_max"] == pytest.approx(max(1 - found.coverage[i, j] for i, j in pairs))
    assert told["reuse_uncovered_distance_3"] == told["reuse_uncovered_distance_3_max"] and "overlap_distance_4" not in told
    assert all(re.fullmatch(r"[a-z0-9_]+", name) and np.isfinite(value) for name, value in told.items())


def test_equal_attention_in_closed_form():
    """Without queries every visible key gets 1 / n: sinks and window hold (sinks + window) / n, any K keys K / n."""
    built = model(*DSA)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            parameter.mul_(0 if "q_b_proj" in name else 1)
    found = attention_measures(built, [a_batch(3, documents=False)], sinks=1, window=5)
    n = np.arange(TOPK + 1, LENGTH + 1)
    assert found.queries == 3 * len(n)
    np.testing.assert_allclose(found.fixed_uncovered, 1 - np.mean(6 / n))
    np.testing.assert_allclose(found.uncovered, 1 - np.mean(TOPK / n))
    np.testing.assert_allclose(found.coverage, np.mean(TOPK / n))
    assert found.chance == pytest.approx(np.mean(TOPK / n)) and found.longest == LENGTH
    np.testing.assert_allclose(found.overlap, 1)  # of equal keys the earlier ones, everywhere
    bounds = [13, 18, 22, 27, 31, 36, 40, 45, 49]  # eighths of the 36 lengths 13 ... 48
    expected = [np.mean(1 - 6 / np.arange(*each)) for each in itertools.pairwise(bounds)]
    np.testing.assert_allclose(found.fixed_by_position, [expected] * 4)


@pytest.mark.parametrize("chunk", [1, 700])
def test_chunks_and_batches_change_nothing(monkeypatch, chunk):
    built, batches = model(*LSA), [a_batch(), a_batch(1, False), a_batch(2, length=40)]
    whole = attention_measures(built, batches)
    alone = [attention_measures(built, [each]) for each in batches]
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", chunk)
    parts = attention_measures(built, batches)
    assert parts.queries == whole.queries == sum(each.queries for each in alone)
    for name in ("uncovered", "missed", "fixed_uncovered", "fixed_by_position", "overlap", "coverage"):
        np.testing.assert_allclose(getattr(parts, name), getattr(whole, name), atol=1e-12)
    for name in ("uncovered", "missed", "overlap", "coverage"):
        mean = sum(each.queries * getattr(each, name) for each in alone) / whole.queries
        np.testing.assert_allclose(getattr(whole, name), mean, atol=1e-12)


def test_the_oracle_misses_nothing_and_random_keys_do():
    batch, found = a_batch(4, False), {}
    for rule in ("oracle", "random", "indexer"):
        found[rule] = attention_measures(model(*DSA, f"{RULE}{rule}", std=0.5), [batch])
    oracle = found["oracle"]
    assert oracle.missed.tolist() == [0.0] * 4
    np.testing.assert_allclose(oracle.uncovered, 1 - oracle.coverage.diagonal(), atol=1e-12)
    # Keys at random hold what their number is worth: K of n.
    chance = np.mean(1 - TOPK / np.arange(TOPK + 1, LENGTH + 1))
    assert found["random"].missed.mean() == pytest.approx(chance, abs=0.05)
    assert oracle.summary["uncovered"] < 0.7 * found["random"].summary["uncovered"]


def test_a_selection_of_everything_leaves_nothing_out():
    """No document has more than index_topk tokens, so that all keys are selected; K is asked smaller."""
    built = model(*DSA, "model.attention.index_topk=40")
    found = attention_measures(built, [a_batch()], topk=6)
    assert found.queries > 0 and found.missed.tolist() == [0.0] * 4
    np.testing.assert_allclose(found.uncovered, 0, atol=1e-12)
    # A batch of rows that short runs dense: its queries use all keys, and count among the others.
    short = a_batch(1, False, length=20)
    mixed, alone = attention_measures(built, [a_batch(), short], topk=6), attention_measures(built, [short], topk=6)
    assert mixed.queries == found.queries + 14 and mixed.missed.tolist() == [0.0] * 4
    assert np.isnan(alone.missed).all()


def test_a_window_covers_what_fixed_keys_cover():
    fixed = ["model.attention.index_init_tokens=2", f"model.attention.index_local_tokens={TOPK - 2}"]
    for rule in ("window", "indexer"):
        found = attention_measures(model(*DSA, *fixed, f"{RULE}{rule}"), [a_batch()])
        assert (found.uncovered > 0.01).all()
        np.testing.assert_allclose(found.uncovered, found.fixed_uncovered, atol=1e-12)
    assert np.isnan(attention_measures(model(*DSA), [a_batch()]).fixed_uncovered).all()  # there are none


def test_documents_are_told_apart():
    """Two documents in a row give what each gives in a row of its own: positions are counted in the document."""
    built, first, second = model("model.num_layers=1"), torch.randint(0, 500, (1, 30)), torch.randint(0, 500, (1, 30))
    ids = torch.tensor([[0] * 30 + [1] * 30])
    labels = torch.full((1, 60), -100)
    # Rotary positions go on inside a row; attention depends on their differences alone.
    joined = attention_measures(built, [Batch(torch.cat((first, second), 1), labels, ids)], 8, 1, 3)
    apart = attention_measures(built, [Batch(each, labels[:, :30], torch.zeros_like(each)) for each in (first, second)], 8, 1, 3)
    assert joined.queries == apart.queries == 44
    for name in ("fixed_uncovered", "overlap", "coverage"):
        np.testing.assert_allclose(getattr(joined, name), getattr(apart, name), atol=1e-9)


def test_a_model_without_index_topk_is_told_to_give_one():
    built, batch = model(), a_batch()
    with pytest.raises(LabError, match="mla has no index_topk; give topk"):
        attention_measures(built, [batch])
    with pytest.raises(LabError, match="topk at least 1"):
        attention_measures(built, [batch], topk=0)
    with pytest.raises(LabError, match="no batch"):
        attention_measures(built, [], topk=4)


def test_short_sequences_have_nothing_to_measure():
    found = attention_measures(model(*DSA), [a_batch(length=TOPK)])
    assert found.queries == 0 and found.summary == {}


def test_the_model_is_left_as_it_was():
    built, batch = model(*LSA).train(), a_batch()
    attention_measures(built, [batch])
    assert built.training and not any(m._forward_hooks for m in built.modules())
    with pytest.raises(LabError, match="outside the vocabulary"):  # a pass that fails takes its hooks along
        record(built, Batch(torch.full((1, 8), 10**6), torch.zeros(1, 8), torch.zeros(1, 8, dtype=torch.int64)))
    assert built.training and not any(m._forward_hooks for m in built.modules())


@pytest.mark.parametrize("overrides", [LSA, ["model.num_layers=1"]], ids=["lsa", "mla"])
def test_a_look_at_one_sequence(overrides):
    built, batch = model(*overrides), a_batch()
    with torch.no_grad():
        expected = [dense_weights(*each) for each in inputs(built, batch)]
    looks = look(built, batch, TOPK, 2, 4)
    assert len(looks) == len(expected) and [each.selects for each in looks] == [overrides is LSA] * len(looks)
    for each, (mass, seen) in zip(looks, expected, strict=True):
        np.testing.assert_allclose(each.mass, mass[0], atol=1e-9)
        assert (each.seen == seen[0].numpy()).all() and not (each.used & ~each.seen).any()
        number = each.seen.sum(1)
        assert (each.used.sum(1) == np.minimum(number, TOPK)).all()
        assert (each.sinks.sum(1) == np.minimum(number, 2)).all() and (each.window.sum(1) == np.minimum(number, 4)).all()
        assert each.sinks[14, :2].all() and each.sinks[20, 15:17].all() and each.window[20, 17:21].all()
    if overrides is LSA:
        assert (looks[0].used == looks[1].used).all() and (looks[0].used != looks[2].used).any()
        assert not (looks[0].sinks & ~looks[0].used).any() and not (looks[0].window & ~looks[0].used).any()


def test_a_run_measures_at_its_end_if_asked(tmp_path):
    steps = ["training.steps=3", "training.schedule.warmup_steps=1", "training.evaluation_sequences=4", "training.attention_measures=6"]
    arms = 'training.evaluations={"random": {"model.attention.selection.kind": "random"}}'
    run = lab.fit(lab.load("tiny", *LSA, *steps, arms), tmp_path / "lsa", progress=False)
    told = attention_measures(run.model, _validation(run, 6)).summary
    assert {name: run.summary[name] for name in told} == pytest.approx(told, abs=1e-6)
    assert run.summary["random/topk_missed"] != run.summary["topk_missed"]
    dense = lab.fit(lab.load("tiny", *steps), tmp_path / "mla", progress=False)
    assert "overlap_distance_1" not in dense.summary and "validation_bpb" in dense.summary


def _validation(run, count):
    from longcat_lab.data import evaluation_batches

    return evaluation_batches(run.corpus.split("validation"), run.config.data.sequence_length, run.config.data.batch_size, count)
