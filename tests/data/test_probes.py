"""Probe tasks: they can be solved from what is shown, they are the same on every rank and after every stop, and they mask exactly."""

import itertools
import json
import math

import numpy as np
import pytest
import torch

from longcat_lab.config import ConfigError, load
from longcat_lab.data import IGNORED, Loader, ProbeLoader, evaluation_probes, prepare
from longcat_lab.data.probes import alphabet
from longcat_lab.errors import LabError

KINDS = {
    "recall": {"kind": "recall", "pairs": 6, "queries": 4},
    "recall_in_front": {"kind": "recall", "pairs": 8, "queries": 8, "places": "front", "filler": "random"},
    "recall_in_text": {"kind": "recall", "pairs": 5, "queries": 5, "filler": "text", "scored": "all"},
    "needle": {"kind": "needle"},
    "long_needle": {"kind": "needle", "key_length": 3, "value_length": 4, "filler": "random", "scored": "all"},
    "multi_key": {"kind": "multi_key", "needles": 5},
    "many_alike_keys": {"kind": "multi_key", "needles": 7, "key_length": 3, "key_tokens": 2, "value_length": 2, "filler": "blank"},
    "copy": {"kind": "copy", "string_length": 9, "distance": 33},
    "whole_copy": {"kind": "copy", "string_length": 20, "string_tokens": 20, "filler": "random"},
}


@pytest.fixture(params=KINDS)
def probe(request):
    return KINDS[request.param]


@pytest.fixture
def made(corpus, config):
    """A loader of probes, and its configuration."""

    def make(probe, seed=3, rank=0, world_size=1, **changes):
        data = config(probe=probe, **changes)
        return ProbeLoader(corpus, data, seed, rank, world_size), data

    return make


def same(a, b):
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("tokens", "labels", "document_ids"))


def only(loader, sample):
    """The probe of a sample that holds just one."""
    (found,) = loader.episodes(sample)
    return found


def solve(probe, tokens, mark):
    """The next token, from those shown alone and the task's rules."""
    if probe["kind"] == "recall":
        (value,) = {after for key, after in itertools.pairwise(tokens) if key == tokens[-1]}  # told once, or twice the same
        return value
    # Where the last mark stands the question begins; what it shows so far stood after just one earlier mark.
    asked = max(i for i, token in enumerate(tokens) if token == mark)
    shown = tokens[asked:]
    starts = [i for i in range(asked) if tokens[i : i + len(shown)] == shown]
    assert len(starts) == 1
    return tokens[starts[0] + len(shown)]


def test_every_question_can_be_answered_from_what_is_shown(made, corpus, probe):
    loader, data = made(probe)
    mark = alphabet(corpus, data.probe).mark
    for sample in range(40):
        episode = only(loader, sample)
        tokens = episode.tokens.tolist()
        assert len(tokens) == data.sequence_length + 1 and episode.answers.max() == data.sequence_length
        for places, source in zip(episode.answers.tolist(), episode.sources, strict=True):
            for offset, place in enumerate(places):
                assert solve(probe, tokens[:place], mark) == tokens[place] == tokens[source + offset]
        earlier = [tokens[: places[0] - 1].count(tokens[places[0] - 1]) for places in episode.answers.tolist()]
        assert probe["kind"] != "recall" or [n == 1 for n in earlier] == episode.counted.tolist()  # told by its pair alone
        assert ((episode.depths >= 0) & (episode.depths < 1)).all()
        assert (episode.distances == episode.answers[:, 0] - 1 - episode.sources).all() and (episode.distances > 0).all()


def test_labels_are_the_answers_or_all_tokens(made, probe):
    loader, data = made(probe)
    batch = next(loader)
    assert not batch.document_ids.any()
    for row in range(data.batch_size):
        episode = only(loader, row)
        labels = batch.labels[row].tolist()
        assert batch.tokens[row].tolist() == episode.tokens[:-1].tolist()
        scored = set((episode.answers - 1).ravel().tolist()) if data.probe.scored == "answers" else set(range(data.sequence_length))
        assert labels == [episode.tokens[t + 1] if t in scored else IGNORED for t in range(data.sequence_length)]


def test_filler_is_what_was_asked_for(made, corpus, probe):
    loader, data = made(probe)
    ids = alphabet(corpus, data.probe)
    for sample in range(5):
        episode = only(loader, sample)
        known = {"blank": [ids.blank], "random": ids.rest.tolist()}.get(data.probe.filler)
        if known is not None:
            assert set(episode.tokens.tolist()) <= {*known, ids.mark, *ids.own.tolist()}
        elif data.probe.kind != "recall":
            (window,) = loader._order(np.array([sample]))
            text = corpus.split("train").tokens[window * data.sequence_length :].tolist()
            size = getattr(data.probe, "length", None) or data.probe.string_length + 1
            tokens, shown = episode.tokens[:-size].tolist(), []
            while tokens:  # with the marked pieces taken out, the text's own tokens are left, in order and none missing
                tokens = tokens[size:] if tokens[0] == ids.mark else (shown.append(tokens[0]) or tokens[1:])
            assert shown == text[: len(shown)]


