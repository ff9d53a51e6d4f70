"""Rules that pick keys without an indexer, rules of one's own, and MLA's absorbed form."""

from typing import ClassVar, Literal

import pytest
import torch

import longcat_lab as lab
from longcat_lab.blocks import Cache, kinds
from longcat_lab.blocks.context import visible_keys
from longcat_lab.blocks.interface import _KINDS
from longcat_lab.blocks.mla.op import attention_reference, causal_mask, shared_key_attention
from longcat_lab.blocks.sparse_attention import ops
from longcat_lab.blocks.sparse_attention.distill_op import attention_mass
from longcat_lab.blocks.sparse_attention.module import SparseAttention
from longcat_lab.blocks.sparse_attention.op import merged_attention, select, selected_scores, sparse_attention
from longcat_lab.budget import totals
from longcat_lab.config import ConfigError, load
from longcat_lab.errors import LabError

CPU = torch.device("cpu")
BASE = ["model.attention.kind=dsa", "model.attention.index_topk=12", "model.attention.index_head_dim=12", "model.num_layers=2"]
SINKS = ["model.attention.index_init_tokens=2", "model.attention.index_local_tokens=4"]


def model(rule, *overrides):
    built = lab.build(load("tiny", *BASE, f"model.attention.selection.kind={rule}", *overrides))
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return built.double().eval()


def selections(lm, tokens, ids=None):
    """int32 [B, T, K] of every attention in one pass, by index group."""
    found = {}
    hook = [
        m.register_forward_hook(lambda module, inputs, _: found.update({module.group: inputs[1].shared[f"index/{module.group}"].indices}))
        for m in lm.modules()
        if isinstance(m, SparseAttention)
    ]
    lm.hidden(tokens, ids)
    for each in hook:
        each.remove()
    return found


@pytest.fixture
def rules():
    before = dict(_KINDS["selection"])
    yield
    _KINDS["selection"].clear()
    _KINDS["selection"].update(before)


def test_the_rules_that_come_with_it():
    assert set(kinds("selection")) == {"indexer", "dense", "window", "random", "oracle"}


@pytest.mark.parametrize("rule", ["dense", "window", "random", "oracle"])
def test_a_rule_without_indexer_has_no_parameters_for_one(rule):
    lm = model(rule)
    assert not any("indexer" in name for name in lm.state_dict())
    config = load("tiny", *BASE, f"model.attention.selection.kind={rule}")
    assert lab.budget(config).loc["total", "params"] == sum(each.numel() for each in lm.state_dict().values())


def test_the_dense_rule_is_mla():
    lm, tokens = model("dense"), torch.randint(0, 300, (2, 64))
    dense = lab.build(load("tiny", "model.num_layers=2")).double().eval()
    dense.load_state_dict(lm.state_dict())
    assert torch.equal(lm(tokens), dense(tokens))
    plain = ["model.num_layers=2"]
    flops = [totals(load("tiny", *more))["flops_per_token"] for more in ([*BASE, "model.attention.selection.kind=dense"], plain)]
    assert flops[0] == flops[1]


def test_the_window_is_the_last_keys_and_sinks_the_first():
    tokens, ids = torch.randint(0, 300, (1, 64)), (torch.arange(64)[None] >= 30).long()
    for found in selections(model("window"), tokens, ids).values():
        assert found[0, 50].tolist() == list(range(39, 51)) and found[0, 32].tolist() == [-1] * 9 + [30, 31, 32]
    for found in selections(model("window", *SINKS), tokens, ids).values():
        assert found[0, 50].tolist() == [30, 31, *range(41, 51)]


