"""From dense to sparse within a run: stages, what is frozen, what is read, and that stopping in any stage changes no bit."""

import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import longcat_lab as lab
from longcat_lab.blocks.sparse_attention.module import SparseAttention
from longcat_lab.config import ConfigError, load
from longcat_lab.data import Batch, prepare
from longcat_lab.errors import LabError
from longcat_lab.training import conversion
from longcat_lab.training.attention_measures import attention_measures
from longcat_lab.training.batches import Batches
from longcat_lab.training.schedule import learning_rate_factor

SPARSE = ["model.attention.kind=lsa", "model.attention.index_topk=12", "model.attention.index_head_dim=12", "model.num_layers=1"]
SPARSE += ["model.attention.index_local_tokens=4", "training.log_every=1", "data.batch_size=2", "training.evaluation_sequences=2"]
PLAN = ["training.conversion.dense_steps=3", "training.conversion.warmup_steps=4"]


def config(*overrides):
    return load("tiny", *SPARSE, *overrides)


def test_stages_follow_each_other():
    plan = config(*PLAN, "training.steps=10", "training.schedule.warmup_steps=1")
    assert [conversion.stage_at(plan, step) for step in range(10)] == ["dense"] * 3 + ["warmup"] * 4 + ["sparse"] * 3
    assert conversion.stage_at(config(), 0) == "sparse"


def test_the_schedule_stands_still_in_the_warm_up():
    plan, plain = config(*PLAN, "training.steps=30"), config("training.steps=26")
    others = [step for step in range(30) if conversion.stage_at(plan, step) != "warmup"]
    rates = [learning_rate_factor(*conversion.schedule_clock(plan, step), plan.training.schedule) for step in others]
    assert rates == [learning_rate_factor(step, 26, plain.training.schedule) for step in range(26)]


def stopped(overrides, folder, steps):
    """The weights of a run that was stopped after so many steps."""
    asked = []
    lab.fit(config(*overrides), folder, progress=False, stop=lambda: asked.append(1) or len(asked) == steps)
    kept = load_file(folder / f"checkpoint-{steps:08d}" / "part-00000.safetensors")
    weights = lab.build(config(*overrides)).state_dict()
    return {name: kept[f"model/{name}"] for name in weights}


def test_the_dense_stage_is_a_dense_model(tmp_path):
    """The same weights as after so many steps of MLA: the indexers neither learn nor decay meanwhile."""
    steps = ["training.steps=8", "training.schedule.warmup_steps=1", "model.moe.zero_expert_num=2"]
    found = stopped(["training.conversion.dense_steps=7", *steps], tmp_path / "sparse", 5)
    dense = stopped([*steps, "model.attention.selection.kind=dense"], tmp_path / "dense", 5)
    start = lab.build(config(*steps)).state_dict()
    assert found.keys() - dense.keys() == {name for name in found if ".indexer." in name} != set()
    assert all(torch.equal(found[name], dense[name]) for name in dense)
    assert all(torch.equal(found[name], start[name]) for name in found.keys() - dense.keys())


def test_the_warm_up_moves_the_indexers_alone(tmp_path):
    steps = [*PLAN, "training.steps=10", "training.schedule.warmup_steps=1", "model.embedding.ngram.order=2"]
    before, after = stopped(steps, tmp_path / "before", 3), stopped(steps, tmp_path / "after", 7)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if ".indexer." in name} != set()


def test_what_follows_the_warm_up_is_trained_on_what_it_would_have_been_trained_on_without(tmp_path):
    """With sparse attention that leaves nothing out, the language model of both runs is the same to the last bit."""
    same = ["model.attention.index_topk=64", "model.mtp.num_nextn_predict_layers=1", "training.schedule.warmup_steps=1"]
    plan = [*PLAN, "training.steps=10"]
    warmed = lab.fit(config(*same, *plan), tmp_path / "warmed", progress=False)
    plain = lab.fit(config(*same, "training.steps=6"), tmp_path / "plain", progress=False)
    others = [name for name in plain.model.state_dict() if ".indexer." not in name]
    assert all(torch.equal(warmed.model.state_dict()[name], plain.model.state_dict()[name]) for name in others)
    assert warmed.metrics["loss"].tolist()[-1] == plain.metrics["loss"].tolist()[-1]


@pytest.mark.parametrize("at", [2, 3, 5, 7, 8])
def test_a_run_stopped_in_any_stage_goes_on_with_the_same_bits(tmp_path_factory, tmp_path, at):
    overrides = [*PLAN, "training.steps=10", "training.schedule.warmup_steps=1"]
    whole = tmp_path_factory.getbasetemp() / "conversion-whole"
    expected = lab.fit(config(*overrides), whole, progress=False)
    stopped(overrides, tmp_path / "run", at)
    found = lab.fit(config(*overrides), tmp_path / "run", progress=False)
    assert all(torch.equal(found.model.state_dict()[name], value) for name, value in expected.model.state_dict().items())
    assert found.metrics["loss"].tolist() == expected.metrics["loss"].tolist()
    kl = [name for name in found.metrics if name.endswith("index_kl")]
    assert kl and found.metrics[kl].isna().equals(expected.metrics[kl].isna())
    assert found.metrics[kl[0]].notna().tolist() == [False] * 3 + [True] * 7