def test_marks_are_in_no_text(corpus, config):
    ids = alphabet(corpus, config(probe=KINDS["recall"]).probe)
    for name in corpus.splits:
        assert not np.isin([ids.mark, ids.blank], corpus.split(name).tokens).any()
    every = [ids.mark, ids.blank, corpus.eos_id, *ids.own, *ids.rest]
    assert len(set(every)) == len(every) == corpus.vocab_size - 11  # 13 bytes are in no UTF-8 text, 2 of them are used


def test_probes_are_a_function_of_seed_and_sample_alone(made, probe):
    one, again, other = made(probe)[0], made(probe)[0], made(probe, seed=4)[0]
    batches = [next(one) for _ in range(3)]
    assert same(batches[0], next(again))
    assert not torch.equal(batches[0].tokens, next(other).tokens) and not torch.equal(batches[0].tokens, batches[1].tokens)
    assert only(again, 17).tokens.tolist()[:-1] == batches[2].tokens[1].tolist()
    wide = made(probe, batch_size=24)[0]
    assert torch.equal(next(wide).tokens, torch.cat([batch.tokens for batch in batches]))


def test_short_probes_come_first_packed_and_smaller(made, corpus, probe):
    """16 sequences of the first length, 16 of the second, then whole probes; each is solved inside its own document."""
    lengths = [31, 13] if probe["kind"] != "multi_key" or probe.get("key_length") else [11, 13]
    lengths = [max(length, 17) for length in lengths] if "key_length" in probe else lengths
    loader, data = made(probe | {"lengths": lengths, "length_samples": 16})
    mark = alphabet(corpus, data.probe).mark
    for k in range(6):
        batch = next(loader)
        length = (lengths[0], lengths[1], data.sequence_length)[k // 2]
        count = (data.sequence_length + 1) // (length + 1)
        for row, (tokens, labels, documents) in enumerate(zip(batch.tokens, batch.labels, batch.document_ids, strict=True)):
            episodes = loader.episodes(8 * k + row)
            assert [len(each.tokens) for each in episodes] == [length + 1] * count
            assert documents.tolist() == [min(t // (length + 1), count) for t in range(data.sequence_length)]
            shown = [*tokens.tolist(), episodes[-1].tokens[-1]]  # the last token of a row that is full is a label alone
            for number, each in enumerate(episodes):
                start = number * (length + 1)
                own = shown[start : start + length + 1]
                assert own[:-1] == each.tokens.tolist()[:-1]
                answers = set((each.answers - 1).ravel().tolist())
                for t in range(length + 1 if start + length < data.sequence_length else length):
                    if t == length:
                        assert labels[start + t] == IGNORED  # what follows is another document
                    elif t in answers:
                        assert labels[start + t] == solve(probe, own[: t + 1], mark)
                    else:
                        assert labels[start + t] == (own[t + 1] if data.probe.scored == "all" else IGNORED)
            assert (labels[count * (length + 1) :] == IGNORED).all()
    assert loader.state_dict()["samples_seen"] == 48


@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 4), (4, 2)])
def test_ranks_share_a_batch_and_resume_where_it_stopped(made, before, after):
    probe = KINDS["multi_key"] | {"share": 0.37, "lengths": [20, 9], "length_samples": 19}

    def together(world, count, state=None):
        loaders = [made(probe, rank=rank, world_size=world)[0] for rank in range(world)]
        for loader in loaders if state else ():
            loader.load_state_dict(json.loads(json.dumps(state)))
        rows = [[next(loader) for loader in loaders] for _ in range(count)]
        assert len({json.dumps(loader.state_dict()) for loader in loaders}) == 1
        return [torch.cat([t for b in row for t in (b.tokens, b.labels)]).sort(dim=0).values for row in rows], loaders[0].state_dict()

    whole, _ = together(1, 9)
    _, state = together(before, 4)
    rest, _ = together(after, 5, state)
    assert all(torch.equal(a, b) for a, b in zip(whole[4:], rest, strict=True))


def test_rank_shares_side_by_side_are_the_whole_batch(made):
    probe = KINDS["needle"] | {"share": 0.5}
    whole = next(made(probe)[0])
    parts = [next(made(probe, rank=rank, world_size=4)[0]) for rank in range(4)]
    for name in ("tokens", "labels", "document_ids"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts]))


