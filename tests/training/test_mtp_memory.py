"""What a prediction step costs in memory at a vocabulary of 32k: bytes that torch holds at the highest point of a real training step."""

import json

import torch
from torch.profiler import ProfilerActivity, profile

import longcat_lab as lab
from longcat_lab.data import Batch
from longcat_lab.training.loss import plan_step, step_loss
from longcat_lab.training.optimizer import make_optimizer

VOCABULARY = 32768


def peak(tmp_path, *settings):
    """Bytes at the highest point of the second step: weights, optimizer state, activations, gradients, work space."""
    config = lab.load("nano", f"model.vocab_size={VOCABULARY}", "data.batch_size=8", *settings)
    model = lab.build(config).train()
    optimizer = make_optimizer(model, config.training.optimizer)
    rows, length = config.data.batch_size, config.data.sequence_length

    def step():
        tokens = torch.randint(0, VOCABULARY, (rows, length + 1))
        batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), torch.zeros(rows, length, dtype=torch.int64))
        loss, _ = step_loss(model, batch.tokens, batch.labels, batch.document_ids, config, plan_step(batch, config, 0), 1.0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()  # makes the optimizer's state
    held = [*model.parameters(), *model.buffers(), *(t for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t))]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    seen.export_chrome_trace(str(tmp_path / "trace.json"))
    events = [e for e in json.loads((tmp_path / "trace.json").read_text())["traceEvents"] if e.get("name") == "[memory]"]
    running, highest = 0, 0
    for event in sorted(events, key=lambda e: e["ts"]):
        running += event["args"]["Bytes"]
        highest = max(highest, running)
    assert highest > rows * length * config.model.hidden_size * 4
    return sum(t.nbytes for t in held) + highest


def test_one_more_step_adds_at_most_a_tenth_to_the_peak(tmp_path):
    without, one, two = (peak(tmp_path, *([f"model.mtp.num_nextn_predict_layers={d}"] if d else [])) for d in (0, 1, 2))
    assert one < 1.10 * without and two < 1.10 * one
    assert two - one < 8 * 256 * VOCABULARY * 4 / 8  # far from a second set of logits
