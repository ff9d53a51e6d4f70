"""Muon and AdamW: orthogonalisation, stacks of matrices, who trains what at which rate, saved state, tiny gradients, width."""

import inspect
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import longcat_lab as lab
from longcat_lab.config import load
from longcat_lab.model import build
from longcat_lab.training.muon import COEFFICIENTS, StackedMuon, orthogonalise
from longcat_lab.training.optimizer import Optimizers, clip, make_optimizer, roles, set_learning_rate, split, split_table

NGRAM = "model.embedding.ngram.order=3"
MUON = "training.optimizer.kind=muon"
ADJUSTMENTS = ["original", "match_rms_adamw"]


def tiny(*overrides):
    config = load("tiny", *overrides)
    return config.training.optimizer, build(config)


def random_gradients(parameters, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator)


def steps(model, optimizer, seeds):
    for seed in seeds:
        random_gradients(model.parameters(), seed)
        set_learning_rate(optimizer, 1 / (1 + seed))
        clip(optimizer, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def same(a, b):
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(name == other and torch.equal(value, found) for (name, value), (other, found) in pairs)


@pytest.mark.parametrize("shape", [(5, 48, 16), (5, 16, 48)])
def test_newton_schulz_brings_singular_values_near_one_and_keeps_the_directions(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.logspace(-5, 5, 5)[:, None, None]
    found = orthogonalise(matrices).float()
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.65 and values.max() < 1.25
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    torch.testing.assert_close(
        torch.diagonal(u.mT @ found @ vh.mT, dim1=-2, dim2=-1).sort(descending=True).values, values, rtol=0, atol=0.03
    )
    assert orthogonalise(torch.zeros(2, 3, 4)).abs().max() == 0


def test_coefficients_and_defaults_are_torchs():
    theirs, ours = (inspect.signature(kind).parameters for kind in (torch.optim.Muon, StackedMuon))
    assert theirs["ns_coefficients"].default == COEFFICIENTS
    shared = (theirs.keys() & ours.keys()) - {"params", "adjust_lr_fn"}  # None means original there
    assert len(shared) == 6 and {name: theirs[name].default for name in shared} == {name: ours[name].default for name in shared}


@pytest.mark.parametrize("adjust_lr_fn", ADJUSTMENTS)
@pytest.mark.parametrize("nesterov", [True, False])
def test_a_stack_takes_the_steps_of_its_matrices_alone(adjust_lr_fn, nesterov):
    """[N, 2 F, H] with gate rows above up rows, tall and wide, against one torch.optim.Muon a matrix.

    Here the bits are equal; the tolerance is for machines whose batched bf16 product sums in another order.
    """
    knobs = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9, "nesterov": nesterov, "ns_steps": 4, "adjust_lr_fn": adjust_lr_fn}
    generator = torch.Generator().manual_seed(1)
    for n, f, h in ((3, 24, 16), (3, 8, 16), (1, 16, 16)):
        stacked = nn.Parameter(torch.randn(n, 2 * f, h, generator=generator))
        alone = [nn.Parameter(half.clone()) for expert in stacked.detach() for half in expert.split(f)]
        ours, theirs = StackedMuon([stacked], stack=2, **knobs), torch.optim.Muon(alone, **knobs)
        for _ in range(4):
            stacked.grad = torch.randn(stacked.shape, generator=generator)
            for parameter, gradient in zip(alone, stacked.grad.flatten(0, 1).split(f), strict=True):
                parameter.grad = gradient.clone()
            ours.step()
            theirs.step()
        torch.testing.assert_close(stacked.detach().flatten(0, 1), torch.cat([p.detach() for p in alone]), rtol=0, atol=5e-4)


def test_a_stack_of_one_is_torchs_muon_and_halves_are_not_one_matrix():
    start, gradient = torch.randn(2, 1, 12, 8, generator=torch.Generator().manual_seed(3))
    found = {}
    for name, stack in (("whole", 1), ("halves", 2)):
        parameter = nn.Parameter(start.clone())
        parameter.grad = gradient.clone()
        StackedMuon([parameter], stack=stack).step()
        found[name] = parameter.detach()[0]
    theirs = nn.Parameter(start[0].clone())
    theirs.grad = gradient[0].clone()
    torch.optim.Muon([theirs]).step()
    torch.testing.assert_close(found["whole"], theirs.detach(), rtol=0, atol=2e-5)
    assert not torch.allclose(found["halves"], found["whole"], rtol=0, atol=2e-4)


def test_the_split_names_every_parameter_once_and_is_what_is_built():
    config, model = tiny(MUON, NGRAM, "training.optimizer.muon_lr_multiplier=2", "training.optimizer.table_lr_multiplier=4")
    rows = {row.name: row for row in split(model, config)}
    assert list(rows) == [name for name, _ in model.named_parameters()]
    names = {id(p): name for name, p in model.named_parameters()}
    built = {}
    for part, inner in make_optimizer(model, config).parts.items():
        for group in inner.param_groups:
            for p in group["params"]:
                assert names[id(p)] not in built
                built[names[id(p)]] = (part, group["role"], group["lr"], group["peak"], group["weight_decay"], group.get("stack", 1))
    for name, row in rows.items():
        part = row.optimizer if row.optimizer == "adamw" or len(row.shape) == 2 else "stacked_muon"
        assert built.pop(name) == (part, row.role, row.learning_rate, row.learning_rate, row.weight_decay, row.stack)
    assert built == {}
    adamw = {row.role for row in rows.values() if row.optimizer == "adamw"}
    assert adamw == {"embedding", "table", "vector", "head", "router"} and rows["lm_head.weight"].role == "head"
    assert {row.role for row in rows.values() if row.optimizer == "muon"} == {"matrix"}
    assert {row.role for row in rows.values() if row.weight_decay} == {"matrix", "head", "router"}
    peak = config.learning_rate
    assert rows["layers.0.mlp.down_proj"].learning_rate == 2 * peak and rows["embed_tokens.tables.weight"].learning_rate == 4 * peak


def test_the_split_is_printed_with_layers_collapsed():
    config, model = tiny(MUON, "model.num_layers=2")
    text = split_table(split(model, config))
    lines = {line.split()[0]: line for line in text.splitlines()}
    assert "  [4, 2x16, 32]  " in lines["layers.*.mlp.gate_up_proj"]
    assert lines["layers.*.self_attn.*.o_proj.weight"].split() == [
        *("layers.*.self_attn.*.o_proj.weight", "4", "[32,", "32]", "matrix", "muon", "0.003", "0.1")
    ]
    assert lines["layers.*.mlp.router.classifier.weight"].split()[-4:] == ["router", "adamw", "0.003", "0.1"]
    count = sum(p.numel() for p in model.parameters())
    assert sum(int(part.split()[1].replace(",", "")) for part in text.splitlines()[-1].split(", ")) == count


class Own(lab.Block):
    def __init__(self, roles, stacks=None):
        super().__init__()
        self.roles, self.stacks = roles, stacks or {}
        self.weight = nn.Parameter(torch.zeros(6, 4))


@pytest.mark.parametrize(
    ("block", "sentence"),
    [
        (Own({"weight": "vektor"}), "weight: its block declares the role 'vektor', did you mean 'vector'?"),
        (Own({}, {"weight": 4}), "weight: [6, 4] does not divide into 4 matrices one below the other"),
    ],
)
def test_a_declaration_that_cannot_be_is_one_sentence(block, sentence):
    with pytest.raises(lab.LabError) as caught:
        make_optimizer(block, load("tiny", MUON).training.optimizer)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_adamw_alone_is_plain_adamw_with_the_same_bits():
    """As it was before there was Muon: one group each for embedding, tables, matrices (with head and router) and vectors."""
    config, model = tiny(NGRAM, "training.optimizer.embedding_lr_multiplier=2")
    other = build(load("tiny", NGRAM))
    optimizer = make_optimizer(model, config)
    assert type(optimizer) is torch.optim.AdamW
    groups = {}
    found = roles(other)
    for name, p in other.named_parameters():
        role = {"head": "matrix", "router": "matrix"}.get(found[name], found[name])
        rate = config.learning_rate * (2 if role == "embedding" else 1)
        decay = 0.1 if role == "matrix" else 0.0
        fixed = {"role": role, "peak": rate, "weight_decay": decay, "clipped": role != "table"}
        groups.setdefault(role, {"params": [], **fixed})["params"].append(p)
    plain = torch.optim.AdamW(list(groups.values()), betas=(0.9, 0.95), eps=1e-16, fused=True)
    steps(model, optimizer, range(3))
    steps(other, plain, range(3))
    assert same(model, other)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_state_goes_through_a_file_and_the_next_steps_have_the_same_bits(kind):
    override = f"training.optimizer.kind={kind}"
    config, whole = tiny(override, NGRAM)
    optimizer = make_optimizer(whole, config)
    steps(whole, optimizer, range(2))
    content = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "model": whole.state_dict()}, content)
    steps(whole, optimizer, range(2, 4))
    content.seek(0)
    saved = torch.load(content, weights_only=True)
    resumed = build(load("tiny", NGRAM, "seed=9"))
    resumed.load_state_dict(saved["model"])
    again = make_optimizer(resumed, config)
    again.load_state_dict(saved["optimizer"])
    steps(resumed, again, range(2, 4))
    assert same(whole, resumed)