@pytest.mark.parametrize("share", [0.01, 0.25, 0.3, 0.7, 0.99])
def test_text_rows_are_those_of_a_run_without_probes(made, corpus, share):
    loader, data = made(KINDS["needle"] | {"share": share}, batch_size=10)
    plain = Loader(corpus.split("train"), data.sequence_length, 10, 3)
    probes = []
    for k in range(20):
        mixed, text = next(loader), next(plain)
        for row in range(10):
            probes.append(loader.is_probe(10 * k + row))
            assert torch.equal(mixed.tokens[row], text.tokens[row]) == (not probes[-1])
            if not probes[-1]:
                assert torch.equal(mixed.labels[row], text.labels[row]) and torch.equal(mixed.document_ids[row], text.document_ids[row])
    assert sum(probes) == round(200 * share)
    assert all(math.floor(10 * share + 1e-9) <= sum(probes[k : k + 10]) <= math.ceil(10 * share - 1e-9) for k in range(0, 200, 10))
    assert loader.epoch == pytest.approx(plain.epoch)  # each probe shows the text that it replaces


def test_the_share_is_exact_after_a_trillion_samples(made):
    loader, _ = made(KINDS["recall"] | {"share": 0.1})
    first = 10**12
    assert [loader.is_probe(first + i) for i in range(20)] == [loader.is_probe(i) for i in range(20)]
    assert sum(loader.is_probe(i) for i in range(20)) == 2
    next(loader)
    assert loader.epoch == pytest.approx(0.9 * 8 / loader.windows)  # blank filler reads no text


@pytest.mark.parametrize("name", ["needle", "multi_key", "copy"])
def test_every_depth_is_as_likely(made, name):
    loader, _ = made(KINDS[name])
    depths = np.concatenate([only(loader, sample).depths for sample in range(900)])
    starts = len(set(depths.tolist()))
    counts = np.histogram(depths, bins=np.arange(starts + 1) / starts - 0.5 / starts)[0]
    assert counts.min() > 0 and counts.sum() == 900
    # chi-square of 900 draws over the places, five standard deviations up
    assert ((counts - 900 / starts) ** 2 / (900 / starts)).sum() < starts + 5 * math.sqrt(2 * starts)


def test_a_copy_keeps_its_distance(made):
    loader, data = made(KINDS["copy"])
    distances = {int(only(loader, sample).distances[0]) for sample in range(400)}
    assert min(distances) == data.probe.distance == 33 and max(distances) == data.sequence_length - 9 - 1


def test_values_and_keys_are_drawn_evenly(made, corpus):
    loader, data = made(KINDS["multi_key"])
    own = alphabet(corpus, data.probe).own
    shown = np.stack([only(loader, sample).tokens[-2:] for sample in range(640)])
    for drawn, allowed in zip(shown.T, (own[:64], own[64:]), strict=True):
        counts = (drawn[:, None] == allowed).sum(axis=0)
        assert counts.sum() == 640
        assert ((counts - 10) ** 2 / 10).sum() < 63 + 5 * math.sqrt(2 * 63)


def test_evaluation_probes_are_always_the_same_and_end(corpus, config, probe):
    data = config(probe=probe | {"evaluation_episodes": 21, "share": 0.5, "scored": "all"})
    length = data.sequence_length + 7
    found = list(evaluation_probes(corpus, data.probe, length, 8))
    assert [len(episodes) for _, episodes in found] == [8, 8, 5]
    other = list(evaluation_probes(corpus, config(probe=probe | {"evaluation_episodes": 21}, seed=9).probe, length, 3))
    assert torch.equal(torch.cat([b.tokens for b, _ in found]), torch.cat([b.tokens for b, _ in other]))
    for batch, episodes in found:
        assert batch.tokens.shape[1] == length and not batch.document_ids.any()
        for labels, episode in zip(batch.labels, episodes, strict=True):  # answers alone, whatever training scores
            assert sorted(torch.nonzero(labels != IGNORED).ravel().tolist()) == sorted((episode.answers - 1).ravel().tolist())
    training, _ = next(iter(found))
    assert not torch.equal(training.tokens[0], next(ProbeLoader(corpus, data, 0)).tokens[0])


def test_probes_never_change_between_versions(corpus, config):
    # Recorded once: a checkpoint written by one release must go on with the same probes in the next one.
    data = config(probe={"kind": "multi_key", "needles": 1, "key_tokens": 5, "value_tokens": 7, "filler": "blank"}, sequence_length=20)
    loader = ProbeLoader(corpus, data, seed=2**33 + 5)
    ids = alphabet(corpus, data.probe)
    names = {ids.mark: "m", ids.blank: "."} | {int(token): "abcdeABCDEFG"[i] for i, token in enumerate(ids.own)}
    assert ["".join(names[int(token)] for token in only(loader, sample).tokens) for sample in (0, 1, 2**32)] == RECORDED


