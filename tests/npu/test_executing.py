"""The same runs on a device `npu` that computes on the CPU, with gloo as `hccl`: nothing in the library assumes cuda, nccl or a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import longcat_lab as lab
from tests.npu import executing

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
STEPS = 5
SETTINGS = [
    "model.num_layers=2",
    "model.embedding.ngram.kind=ngram_embedding",
    "model.embedding.ngram.order=3",
    "model.embedding.ngram.splits=2",
    "model.embedding.ngram.vocab_ratio=3.3",
    "model.attention.kind=lsa",
    "model.attention.index_n_heads=2",
    "model.attention.index_head_dim=16",
    "model.attention.index_topk=16",
    "model.attention.index_init_tokens=2",
    "model.attention.index_local_tokens=4",
    "model.attention.cli_factor=2",
    "model.mtp.num_nextn_predict_layers=1",
    "model.moe.balance_loss_alpha=0.01",
    "training.precision=fp32",
    f"training.steps={STEPS}",
    "training.log_every=1",
    "training.checkpoint_every=1000",
    "training.evaluation_sequences=2",
    "training.micro_batch_size=2",
]
LAYOUTS = {
    "data": [],
    "data and experts": ["parallel.expert=2"],
    "tensor": ["parallel.tensor=2"],
    "tensor and experts": ["parallel.tensor=2", "parallel.expert=2"],
    "context": ["parallel.context=2"],
    "pipeline": ["parallel.pipeline=2"],
    "tables": ["parallel.embedding=2"],
}
# As between one and many processes (tests/parallel/test_equality.py): sums in another order, which AdamW amplifies step by step.
LOSS = 2e-5


@pytest.fixture(scope="module")
def device():
    if executing.compiler() is None:
        pytest.skip("there is no C++ compiler to build the executing device with")
    return executing.built()


@pytest.fixture(scope="module")
def on_the_cpu(tmp_path_factory):
    return lab.fit(lab.load("tiny", *SETTINGS, "training.device=cpu"), tmp_path_factory.mktemp("cpu") / "run", progress=False)


def environment():
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])}


def trained(folder, processes, runs):
    """What each process saw, by rank; the runs are in `folder/NAME`."""
    work = folder / "work.json"
    work.write_text(json.dumps({"folder": str(folder), "runs": {name: [*SETTINGS, *more] for name, more in runs.items()}}))
    program = [str(Path(executing.__file__).with_name("training.py")), str(work)]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    done = subprocess.run([sys.executable, *launcher, *program], capture_output=True, text=True, env=environment(), timeout=1200)
    assert done.returncode == 0, done.stderr[-6000:]
    return [json.loads((folder / f"seen-{rank}.json").read_text()) for rank in range(processes)]


def assert_same_losses(run, expected, name):
    losses, others = (torch.tensor(each.metrics["loss"].tolist()) for each in (run, expected))
    assert len(losses) == STEPS
    assert ((losses - others) / others).abs().max() <= LOSS, (name, losses, others)
    assert run.summary["validation_bpb"] == pytest.approx(expected.summary["validation_bpb"], rel=LOSS), name


def test_one_process_trains_as_on_a_cpu(device, on_the_cpu, tmp_path):
    seen = trained(tmp_path, 1, {"alone": []})[0]
    run = lab.Run(tmp_path / "alone")
    assert_same_losses(run, on_the_cpu, "alone")
    told = json.loads((tmp_path / "alone" / "run.json").read_text())
    assert told["provenance"]["device"] == "npu" or told["device"].startswith("npu")
    assert seen["alone"]["first"] == "interrupted" and seen["alone"]["then"] == "finished"
    assert seen["bytes"] > sum(parameter.nbytes for parameter in lab.build(lab.load("tiny", *SETTINGS)).parameters())


def test_two_processes_train_as_one_in_every_layout(device, on_the_cpu, tmp_path):
    seen = trained(tmp_path, 2, LAYOUTS)
    for rank, each in enumerate(seen):
        assert each["device"] == rank  # its own, not the first
        assert each["backends"] == ["gloo", "hccl"]
        for name in LAYOUTS:
            assert each[name]["collectives"] > STEPS, name
            assert each[name]["first"] == "interrupted" and each[name]["then"] == "finished"
    for name in LAYOUTS:
        assert_same_losses(lab.Run(tmp_path / name), on_the_cpu, name)


def test_adapters_of_the_vendors_operators_compute_what_our_references_do(device):
    """Against what the vendor documents of its operators, in plain PyTorch: the mapping of arguments, not the operators."""
    program = str(Path(executing.__file__).with_name("adapters.py"))
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, env=environment(), timeout=600)
    assert done.returncode == 0, done.stderr[-6000:]
