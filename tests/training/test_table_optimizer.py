"""Optimizers of n-gram tables: their equations, that they touch the rows that were hit alone, clipping, saved state, rare rows."""

import io
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import longcat_lab as lab
from longcat_lab.config import load
from longcat_lab.model import build
from longcat_lab.training import growth
from longcat_lab.training.device import deterministic
from longcat_lab.training.optimizer import Optimizers, clip, make_optimizer, roles, set_learning_rate, split, split_table
from longcat_lab.training.table_optimizer import TableOptimizer, hit_rows, merge, once_hit_displacement

MODES = ["lazy_adam", "row_wise", "sgd"]
NGRAM = "model.embedding.ngram.order=3"
KNOBS = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-16, "weight_decay": 0.1, "momentum": 0.5}


class Rows(lab.Block):
    """Reads rows of a table and multiplies them with a matrix: a model of the two kinds of parameters."""

    roles = {"tables": "table"}

    def __init__(self, rows=40, width=4, dtype=torch.float32):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.tables = nn.Parameter(torch.randn(rows, width, generator=generator, dtype=dtype))
        self.matrix = nn.Parameter(torch.randn(width, width, generator=generator, dtype=dtype))

    def forward(self, rows):
        return F.embedding(rows, self.tables, sparse=self.sparse_gradients) @ self.matrix


def settings(*overrides):
    return load("tiny", *(f"training.optimizer.{each}" for each in overrides)).training.optimizer