def test_state_of_other_optimizers_is_refused():
    config, model = tiny(MUON)
    optimizer = make_optimizer(model, config)
    assert isinstance(optimizer, Optimizers) and set(optimizer.parts) == {"adamw", "muon", "stacked_muon"}
    with pytest.raises(lab.LabError, match=r"but the run trains with adamw, muon, stacked_muon"):
        optimizer.load_state_dict({"adamw": optimizer.parts["adamw"].state_dict()})


@pytest.mark.parametrize("adjust_lr_fn", ADJUSTMENTS)
def test_muon_trains_and_moves_every_matrix(adjust_lr_fn):
    config, model = tiny(MUON, f"training.optimizer.adjust_lr_fn={adjust_lr_fn}", "training.optimizer.learning_rate=1e-2")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = make_optimizer(model.train(), config)
    tokens = torch.randint(512, (4, 33), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(8):
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        clip(optimizer, config.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.5
    assert [name for name, p in model.named_parameters() if torch.equal(p, before[name])] == []


def test_width_divides_adams_rate_of_hidden_weights_and_no_other():
    s, settings = 4.0, (NGRAM, "training.optimizer.embedding_lr_multiplier=3", "training.optimizer.table_lr_multiplier=5")
    for kind in ("adamw", "muon"):
        config, model = tiny(f"training.optimizer.kind={kind}", *settings)
        peak = config.learning_rate
        expected = {"embedding": 3 * peak, "table": 5 * peak, "vector": peak, "head": peak / s, "router": peak / s}
        expected["matrix"] = peak if kind == "muon" else peak / s
        assert {row.role: row.learning_rate for row in split(model, config, s)} == pytest.approx(expected)
        for group in make_optimizer(model, config, s).param_groups:
            assert group["peak"] == group["lr"] == pytest.approx(expected[group["role"]])


def test_an_epsilon_of_1e_16_is_negligible_where_gradients_are_tiny():
    """Gradients of RMS 1e-12: the steps are those of Adam without any epsilon; the usual 1e-8 would stop them."""
    assert load("tiny").training.optimizer.eps == 1e-16
    generator = torch.Generator().manual_seed(2)
    gradients = 1e-12 * torch.randn(5, 6, 4, generator=generator).clamp(min=-3, max=3)
    moved = {}
    for eps in (1e-16, 1e-8):
        model = Own({})
        config = load("tiny", f"training.optimizer.eps={eps}", "training.optimizer.weight_decay=0").training.optimizer
        optimizer = make_optimizer(model, config)
        for gradient in gradients:
            model.weight.grad = gradient.clone()
            optimizer.step()
        moved[eps] = model.weight.detach().double()
    m, v, expected = torch.zeros(6, 4).double(), torch.zeros(6, 4).double(), torch.zeros(6, 4).double()
    for t, gradient in enumerate(gradients.double(), 1):
        m, v = 0.9 * m + 0.1 * gradient, 0.95 * v + 0.05 * gradient**2
        expected -= config.learning_rate * (m / (1 - 0.9**t)) / (v / (1 - 0.95**t)).sqrt()
    torch.testing.assert_close(moved[1e-16], expected, rtol=0, atol=0.01 * config.learning_rate)
    assert moved[1e-8].abs().max() < 0.01 * expected.abs().mean()