def test_random_keys_are_evenly_spread_and_differ_by_query_group_and_seed():
    lm, tokens = model("random"), torch.randint(0, 300, (2, 64))
    found = selections(lm, tokens)
    assert torch.equal(found[0][0], found[0][1])  # positions decide, not tokens
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[0], selections(model("random", "model.attention.selection.seed=1"), tokens)[0])
    lm = lab.build(load("tiny", *BASE, "model.attention.selection.kind=random", "model.max_position_embeddings=512")).eval()
    picked = selections(lm, torch.randint(0, 300, (1, 512)))[0][0, 256:]
    share = torch.bincount(picked.flatten().long() // 64, minlength=8)[:4] / picked.numel()  # of keys that all these queries see
    expected = sum(64 / (t + 1) for t in range(256, 512)) / 256
    assert torch.allclose(share, torch.full((4,), expected), atol=0.02)


@pytest.mark.parametrize("documents", [False, True])
def test_the_oracle_takes_what_dense_attention_gives_most(documents):
    lm, tokens = model("oracle", *SINKS), torch.randint(0, 300, (2, 64))
    ids = (torch.arange(64)[None] >= torch.tensor([[20], [41]])).long() if documents else None
    attention, seen = lm.layers[0].self_attn[0], {}
    attention.register_forward_hook(lambda module, inputs, _: seen.update(x=inputs[0], context=inputs[1]))
    found = selections(lm, tokens, ids)[0]
    x, context = seen["x"], seen["context"]
    q_nope, q_rope = attention.queries(attention.query_latent(x), context.rope)
    c_kv, k_rope = attention.latents(x, context.rope)
    k_nope = attention.kv_b_proj(c_kv).unflatten(-1, (attention.config.num_attention_heads, -1)).transpose(1, 2)[..., : q_nope.shape[-1]]
    scores = (q_nope @ k_nope.transpose(-1, -2) + q_rope @ k_rope[:, None].transpose(-1, -2)) * attention.softmax_scale
    visible = visible_keys(context.first, 64, 64, CPU)
    mass = scores.masked_fill(~visible[:, None], -torch.inf).softmax(-1).mean(1)
    assert torch.equal(found, select(mass, visible.expand(2, -1, -1), 12, 2, 4))


@pytest.mark.parametrize("rule", ["window", "random", "oracle"])
def test_decoding_selects_what_a_whole_pass_does(rule):
    lm, tokens, cache, parts = model(rule, *SINKS), torch.randint(0, 300, (1, 64)), Cache(), []
    for at in range(0, 64, 7):
        parts.append(lm.hidden(tokens[:, at : at + 7], cache=cache))
    assert torch.allclose(torch.cat(parts, 1), lm.hidden(tokens), atol=1e-9)


def test_a_rule_of_ones_own_trains(rules, tmp_path):
    @lab.register("selection")
    class Strided(lab.Selection):
        kind: Literal["strided"] = "strided"
        uses_indexer: ClassVar[bool] = False

        def rank(self, at):
            return (at.distance % 4 == 0).float().expand_as(at.visible)

    config = load("tiny", *BASE, "model.attention.selection.kind=strided", "training.steps=3")
    run = lab.fit(config, tmp_path / "run", progress=False)
    found = selections(run.model.eval(), torch.randint(0, 300, (1, 64)))[0][0]
    assert all((60 - s) % 4 == 0 for s in found[60].tolist()) and len(set(found[60].tolist())) == 12
    assert run.summary["not_engaged"] is not None


def test_a_rule_may_mix_index_scores_with_positions(rules):
    @lab.register("selection")
    class Recent(lab.Selection):
        kind: Literal["recent"] = "recent"

        def rank(self, at):
            return at.index_scores() - 1e6 * (at.distance > 20)

    lm = model("recent")
    assert any("indexer" in name for name in lm.state_dict())
    found = selections(lm, torch.randint(0, 300, (1, 64)))[0][0]
    assert all(t - s <= 20 for t in range(20, 64) for s in found[t].tolist())


def test_a_rule_that_gives_the_wrong_shape_is_told(rules):
    @lab.register("selection")
    class Wrong(lab.Selection):
        kind: Literal["wrong"] = "wrong"

        def rank(self, at):
            return at.index_scores()[0, 0]

    with pytest.raises(LabError, match=r"selection.kind wrong: rank\(\) gave \[64\]; it must give a tensor \[1, 64, 64\]"):
        model("wrong").hidden(torch.randint(0, 300, (1, 64)))


def test_an_unknown_rule_names_the_nearest():
    with pytest.raises(ConfigError, match=r"'oracel'.*oracle"):
        load("tiny", *BASE, "model.attention.selection.kind=oracel")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["model.attention.cli_offset=1"], "cli_offset is 1, not below cli_factor 1"),
        (["model.attention.cli_factor=2", "model.attention.distill.served_weights=[1]"], r"served_weights \[1.0\] must be 2 numbers"),
        (["model.attention.hierarchical={page: 12, block: 8}"], "block is 8, which does not divide page 12"),
    ],
)
def test_settings_that_do_not_fit_are_told(settings, said):
    with pytest.raises(ConfigError, match=said):
        load("tiny", *BASE, *settings)


def test_a_pipeline_stage_may_not_begin_inside_a_group():
    attention = load("tiny", *BASE, "model.attention.cli_factor=4", "model.attention.cli_offset=2").model.attention
    attention.check_stages([0, 2, 6, 10])
    with pytest.raises(ConfigError, match=r"begins at attention 4, inside the group of cli_factor 4 that begins at 2.*attention 2 or 6"):
        attention.check_stages([0, 2, 4])


