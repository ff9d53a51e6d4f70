"""Measures of a probe against models whose answers are known, and training on one."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import longcat_lab as lab
from longcat_lab.config import load
from longcat_lab.data import IGNORED, evaluation_batches, evaluation_probes, prepare, scored
from longcat_lab.training.batches import training_loader
from longcat_lab.training.evaluation import evaluate
from longcat_lab.training.probe_evaluation import evaluate_probe, loss_by_position

RECALL = ["data.probe.kind=recall", "data.probe.pairs=5", "data.probe.queries=5"]
MULTI = ["data.probe.kind=multi_key", "data.probe.needles=3", "data.probe.value_length=2"]
COPY = ["data.probe.kind=copy", "data.probe.string_length=9", "data.probe.distance=20"]


class Table(nn.Module):
    """A model whose most likely next token is looked up by what stands before: `rule(tokens so far)`, -1 for none."""

    def __init__(self, vocab_size, rule, certainty=30.0):
        super().__init__()
        self.rule, self.certainty = rule, certainty
        self.norm, self.lm_head = nn.Identity(), nn.Linear(vocab_size, vocab_size, bias=False)
        nn.init.eye_(self.lm_head.weight)

    def hidden(self, tokens, document_ids=None):
        assert not self.training and not document_ids.any()
        said = torch.tensor([[self.rule(row[: t + 1]) for t in range(len(row))] for row in tokens.tolist()])
        return F.one_hot(said.clamp(min=0), self.lm_head.in_features).float() * self.certainty * (said >= 0)[..., None]


def repeating(tokens, width):
    """What stood after the last earlier place with the same `width` tokens; -1 where there is none."""
    for at in range(len(tokens) - 2, width - 2, -1):
        if tokens[at - width + 1 : at + 1] == tokens[-width:]:
            return tokens[at + 1]
    return -1


def asked(*overrides):
    config = load("tiny", "data.probe.evaluation_episodes=24", *overrides)
    return config, prepare(config.data, config.model.vocab_size)


@pytest.mark.parametrize("task", [RECALL, MULTI, COPY], ids=["recall", "multi_key", "copy"])
def test_a_model_that_looks_back_answers_everything(task):
    config, corpus = asked(*task, "data.probe.filler=blank")
    # The mark and one key lead to a value; then the two tokens before. Of a recall or a copy one token is enough.
    model = Table(512, lambda tokens: repeating(tokens, 2 if task is MULTI else 1)).train()
    found = evaluate_probe(model, corpus, config)
    assert model.training  # as it was
    assert found["probe_accuracy"] == found["probe_token_accuracy"] == 1 and found["probe_error"] == 0
    assert found["probe_loss"] == pytest.approx(math.log1p(511 * math.exp(-30)), abs=1e-6)
    assert {found[key] for key in found if key.startswith("probe_accuracy")} == {1.0}


def test_a_model_that_knows_nothing_has_the_loss_of_chance():
    config, corpus = asked(*MULTI)
    found = evaluate_probe(Table(512, lambda tokens: -1), corpus, config)
    assert found["probe_loss"] == pytest.approx(math.log(512), rel=1e-6)
    assert found["probe_accuracy"] == 0 == found["probe_token_accuracy"]  # token 0 ends a document and is no answer
    value = next(iter(evaluation_probes(corpus, config.data.probe, 64, 24)))[1][0].tokens[-1]
    constant = evaluate_probe(Table(512, lambda tokens: int(value)), corpus, config)
    answers = np.stack([e.tokens[-2:] for _, es in evaluation_probes(corpus, config.data.probe, 64, 24) for e in es])
    assert constant["probe_token_accuracy"] == pytest.approx((answers == value).mean()) and 0 < constant["probe_token_accuracy"] < 0.2
    assert constant["probe_accuracy"] == pytest.approx((answers == value).all(axis=1).mean())


def test_a_short_sight_shows_in_depth_and_distance_and_length():
    """A model that sees the last 30 tokens only answers what was told there, and nothing else."""
    seen = 30
    task = [*COPY, "data.probe.string_length=4", "data.probe.distance=4", "data.probe.filler=blank", "data.probe.evaluation_episodes=60"]
    config, corpus = asked(*task, "data.probe.evaluation_lengths=[24,64]", f"data.probe.far={seen - 1}")
    found = evaluate_probe(Table(512, lambda tokens: repeating(tokens[-seen:], 1)), corpus, config)
    right, depths, far = {24: [], 64: []}, [], []
    for length in right:
        for _, episodes in evaluation_probes(corpus, config.data.probe, length, 7):
            for episode in episodes:
                # the mark before the string must be in sight too, for the first token; the distance is the same for all tokens
                right[length].append(bool(episode.distances[0] + 1 < seen))
                depths.append(int(5 * episode.depths[0]))
                far.append(bool(episode.distances[0] >= seen - 1))
    every = np.array(right[24] + right[64])
    assert found["probe_accuracy_length_24"] == np.mean(right[24]) == 1
    assert found["probe_accuracy_length_64"] == pytest.approx(np.mean(right[64])) and 0.2 < np.mean(right[64]) < 0.8
    assert found["probe_accuracy"] == pytest.approx(every.mean()) == pytest.approx(1 - found["probe_error"])
    for i in range(5):
        assert found[f"probe_accuracy_depth_{i}"] == pytest.approx(every[np.array(depths) == i].mean())
    assert found["probe_error_far"] == pytest.approx(1 - every[far].mean()) == 1


def test_the_measures_do_not_depend_on_the_batch_or_the_order_of_lengths():
    config, corpus = asked(*RECALL, "data.probe.evaluation_lengths=[40,64]")
    model = lab.build(config)
    one = evaluate_probe(model, corpus, config)
    other = evaluate_probe(model, corpus, load(config, "data.batch_size=1", "data.probe.evaluation_lengths=[64,40]"))
    assert one.keys() == other.keys()
    assert all(one[key] == pytest.approx(other[key], abs=1e-5) for key in one)
    assert evaluate_probe(model, corpus, load(config, "seed=5", "data.seed=3", "data.probe.share=0.5")) == one


def test_the_loss_is_that_of_the_whole_forward_pass():
    config, corpus = asked(*MULTI)
    model, nats, count = lab.build(config).eval(), 0.0, 0
    for batch, _ in evaluation_probes(corpus, config.data.probe, 64, 24):
        logits = model(batch.tokens, batch.document_ids)
        nats += F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED, reduction="sum").item()
        count += int((batch.labels != IGNORED).sum())
    assert count == 24 * 2
    assert evaluate_probe(model, corpus, config)["probe_loss"] == pytest.approx(nats / count, rel=1e-5)


def test_lengths_beyond_the_model_are_refused():
    config, corpus = asked(*RECALL)
    beyond = config.model_copy(update={"data": load(config, "data.probe.evaluation_lengths=[60]").data})
    beyond = beyond.model_copy(update={"model": beyond.model.model_copy(update={"max_position_embeddings": 59})})
    with pytest.raises(lab.LabError, match=r"evaluation_lengths has 60, above model.max_position_embeddings 59"):
        evaluate_probe(Table(512, lambda tokens: -1), corpus, beyond)


def test_loss_by_position_in_closed_form_and_against_bits_per_byte():
    config = load("tiny")
    corpus = prepare(config.data, config.model.vocab_size)

    class Ramp(nn.Module):
        """Nats per token: known by place. The label's own logit is raised by an amount that grows along the sequence."""

        def __init__(self):
            super().__init__()
            self.unused = nn.Parameter(torch.zeros(1))
            self.labels = iter([b.labels for b in evaluation_batches(corpus.split("validation"), 64, 4, 8)])

        def forward(self, tokens, document_ids):
            raised = torch.arange(tokens.shape[1]).expand_as(tokens)[..., None] / 8.0
            return F.one_hot(next(self.labels).clamp(min=0), 512) * raised

    found = loss_by_position(Ramp(), corpus, config, bins=64)
    for t in range(64):
        assert found[f"loss_position_{t}"] == pytest.approx(math.log(511 + math.exp(t / 8)) - t / 8, abs=1e-5)
    model = lab.build(config)
    whole = loss_by_position(model, corpus, config, bins=1)["loss_position_0"]
    labels = torch.cat([b.labels for b in evaluation_batches(corpus.split("validation"), 64, 4, 8)])
    mask = scored(labels, corpus.token_bytes)
    bytes_per_token = torch.from_numpy(corpus.token_bytes)[labels[mask]].double().mean()
    assert whole == pytest.approx(evaluate(model, corpus, config, "validation") * math.log(2) * float(bytes_per_token), rel=1e-6)
    with pytest.raises(lab.LabError, match=r"65 bins do not fit into data\.sequence_length 64"):
        loss_by_position(model, corpus, config, bins=65)


