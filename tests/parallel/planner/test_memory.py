"""Predicted memory against what is really held: tensors of a small run, in a whole step, on the processes of a real layout.

Weights, gradients and optimizer state to the byte; activations and peak within a tenth. Sizes are such that activations outweigh the rest.
"""

import pytest
import torch

import longcat_lab as lab
from longcat_lab.parallel.layout import make_layout
from longcat_lab.parallel.planner import ACCELERATOR, predict_memory
from longcat_lab.parallel.planner.activations import CPU, layer_kept
from tests.parallel.planner.live import Live
from tests.parallel.planner.small_runs import step_in_memory
from tests.parallel.processes import dist_run

SIZES = [
    *("model.hidden_size=128", "model.ffn.ffn_hidden_size=192", "model.num_layers=2", "model.max_position_embeddings=256"),
    *("model.attention.num_attention_heads=4", "model.attention.q_lora_rank=64", "model.attention.kv_lora_rank=32"),
    *("model.attention.qk_nope_head_dim=16", "model.attention.qk_rope_head_dim=8", "model.attention.v_head_dim=24"),
    *("model.moe.expert_ffn_hidden_size=40", "data.sequence_length=256", "data.batch_size=4", "training.micro_batch_size=2"),
    *("training.precision=fp32", "model.mtp=null"),
]
LSA = [
    *("model.attention.kind=lsa", "model.attention.index_n_heads=2", "model.attention.index_head_dim=16", "model.attention.index_topk=64"),
    *("model.attention.index_local_tokens=16", "model.attention.cli_factor=2"),
]
MTP = "model.mtp={kind: mtp, num_nextn_predict_layers: 2"
AGAIN = "training.recompute=true"
ALONE = {
    "dense": (),
    "recomputed": (AGAIN,),
    "lsa": LSA,
    "lsa, recomputed": (*LSA, AGAIN),
    "prediction steps": (MTP + "}",),
    "prediction steps kept, lsa": (*LSA, MTP + ", recompute: false}"),
    "decoder, muon": ("model.layer.kind=decoder", "training.optimizer.kind=muon"),
}
FOUR = {
    "data_shard": ("parallel.data_shard=4",),
    "data_shard, one micro-batch": ("parallel.data_shard=4", "training.micro_batch_size=4"),
    "data_shard, expert, lsa, prediction steps": (*LSA, MTP + "}", "parallel.expert=2"),
    "tensor": ("parallel.tensor=2",),
    "pipeline, prediction steps": (MTP + "}", "parallel.pipeline=2"),
    "pipeline, tensor, recomputed": ("parallel.pipeline=2", "parallel.tensor=2", AGAIN),
}
BATCH = "data.batch_size=16"


def check(found, settings):
    """`found`: what each process held."""
    config = lab.load("tiny", *SIZES, *settings)
    layout = make_layout(config, len(found))
    stages = predict_memory(config, layout)
    for rank, held in enumerate(found):
        predicted = stages[rank // layout.stage_size]
        if rank % layout.stage_size == 0:
            each = predicted.tables // 16  # of a weight of four bytes: it, its gradient, two moments; and step counts
            own = predicted.weights + 4 * each, predicted.gradients + 4 * each, predicted.state + predicted.tables - 8 * each
            assert own == (held["weights"], held["gradients"], held["state"])
        if layout.embedding == 1:
            assert held["state"] <= predicted.state and held["weights"] <= predicted.weights  # padding lies on the last ones
        assert predicted.total == pytest.approx(held["peak"], rel=0.1), rank
        if layout.pipeline == 1:  # in pipelines weights come and go between passes too
            made = predicted.activations + ends(config, layout)
            assert made == pytest.approx(held["forward"], rel=0.1), rank


def ends(config, layout):
    """What a forward pass leaves beside activations: the head's gradient, and gathered weights of embedding, head, norms and projection."""
    c = config.model
    rows = c.vocab_size * c.hidden_size // layout.tensor
    gathered = rows + c.vocab_size * c.hidden_size + c.hidden_size + (c.mtp is not None) * (2 * c.hidden_size**2 + 3 * c.hidden_size)
    return 4 * (rows + (gathered if layout.data_shard > 1 else 0))


def alone(names):
    return [step_in_memory([*SIZES, *ALONE[name]]) for name in names]


def test_a_step_of_one_process():
    [held] = alone(["dense"])
    check([held], ALONE["dense"])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ALONE if name != "dense"])
def test_steps_of_one_process(name):
    check(alone([name]), ALONE[name])


def all_of_them():
    return {name: step_in_memory([*SIZES, BATCH, *settings]) for name, settings in FOUR.items()}


@pytest.fixture(scope="module")
def runs():
    return dist_run(all_of_them, 4, deadline=600)


@pytest.mark.slow
@pytest.mark.parametrize("name", FOUR)
def test_steps_of_four_processes(runs, name):
    check([found[name] for found in runs], (BATCH, *FOUR[name]))


EIGHT = {
    "pipeline, context, tensor, expert, embedding": (
        *("parallel.pipeline=2", "parallel.context=2", "parallel.tensor=2", "parallel.expert=2", "parallel.embedding=4"),
        *("model.embedding.ngram.order=3", "model.embedding.ngram.splits=2", "model.embedding.ngram.table_rows=101"),
        "training.optimizer.table_optimizer=adamw",
    ),
    "context, data_replicate, expert": ("parallel.context=2", "parallel.data_replicate=2", "parallel.expert=2"),
}


def eight_of_them():
    return {name: step_in_memory([*SIZES, BATCH, *settings]) for name, settings in EIGHT.items()}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_steps_of_eight_processes():
    runs = dist_run(eight_of_them, 8, deadline=600)
    for name, settings in EIGHT.items():
        check([found[name] for found in runs], (BATCH, *settings))


def test_tables_of_another_optimizer_are_not_reckoned():
    tables = ("model.embedding.ngram.order=3", "model.embedding.ngram.splits=2", "model.embedding.ngram.table_rows=101")
    config = lab.load("tiny", *SIZES, *tables, "training.optimizer.table_optimizer=row_wise")
    with pytest.raises(lab.LabError, match="table_optimizer is row_wise: set it to adamw"):
        predict_memory(config, make_layout(config, 1))


def test_live_bytes_are_those_of_storages():
    """Made, viewed, freed, emptied and filled again in place."""
    with Live(torch.zeros(10)) as live:
        assert live.now == 0  # gone already
        a = torch.ones(1000)
        b = a[:10]  # the same storage
        assert live.now == 4000
        c = a * 2 + 1
        assert live.now == 8000 and live.peak == 12000
        del a
        assert live.now == 8000
        del b
        assert live.now == 4000
        c.untyped_storage().resize_(0)
        assert live.now == 0
        c.untyped_storage().resize_(400)
        assert live.now == 400 and live.peak == 12000


def test_an_accelerator_keeps_the_same_tensors_narrower():
    """What a CPU keeps beside is named; all else is twice as wide there, or of a fixed width in both."""
    config = lab.load("tiny", *SIZES)
    place = config.model.shape()
    narrow, wide = ({each.name: each.bytes for each in layer_kept(config.model.layer, place, keep)} for keep in (ACCELERATOR, CPU))
    for name in narrow.keys() & wide.keys():
        assert wide[name] in (narrow[name], 2 * narrow[name]), name
    assert narrow.keys() - wide.keys() == {"router input", "experts' product"}
    assert all("mean square" in name or "order of picks" in name for name in wide.keys() - narrow.keys())
    layout = make_layout(config, 1)
    assert predict_memory(config, layout, ACCELERATOR)[0].activations < predict_memory(config, layout)[0].activations
