"""From dense to sparse on two processes: each stage as on one, through a checkpoint in the middle of the warm-up."""

import pytest
import torch
import torch.distributed as dist

import longcat_lab as lab
from tests.parallel.processes import dist_run

SETTINGS = [
    *(
        "model.num_layers=2",
        "model.embedding.ngram.kind=ngram_embedding",
        "model.embedding.ngram.order=2",
        "model.embedding.ngram.splits=2",
    ),
    *("model.attention.kind=lsa", "model.attention.index_topk=16", "model.attention.index_head_dim=16"),
    *("model.attention.index_init_tokens=2", "model.attention.index_local_tokens=4", "model.attention.cli_factor=2"),
    *("model.mtp.num_nextn_predict_layers=1", "model.moe.balance_loss_alpha=0.01", "model.moe.balance_groups=2"),
    *("training.conversion.dense_steps=2", "training.conversion.warmup_steps=3", "training.steps=7", "training.schedule.warmup_steps=1"),
    *("training.log_every=1", "training.evaluate_every=4", "training.evaluation_sequences=2", "training.micro_batch_size=2"),
    *("training.precision=fp32", "data.sequence_length=32", "training.keep_model=false"),
]
LAYOUTS = {
    "data_shard": ["data_shard=2"],
    "context": ["context=2"],
    "tensor": ["tensor=2"],
    "pipeline": ["pipeline=2"],
    "data_replicate": ["data_replicate=2"],
    "experts and tables": ["expert=2", "embedding=2"],
}
STOP = 4  # two of three steps of the warm-up done
FIRST, LAST = 1e-6, 2e-5  # of a mean loss near 6 nats: sums in another order, and what AdamW makes of them


def curve(degrees, folder, more=()):
    """The logged rows of a run that is stopped in the warm-up and goes on from its checkpoint."""
    config = lab.load("tiny", *SETTINGS, *(f"parallel.{each}" for each in degrees), *more)
    asked = []
    stopped = lab.fit(config, folder, progress=False, stop=lambda: asked.append(1) or len(asked) == STOP)
    if not dist.is_initialized() or dist.get_rank() == 0:
        assert stopped.record["status"] == "interrupted" and (folder / f"checkpoint-{STOP:08d}").exists()
    run = lab.fit(config, folder, progress=False)
    return {key: values.tolist() for key, values in run.metrics.items()}, run.record["final"]


def curves(layouts, folder, more=()):
    found = {name: curve(degrees, folder / name, more) for name, degrees in layouts.items()}
    return found if dist.get_rank() == 0 else None


def check(layouts, folder, more=(), last=LAST):
    expected, final = curve((), folder / "alone", more)
    found = dist_run(curves, 2, layouts, folder, more, timeout=120, deadline=600)[0]
    divergences = [key for key in expected if key.endswith("/index_kl")]
    assert divergences and torch.tensor(expected[divergences[0]])[:2].isnan().all()
    for name, (rows, end) in found.items():
        assert rows.keys() == expected.keys() and rows["step"] == expected["step"] == list(range(1, 8)), name
        error = (torch.tensor(rows["loss"]) / torch.tensor(expected["loss"]) - 1).abs()
        assert error[0] <= FIRST and error.max() <= last, f"{name}: {error}"
        for key in (*divergences, "gradient_norm", "validation_bpb"):
            one, other = (torch.tensor(each[key], dtype=torch.float64) for each in (expected, rows))
            torch.testing.assert_close(other, one, rtol=2e-3, atol=1e-6, equal_nan=True, msg=lambda s, n=name, k=key: f"{n}: {k}: {s}")
        assert end.keys() == final.keys()
        assert end["validation_bpb"] == pytest.approx(final["validation_bpb"], rel=last), name


def test_each_stage_learns_what_one_process_learns(tmp_path):
    check({name: LAYOUTS[name] for name in ("data_shard", "context", "tensor")}, tmp_path)


@pytest.mark.slow
def test_with_stages_experts_and_tables_elsewhere(tmp_path):
    check({name: LAYOUTS[name] for name in ("pipeline", "experts and tables", "data_replicate")}, tmp_path)


@pytest.mark.slow
def test_frozen_matrices_are_left_alone_by_muon_too(tmp_path):
    """Its products are in bf16, and so are what it sends: where sums meet in another order steps differ more than AdamW's."""
    check({"data_shard": LAYOUTS["data_shard"]}, tmp_path, ["training.optimizer.kind=muon"], last=1e-4)