def sparse_gradient(rows, seed, count=12, width=4, dtype=torch.float64):
    """Uncoalesced, with rows that stand in it several times."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(rows, (1, count), generator=generator)
    values = torch.randn(count, width, generator=generator, dtype=dtype)
    return torch.sparse_coo_tensor(numbers, values, (rows, width), check_invariants=True)


def after_steps(make, gradients, start):
    table = nn.Parameter(start.clone())
    optimizer = make([table])
    for gradient in gradients:
        table.grad = gradient.clone()
        optimizer.step()
    return table.detach(), optimizer


@pytest.mark.parametrize("eps", [1e-16, 1e-2])
def test_lazy_adam_takes_torchs_sparse_adams_steps(eps):
    start = torch.randn(20, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gradients = [sparse_gradient(20, seed) for seed in range(30)]
    ours, _ = after_steps(lambda p: TableOptimizer(p, "lazy_adam", lr=0.01, betas=(0.8, 0.95), eps=eps), gradients, start)
    theirs, _ = after_steps(lambda p: torch.optim.SparseAdam(p, lr=0.01, betas=(0.8, 0.95), eps=eps), gradients, start)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_row_wise_is_its_equation_and_keeps_four_bytes_a_row():
    start = torch.randn(20, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gradients = [sparse_gradient(20, seed) for seed in range(30)]
    ours, _ = after_steps(lambda p: TableOptimizer(p, "row_wise", **KNOBS | {"eps": 1e-3}), gradients, start)
    table, second = start.clone(), [0.0] * 20
    for t, gradient in enumerate(gradients, 1):
        for r, g in enumerate(gradient.to_dense()):
            if g.any():
                second[r] = 0.95 * second[r] + 0.05 * float(g.square().sum()) / 4
                table[r] = table[r] * (1 - 0.01 * 0.1) - 0.01 * g / (math.sqrt(second[r] / (1 - 0.95**t)) + 1e-3)
    torch.testing.assert_close(ours, table, rtol=1e-12, atol=1e-14)
    _, optimizer = after_steps(lambda p: TableOptimizer(p, "row_wise", **KNOBS), [g.float() for g in gradients], start.float())
    state = optimizer.state_dict()["state"][0]
    tensors = [value for value in state.values() if torch.is_tensor(value)]
    assert sum(t.numel() * t.element_size() for t in tensors) == 4 * 20 and state.keys() == {"step", "row_exp_avg_sq"}


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_is_torchs_where_every_row_is_hit_and_has_no_state_without_momentum(momentum):
    start = torch.randn(20, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gradients = [torch.randn(20, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) for seed in range(9)]
    ours, optimizer = after_steps(lambda p: TableOptimizer(p, "sgd", lr=0.1, momentum=momentum), gradients, start)
    theirs, _ = after_steps(lambda p: torch.optim.SGD(p, lr=0.1, momentum=momentum), gradients, start)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    assert list(optimizer.state_dict()["state"].get(0, {})) == (["momentum_buffer"] if momentum else [])


@pytest.mark.parametrize("mode", MODES)
def test_rows_that_are_not_hit_keep_their_bits_and_their_state(mode):
    """Decay and momentum included; a row whose entries cancel or are zero is not hit. Dense gradients do the same."""
    gradients = [sparse_gradient(20, seed, count=4) for seed in range(6)]
    values = torch.tensor([[1.0], [0.0], [-1.0]], dtype=torch.float64).expand(3, 4)
    none = torch.sparse_coo_tensor(torch.tensor([[3, 7, 3]]), values, (20, 4), check_invariants=True)
    start = torch.randn(20, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    table, optimizer = after_steps(lambda p: TableOptimizer(p, mode, **KNOBS), gradients, start)
    hit = torch.stack([g.to_dense().ne(0).any(1) for g in gradients]).any(0)
    assert torch.equal(table[~hit], start[~hit]) and not (table[hit] == start[hit]).any() and 0 < hit.sum() < 20
    state = next(iter(optimizer.state.values()))
    assert all(not value[~hit].any() for value in state.values() if torch.is_tensor(value))
    dense, _ = after_steps(lambda p: TableOptimizer(p, mode, **KNOBS), [g.to_dense() for g in gradients], start)
    assert torch.equal(table, dense)
    both = [after_steps(lambda p: TableOptimizer(p, mode, **KNOBS), [*gradients, *more], start)[0] for more in ([none], [none.to_dense()])]
    assert torch.equal(both[0], table) and torch.equal(both[1], table)


def test_merging_gives_each_row_once_and_the_same_bits_with_two_threads():
    gradient = sparse_gradient(300, 0, count=4000, width=32, dtype=torch.float32)
    merged, expected = merge(gradient), gradient.coalesce()
    assert merged.is_coalesced() and merge(merged) is merged
    assert torch.equal(merged._indices(), expected._indices())
    torch.testing.assert_close(merged._values(), expected._values(), rtol=0, atol=1e-5)
    with deterministic(2):
        assert torch.equal(merge(gradient)._values(), merged._values())
    nothing = torch.sparse_coo_tensor(torch.zeros(1, 0, dtype=torch.long), torch.zeros(0, 4), (9, 4), check_invariants=True)
    assert [len(each) for each in hit_rows(nothing)] == [0, 0]
    table = nn.Parameter(torch.zeros(6, 3))
    F.embedding(torch.tensor([5, 1, 5]), table, sparse=True).sum().backward()  # its gradient is one number, expanded
    assert hit_rows(table.grad)[0].tolist() == [1, 5] and hit_rows(table.grad)[1].tolist() == [[1, 1, 1], [2, 2, 2]]


class LargestResult(TorchDispatchMode):
    """Elements of the largest tensor that any operation made, but for those that lie in `known`."""

    def __init__(self, known):
        super().__init__()
        self.known, self.found = {tensor.untyped_storage().data_ptr() for tensor in known}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else [out]:
            if torch.is_tensor(each) and each.layout is torch.strided and each.untyped_storage().data_ptr() not in self.known:
                self.found = max(self.found, each.numel())
        return out


@pytest.mark.parametrize("mode", MODES)
def test_a_step_makes_nothing_of_the_tables_size(mode):
    table = nn.Parameter(torch.zeros(10_000, 4))
    optimizer = TableOptimizer([table], mode, **KNOBS)
    for _ in range(2):  # the state is made in the first
        table.grad = sparse_gradient(10_000, 3, dtype=torch.float32)
        with LargestResult([table, *(v for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v))]) as seen:
            optimizer.step()
    assert 0 < seen.found <= 12 * 4


@pytest.mark.parametrize("mode", MODES)
def test_a_model_trains_alike_with_sparse_and_with_dense_gradients(mode):
    """Two micro-batches a step, tables within the norm, in a run's deterministic mode; AdamW afterwards makes gradients dense again."""
    found = {}
    for sparse in (True, False):
        model, config = Rows(), settings(f"table_optimizer={mode}", "clip_without=[]", "table_momentum=0.5", "table_weight_decay=0.1")
        optimizer = make_optimizer(model, config)
        assert set(optimizer.parts) == {"adamw", mode} and model.sparse_gradients
        model.sparse_gradients = sparse
        norms = []
        with deterministic(1):
            for step in range(4):
                for part in range(2):
                    rows = torch.randint(40, (3, 5), generator=torch.Generator().manual_seed(2 * step + part))
                    model(rows).square().sum().backward()
                assert model.tables.grad.is_sparse == sparse
                norms.append(clip(optimizer, 1.0))
                assert not sparse or model.tables.grad.is_coalesced()
                squares = [p.grad.to_dense().square().sum() for p in model.parameters()]
                assert float(sum(squares)) == pytest.approx(1.0, rel=1e-4)
                optimizer.step()
                optimizer.zero_grad()
        found[sparse] = [*norms, *model.tables.detach().flatten().tolist(), *model.matrix.detach().flatten().tolist()]
    assert found[True] == pytest.approx(found[False], rel=1e-4, abs=1e-5)
    assert type(make_optimizer(model, settings())) is torch.optim.AdamW and not model.sparse_gradients


