"""Rows on their way while the dense branch runs: the same values, gradients and bytes as without, and what really ran when."""

import contextlib
import copy
import datetime

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

import longcat_lab as lab
from longcat_lab.blocks.moe.module import Done, MoE, begin
from longcat_lab.config.parallel import ParallelConfig
from longcat_lab.data import Batch
from longcat_lab.parallel import collectives, wire
from longcat_lab.parallel.experts import connect_experts
from longcat_lab.parallel.placement import build_part
from longcat_lab.parallel.world import World
from longcat_lab.training.loss import plan_step
from longcat_lab.training.steps import Steps
from tests.parallel.processes import dist_run

MIXTURE = ("model.moe.n_routed_experts=8", "model.moe.zero_expert_num=3", "model.moe.moe_topk=4", "model.moe.n_shared_experts=1")
MIXTURE += ("model.moe.expected_real_experts=3",)
OFF = {"overlap": False}
HOW = [OFF, {}, {"moe_chunks": 2}, {"dispatch": "process"}, {"dispatch": "process", "moe_chunks": 2}, {"moe_chunks": 2, **OFF}]


def _experts(name):
    return name.endswith(("gate_up_proj", "down_proj"))


class Layers:
    """A shortcut layer in float64, whole, and the same with its experts divided over `group`; two rows of each process."""

    def __init__(self, group, kind="scmoe"):
        self.group, self.place = group, group.rank()
        self.model = lab.build(lab.load("tiny", *MIXTURE, f"model.layer.kind={kind}")).double().train()
        generator = torch.Generator().manual_seed(3)
        self.x, self.d = (torch.randn(2 * group.size(), 7, 32, generator=generator, dtype=torch.float64) for _ in range(2))
        self.own = slice(2 * self.place, 2 * self.place + 2)

    def divided(self, **how):
        layer = copy.deepcopy(self.model.layers[0])
        mixture = layer.mlp
        for name in ("gate_up_proj", "down_proj"):
            setattr(mixture, name, nn.Parameter(getattr(mixture, name).detach().chunk(self.group.size())[self.place].clone()))
        connect_experts(mixture, self.group, None, ParallelConfig(**how))
        return layer

    def passed(self, layer, rows=slice(None), again=False):
        """[value, gradients of x and of all weights] of `rows`."""
        x = self.x[rows].clone().requires_grad_()
        arguments = layer, x, self.model.context(x)
        out = checkpoint(*arguments, use_reentrant=False) if again else layer(*arguments[1:])
        names, weights = zip(*layer.named_parameters(), strict=True)
        found = torch.autograd.grad((out * self.d[rows]).sum(), (x, *weights))
        return {"out": out.detach(), "x": found[0]} | dict(zip(names, found[1:], strict=True))

    def expected(self):
        """What `passed(divided())` of all processes must add up to, this process's part of it."""
        found = self.passed(self.model.layers[0])
        for name, whole in found.items():
            if name in ("out", "x"):
                found[name] = whole[self.own]
            elif _experts(name):
                found[name] = whole.chunk(self.group.size())[self.place]
        return found


def same(found, other):
    assert found.keys() == other.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, other[name], rtol=0, atol=0, msg=lambda s, n=name: f"{n}: {s}")


def check_layer(group, kinds):
    """Against one process; overlap on and off bit by bit, in bytes too, and with recomputed activations; both layers that have dense
    branches, and the decoder's, which calls the mixture as a whole."""
    for kind in kinds:
        layers = Layers(group, kind)
        expected, without, sent = layers.expected(), None, {}
        for how in HOW if kind == "scmoe" else HOW[:2]:
            with collectives.counted() as traffic:
                found = layers.passed(layers.divided(**how), layers.own)
            for name, tensor in found.items():
                total = tensor.clone()
                if name not in ("out", "x") and not _experts(name):
                    dist.all_reduce(total, group=group)  # dense weights: each process saw a part of the rows
                torch.testing.assert_close(total, expected[name], rtol=1e-11, atol=1e-12, msg=lambda s, at=(how, name): f"{at}: {s}")
            if how == OFF:
                without = found
            elif not how:
                same(found, without)
            sent[str(how)] = dict(traffic)
            if kind == "scmoe":
                same(layers.passed(layers.divided(**how), layers.own, again=True), found)
        counts = 8 // group.size() * (group.size() - 1) * 8
        assert set(sent[str(OFF)]) == {"expert"} and sent[str(OFF)] == sent[str({})]
        for how in ({"moe_chunks": 2}, {"moe_chunks": 2, **OFF}) if kind == "scmoe" else ():  # counts of the second chunk
            assert sent[str(how)]["expert"] == sent[str({})]["expert"] + counts


@contextlib.contextmanager
def noted(layer):
    """What happened in here, in order: exchanges posted and waited for, dense parts that have run (forwards, and backwards)."""
    events, real = [], dist.all_to_all_single

    class Noted:
        def __init__(self, work):
            self.work = work

        def wait(self):
            self.work.wait()
            events.append("here")

    def all_to_all_single(out, x, *rest, **settings):
        work = real(out, x, *rest, **settings)
        if x.dtype == torch.int64:  # counts, which say how much there is to receive
            return work
        events.append("sent")
        return Noted(work)

    hooks = []
    for name in ("mlps.0", "self_attn.1", "mlps.1", "mlp.shared_experts"):
        module, short = layer.get_submodule(name), name.removeprefix("mlp.")
        hooks.append(module.register_forward_hook(lambda *_, n=short: events.append(n)))
        hooks.append(module.register_full_backward_hook(lambda *_, n=short: events.append(n)))
    dist.all_to_all_single = all_to_all_single
    try:
        yield events
    finally:
        dist.all_to_all_single = real
        for hook in hooks:
            hook.remove()


