"""DSA and LSA: the indexer's scores, the selection rule, sharing between attentions and steps, decoding, and what it all costs."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import longcat_lab as lab
from longcat_lab.blocks import Cache, DSAConfig, ForwardContext, LSAConfig, MLAConfig, ModelShape, RMSNormConfig, RopeConfig
from longcat_lab.blocks.context import document_starts, visible_keys
from longcat_lab.blocks.mla.op import attention_reference, causal_document_mask
from longcat_lab.blocks.rope.op import rotate
from longcat_lab.blocks.sparse_attention.module import Index, SparseAttention
from longcat_lab.blocks.sparse_attention.op import index_scores, mean_selected, rotate_halves, select
from longcat_lab.config import ConfigError, load
from longcat_lab.errors import LabError

HIDDEN, LENGTH = 48, 40
SHAPE = ModelShape(hidden_size=HIDDEN, vocab_size=300, sequence_length=LENGTH, norm=RMSNormConfig(), rope=RopeConfig())
KINDS = {"dsa": DSAConfig, "lsa": LSAConfig}
SMALL = {"num_attention_heads": 2, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
SPARSE = {**SMALL, "index_n_heads": 16, "index_head_dim": 12, "index_topk": 10}
# A whole small model whose sequences of 64 tokens are longer than index_topk.
MODEL = ["model.attention.index_topk=12", "model.attention.index_head_dim=12", "model.attention.index_n_heads=16", "model.num_layers=2"]


def filled(module, std=0.3):
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return module


def attention(kind, index=0, **settings):
    sinks = {"index_init_tokens": 2, "index_local_tokens": 4} if kind == "lsa" else {}
    return filled(KINDS[kind](**{**SPARSE, **sinks, **settings}).build(replace(SHAPE, attention_index=index))).double()


def a_context(length=LENGTH, first=None, cache=None, start=0):
    rope = RopeConfig().build(SHAPE)(length, SMALL["qk_rope_head_dim"], torch.empty(0, dtype=torch.float64), start)
    return ForwardContext(rope, first, cache=cache)


def mask_of(indices, keys):
    """A selection as bool [B, T, S]."""
    chosen = torch.zeros(*indices.shape[:2], keys + 1, dtype=torch.bool)
    return chosen.scatter(-1, torch.where(indices < 0, keys, indices).long(), True)[..., :keys]


def selected(module, x, context):
    """The keys that an attention attends to in one pass, bool [B, T, S]."""
    module(x, context)
    return mask_of(module.shared(context).indices, x.shape[1])


def causal(length=LENGTH):
    return visible_keys(None, length, length, torch.device("cpu"))


def model(kind, *overrides):
    """A small model in float64, in which one selection is as good as any other only by chance."""
    windows = ["model.attention.index_init_tokens=2", "model.attention.index_local_tokens=4"] if kind == "lsa" else []
    built = lab.build(load("tiny", f"model.attention.kind={kind}", *MODEL, *windows, *overrides))
    return filled(built, 0.2).double().eval()


def two_documents(rows=2, length=64):
    """Token rows of two documents each, with boundaries at different places."""
    ids = torch.stack([(torch.arange(length) >= length // 3 + 7 * row).long() for row in range(rows)])
    return torch.randint(0, 300, (rows, length)), ids


# --- scores -------------------------------------------------------------------------------------------------------------------


def test_scores_are_the_equation_pair_by_pair():
    q, k, w = torch.randn(2, 3, 4, 5), torch.randn(2, 6, 5), torch.randn(2, 3, 4)
    scores = index_scores(q, k, w)
    for b, t, s in [(0, 0, 0), (1, 2, 5), (0, 1, 3)]:
        expected = sum(float(w[b, t, j]) * max(0.0, float(q[b, t, j] @ k[b, s])) for j in range(4))
        assert float(scores[b, t, s]) == pytest.approx(expected, rel=1e-5)


def test_scores_are_not_narrowed_by_autocast():
    q, k, w = torch.randn(1, 3, 4, 5), torch.randn(1, 6, 5), torch.randn(1, 3, 4)
    plain = index_scores(q, k, w)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(index_scores(q, k, w), plain)
    assert index_scores(q.bfloat16(), k.bfloat16(), w).dtype == torch.float32


def test_half_split_rope_turns_the_same_pairs_at_other_places():
    x, (cos, sin) = torch.randn(2, 7, 12), RopeConfig().build(SHAPE)(7, 12, torch.empty(0))
    interleaved = rotate(x, cos, sin)
    halves = torch.cat((x[..., 0::2], x[..., 1::2]), -1)
    assert torch.allclose(rotate_halves(halves, cos, sin), torch.cat((interleaved[..., 0::2], interleaved[..., 1::2]), -1), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_family_defaults_of_norm_layout_and_latent(kind):
    module = attention(kind)
    half = module.config.index_rope_layout == "half-split"
    assert (isinstance(module.indexer.k_norm, torch.nn.LayerNorm), half) == (kind == "dsa", kind == "dsa")
    assert module.indexer.k_norm.eps == (1e-6 if kind == "dsa" else SHAPE.norm.eps)
    assert module.config.index_query_latent == "normed"
    names = {"wq_b.weight", "wk.weight", "k_norm.weight", "weights_proj.weight"} | ({"k_norm.bias"} if kind == "dsa" else set())
    assert {name for name, _ in module.indexer.named_parameters()} == names


@pytest.mark.parametrize("settings", [{"index_rope_layout": "interleaved"}, {"index_rope_layout": "half-split"}])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_the_indexer_is_its_equations_with_either_layout_and_norm(settings, norm):
    module = attention("lsa", index_k_norm_type=norm, **settings)
    c, indexer, x, c_q = module.config, module.indexer, torch.randn(1, 9, HIDDEN).double(), torch.randn(1, 9, 24).double()
    context = a_context(9)
    turn = rotate if settings["index_rope_layout"] == "interleaved" else rotate_halves

    def turned(each):
        return torch.cat((turn(each[:, :8], *context.rope), each[:, 8:]), -1)

    key = x[0] @ indexer.wk.weight.T
    if norm == "layer":
        key = (key - key.mean(-1, keepdim=True)) / (key.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        key = key * indexer.k_norm.weight + indexer.k_norm.bias
    else:
        key = key / (key.square().mean(-1, keepdim=True) + SHAPE.norm.eps).sqrt() * indexer.k_norm.weight
    key, total = turned(key), 0
    for j in range(c.index_n_heads):
        query = turned(c_q[0] @ indexer.wq_b.weight[j * 12 : (j + 1) * 12].T)
        weight = x[0] @ indexer.weights_proj.weight[j] / (c.index_n_heads * c.index_head_dim) ** 0.5
        total = total + weight[:, None] * (query @ key.T).clamp_min(0)
    assert torch.allclose(index_scores(*indexer(x, c_q, context))[0], total, rtol=1e-9)


def test_the_query_latent_before_or_after_its_factor_changes_the_scores_by_that_factor_and_no_selection():
    normed, x, seen = attention("lsa"), torch.randn(1, LENGTH, HIDDEN).double(), []
    scaled = attention("lsa", index_query_latent="scaled")
    scaled.load_state_dict(normed.state_dict())
    for module in (normed, scaled):
        module.indexer.register_forward_hook(lambda _, inputs, vectors: seen.append((inputs[1], index_scores(*vectors))))
        seen.append(selected(module, x, a_context()))
    (latent, before), mask, (scaled_latent, after), same_mask = seen
    assert torch.allclose(latent, normed.q_a_layernorm(normed.q_a_proj(x))) and normed.q_scale == 2**0.5
    assert torch.allclose(scaled_latent, latent * normed.q_scale) and torch.allclose(after, before * normed.q_scale)
    assert torch.equal(mask, same_mask)


@pytest.mark.parametrize(("scale", "factor"), [("heads_and_width", (16 * 12) ** -0.5), ("width", 12**-0.5), ("none", 1.0)])
def test_the_scores_factor_is_an_option_and_changes_no_selection(scale, factor):
    module, plain, x = attention("dsa", index_score_scale=scale), attention("dsa"), torch.randn(1, LENGTH, HIDDEN).double()
    plain.load_state_dict(module.state_dict())
    c_q = torch.randn(1, LENGTH, 24).double()
    scores = index_scores(*module.indexer(x, c_q, a_context()))
    assert torch.allclose(scores / factor, index_scores(*plain.indexer(x, c_q, a_context())) * (16 * 12) ** 0.5)
    assert torch.equal(selected(module, x, a_context()), selected(plain, x, a_context()))


# --- selection ----------------------------------------------------------------------------------------------------------------


def chosen_by_hand(scores, visible, topk, sinks, window):
    """One query at a time, with lists."""
    chosen = torch.zeros_like(visible)
    for b, t in ((b, t) for b in range(scores.shape[0]) for t in range(scores.shape[1])):
        keys = [s for s in range(scores.shape[2]) if visible[b, t, s]]
        picked = set(keys[:sinks]) | set(keys[max(0, len(keys) - window) :] if window else [])
        if len(keys) <= topk:
            picked = set(keys)
        else:
            rest = sorted((s for s in keys if s not in picked), key=lambda s: -float(scores[b, t, s]))
            picked |= set(rest[: topk - sinks - window])
            assert len(picked) == topk
        chosen[b, t, list(picked)] = True
    return chosen


@pytest.mark.parametrize(("topk", "sinks", "window"), [(10, 0, 0), (10, 2, 4), (10, 0, 10), (10, 10, 0), (10, 1, 9), (1, 0, 1), (10, 0, 4)])
def test_selection_is_that_of_a_loop_over_queries(topk, sinks, window):
    _, ids = two_documents(3, LENGTH)
    scores, visible = torch.randn(3, LENGTH, LENGTH), causal_document_mask(ids)[:, 0]
    indices = select(scores, visible, topk, sinks, window)
    assert torch.equal(mask_of(indices, LENGTH), chosen_by_hand(scores, visible, topk, sinks, window))
    assert indices.dtype == torch.int32 and torch.equal(indices, indices.sort(-1).values)  # rising, empty places in front


def test_selection_with_fewer_queries_than_keys_is_the_end_of_the_whole():
    scores, visible = torch.randn(2, LENGTH, LENGTH), causal()
    assert torch.equal(select(scores[:, -3:], visible[:, -3:], 10, 2, 4), select(scores, visible, 10, 2, 4)[:, -3:])


def test_of_equal_scores_the_earlier_key_is_selected():
    assert select(torch.zeros(1, 6, 6), causal(6), 2)[0].tolist()[-1] == [0, 1]
    assert select(torch.zeros(1, 6, 6), causal(6), 3, 1, 1)[0].tolist()[-1] == [0, 1, 5]
    assert select(torch.zeros(1, 6, 6), causal(6), 3)[0].tolist()[1] == [-1, 0, 1]


def test_room_for_all_keys_selects_all():
    visible = causal_document_mask(two_documents(2, LENGTH)[1])[:, 0]
    assert torch.equal(mask_of(select(torch.randn(2, LENGTH, LENGTH), visible, LENGTH, 2, 4), LENGTH), visible)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_with_room_for_all_keys_the_model_is_dense_mla_bit_for_bit(kind, documents):
    tokens, ids = two_documents()
    sparse = lab.build(load("tiny", f"model.attention.kind={kind}", "model.attention.index_topk=64", "model.num_layers=2"))
    dense = lab.build(load("tiny", "model.num_layers=2"))
    assert torch.equal(sparse(tokens, ids if documents else None), dense(tokens, ids if documents else None))


def test_one_key_less_than_the_sequence_has_is_another_model():
    tokens, _ = two_documents()
    dense, sparse = model("dsa", "model.attention.index_topk=64"), model("dsa", "model.attention.index_topk=63")
    sparse.load_state_dict(dense.state_dict())
    there = (dense(tokens) - sparse(tokens)).detach().abs().amax((0, 2))
    assert there[-1] > 1e-6 and float(there[:-1].max()) < 1e-12  # only the last query has a key too many


@pytest.mark.parametrize("kind", KINDS)
def test_documents_are_never_crossed(kind):
    tokens, ids = two_documents()
    lm, border = model(kind), int((ids[0] == 0).sum())
    packed = lm(tokens[:1], ids[:1])
    other = tokens[:1].clone()
    other[:, :border] = torch.randint(0, 300, (1, border))
    assert torch.equal(lm(other, ids[:1])[:, border:], packed[:, border:])
    alone = torch.cat((lm(tokens[:1, :border]), lm(tokens[:1, border:])), 1)
    assert torch.allclose(packed, alone, atol=1e-9)  # sinks and window are each document's own


def test_the_core_attends_to_the_selected_keys_alone():
    module, x = attention("lsa"), torch.randn(1, LENGTH, HIDDEN).double()
    context, dense = a_context(), MLAConfig(**SMALL).build(SHAPE).double()
    out = module(x, context)
    mask = mask_of(module.shared(context).indices, LENGTH)
    dense.load_state_dict({name: value for name, value in module.state_dict().items() if not name.startswith("indexer")})
    same = a_context()
    same.__dict__["mask"] = mask[:, None]  # MLA, expanded, with nothing but these keys visible
    assert torch.allclose(out, dense(x, same), atol=1e-12)
    assert mask.sum(-1).flatten().tolist() == [min(t, 10) for t in range(1, LENGTH + 1)]
    assert float(mask.sum()) / LENGTH == mean_selected(LENGTH, 10)


# --- against transformers -----------------------------------------------------------------------------------------------------


@pytest.fixture
def peer():
    """DSA of transformers and ours, on the same random weights."""
    pytest.importorskip("transformers.models.deepseek_v32")
    from transformers.models.deepseek_v32.configuration_deepseek_v32 import DeepseekV32Config
    from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32Attention, DeepseekV32RotaryEmbedding

    theirs_config = DeepseekV32Config(
        **{name: size for name, size in SPARSE.items()},
        hidden_size=HIDDEN,
        num_key_value_heads=2,
        num_hidden_layers=1,
        vocab_size=300,
        max_position_embeddings=LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        attn_implementation="eager",
    )
    theirs = filled(DeepseekV32Attention(theirs_config, 0)).eval()
    config = DSAConfig(**SPARSE, mla_scale_q_lora=False, mla_scale_kv_lora=False)
    ours = config.build(replace(SHAPE, norm=RMSNormConfig(eps=1e-6)))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, LENGTH, HIDDEN)
    angles = DeepseekV32RotaryEmbedding(theirs_config)(x, torch.arange(LENGTH)[None])
    rope = RopeConfig().build(SHAPE)(LENGTH, SMALL["qk_rope_head_dim"], x)
    return theirs, ours, x, angles, rope


@pytest.mark.parametrize("documents", [False, True])
def test_transformers_selects_the_same_tokens(peer, documents):
    theirs, ours, x, angles, rope = peer
    ids = two_documents(2, LENGTH)[1] if documents else torch.zeros(2, LENGTH, dtype=torch.long)
    mask = causal_document_mask(ids)
    c_q = theirs.q_a_layernorm(theirs.q_a_proj(x))
    picked = theirs.indexer(x, c_q, angles, mask[:, 0], torch.arange(LENGTH)[None]).long()
    expected = torch.zeros_like(mask[:, 0]).scatter(-1, picked, True) & mask[:, 0]
    assert torch.equal(selected(ours, x, ForwardContext(rope, document_starts(ids))), expected)


def test_the_whole_attention_is_that_of_transformers(peer):
    theirs, ours, x, angles, rope = peer
    mask = causal_document_mask(torch.zeros(2, LENGTH))
    expected, _ = theirs(x, angles, mask.float().log(), position_ids=torch.arange(LENGTH)[None])
    assert torch.allclose(ours(x, ForwardContext(rope)), expected, atol=1e-5)


# --- sharing ------------------------------------------------------------------------------------------------------------------


def owners(built):
    return [name.removesuffix(".indexer") for name, module in built.named_modules() if name.endswith(".indexer")]


def test_every_cli_factor_th_attention_owns_an_indexer():
    assert owners(model("lsa")) == ["layers.0.self_attn.0", "layers.1.self_attn.0"]
    assert owners(model("lsa", "model.attention.cli_factor=4")) == ["layers.0.self_attn.0"]
    assert len(owners(model("dsa"))) == 4
    decoder = model("lsa", "model.layer.kind=decoder", "model.num_layers=5", "model.attention.cli_factor=2")
    assert owners(decoder) == ["layers.0.self_attn", "layers.2.self_attn", "layers.4.self_attn"]


@pytest.mark.parametrize("cli_factor", [1, 2, 3])
def test_the_others_attend_to_their_owners_selection(cli_factor):
    x, context, masks = torch.randn(1, LENGTH, HIDDEN).double(), a_context(), []
    for index in range(6):
        module = attention("lsa", index, cli_factor=cli_factor)
        masks.append(selected(module, x, context))
    same = [torch.equal(before, after) for before, after in itertools.pairwise(masks)]
    assert same == [index % cli_factor != 0 for index in range(1, 6)]


def test_reusing_without_an_owner_is_said_in_one_sentence():
    module, x = attention("lsa", 1), torch.randn(1, LENGTH, HIDDEN).double()
    with pytest.raises(LabError, match=r"group 0 has no selection.*set cli_factor to 1"):
        module(x, a_context())


@pytest.mark.parametrize(("shared", "selections"), [(True, 1), (False, 3)])
def test_prediction_steps_after_the_first_take_its_selection(shared, selections):
    overrides = ["model.mtp.num_nextn_predict_layers=3", f"model.attention.dsa_mtp_cli={'true' if shared else 'false'}"]
    lm, calls = model("lsa", *overrides), []
    assert owners(lm)[-1] == "mtp.layers.0.layer.self_attn"
    lm.mtp.layers[0].layer.self_attn.indexer.register_forward_hook(lambda *_: calls.append(1))
    tokens, ids = two_documents()
    lm.ahead(lm.hidden(tokens, ids), tokens, ids)
    assert len(calls) == selections


# --- decoding -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [1, 11, 12, 13, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_decoding_with_a_cache_is_the_whole_pass(kind, first):
    """Prefill of `first` tokens (less, as many as, more than index_topk), then steps of 1 and of 3 tokens."""
    lm, tokens = model(kind), torch.randint(0, 300, (1, 64))
    whole, cache, parts, at = lm.hidden(tokens), Cache(), [], 0
    for size in [first, *[1, 3] * 16]:
        parts.append(lm.hidden(tokens[:, at : at + size], cache=cache))
        at += size
        if at >= 64:
            break
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-9)


def test_forgotten_drafts_leave_no_index_key_behind():
    lm, tokens, cache = model("lsa"), torch.randint(0, 300, (1, 30)), Cache()
    lm.hidden(tokens[:, :20], cache=cache)
    lm.hidden(torch.randint(0, 300, (1, 5)), cache=cache)
    cache.cut(20)
    assert torch.allclose(lm.hidden(tokens[:, 20:], cache=cache), lm.hidden(tokens)[:, 20:], atol=1e-9)


def test_generation_is_the_same_with_and_without_cache_and_with_drafts():
    from longcat_lab.model.speculative import speculate

    lm, tokens = model("lsa", "model.mtp.num_nextn_predict_layers=3"), torch.randint(0, 300, (9,))
    plain = lab.generate(lm, tokens, 30, cached=False)
    assert torch.equal(lab.generate(lm, tokens, 30), plain)
    assert torch.equal(speculate(lm, tokens, 30).tokens, plain)


# --- costs --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("topk", [10, LENGTH - 1, LENGTH])
@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_costs_are_those_of_the_built_module(kind, index, topk, monkeypatch):
    """The reference computes all pairs of query and key for the scores; the budget counts those that are visible."""
    monkeypatch.setattr("longcat_kernels.takes", lambda *_: False)  # the counter sees torch's products only
    monkeypatch.setattr("longcat_lab.blocks.mla.module.attention", attention_reference)
    shape = replace(SHAPE, attention_index=index)
    config = KINDS[kind](**{**SPARSE, "index_topk": topk}, cli_factor=2, index_init_tokens=0, index_local_tokens=4)
    module, cache, cost = config.build(shape).double().eval(), Cache(), config.budget(shape)
    context, again = a_context(), a_context(cache=cache)
    if index:  # what the owner of the group would have left
        context.shared["index/0"] = again.shared["index/0"] = Index(indices=select(torch.randn(1, LENGTH, LENGTH), causal(), topk))
    assert cost.params == cost.active_params == sum(each.numel() for each in module.state_dict().values())
    with FlopCounterMode(display=False) as counter:
        module(torch.randn(1, LENGTH, HIDDEN).double(), context)
    absorbed, expanded, score = 2 * 2 * (2 * 16 + 8), 2 * 2 * (16 + 8), 2 * 16 * 12 + 2 * 16
    scored = score if index == 0 and topk < LENGTH else 0
    # empty places of a selection are multiplied too, and so are keys ahead in a dense core
    not_visible = absorbed * (topk - mean_selected(LENGTH, topk)) if topk < LENGTH else expanded * (LENGTH - 1) / 2
    not_visible += scored * (LENGTH - 1) / 2
    assert counter.get_total_flops() / LENGTH - not_visible == pytest.approx(cost.flops_per_token, rel=1e-12)
    module(torch.randn(1, LENGTH, HIDDEN).double(), again)
    kept = [store[:, :LENGTH] for stores in cache._kept.values() for store in stores]
    assert sum(each.to(torch.bfloat16).nbytes for each in kept) == LENGTH * cost.state_bytes_per_token
    assert len(kept) == (2 if index else 3)


def test_mean_of_selected_keys():
    assert mean_selected(7, 100) == mean_selected(7, 7) == 4.0
    assert mean_selected(100, 3) == sum(min(t, 3) for t in range(1, 101)) / 100


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_model_adds_up(kind):
    config = load("tiny", f"model.attention.kind={kind}", "model.num_layers=3", "model.mtp.num_nextn_predict_layers=2")
    with torch.device("meta"):
        built = lab.build(config)
    assert lab.budget(config).loc["total", "params"] == sum(each.numel() for each in built.state_dict().values())


# --- settings -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("model.attention.index_topk=32", "index_topk is 32, below index_init_tokens + index_local_tokens (33): raise it"),
        ("model.attention.index_head_dim=6", "index_head_dim is 6, below qk_rope_head_dim 8: raise it"),
        ("model.attention.q_lora_rank=null", "q_lora_rank is empty, but the indexer reads the query latent: give it a width"),
        ("model.attention.cli_factor=0", "greater than or equal to 1"),
        ("model.attention.index_rope_layout=halves", "should be 'half-split' or 'interleaved'"),
    ],
)
def test_settings_that_cannot_be_are_named(override, sentence):
    with pytest.raises(ConfigError) as error:
        load("tiny", "model.attention.kind=lsa", override)
    assert sentence in str(error.value)


def test_a_selection_of_sinks_and_window_alone_is_possible():
    assert load("tiny", "model.attention.kind=lsa", "model.attention.index_topk=33").model.attention.index_topk == 33


# --- page by page -------------------------------------------------------------------------------------------------------------


def paged(*settings):
    """Hierarchical indexing in a model, on the weights of a flat one: pages of 8 of 64 tokens, sub-blocks of 4."""
    flat = model("dsa")
    pages = [f"model.attention.hierarchical.{each}" for each in ("page=8", "block=4", "from_length=0", *settings)]
    other = model("dsa", *pages)
    other.load_state_dict(flat.state_dict())
    return flat, other


def test_with_pages_for_all_tokens_the_model_is_the_flat_one():
    (flat, other), (tokens, ids) = paged("pages=8", "exempt=0"), two_documents()
    assert torch.equal(flat(tokens), other(tokens)) and torch.equal(flat(tokens, ids), other(tokens, ids))


def test_few_pages_select_other_keys_but_not_while_training_nor_where_indexers_are_exempt_nor_below_the_length():
    tokens = torch.randint(0, 300, (2, 64))
    flat, other = paged("pages=2", "exempt=0")
    assert not torch.allclose(flat(tokens), other(tokens))
    flat.train(), other.train()
    assert torch.equal(flat(tokens), other(tokens))
    for settings in (("pages=2", "exempt=4"), ("pages=2", "exempt=0", "from_length=65")):
        flat, other = paged(*settings)
        assert torch.equal(flat(tokens), other(tokens))


def selections(lm, tokens):
    """Of every attention in one pass, in order."""
    found = []

    def keep(module, inputs, _):
        found.append(inputs[1].shared[f"index/{module.group}"].indices)

    hooks = [m.register_forward_hook(keep) for m in lm.modules() if isinstance(m, SparseAttention)]
    lm.hidden(tokens)
    for hook in hooks:
        hook.remove()
    return found


def test_exempt_counts_indexers_from_the_first_on():
    tokens, changed = torch.randint(0, 300, (1, 64)), []
    for exempt in range(5):
        same = [torch.equal(*pair) for pair in zip(*(selections(lm, tokens) for lm in paged("pages=2", f"exempt={exempt}")), strict=True)]
        changed.append(same.index(False) if False in same else 4)
    assert changed == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("decode", [False, True])
def test_decoding_is_flat_unless_asked(decode):
    flat, other = paged("pages=2", "exempt=0", f"decode={'true' if decode else 'false'}")
    tokens, outs = torch.randint(0, 300, (1, 64)), []
    for lm in (flat, other):
        cache = Cache()
        parts = [lm.hidden(tokens[:, t : t + 1], cache=cache) for t in range(64)]
        outs.append(torch.cat(parts, 1))
    assert torch.equal(*outs) == (not decode)
    if decode:
        assert torch.allclose(outs[1], other.hidden(tokens), atol=1e-9)


def test_half_precision_runs_and_is_near():
    """bf16 autocast: index weights, scores and losses stay in fp32, selections differ in near ties alone."""
    lm = lab.build(load("tiny", "model.attention.kind=lsa", *MODEL, "model.attention.index_local_tokens=4")).train()
    tokens, told = torch.randint(0, 300, (2, 64)), []
    for enabled in (False, True):
        for attention in (m for m in lm.modules() if isinstance(m, SparseAttention)):
            attention.after_step()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = lm.hidden(tokens)
        lm.zero_grad()
        out.float().square().mean().backward()
        gradient = torch.cat([p.grad.flatten() for name, p in lm.named_parameters() if ".indexer." in name])
        attentions = [m for m in lm.modules() if isinstance(m, SparseAttention)]
        told.append((out.detach().float(), gradient, [float(m.taught[0]) for m in attentions]))
    (out, gradient, losses), (half_out, half_gradient, half_losses) = told
    assert float((out - half_out).abs().mean()) < 0.02 * float(out.abs().mean())
    assert torch.nn.functional.cosine_similarity(gradient, half_gradient, dim=0) > 0.8
    assert half_losses == pytest.approx(losses, rel=0.3)