@pytest.mark.parametrize(
    ("entries", "outside"),
    [
        ('["table"]', {"tables"}),
        ("[]", set()),
        ('["*.tables", "tab*"]', {"tables"}),
        ('["matrix"]', {"matrix"}),
        ('["router"]', set()),
    ],
)
def test_clipping_leaves_out_what_is_named(entries, outside):
    model, entries = nn.Sequential(Rows()), entries.replace("tab*", "0.tab*")
    optimizer = make_optimizer(model, settings("table_optimizer=sgd", f"clip_without={entries}"))
    model[0](torch.tensor([1, 2, 2])).square().sum().backward()
    before = {name: p.grad.to_dense().clone() for name, p in model[0].named_parameters()}
    norm = clip(optimizer, 0.5)
    inside = before.keys() - outside
    assert norm == pytest.approx(math.sqrt(sum(float(before[name].square().sum()) for name in inside)))
    for name, p in model[0].named_parameters():
        torch.testing.assert_close(p.grad.to_dense(), before[name] * (0.5 / norm if name in inside else 1))


def test_an_entry_that_leaves_nothing_out_is_one_sentence():
    make_optimizer(build(load("tiny")), settings())  # no tables: still a role
    with pytest.raises(lab.LabError, match=r"clip_without: 'tabel' matches no parameter .* is no role, did you mean 'table'\?") as caught:
        make_optimizer(Rows(), settings('clip_without=["tabel"]'))
    assert "\n" not in str(caught.value)


def test_a_table_that_has_no_rows_is_one_sentence():
    model = Rows()
    model.tables = nn.Parameter(torch.zeros(2, 3, 4))
    with pytest.raises(lab.LabError, match=r"tables: a table of shape \[2, 3, 4\] has no rows for sgd"):
        make_optimizer(model, settings("table_optimizer=sgd"))


def test_the_split_shows_mode_rate_decay_and_what_becomes_of_rare_rows():
    knobs = ("table_optimizer=lazy_adam", "table_lr_multiplier=4", "table_weight_decay=0.2", "table_beta2=0.99")
    model, config = Rows(), settings(*knobs)
    row = split(model, config)[0]
    assert (row.optimizer, row.learning_rate, row.weight_decay, row.clipped) == ("lazy_adam", 4 * config.learning_rate, 0.2, False)
    group = make_optimizer(model, config).parts["lazy_adam"].param_groups[0]
    assert (group["peak"], group["weight_decay"], group["betas"], group["eps"]) == (row.learning_rate, 0.2, (0.9, 0.99), 1e-16)
    lines = split_table(split(model, config), config).splitlines()
    assert lines[1].split()[-3:] == ["lazy_adam", "0.012", "0.2"] and "outside the gradient's norm, and not clipped: tables" in lines
    once = "a row that is hit once after a long silence moves by"
    assert lines[-1] == f"tables: lazy_adam; {once} 1 learning rates (dense AdamW: 10.5); decay acts on rows that are hit"
    dense = settings("table_beta1=0.5", "table_weight_decay=0.2")
    assert make_optimizer(model, dense).param_groups[0]["betas"] == (0.5, 0.95)
    assert split_table(split(model, dense), dense).splitlines()[-1].endswith("decay acts on every row in every step")


