"""What is measured of a model that is divided over processes: the same numbers, and nobody ever holds the whole of it."""

import gc
import json
import types

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import longcat_lab as lab
from longcat_lab.data import Batch, prepare
from longcat_lab.parallel.gather import gather_model
from longcat_lab.parallel.placement import build_part
from longcat_lab.parallel.world import World
from longcat_lab.training import final
from longcat_lab.training.checkpoint import table_rows
from longcat_lab.training.divided_weights import PARTS, save_divided
from longcat_lab.training.evaluation import evaluate, evaluate_in_place
from longcat_lab.training.loss import plan_step
from longcat_lab.training.optimizer import make_optimizer
from longcat_lab.training.passes import hits
from longcat_lab.training.steps import Steps
from longcat_lab.training.weights import WEIGHTS
from tests.parallel.processes import dist_run

# Everything that a pass meets; weights so large that what a block does wrong moves the loss; six sequences in batches of four.
SETTINGS = [
    *("model.num_layers=2", "model.initializer_range=0.1", "model.embedding.ngram.kind=ngram_embedding", "model.embedding.ngram.order=3"),
    *("model.embedding.ngram.splits=2", "model.embedding.ngram.vocab_ratio=3.3", "model.attention.kind=lsa"),
    *("model.attention.index_topk=16", "model.attention.index_init_tokens=2", "model.attention.index_local_tokens=4"),
    *("model.attention.cli_factor=2", "model.mtp.num_nextn_predict_layers=2", "model.mtp.repeat_block=true"),
    *("training.evaluation_sequences=6", "data.batch_size=4", "training.precision=fp32"),
]
LAYOUTS = {
    "data_shard": ["data_shard=2"],
    "tensor": ["tensor=2"],
    "context": ["context=2"],
    "expert": ["expert=2"],
    "pipeline": ["pipeline=2"],
    "embedding": ["embedding=2"],
}
COPIES = ["data_replicate=2"]
ALL = ["pipeline=2", "context=2", "tensor=2", "expert=2", "embedding=4"]
CLOSE = 1e-6


def config_of(degrees=(), *more):
    return lab.load("tiny", *SETTINGS, "training.micro_batch_size=1", *(f"parallel.{each}" for each in degrees), *more)


def steps_of(config):
    world = World(config, torch.device("cpu"))
    model = (lab.build(config) if world.size == 1 else build_part(config, world)).train()
    make_optimizer(model, config.training.optimizer)  # says which gradients are sparse
    return Steps(model, config, world)


def measured(config, steps):
    corpus = prepare(config.data, config.model.vocab_size)
    return {**evaluate_in_place(steps.model, corpus, config, steps.over), **final.entry_of(steps, corpus, config)}


def gradients(config, steps):
    """The loss of one batch, and the gradients of what is here, which are left as they were before."""
    world, ways = steps.world, steps.world.layout.batch_ways
    tokens = torch.randint(0, 512, (4, 64), generator=torch.Generator().manual_seed(1)).chunk(ways)[world.batch_place]
    batch = Batch(tokens, tokens, torch.zeros_like(tokens))
    told = steps.gradients(batch, plan_step(batch, config, 0, world=world))
    found = [p.grad.to_dense() if p.grad.is_sparse else p.grad for p in steps.model.parameters() if p.grad is not None]
    for parameter in steps.model.parameters():
        parameter.grad = None
    return told["loss"], [getattr(each, "_local_tensor", each) for each in found]


def in_all_layouts(layouts, folder):
    """By layout: what is measured on each process; that it changes nothing for training; that the weights are written as they are."""
    found = {}
    for name, degrees in layouts.items():
        config = config_of(degrees)
        steps = steps_of(config)
        before = gradients(config, steps)
        found[name] = measured(config, steps)
        assert steps.model.training
        after = gradients(config, steps)
        assert before[0] == after[0] and all(torch.equal(a, b) for a, b in zip(before[1], after[1], strict=True)), name
        path = folder / name / WEIGHTS
        save_divided(steps.model, path, steps.world, table_rows(steps.model, steps.world), 60)
        whole = gather_model(steps.model, config, steps.world)
        if whole is not None:
            stored, held = load_file(path), whole.state_dict()
            assert stored.keys() == held.keys() and all(torch.equal(stored[key], held[key]) for key in held), name
            assert [each.name for each in path.parent.iterdir()] == [WEIGHTS]
            lab.build(config).load_state_dict(stored)
        if name == "tensor":
            check_hits(steps.model)
    return found


def check_hits(model):
    """Against argmax over the whole head; of equals the first counts, wherever it lies."""
    generator = torch.Generator().manual_seed(0)
    states, head = torch.randn(2, 40, 8, generator=generator), torch.randn(512, 8, generator=generator)
    likely = (states @ head.T).argmax(-1)
    labels = torch.where(torch.rand(2, 40, generator=generator) < 0.5, likely, (likely + 256) % 512)
    rows = slice(model.vocabulary.first, model.vocabulary.first + 256)
    part = types.SimpleNamespace(config=model.config, vocabulary=model.vocabulary, lm_head=types.SimpleNamespace(weight=head[rows]))
    assert hits(part, states, labels) == int((labels == likely).sum()) > 20
    part.lm_head.weight = torch.zeros(256, 8)
    assert hits(part, states, torch.zeros_like(labels)) == 80 and hits(part, states, torch.full_like(labels, 256)) == 0


