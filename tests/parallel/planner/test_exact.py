"""Predicted bytes of a whole optimizer step against those that real processes send, to the byte: every operator of torch.distributed is
counted, from the counting of labels to the question whether to stop."""

import pytest
import torch
import torch.distributed as dist

import longcat_lab as lab
from longcat_lab.config import ParallelConfig
from longcat_lab.parallel import placement, wire
from longcat_lab.parallel.layout import make_layout
from longcat_lab.parallel.planner import by_kind, by_purpose, predict_marks, predict_memory, predict_step
from tests.parallel.planner.small_runs import SmallRun, held_bytes, one_step, step_in_memory
from tests.parallel.processes import dist_run

PLAIN = [
    *("model.num_layers=2", "data.sequence_length=16", "data.batch_size=8", "training.precision=fp32", "model.moe.n_routed_experts=4"),
    *("training.micro_batch_size=1", "model.mtp.num_nextn_predict_layers=1"),
]
TABLES = ["model.embedding.ngram.order=3", "model.embedding.ngram.splits=2", "model.embedding.ngram.table_rows=101"]
LSA = [
    *("model.attention.kind=lsa", "model.attention.index_n_heads=2", "model.attention.index_head_dim=16", "model.attention.index_topk=8"),
    *("model.attention.index_local_tokens=2", "model.attention.cli_factor=2"),
]
RICH = [
    *("model.mtp.num_nextn_predict_layers=2", "model.moe.balance_loss_alpha=0.01", "model.moe.balance_groups=2"),
    "training.z_loss_weight=1e-4",
]
MUON = "training.optimizer.kind=muon"
AGAIN = "training.recompute=true"
LAYOUTS = {
    "tensor, expert, embedding": (*TABLES, "parallel.tensor=2", "parallel.expert=2", "parallel.embedding=4"),
    "context, expert, lsa": (*LSA, *RICH, "parallel.context=2", "parallel.expert=4"),
    "context, tensor, lsa, recomputed": (*LSA, *RICH, "parallel.context=2", "parallel.tensor=2", AGAIN),
    "tensor, expert, recomputed": ("parallel.tensor=2", "parallel.expert=2", AGAIN),
    "data_replicate, tables": (*TABLES, "parallel.data_replicate=2", "parallel.embedding=2"),
    "data_replicate, sparse tables": (
        *(*TABLES, "parallel.data_replicate=4", "parallel.embedding=2"),
        "training.optimizer.table_optimizer=lazy_adam",
    ),
    "data_shard": (),
    "data_shard, expert, recomputed": ("parallel.expert=2", AGAIN),
    "pipeline, prediction steps": (*TABLES, "parallel.pipeline=2", "model.mtp.num_nextn_predict_layers=2"),
    "data_shard, muon": (*TABLES, MUON, "parallel.expert=2", "model.mtp.num_nextn_predict_layers=2"),
    "all but pipeline, muon": (MUON, "parallel.expert=4", "parallel.tensor=2", "parallel.context=2"),
    "pipeline, tensor, muon": (MUON, "parallel.pipeline=2", "parallel.tensor=2"),
    "serial, shared experts": (
        *(MUON, AGAIN, "parallel.expert=4", "parallel.tensor=2", "model.layer.kind=serial", "model.mtp.own_embedding=true"),
        *("model.mtp.block=layer", "model.moe.n_shared_experts=1"),
    ),
    "a row to each process, in chunks": (
        *("parallel.expert=4", "parallel.tensor=2", "parallel.dispatch=process", "parallel.moe_chunks=2", AGAIN),
    ),
    "decoder, uneven rows": (
        *("model.layer.kind=decoder", "parallel.expert=2", "parallel.tensor=2", AGAIN, "model.mtp.loss_weight=0", "model.vocab_size=514"),
    ),
}
EIGHT = {
    "all six": (*TABLES, *LSA, *RICH, MUON, "parallel.pipeline=2", "parallel.tensor=2", "parallel.expert=2", "parallel.embedding=4"),
    "context": (*LSA, *RICH, "parallel.pipeline=2", "parallel.context=2", "parallel.tensor=2", "parallel.expert=4"),
}
# What `collectives.counted` has a part of only: FSDP2's own, states between stages, sums of the loop.
NOT_COUNTED = ("data", "pipeline", "loop")