@pytest.mark.parametrize(
    ("mode", "beta2", "expected"),
    [
        *(("adamw", beta2, value) for beta2, value in ((0.95, 5.84), (0.99, 10.5), (0.999, 31.8))),
        *(("lazy_adam", beta2, value) for beta2, value in ((0.95, 0.447), (0.99, 1.0), (0.999, 3.16))),
        *(("row_wise", beta2, value) for beta2, value in ((0.95, 4.47), (0.99, 10.0), (0.999, 31.6))),
        ("sgd", 0.95, 1.0),
    ],
)
def test_a_row_that_is_hit_once_moves_by_what_is_told(mode, beta2, expected):
    """Row 0 is hit once, row 1 in each of thousands of steps before and after (so that the bias corrections are 1)."""
    told = once_hit_displacement(settings(f"table_optimizer={mode}", f"beta2={beta2}", "table_momentum=0.9"))
    assert told == pytest.approx(expected, rel=0.005)
    before, size, table = int(8 / (1 - beta2)), 0.3, nn.Parameter(torch.zeros(2, 2, dtype=torch.float64))
    knobs = {"lr": 1e-3, "betas": (0.9, beta2), "eps": 1e-16, "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([table], **knobs) if mode == "adamw" else TableOptimizer([table], mode, momentum=0.9, **knobs)
    for step in range(before + 500):
        table.grad = torch.tensor([[size if step == before else 0.0] * 2, [0.1, -0.1]], dtype=torch.float64)
        optimizer.step()
    unit = 1e-3 * (size if mode == "sgd" else 1)
    assert (-table[0].detach() / unit).tolist() == pytest.approx([told] * 2, rel=1e-3)


def test_where_adamws_sum_has_no_end_it_is_infinite():
    assert once_hit_displacement(settings("beta1=0.99", "beta2=0.9")) == math.inf


@pytest.mark.parametrize("mode", MODES)
def test_state_goes_through_a_file_with_shape_kind_and_count(mode):
    config = settings(f"table_optimizer={mode}", "table_momentum=0.9", "table_weight_decay=0.1")

    def train(model, optimizer, seeds):
        for seed in seeds:
            set_learning_rate(optimizer, 1 / (1 + seed))
            model(torch.randint(40, (2, 5), generator=torch.Generator().manual_seed(seed))).square().sum().backward()
            clip(optimizer, 1.0)
            optimizer.step()
            optimizer.zero_grad()

    whole = Rows()
    optimizer = make_optimizer(whole, config)
    assert isinstance(optimizer, Optimizers)
    train(whole, optimizer, range(3))
    content = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "model": whole.state_dict()}, content)
    content.seek(0)
    saved = torch.load(content, weights_only=True)
    resumed = Rows()
    resumed.load_state_dict(saved["model"])
    again = make_optimizer(resumed, config)
    again.load_state_dict(saved["optimizer"])
    kept, loaded = (each.parts[mode].state_dict()["state"][0] for each in (optimizer, again))
    moments = {"lazy_adam": ["exp_avg", "exp_avg_sq"], "row_wise": ["row_exp_avg_sq"], "sgd": ["momentum_buffer"]}[mode]
    shapes = dict.fromkeys(moments, (40,) if mode == "row_wise" else (40, 4))
    assert {name: tuple(v.shape) for name, v in loaded.items() if torch.is_tensor(v)} == shapes
    assert all(v.dtype == torch.float32 and torch.equal(v, kept[name]) for name, v in loaded.items() if torch.is_tensor(v))
    assert loaded.get("step", 3) == 3
    train(whole, optimizer, range(3, 6))
    train(resumed, again, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    with pytest.raises(lab.LabError, match=r"set training\.optimizer\.kind and table_optimizer as they were"):
        make_optimizer(Rows(), settings(f"table_optimizer={'sgd' if mode != 'sgd' else 'row_wise'}")).load_state_dict(saved["optimizer"])


@pytest.mark.parametrize("mode", MODES)
def test_a_stopped_run_goes_on_with_the_same_bits(tmp_path, mode):
    knobs = {"table_optimizer": mode, "table_momentum": 0.9, "table_weight_decay": 0.1}
    short = ("training.steps=8", "training.schedule.warmup_steps=2", "training.evaluation_sequences=2", "training.log_every=4")
    config = load("tiny", NGRAM, *short, *(f"training.optimizer.{key}={value}" for key, value in knobs.items()))
    whole = lab.fit(config, tmp_path / "whole", progress=False)
    asked = []
    lab.fit(config, tmp_path / "parts", progress=False, stop=lambda: asked.append(1) or len(asked) == 3)
    parts = lab.fit(config, tmp_path / "parts", progress=False)
    assert whole.metrics["loss"].tolist() == parts.metrics["loss"].tolist()
    found = [run.model.state_dict() for run in (whole, parts)]
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
    assert f"\ntables: {mode}; a row that is hit once" in (whole.path / "optimizer.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("mode", MODES)
def test_depth_growth_keeps_the_tables_state(mode):
    config = load("tiny", NGRAM, "model.num_layers=4", "training.growth.at_step=6", "training.growth.times=2")
    knobs = config.training.optimizer.model_copy(update={"table_optimizer": mode, "table_momentum": 0.9})
    small, large = build(growth.shallow(config)).train(), build(config).train()
    before, after = make_optimizer(small, knobs), make_optimizer(large, knobs)
    small(torch.randint(512, (2, 16))).square().mean().backward()
    before.step()
    growth.stack_moments(small, before, large, after)
    for name in (name for name, role in roles(large).items() if role == "table"):
        old, new = before.parts[mode].state[small.get_parameter(name)], after.parts[mode].state[large.get_parameter(name)]
        assert len(new) and old.keys() == new.keys()
        for key, value in new.items():
            assert torch.equal(value, old[key]) and value.data_ptr() != old[key].data_ptr() if torch.is_tensor(value) else value == old[key]
