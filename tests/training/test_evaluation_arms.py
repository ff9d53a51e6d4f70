"""Trained weights, evaluated with other settings: the same tensors, the hand-made numbers, and mistakes named before training."""

import math

import pytest
import torch

import longcat_lab as lab
from longcat_lab.config import apply, load
from longcat_lab.data import evaluation_batches
from longcat_lab.errors import LabError
from longcat_lab.files import read_json
from longcat_lab.model import LongcatLM, build
from longcat_lab.training import evaluate_all
from longcat_lab.training.device import deterministic
from longcat_lab.training.evaluation_arms import check, evaluate_arms, with_weights
from longcat_lab.training.weights import WEIGHTS, load_weights

ARMS = {
    "same": {},
    "wider": {"model.moe.moe_topk": 3},
    "turned": {"model.rope.theta": 50.0},
    "trunk": {"model.mtp": None},
    "rehashed": {"model.embedding.ngram.hash_seed": 7},
}
ARMS_OF_TWO = {"trunk": {"model.mtp": None}, "turned": {"model.mtp": None, "model.rope.theta": 50.0}}
# One hash in training and another in evaluation: same tables, other rows. Its numbers are a buffer that is no part of the weights.
SETTINGS = {
    "training.steps": 6,
    "training.schedule.warmup_steps": 2,
    "model.mtp.num_nextn_predict_layers": 2,
    "model.embedding.ngram.order": 3,
    "model.embedding.ngram.hash": "permuted",
    "training.optimizer.learning_rate": 0.02,
}


def metrics(final, name):
    return {key.removeprefix(f"{name}/"): value for key, value in final.items() if key.startswith(f"{name}/")}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config = apply("tiny", {**SETTINGS, "training.evaluations": ARMS})
    return lab.fit(config, tmp_path_factory.mktemp("run") / "run", progress=False)


def by_hand(run, overrides):
    """The saved weights in an ordinary model of other settings; what it has no place for is left in the file."""
    config = apply(run.config, overrides)
    model, stored = build(config), run.model.state_dict()
    kept = {name: stored[name].clone() for name in model.state_dict()}
    model.load_state_dict(kept)
    with deterministic(config.training.threads):  # the same bits as in the run
        return evaluate_all(model.eval(), run.corpus, config)


def test_the_same_settings_give_the_runs_own_metrics_to_the_bit(run):
    final = run.record["final"]
    same = metrics(final, "same")
    assert {"validation_bpb", "shuffled_bpb", "out_of_distribution_bpb", "mtp_accuracy_2", "accepted_length"} <= set(same)
    assert same == {key: final[key] for key in same} and all(math.isfinite(value) for value in same.values())
    assert not any(key.startswith("same/") for key in final if key.partition("/")[2] in ("train_loss", "epochs", "tokens"))


@pytest.mark.parametrize("name", ["wider", "turned", "trunk", "rehashed"])
def test_other_settings_give_what_the_saved_weights_give_by_hand(run, name):
    found, final = metrics(run.record["final"], name), run.record["final"]
    assert found == by_hand(run, ARMS[name])
    if name == "trunk":  # the prediction steps are dropped, and the trunk is what it was
        assert set(found) == {"validation_bpb", "shuffled_bpb", "out_of_distribution_bpb"}
        assert found == {key: final[key] for key in found}
    else:
        assert found["validation_bpb"] != final["validation_bpb"]


def test_bits_per_byte_of_an_arm_from_scratch(run):
    """Not by the library's own loop: log-probabilities of each label, in float64, over the labels' bytes."""
    model = LongcatLM(apply(run.config, ARMS["turned"]).model)
    load_weights(model, run.path / WEIGHTS)
    model, config, nats, count = model.double().eval(), run.config, 0.0, 0
    sizes = torch.as_tensor(run.corpus.token_bytes)
    for batch in evaluation_batches(run.corpus.split("validation"), config.data.sequence_length, 2, config.training.evaluation_sequences):
        with torch.no_grad():
            logits = model(batch.tokens, batch.document_ids)
        labels = batch.labels.clamp(min=0)
        told = (batch.labels >= 0) & (sizes[labels] > 0)
        nats -= float(logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0][told].sum())
        count += int(sizes[labels][told].sum())
    assert metrics(run.record["final"], "turned")["validation_bpb"] == pytest.approx(nats / math.log(2) / count, rel=1e-5)