def test_a_run_trains_on_its_probe_and_reports_it(tmp_path):
    task = [*RECALL, "data.probe.evaluation_episodes=24", "data.probe.share=0.5", "training.steps=6", "training.checkpoint_every=2"]
    config = load("tiny", *task, "training.schedule.warmup_steps=1")
    run = lab.fit(config, tmp_path / "run", progress=False)
    told = evaluate_probe(run.model, run.corpus, config)
    assert {key: run.record["final"][key] for key in told} == told
    assert run.record["final"]["epochs"] == pytest.approx(0.5 * 6 * 4 / training_loader(config, run.corpus).windows)
    assert run.record["final"]["validation_bpb"] > 0
    # Stopped in the middle and resumed: the same bits, so the same rows.
    steps = iter(range(6))
    lab.fit(config, tmp_path / "stopped", progress=False, stop=lambda: next(steps) == 2)
    again = lab.fit(config, tmp_path / "stopped", progress=False)
    assert again.record["final"] == run.record["final"]
    assert all(torch.equal(a, b) for a, b in zip(run.model.parameters(), again.model.parameters(), strict=True))


def test_variants_of_a_model_see_the_same_probes():
    one = load("tiny", *MULTI, "seed=7")
    corpus = prepare(one.data, one.model.vocab_size)
    other = load(one, "model.num_layers=2", "training.steps=50", "model.attention.num_attention_heads=1")
    first, second = (next(training_loader(config, corpus)) for config in (one, other))
    assert torch.equal(first.tokens, second.tokens) and torch.equal(first.labels, second.labels)
    assert not torch.equal(first.tokens, next(training_loader(load(one, "seed=8"), corpus)).tokens)