def check(layouts, world, folder):
    config = config_of()
    expected = measured(config, steps_of(config))
    assert {"validation_bpb", "shuffled_bpb", "mtp_validation_loss_2", "mtp_accuracy_2", "first_attention_ratio"} <= expected.keys()
    for rank in dist_run(in_all_layouts, world, layouts, folder, timeout=60 * world, deadline=240 + 60 * world):
        for name, found in rank.items():
            assert found.keys() == expected.keys()
            for key, value in expected.items():
                assert found[key] == pytest.approx(value, rel=CLOSE), f"{name}: {key}"


def test_each_dimension_measures_what_one_process_measures(tmp_path):
    check(LAYOUTS, 2, tmp_path)


@pytest.mark.slow
def test_copies_and_all_dimensions_together_measure_what_one_process_measures(tmp_path):
    check({"copies": COPIES}, 2, tmp_path)
    check({"all": ALL}, 8, tmp_path)


def held_bytes():
    """Of all tensors of this process, each storage once."""
    seen = {}
    for each in gc.get_objects():
        if issubclass(type(each), torch.Tensor) and type(each) in (torch.Tensor, torch.nn.Parameter) and each.device.type == "cpu":
            storage = each.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
    return sum(seen.values())


def peaks(layouts, more):
    """By layout, bytes of the tensors that a process holds: before an evaluation, at most while layers run, after it, and with a copy."""
    found = []
    for degrees in layouts:
        config = config_of(degrees, *more)
        corpus, steps = prepare(config.data, config.model.vocab_size), steps_of(config)
        gc.collect()
        before, seen = held_bytes(), []
        for layer in steps.model.layers[1::4]:  # of the other stage: never called
            layer.register_forward_hook(lambda *_, seen=seen: seen.append(held_bytes()))
        evaluate(steps.model, corpus, config, "validation", over=steps.over)
        final.entry_of(steps, corpus, config)
        gc.collect()
        after = held_bytes()
        copy = gather_model(steps.model, config, steps.world)
        found.append((before, max(seen), after, held_bytes() if copy is not None else None))
        del config, corpus, steps, copy, layer
    return found


def test_no_process_holds_more_than_its_part_and_what_is_gathered_for_a_moment():
    """Twelve layers that outweigh the rest: six of them and what is gathered of a layer are far less than all."""
    more = ["model.num_layers=12", "model.mtp=null", "model.embedding.ngram=null", "model.attention.cli_factor=1"]
    more += ["training.evaluation_sequences=2", "data.sequence_length=16"]
    whole = lab.build(config_of((), *more))
    layer = sum(p.nbytes for p in whole.layers[0].parameters())
    rest = sum(p.nbytes for p in whole.parameters()) - 12 * layer
    first, second = dist_run(peaks, 2, (["data_shard=2"], ["pipeline=2"]), more)
    for sharded, staged in (first, second):
        for (before, highest, after, _), gathered in ((sharded, 2 * layer + rest), (staged, layer)):
            assert 6 * layer <= before <= 6 * layer + rest  # so it is counted
            assert highest <= before + gathered < 12 * layer  # activations are few
            assert after <= before + layer / 2
    assert all(with_a_copy >= 12 * layer for *_, with_a_copy in first)


def ended(folder, free, more):
    """run.json of a run on two processes; free: bytes that are said to be free."""
    from longcat_lab.training import device

    device.free_bytes = lambda place, known=device.free_bytes: known(place) if free is None else free
    config = config_of(["data_shard=2"], "training.steps=2", "training.evaluate_every=1", "training.schedule.warmup_steps=1", *more)
    run = lab.fit(config, folder, progress=False)
    return run.record if dist.get_rank() == 0 else None


def both(folder, more):
    return ended(folder / "room", None, more), ended(folder / "none", 100_000, more)


@pytest.mark.slow
def test_what_takes_a_whole_model_is_left_out_where_there_is_no_room_for_it(tmp_path):
    more = ["training.attention_measures=2", "training.evaluations.same={}", "training.evaluation_sequences=2"]
    config = config_of((), "training.steps=2", "training.evaluate_every=1", "training.schedule.warmup_steps=1", *more)
    alone = lab.fit(config, tmp_path / "alone", progress=False)
    room, none = dist_run(both, 2, tmp_path, more)[0]
    assert list(room["final"]) == list(alone.record["final"]) and "left_out" not in room
    close = {key: value for key, value in alone.record["final"].items() if key.endswith("_bpb")}
    assert {key: room["final"][key] for key in close} == pytest.approx(close, rel=1e-5)
    assert none["status"] == "finished" and len(none["left_out"]) == 1
    assert "accepted_length, speculation_rounds, attention measures, same/...: left out, for a whole copy of the model takes" in (
        json.dumps(none["left_out"])
    )
    gone = room["final"].keys() - none["final"].keys()
    assert {"accepted_length", "speculation_rounds", "topk_uncovered", "same/validation_bpb"} <= gone
    assert not {"validation_bpb", "shuffled_bpb", "mtp_validation_loss", "embedding_rms_final"} & gone
    assert none["final"] == {key: room["final"][key] for key in room["final"].keys() - gone}
    assert (tmp_path / "none" / WEIGHTS).read_bytes() == (tmp_path / "room" / WEIGHTS).read_bytes()
    assert not (tmp_path / "room" / PARTS).exists()
    assert lab.Run(tmp_path / "room").model is not None