RECORDED = [".meFmcD...........mcD", ".meD.mdC..........mdC", "meC...mdA.........mdA"]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (["kind=recall", "pairs=25"], "sequence_length 64 is too short for this recall probe, which needs 65 tokens"),
        (["kind=copy", "string_length=8", "lengths=[63,2]"], "probe.lengths has 2: a copy probe has 3 tokens at least"),
        (["kind=needle", "lengths=[65]"], "probe.lengths has 65: a needle probe has 5 tokens at least, and sequence_length is 64"),
        (["kind=recall", "pairs=9", "key_tokens=8"], "pairs 9 is above key_tokens 8"),
        (["kind=multi_key", "needles=20"], "sequence_length 64 is too short for this multi_key probe, which needs 68 tokens"),
        (["kind=multi_key", "key_tokens=4"], "key_tokens 4 with key_length 1 is too few for 5 needles: raise one"),
        (["kind=copy", "distance=60"], "sequence_length 64 is too short for this copy probe, which needs 77 tokens"),
        (["kind=copy", "string_length=20", "string_tokens=19"], "string_length 20 is above string_tokens 19"),
        (["kind=needle", "evaluation_lengths=[64,4]"], "probe.evaluation_lengths 4 is too short for this needle probe, which needs 5"),
        (["kind=needle", "far=65"], "probe.far 65 is above the longest probe (64 tokens): lower it"),
        (["kind=needle", "share=0"], "'data.probe.share': input should be greater than 0, got 0"),
        (["kind=needle", "pairs=3"], "Unknown key 'data.probe.pairs'"),
        (["kind=needles"], "'data.probe': input tag 'needles' found using 'kind' does not match any of the expected tags"),
    ],
)
def test_probes_that_do_not_fit_are_refused_with_the_configuration(changes, sentence):
    with pytest.raises(ConfigError) as caught:
        load("tiny", *(f"data.probe.{change}" for change in changes))
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("kind", "length"), [("recall", 31), ("needle", 5), ("multi_key", 20), ("copy", 33)])
def test_the_shortest_sequence_is_enough(corpus, config, kind, length):
    data = config(probe={"kind": kind}, sequence_length=length)
    loader = ProbeLoader(corpus, data, 0)
    assert all(len(only(loader, sample).tokens) == length + 1 for sample in range(50))
    with pytest.raises(ValueError, match="too short"):
        config(probe={"kind": kind}, sequence_length=length - 1)


def test_a_vocabulary_that_is_too_small_is_refused(corpus, config):
    fits = {"kind": "recall", "key_tokens": 400, "value_tokens": 512 - 14 - 400}
    assert len(next(ProbeLoader(corpus, config(probe=fits), 0)).tokens) == 8
    with pytest.raises(LabError, match=r"needs 499 token ids for itself, but model.vocab_size 512 leaves 498: raise it"):
        ProbeLoader(corpus, config(probe=fits | {"filler": "random"}), 0)


def test_bytes_alone_are_vocabulary_enough(config, cache):
    small = prepare(config(train_bytes=30_000, validation_bytes=5_000, out_of_distribution_bytes=0), 257, cache)
    for probe in KINDS.values():
        batch = next(ProbeLoader(small, config(probe=probe), 0))
        assert int(batch.tokens.max()) < 257


def test_a_state_of_another_probe_is_refused_but_not_of_another_evaluation(made):
    state = made(KINDS["needle"])[0].state_dict()
    made(KINDS["needle"] | {"evaluation_episodes": 3, "far": 9})[0].load_state_dict(state)
    for other in (KINDS["copy"], KINDS["needle"] | {"share": 0.5}):
        with pytest.raises(LabError, match="The checkpoint was reading other data"):
            made(other)[0].load_state_dict(state)


def test_a_probe_may_be_switched_on_a_preset_and_keeps_what_both_have():
    config = load("probe-multi-key", "data.probe.kind=copy", "data.probe.string_length=4")
    assert config.data.probe.kind == "copy" and config.data.probe.far == load("probe-multi-key").data.probe.far


def test_evaluation_lengths_that_the_model_cannot_take_are_told():
    with pytest.raises(ConfigError, match=r"evaluation_lengths 400 is above model.max_position_embeddings 256"):
        load("probe-multi-key", "data.probe.evaluation_lengths=[100, 400]")
