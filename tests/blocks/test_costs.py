"""What every block kind says it costs, held against the built module: parameters, FLOPs, decoding state."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from longcat_lab.blocks import Block, BlockConfig, ForwardContext, MLAConfig, MoEConfig, NgramEmbeddingConfig, kinds
from longcat_lab.blocks.context import feed_forward
from longcat_lab.blocks.engram.op import convolve_reference
from longcat_lab.blocks.mla.op import attention_reference
from longcat_lab.blocks.moe.experts_op import experts_reference
from longcat_lab.blocks.moe.module import MoE
from longcat_lab.budget import budget, totals
from longcat_lab.config import load
from longcat_lab.model import build

LENGTH = 32
# Rules of selection are no modules: what they make an attention cost is held in test_selection_rules.py.
ALL_KINDS = sorted((role, kind) for role, found in kinds().items() if role != "selection" for kind in found)


def shape_and_config(role, kind, **settings):
    model = load("tiny").model
    shape = replace(model.shape(), sequence_length=LENGTH)
    return shape, kinds(role)[kind](**settings)


def inputs(role, shape, rope_width):
    """Arguments of a forward pass of one sequence."""
    tokens, x = torch.randint(0, shape.vocab_size, (1, LENGTH)), torch.randn(1, LENGTH, shape.hidden_size)
    context = ForwardContext(tuple(torch.randn(2, LENGTH, rope_width // 2)), tokens=tokens, embedded=x)
    trunk = torch.nn.Embedding(shape.vocab_size, shape.hidden_size)
    return {
        "embedding": (tokens,),
        "ngram": (tokens, context),
        "ffn": (x, context),
        "attention": (x, context),
        "layer": (x, context),
        "mtp": (x, tokens, trunk, lambda: context),
    }.get(role, (x,))


def run(role, module, shape, arguments):
    """One forward pass; kinds that enter the residual stream at layers do so at all of them."""
    if role == "ffn":
        return feed_forward(module, *arguments)
    if role != "ngram":
        return module(*arguments)
    tokens, context = arguments
    x = context.embedded = module(tokens)
    for point in range(shape.num_layers + 1):
        x = module.enter(point, x, context)
    return x


def built(role, shape, config):
    if role == "ngram":
        return config.build(shape, 0.02)
    return config.build(shape)


def elements(module):
    return sum(t.numel() for t in module.state_dict().values())


@pytest.mark.parametrize(("role", "kind"), ALL_KINDS)
def test_parameters_are_those_of_the_built_module(role, kind):
    shape, config = shape_and_config(role, kind)
    module = built(role, shape, config)
    own = elements(module) - (module.weight.numel() if role == "ngram" else 0)
    assert config.budget(shape).params == own


@pytest.mark.parametrize(("role", "kind"), [pair for pair in ALL_KINDS if pair[0] != "rope"])
def test_flops_are_those_of_the_built_module(role, kind, monkeypatch):
    """Counted by torch while the module runs. Attention runs over all T keys and is budgeted over the (T + 1) / 2 visible ones."""
    monkeypatch.setattr("longcat_lab.blocks.mla.module.attention", attention_reference)  # the counter sees plain products only
    monkeypatch.setattr(MoE, "compute", staticmethod(experts_reference))
    monkeypatch.setattr("longcat_lab.blocks.engram.module.convolve", convolve_reference)
    shape, config = shape_and_config(role, kind)
    if role in ("moe", "layer"):  # every pick real, so that the count does not depend on the routing
        moe = MoEConfig(zero_expert_num=0)
        shape, config = replace(shape, moe=moe), moe if role == "moe" else config
    module, a = built(role, shape, config), config if role == "attention" else shape.attention
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    with FlopCounterMode(display=False) as counter:
        run(role, module, shape, inputs(role, shape, a.qk_rope_head_dim))
    counted = counter.get_total_flops() / LENGTH
    if role == "mtp":  # the head is the trunk's module and is applied outside
        counted += config.num_nextn_predict_layers * 2 * shape.hidden_size * shape.vocab_size
    attentions = {"attention": 1, "layer": 1 if kind == "decoder" else 2, "mtp": 1}.get(role, 0)
    core = 2 * a.num_attention_heads * (a.qk_head_dim + a.v_head_dim) * attentions
    assert counted - core * LENGTH == pytest.approx(config.budget(shape).flops_per_token - core * (LENGTH + 1) / 2, rel=1e-12)


def test_zero_experts_cost_no_flops(monkeypatch):
    """With a bias that sends every second pick to zero-experts the counted products are those of the real picks alone."""
    monkeypatch.setattr(MoE, "compute", staticmethod(experts_reference))
    config = MoEConfig(n_routed_experts=4, zero_expert_num=2, moe_topk=2, expected_real_experts=1.0)
    shape = load("tiny").model.shape()
    module = config.build(shape)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.01)
    module.router.e_score_correction_bias.copy_(torch.tensor([9.0, 0, 0, 0, 9.0, 0]))
    with FlopCounterMode(display=False) as counter:
        module(torch.randn(1, LENGTH, shape.hidden_size))
    assert counter.get_total_flops() == LENGTH * config.budget(shape).flops_per_token


def test_state_bytes_are_those_of_the_latents():
    shape, config = shape_and_config("attention", "mla")
    module = config.build(shape)
    x = torch.randn(1, LENGTH, shape.hidden_size)
    kept = module.latents(x, inputs("attention", shape, config.qk_rope_head_dim)[1].rope)
    assert sum(t.to(torch.bfloat16).nbytes for t in kept) == LENGTH * config.budget(shape).state_bytes_per_token


@pytest.mark.parametrize("overrides", [(), ("model.embedding.ngram.order=3",), ("model.num_layers=3", "model.moe.n_routed_experts=7")])
def test_the_whole_model_adds_up(overrides):
    config = load("tiny", *overrides)
    with torch.device("meta"):
        model = build(config)
    assert totals(config)["total_params"] == elements(model)
    table = budget(config)
    assert table.loc["total", "params"] == table["params"].iloc[:-1].sum() == elements(model)


def test_active_parameters_leave_out_what_is_only_looked_up():
    config = load("tiny")
    shape, model = config.model.shape(), config.model
    with_tables = load("tiny", "model.embedding.ngram.order=3")
    assert totals(with_tables)["active_params"] - totals(config)["active_params"] == model.hidden_size**2
    idle = (model.moe.n_routed_experts - model.moe.real_experts) * 3 * model.hidden_size * model.moe.expert_ffn_hidden_size
    assert totals(config)["total_params"] - totals(config)["active_params"] == idle + shape.vocab_size * shape.hidden_size


def test_longcat_flash_to_the_last_parameter():
    """The published 560 664 980 480 parameters without the prediction module (spec arithmetic, matched to the checkpoint)."""
    from longcat_lab.config import ModelConfig

    flash = ModelConfig(
        hidden_size=6144,
        num_layers=28,
        vocab_size=131072,
        max_position_embeddings=131072,
        attention={
            "num_attention_heads": 64,
            "q_lora_rank": 1536,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
        },
        ffn={"ffn_hidden_size": 12288},
        moe={"n_routed_experts": 512, "zero_expert_num": 256, "moe_topk": 12, "expert_ffn_hidden_size": 2048, "expected_real_experts": 8.0},
    )
    counted = totals(flash)
    assert counted["total_params"] == 560_664_980_480
    # Active with 8 real experts: base + head + 8 L E; the router's bias and the norms are in the base.
    assert counted["active_params"] == 27_149_511_680
    with torch.device("meta"):
        assert elements(build(flash)) == 560_664_980_480


def test_flash_lite_tables_to_the_last_row():
    config = NgramEmbeddingConfig(order=4, splits=4, vocab_ratio=78.0)
    shape = replace(load("tiny").model.shape(), hidden_size=3072, vocab_size=131072)
    assert config.budget(shape).params == 31_406_985_216 + 9_437_184


def test_a_kind_of_ones_own_is_found_built_and_budgeted():
    from typing import Literal

    from longcat_lab.blocks import Budget, register
    from longcat_lab.blocks.interface import _KINDS

    class Nothing(Block):
        def forward(self, x):
            return torch.zeros_like(x)

    try:

        @register("ffn")
        class NoFfn(BlockConfig):
            kind: Literal["none"] = "none"

            def budget(self, shape):
                return Budget()

            def build(self, shape):
                return Nothing()

        config = load("tiny", "model.ffn.kind=none")
        assert elements(build(config)) == totals(config)["total_params"] < totals(load("tiny"))["total_params"]
    finally:
        del _KINDS["ffn"]["none"]


def test_budgets_add_and_multiply():
    _, config = shape_and_config("attention", "mla")
    one = config.budget(load("tiny").model.shape())
    assert list(itertools.accumulate([one] * 3))[-1] == 3 * one == one * 3
    assert isinstance(config, MLAConfig)