@pytest.mark.parametrize(
    "embedding",
    [
        {"model.embedding.ngram.hash": "permuted"},
        {
            "model.embedding.ngram.kind": "bigram_lambda",
            "model.embedding.ngram.sign_rows": 64,
        },  # its fixed signs are no part of the weights
    ],
)
def test_tensors_are_shared_and_the_trained_model_stays_as_it_is(run, embedding):
    config = apply("tiny", {"model.mtp.num_nextn_predict_layers": 2, **embedding, "training.evaluations": ARMS_OF_TWO})
    model, fresh = build(config), build(apply(config, ARMS_OF_TWO["trunk"]), seed=5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    drawn = torch.get_rng_state()
    other = with_weights(apply(config, ARMS_OF_TWO["trunk"]), model)
    own, wanted = model.state_dict(), dict(fresh.named_buffers())
    assert set(other.state_dict()) == set(fresh.state_dict()) < set(own)
    for name, tensor in other.state_dict().items():
        assert tensor.data_ptr() == own[name].data_ptr() and torch.equal(tensor, own[name]), name
    made = {name: buffer for name, buffer in other.named_buffers() if name not in own}
    assert len(made) > 5 and all(torch.equal(buffer, wanted[name]) for name, buffer in made.items()), "as in any new model"
    assert any(buffer.any() for buffer in made.values()) and not other.training and model.training
    found = evaluate_arms(model, run.corpus, config)
    assert len(found) == 6 and found["trunk/validation_bpb"] != found["turned/validation_bpb"]
    assert torch.equal(drawn, torch.get_rng_state()), "nothing was drawn: what comes after goes on alike"
    assert model.training and all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(parameter.is_meta for parameter in build(config).parameters()), "a model that is built afterwards has its weights"


def test_arms_leave_the_runs_own_numbers_alone(run, tmp_path):
    plain = lab.fit(apply(run.config, {"training.evaluations": {}}), tmp_path / "plain", progress=False)
    with_arms = {key: value for key, value in run.record["final"].items() if "/" not in key}
    assert plain.record["final"] == with_arms
    assert plain.record["identity"] != run.record["identity"]


@pytest.mark.parametrize(
    ("arms", "sentence"),
    [
        ({"a": {"training.steps": 3}}, r"training\.evaluations\.a sets 'training\.steps': only settings of the model"),
        ({"a": {"seed": 3}}, r"training\.evaluations\.a sets 'seed'"),
        ({"a/b": {}}, "the name 'a/b' is not of letters, digits, - and _ alone"),
        ({"a": {"model.moe.moe_topp": 1}}, r"training\.evaluations\.a: Unknown key 'model\.moe\.moe_topp', did you mean 'moe_topk'"),
        ({"a": {"model.max_position_embeddings": 8}}, r"training\.evaluations\.a: data\.sequence_length 64 is above"),
        (
            {"ok": {}, "a": {"model.moe.n_shared_experts": 1}},
            r"training\.evaluations\.a needs tensors that this run does not train: layers\.0\.\S*shared_experts\.\S+ \[",
        ),
        ({"a": {"model.num_layers": 2}}, r"not train: layers\.1\.\S+ \[.*\], .* and \d+ more; set only what"),
        ({"a": {"model.ffn.ffn_hidden_size": 40}}, r"mlps\S* \[\d+, 32\] \(trained: \[\d+, 32\]\)"),
    ],
)
def test_mistakes_are_named_before_training(tmp_path, arms, sentence):
    config = apply("tiny", {"training.evaluations": arms})
    with pytest.raises(LabError, match=sentence) as error:
        check(config)
    assert "\n" not in str(error.value)
    with pytest.raises(LabError, match=sentence):
        lab.fit(config, tmp_path / "run", progress=False)
    assert read_json(tmp_path / "run" / "run.json") is None and not list((tmp_path / "run").glob("*.parquet"))


def test_without_arms_nothing_is_asked(tmp_path):
    assert load("tiny").training.evaluations == {}
    check(load("tiny"))
    assert evaluate_arms(torch.nn.Identity(), None, load("tiny")) == {}