def measured(layouts):
    return {name: one_step([*PLAIN, *settings]) for name, settings in layouts.items()}


def check(found, name, settings):
    """`found`: what each process returned."""
    config = lab.load("tiny", *PLAIN, *settings)
    layout = make_layout(config, len(found))
    for rank, (travelled, traffic, sent) in enumerate(found):
        predicted = predict_step(config, layout, travelled, rank)
        calls, sizes = sent.calls_by_kind(), sent.by_kind()
        assert by_kind(predicted) == {kind: (calls[kind], sizes.get(kind, 0)) for kind in calls}, (name, rank)
        assert sum(each.bytes for each in predicted) == sent.total
        purposes = by_purpose(predicted)
        for purpose in {*purposes, *traffic} - {*NOT_COUNTED}:
            assert purposes[purpose] == traffic.get(purpose, 0), (name, purpose, rank)


SMALL = (*TABLES, *LSA, MUON, "parallel.tensor=2", "parallel.expert=2", "parallel.embedding=2")
SHARDED = (*TABLES, "training.optimizer.table_optimizer=lazy_adam", "parallel.expert=2", "training.micro_batch_size=2")
# Large enough that activations are most of what there is.
WIDE = [
    *("model.hidden_size=128", "model.ffn.ffn_hidden_size=192", "model.num_layers=2", "model.max_position_embeddings=256"),
    *("data.sequence_length=256", "training.precision=fp32", "training.micro_batch_size=2", "data.batch_size=8", "model.mtp=null"),
    *("model.attention.num_attention_heads=4", "model.attention.q_lora_rank=64", "model.attention.kv_lora_rank=32"),
]


def both():
    """Traffic of two small layouts, and memory of one."""
    traffic = measured({"small": SMALL, "sharded": SHARDED})
    return traffic, step_in_memory(WIDE)


def test_two_processes_send_and_hold_what_was_predicted():
    found = dist_run(both, 2)
    for name, settings in (("small", SMALL), ("sharded", SHARDED)):
        check([traffic[name] for traffic, _ in found], name, settings)
    travelled, traffic, _ = found[0][0]["small"]
    assert travelled.picks_sent and travelled.picks_answered and travelled.rows_asked and travelled.rows_answered
    assert all(traffic[purpose] for purpose in ("expert", "embedding", "tensor", "norm", "data"))
    config = lab.load("tiny", *WIDE)
    [predicted] = predict_memory(config, make_layout(config, 2))
    held = found[0][1]
    assert (predicted.weights, predicted.gradients, predicted.state) == (held["weights"], held["gradients"], held["state"])
    assert predicted.total == pytest.approx(held["peak"], rel=0.1)


@pytest.fixture(scope="module")
def runs():
    return dist_run(measured, 4, LAYOUTS, deadline=900)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_four_processes_send_what_was_predicted(runs, name):
    check([found[name] for found in runs], name, LAYOUTS[name])


@pytest.mark.slow
def test_eight_processes_send_what_was_predicted():
    found = dist_run(measured, 8, EIGHT, timeout=300, deadline=900)
    for name, settings in EIGHT.items():
        check([each[name] for each in found], name, settings)


def marks(settings):
    run = SmallRun([*PLAIN, *settings])
    with wire.counted() as sent:
        placement.merge_marks(run.model, run.world)
    return sent.total


@pytest.mark.slow
def test_marks_of_rows_that_were_read():
    settings = (*TABLES, "parallel.embedding=2")
    config = lab.load("tiny", *PLAIN, *settings)
    [expected] = predict_marks(config, make_layout(config, 2))
    assert dist_run(marks, 2, settings) == [expected.bytes] * 2


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("training.precision=bf16", "not reckoned under training.precision bf16"),
        ("model.embedding.ngram.kind=ple", "reckoned for model.embedding.ngram.kind=ngram_embedding alone"),
    ],
)
def test_what_is_not_reckoned_is_said(setting, sentence):
    config = lab.load("tiny", "data.sequence_length=16", setting)
    with pytest.raises(lab.LabError, match=sentence):
        predict_step(config, make_layout(config, 2))


def test_one_process_sends_nothing():
    config = lab.load("tiny", *PLAIN, *TABLES)
    assert predict_step(config, make_layout(config, 1)) == [] and config.parallel == ParallelConfig()
    assert not dist.is_initialized() and held_bytes([torch.zeros(3)]) == 12