def test_the_warm_up_makes_the_indexer_find_what_attention_looks_at():
    """A model with marked attention, one batch: the divergence falls to a fraction, and the keys it would pick are the attention's best."""
    model = lab.build(config("model.num_layers=2", "model.attention.index_n_heads=8", "model.attention.index_local_tokens=0"))
    for name, parameter in model.named_parameters():
        if ".indexer." not in name:
            torch.nn.init.normal_(parameter, std=0.4)
    conversion.enter(model.train(), "warmup")
    attentions = [m for m in model.modules() if isinstance(m, SparseAttention)]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    tokens, divergences, found = torch.randint(0, 300, (4, 64)), [], {}
    batch = Batch(tokens, tokens, torch.zeros_like(tokens))
    for step in range(101):
        if step in (0, 100):
            conversion.enter(model, "sparse")
            found[step] = attention_measures(model, [batch]).summary["topk_missed"]
            conversion.enter(model, "warmup")
        model.hidden(tokens).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        for attention in attentions:
            attention.after_step()
        divergences.append(sum(attention.told["index_kl"] for attention in attentions))
    assert divergences[-1] < 0.6 * divergences[0], divergences[::10]
    assert found[100] < 0.8 * found[0], found


def test_entering_a_stage_sets_what_learns():
    model = lab.build(config("model.embedding.ngram.order=2")).train()
    conversion.enter(model, "warmup")
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {n for n, _ in model.named_parameters() if ".indexer." in n}
    assert {m.stage for m in model.modules() if isinstance(m, SparseAttention)} == {"warmup"}
    assert {type(m).__name__ for m in model.modules() if m.training} == {"SparseAttention"}
    conversion.enter(model, "sparse")
    assert all(p.requires_grad for p in model.parameters()) and all(m.training for m in model.modules())


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.attention.selection.kind=dense"], "dense to the end"),
        (["model.attention.selection.kind=window"], "no indexer that learns"),
        (["model.attention.distill.weight=0"], "no indexer that learns"),
    ],
)
def test_a_model_with_nothing_to_convert_is_told(tmp_path, overrides, said):
    with pytest.raises(LabError, match=said):
        lab.fit(config(*PLAN, *overrides, "training.steps=30"), tmp_path / "run", progress=False)


def test_more_steps_than_there_are_is_told():
    with pytest.raises(ConfigError, match="dense_steps \\+ warmup_steps is 7, not below steps 7"):
        config(*PLAN, "training.steps=7", "training.schedule.warmup_steps=1")


def test_growth_and_conversion_keep_their_steps():
    """The layers are stacked before step 4; step 4 is dense still, and the warm-up begins at 5."""
    seen, own = [], SparseAttention.learns

    def watched(self, sparse):
        seen.append(self.stage)
        return own(self, sparse)

    plan = ["training.conversion.dense_steps=5", "training.conversion.warmup_steps=2", "training.growth.at_step=4", "training.steps=10"]
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(SparseAttention, "learns", watched)
        stages = []

        def after():
            stages.append(seen[-1])
            return False

        few = ["model.num_layers=2", "model.attention.cli_factor=2", "training.schedule.warmup_steps=1"]
        lab.fit(config(*plan, *few), Path(folder) / "run", progress=False, stop=after)
    assert stages == ["dense"] * 5 + ["warmup"] * 2 + ["sparse"] * 2


def test_the_warm_up_stands_where_the_language_model_stands():
    """A probe's curriculum goes by the number of the sample: the warm-up must not begin with its shortest ones again."""
    probe = ["data.probe={kind: recall, pairs: 2, queries: 2, lengths: [8], length_samples: 4}", "data.sequence_length=32"]
    plan = config(*PLAN, *probe, "training.steps=10", "training.schedule.warmup_steps=1", "data.batch_size=2")
    batches = Batches(plan, prepare(plan.data, plan.model.vocab_size))
    documents = [int(batches.next(step, conversion.stage_at(plan, step)).document_ids.max()) for step in range(10)]
    assert documents[0] > 0 and set(documents[2:]) == {0}


def test_in_the_warm_up_layers_are_recomputed_if_asked():
    held = {}
    for recompute in (False, True):
        model = lab.build(config("model.num_layers=4")).train()
        model.recompute = recompute
        conversion.enter(model, "warmup")
        sizes = held[recompute] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, into=sizes: into.append(t.nbytes) or t, lambda t: t):
            model.hidden(torch.randint(0, 300, (2, 64)))
    assert sum(held[True]) < sum(held[False]) / 4


def test_a_loss_of_the_indexers_that_is_no_number_ends_the_run(tmp_path):
    wild = ["model.attention.index_topk=4", "model.attention.index_local_tokens=1", "model.attention.distill.temperature=1e-45"]
    with pytest.raises(LabError, match="index KL of attention group 0 is"):
        lab.fit(config(*wild, "training.steps=30"), tmp_path / "run", progress=False)