# --- cores --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("yarn", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_absorbed_and_expanded_forms_agree_in_fp32(scaled, yarn):
    rope = ["model.rope={kind: yarn, factor: 8, original_max_position_embeddings: 32, mscale_all_dim: 1.0}"] if yarn else []
    corrections = [f"model.attention.mla_scale_{name}_lora={'true' if scaled else 'false'}" for name in ("q", "kv")]
    lm = lab.build(load("tiny", *rope, *corrections)).eval()
    attention, x = lm.layers[0].self_attn[0], torch.randn(2, 64, lm.config.hidden_size)
    assert (attention.kv_scale > 1) == scaled and (attention.softmax_scale > attention.config.qk_head_dim**-0.5) == yarn
    context = lm.context(x, torch.arange(64)[None].expand(2, -1) // 40)
    parts = [*attention.queries(attention.query_latent(x), context.rope), *attention.latents(x, context.rope)]
    assert torch.allclose(attention.absorbed(*parts, context.mask), attention.expanded(*parts, context.mask), atol=1e-5)


def test_decoding_takes_the_absorbed_form_where_it_costs_less():
    lm, tokens, used = model("dense"), torch.randint(0, 300, (1, 64)), []
    for module in lm.modules():
        if isinstance(module, SparseAttention):
            for name in ("absorbed", "expanded"):
                own = getattr(module, name)
                setattr(module, name, lambda *inputs, own=own, name=name: (used.append(name), own(*inputs))[1])
    cache = Cache()
    whole = lm.hidden(tokens)
    parts = [lm.hidden(tokens[:, :50], cache=cache), *(lm.hidden(tokens[:, t : t + 1], cache=cache) for t in range(50, 64))]
    assert used == ["expanded"] * 8 + ["absorbed"] * 56
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-9)


def test_one_key_for_all_heads_is_attention_with_copies_of_it():
    q, k, v = torch.randn(2, 5, 3, 6).double(), torch.randn(2, 9, 6).double(), torch.randn(2, 9, 4).double()
    mask = (torch.rand(2, 1, 5, 9) < 0.5) | torch.eye(9, dtype=torch.bool)[4:]
    copies = [each[:, None].expand(-1, 3, -1, -1) for each in (k, v)]
    for given in (mask, None):
        expected = attention_reference(q.transpose(1, 2), *copies, given, 0.3).transpose(1, 2)
        assert torch.allclose(shared_key_attention(q, k, v, given, 0.3), expected)


def test_with_all_keys_selected_the_core_is_torchs():
    q, k, v = torch.randn(2, 7, 3, 6).double(), torch.randn(2, 11, 6).double(), torch.randn(2, 11, 4).double()
    indices = select(torch.randn(2, 7, 11), visible_keys(None, 7, 11, CPU), 11)
    copies = [each[:, None].expand(-1, 3, -1, -1) for each in (k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(q.transpose(1, 2), *copies, attn_mask=causal_mask(7, 11, CPU), scale=0.3)
    out, mass = sparse_attention(q, k, v, indices, 0.3)
    assert torch.allclose(out, expected.transpose(1, 2))
    assert torch.allclose(
        torch.zeros(2, 7, 12).double().scatter(-1, torch.where(indices < 0, 11, indices).long(), mass)[..., :11],
        attention_mass(q, k, None, 0.3),
    )


@pytest.mark.parametrize("window", [1, 4, 9])
def test_window_and_other_keys_merged_by_log_sum_exp_are_one_softmax(window):
    """Values and gradients; early queries, and those of a document's start, have nothing but their window."""
    q, k = torch.randn(2, 20, 3, 6, dtype=torch.float64, requires_grad=True), torch.randn(2, 20, 6, dtype=torch.float64, requires_grad=True)
    first = torch.where(torch.arange(20) >= 11, 11, 0).expand(2, -1)
    indices = select(torch.randn(2, 20, 20), visible_keys(first, 20, 20, CPU), 9, 0, window)
    assert (indices[..., : 9 - window] < 0).all(-1).any() and (indices >= 0).all(-1).any()
    found, whole = merged_attention(q, k, k[..., :4], indices, 0.7, window), sparse_attention(q, k, k[..., :4], indices, 0.7)[0]
    given = torch.randn_like(whole)
    gradients = [torch.autograd.grad(each, (q, k), given) for each in (found, whole)]
    assert torch.allclose(found, whole, atol=1e-12)
    assert all(torch.allclose(*pair, atol=1e-12) for pair in zip(*gradients, strict=True))


def test_in_chunks_plain_pytorch_gives_the_same_values_and_gradients(monkeypatch):
    monkeypatch.setattr(ops, "_fast", lambda *_: None)
    monkeypatch.setattr(ops, "CHUNK_ELEMENTS", 2 * 4 * 13 * 2)
    q, k = torch.randn(2, 9, 3, 6, dtype=torch.float64, requires_grad=True), torch.randn(2, 9, 6, dtype=torch.float64, requires_grad=True)
    indices = select(torch.randn(2, 9, 9), visible_keys(None, 9, 9, CPU), 4)
    w = torch.randn(2, 9, 3, dtype=torch.float64, requires_grad=True)

    def values(core, scores):
        out, mass = core(q, k, k[..., :4], indices, 0.3)
        found = scores(q, k, w, indices)
        return out, mass, found, torch.autograd.grad(out.square().sum() + found[indices >= 0].square().sum(), (q, k, w))

    chunked, whole = values(ops.sparse_attention, ops.selected_scores), values(sparse_attention, selected_scores)
    for own, other in zip((*chunked[:3], *chunked[3]), (*whole[:3], *whole[3]), strict=True):
        assert torch.allclose(own, other)