def check_order(group):
    """The dense branch runs between a journey's begin and its end, in both passes."""
    layers = Layers(group)
    for how, forward, backward in (
        (
            {},
            "sent shared_experts mlps.0 here sent self_attn.1 mlps.1 here",
            "sent mlps.1 self_attn.1 here sent mlps.0 shared_experts here",
        ),
        (
            OFF,
            "sent here shared_experts mlps.0 sent here self_attn.1 mlps.1",
            "sent here mlps.1 self_attn.1 sent here mlps.0 shared_experts",
        ),
        (
            {"moe_chunks": 2},
            "sent sent shared_experts mlps.0 here sent here sent self_attn.1 mlps.1 here here",
            "sent sent mlps.1 self_attn.1 here sent here sent mlps.0 shared_experts here here",
        ),
        (
            {"dispatch": "process"},  # slots travel beside the rows, and have no gradient
            "sent sent shared_experts mlps.0 here here sent self_attn.1 mlps.1 here",
            "sent mlps.1 self_attn.1 here sent mlps.0 shared_experts here",
        ),
    ):
        layer = layers.divided(**how)
        with noted(layer) as events:
            x = layers.x[layers.own].clone().requires_grad_()
            out = layer(x, layers.model.context(x))
            assert events == forward.split(), (how, events)
            events.clear()
            (out * layers.d[layers.own]).sum().backward()
            assert events == backward.split(), (how, events)


RUNS = {
    "weights sharded, recomputed": ("data.batch_size=8", "parallel.expert=2", "training.recompute=true"),
    "tensor": ("data.batch_size=4", "parallel.tensor=2", "parallel.expert=4", "training.recompute=true"),
    "pipeline": ("data.batch_size=4", "parallel.pipeline=2", "parallel.expert=2", "model.num_layers=2"),
}
MORE = {
    "weights sharded": ("data.batch_size=8", "parallel.expert=2"),
    "weights sharded, two chunks": ("data.batch_size=8", "parallel.expert=2", "parallel.moe_chunks=2", "parallel.dispatch=process"),
    "copies": ("data.batch_size=8", "parallel.expert=2", "parallel.data_replicate=2", "model.layer.kind=serial"),
    "experts alone sharded": ("data.batch_size=2", "parallel.tensor=4", "parallel.expert=2", "model.attention.num_attention_heads=4"),
    "context": ("data.batch_size=4", "parallel.context=2", "parallel.expert=2"),
}


def step_of(settings):
    """Local gradients of a step of two micro-batches, and all bytes that it sent, by kind and group."""
    config = lab.load("tiny", *MIXTURE, "training.micro_batch_size=1", *settings)
    world = World(config, torch.device("cpu"))
    model = build_part(config, world).train()
    model.recompute = config.training.recompute
    generator = torch.Generator().manual_seed(world.batch_place)
    tokens = torch.randint(0, 512, (2, 17), generator=generator)
    batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), torch.zeros_like(tokens[:, 1:]))
    steps = Steps(model, config, world)
    with wire.counted() as sent:
        told = steps.gradients(batch, plan_step(batch, config, 0, world=world))
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    found = {name: gradient.to_local() if isinstance(gradient, DTensor) else gradient for name, gradient in gradients.items()}
    return {**found, "loss": torch.tensor(told["loss"])}, dict(sent.bytes), dict(sent.calls)


def check_steps(runs):
    """Whole steps in layouts of four processes: bits and bytes with and without. Where FSDP2's hooks run around the mixture's own forward
    pass, instead of around its experts alone, the same but for the order in which the mixture's and FFN_0's gradients are added up."""
    apart = MoE.begin
    sizes = ("data.sequence_length=16", "model.mtp.num_nextn_predict_layers=1", "model.mtp.block=layer")
    for name, settings in runs.items():
        found, *sent = step_of((*sizes, *settings))
        other, *other_sent = step_of((*sizes, *settings, "parallel.overlap=false"))
        same(other, found)
        assert other_sent == sent, name
        if "weights sharded" in name:
            MoE.begin = lambda self, x, context=None: Done(self(x, context))
            other, *other_sent = step_of((*sizes, *settings))
            MoE.begin = apart
            for key, tensor in other.items():
                torch.testing.assert_close(found[key], tensor, rtol=1e-5, atol=1e-6 * float(tensor.abs().amax()) if tensor.numel() else 0)
            assert other_sent == sent, name
        assert all(bool(tensor.any()) for key, tensor in found.items() if _experts(key) and tensor.numel()), name


def run_all():
    """Over all four processes, and over pairs of them."""
    pairs = [dist.new_group(ranks, timeout=datetime.timedelta(seconds=60)) for ranks in ((0, 2), (1, 3))]
    check_layer(dist.group.WORLD, ("scmoe", "serial", "decoder"))
    check_layer(pairs[dist.get_rank() % 2], ("scmoe",))
    for group in (dist.group.WORLD, pairs[dist.get_rank() % 2]):
        check_order(group)
    check_steps(RUNS)
    return True


def test_over_four_processes_and_over_pairs_of_them():
    assert dist_run(run_all, 4) == [True] * 4


def test_a_mixture_that_has_no_parts_runs_when_it_is_begun():
    class Twice(nn.Module):
        def forward(self, x, context):
            return 2 * x

    model = lab.build(lab.load("tiny"))
    x = torch.randn(1, 4, 32)
    context, layer = model.context(x), model.layers[0]
    layer.mlp = Twice()
    pending = begin(layer.mlp, x, context)
    pending.compute()
    torch.testing.assert_close(pending.end(), 2 * x, rtol=0, atol=0)
    assert layer(x, context).shape == x.shape


@pytest.mark.slow
def test_steps_in_more_layouts():
    dist_run(check_steps, 4, MORE)
