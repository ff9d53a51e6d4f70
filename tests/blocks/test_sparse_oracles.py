"""Sparse attention's reference against what others wrote: fla's naive DSA, torch's own attention, GLM's DSA in transformers."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from longcat_lab.blocks.sparse_attention import op

LENGTH, TOPK = 40, 12
HIDDEN, HEADS, NOPE, ROPE, VALUE, LATENT = 48, 3, 8, 6, 10, 16
INDEX_HEADS, INDEX_WIDTH = 16, 14  # with few heads, many scores are 0: torch.topk, which the others use, breaks ties anyhow


@pytest.fixture(scope="module")
def fla():
    """fla's naive DSA, loaded by its file alone: importing fla.ops brings in every Triton kernel of fla, half a minute of it."""
    pytest.importorskip("einops")
    package = importlib.util.find_spec("fla")
    if package is None:
        pytest.skip("fla is not installed")
    spec = importlib.util.spec_from_file_location("naive_dsa", Path(package.submodule_search_locations[0]) / "ops" / "dsa" / "naive.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def index_inputs(rows=2):
    q, k = torch.randn(rows, LENGTH, INDEX_HEADS, INDEX_WIDTH), torch.randn(rows, LENGTH, INDEX_WIDTH)
    return q, k, torch.randn(rows, LENGTH, INDEX_HEADS)


def core_inputs(rows=2):
    """q, and k whose first columns are the values, of MLA in its absorbed form."""
    return torch.randn(rows, LENGTH, HEADS, LATENT + ROPE), torch.randn(rows, LENGTH, LATENT + ROPE)


def gradients(result, d_out, *inputs):
    return [result, *torch.autograd.grad((result * d_out).sum(), inputs)]


# --- fla ----------------------------------------------------------------------------------------------------------------------


def test_fla_selects_the_same_keys(fla):
    q, k, w = index_inputs()
    theirs = fla.naive_dsa_indexer(q, k, w, TOPK, activation="relu")  # best first, -1 behind
    assert torch.equal(theirs.sort(-1).values.int(), op.index_topk(q, k, w, None, TOPK))


def test_fla_selects_the_same_keys_of_packed_documents(fla):
    """It counts keys from the document's first one; a document shorter than topk leaves -1."""
    q, k, w = index_inputs(rows=1)
    bounds = torch.tensor([0, 7, 29, LENGTH])
    first = bounds[:-1].repeat_interleave(bounds.diff())[None]
    theirs = fla.naive_dsa_indexer(q, k, w, TOPK, activation="relu", cu_seqlens=bounds)
    theirs = torch.where(theirs < 0, theirs, theirs + first[..., None])
    assert torch.equal(theirs.sort(-1).values.int(), op.index_topk(q, k, w, first, TOPK))


@pytest.mark.parametrize("packed", [False, True])
def test_fla_attends_the_same_way(fla, packed):
    """One key and value head for all query heads; values and gradients."""
    rows = 1 if packed else 2
    (q, k), (iq, ik, w) = core_inputs(rows), index_inputs(rows)
    bounds = torch.tensor([0, 7, 29, LENGTH]) if packed else None
    first = bounds[:-1].repeat_interleave(bounds.diff())[None] if packed else None
    indices = op.index_topk(iq, ik, w, first, TOPK)
    local = torch.where(indices < 0, indices, indices - (0 if first is None else first[..., None])).long()
    q.requires_grad_(), k.requires_grad_()
    key, d_out = k[:, :, None], torch.randn(rows, LENGTH, HEADS, LATENT)
    theirs = fla.naive_dsa(q, key, key[..., :LATENT], None, None, indices=local, scale=0.3, cu_seqlens=bounds)
    ours, _ = op.sparse_attention(q, k, k[..., :LATENT], indices, 0.3)
    for mine, other in zip(gradients(ours, d_out, q, k), gradients(theirs, d_out, q, k)):
        assert torch.allclose(mine, other, atol=1e-5)


# --- torch --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("queries", [LENGTH, 9])
def test_with_every_key_selected_it_is_softmax_attention(queries):
    """Also of the last few queries; and the mass is the heads' mean of softmax's weights."""
    q, k = (tensor.double().requires_grad_() for tensor in core_inputs())
    some = q[:, LENGTH - queries :]
    iq, ik, w = index_inputs()
    indices = op.index_topk(iq[:, LENGTH - queries :], ik, w[:, LENGTH - queries :], None, LENGTH)
    ours, mass = op.sparse_attention(some, k, k[..., :LATENT], indices, 0.3)
    key, d_out = k[:, None].expand(-1, HEADS, -1, -1), torch.randn(2, queries, HEADS, LATENT).double()
    seen = op.visible_keys(None, queries, LENGTH, q.device)
    theirs = F.scaled_dot_product_attention(some.transpose(1, 2), key, key[..., :LATENT], attn_mask=seen, scale=0.3).transpose(1, 2)
    for mine, other in zip(gradients(ours, d_out, q, k), gradients(theirs, d_out, q, k)):
        assert torch.allclose(mine, other, atol=1e-12)
    # Attention to the rows of a unit matrix: the weights themselves.
    unit = torch.eye(LENGTH).double().expand(2, HEADS, -1, -1)
    weights = F.scaled_dot_product_attention(some.transpose(1, 2), key, unit, attn_mask=seen, scale=0.3).mean(1)
    dense = torch.zeros_like(weights).scatter_add(2, indices.clamp(min=0).long(), mass)
    assert torch.allclose(dense, weights, atol=1e-12)


# --- GLM ----------------------------------------------------------------------------------------------------------------------
# GLM-MoE-DSA in transformers is DeepSeek-V3.2's attention with two differences: the indexer's RoPE turns neighbouring pairs, as MLA's
# does (DeepSeek-V3.2: half-split), and layers may take over the selection of the one before. Its indexer has the ReLU, a LayerNorm with
# bias over index keys, and w with both scale factors, like DeepSeek-V3.2's. (Other codes say that GLM-5 has no ReLU: not this one.)


@pytest.fixture
def glm():
    """GLM's attention with random weights, its inputs, and what it leaves: (module, x, angles [T, ROPE / 2], result, selection)."""
    pytest.importorskip("transformers.models.glm_moe_dsa")
    from transformers.models.glm_moe_dsa.configuration_glm_moe_dsa import GlmMoeDsaConfig
    from transformers.models.glm_moe_dsa.modeling_glm_moe_dsa import GlmMoeDsaAttention, GlmMoeDsaRotaryEmbedding

    config = GlmMoeDsaConfig(
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        num_hidden_layers=1,
        q_lora_rank=24,
        kv_lora_rank=LATENT,
        qk_nope_head_dim=NOPE,
        qk_rope_head_dim=ROPE,
        v_head_dim=VALUE,
        index_n_heads=INDEX_HEADS,
        index_head_dim=INDEX_WIDTH,
        index_topk=TOPK,
        vocab_size=300,
        max_position_embeddings=LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        attn_implementation="eager",
    )
    module = GlmMoeDsaAttention(config, 0).eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x, places = torch.randn(2, LENGTH, HIDDEN), torch.arange(LENGTH)
    mask = torch.full((LENGTH, LENGTH), -torch.inf).triu(1).expand(2, 1, -1, -1)
    with torch.no_grad():
        result, _, picked = module(x, GlmMoeDsaRotaryEmbedding(config)(x, places[None]), mask, position_ids=places[None])
    angles = places[:, None] * 10_000.0 ** (-torch.arange(0, ROPE, 2) / ROPE)
    return module, x, angles, result, picked.long()


def turned(x, angles):
    """RoPE of neighbouring pairs of x [B, T, ..., ROPE], as a product of complex numbers."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    factors = torch.polar(torch.ones_like(angles), angles).view(LENGTH, *[1] * (x.dim() - 3), -1)
    return torch.view_as_real(pairs * factors).flatten(-2)


def half_turned(x, angles):
    shape = (LENGTH, *[1] * (x.dim() - 3), -1)
    return op.rotate_halves(x, angles.cos().view(shape), angles.sin().view(shape))


def glm_index(module, x, angles, rope=turned):
    """q, k, w of GLM's indexer from its weights and specs' equations: RoPE first, then what is not turned."""
    weights = dict(module.indexer.named_parameters())
    q = (module.q_a_layernorm(module.q_a_proj(x)) @ weights["wq_b.weight"].T).unflatten(-1, (INDEX_HEADS, INDEX_WIDTH))
    k = F.layer_norm(x @ weights["wk.weight"].T, (INDEX_WIDTH,), weights["k_norm.weight"], weights["k_norm.bias"], 1e-6)
    w = x @ weights["weights_proj.weight"].T * INDEX_HEADS**-0.5 * INDEX_WIDTH**-0.5
    return *(torch.cat((rope(each[..., :ROPE], angles), each[..., ROPE:]), -1) for each in (q, k)), w


def as_mask(indices):
    """bool [B, T, S] of a selection, and of one that goes beyond the visible keys where those are too few."""
    found = torch.zeros(2, LENGTH, LENGTH + 1, dtype=torch.bool).scatter(-1, indices.long() % (LENGTH + 1), True)
    return found[..., :LENGTH].tril()


def test_glm_selects_the_same_tokens(glm):
    module, x, angles, _, picked = glm
    with torch.no_grad():
        assert torch.equal(as_mask(op.index_topk(*glm_index(module, x, angles), None, TOPK)), as_mask(picked))


def test_glm_would_select_others_with_half_split_rope_or_without_relu(glm):
    """Those are the details in which codes differ, and this one could not be told from them by weights' names."""
    module, x, angles, _, picked = glm
    with torch.no_grad():
        other = op.index_topk(*glm_index(module, x, angles, half_turned), None, TOPK)
        q, k, w = glm_index(module, x, angles)
        linear = torch.einsum("bthd,bsd,bth->bts", q, k, w)
    assert not torch.equal(as_mask(other), as_mask(picked))
    unclipped = op.select(linear, op.visible_keys(None, LENGTH, LENGTH, x.device), TOPK)
    assert not torch.equal(as_mask(unclipped), as_mask(picked))


def test_glms_expanded_heads_are_the_absorbed_form(glm):
    """It expands a key and a value for each head and masks what is not selected; here one latent is read, at the selected keys alone."""
    module, x, angles, result, _ = glm
    with torch.no_grad():
        q = module.q_b_proj(module.q_a_layernorm(module.q_a_proj(x))).unflatten(-1, (HEADS, NOPE + ROPE))
        latent, shared = module.kv_a_proj_with_mqa(x).split([LATENT, ROPE], -1)
        latent = module.kv_a_layernorm(latent)
        up_k, up_v = module.kv_b_proj.weight.view(HEADS, NOPE + VALUE, LATENT).split([NOPE, VALUE], 1)
        absorbed = torch.cat((torch.einsum("bthn,hnc->bthc", q[..., :NOPE], up_k), turned(q[..., NOPE:], angles)), -1)
        k = torch.cat((latent, turned(shared, angles)), -1)
        indices = op.index_topk(*glm_index(module, x, angles), None, TOPK)
        o, _ = op.sparse_attention(absorbed, k, k[..., :LATENT], indices, (NOPE + ROPE) ** -0.5)
        ours = module.o_proj(torch.einsum("bthc,hvc->bthv", o, up_v).flatten(2))
    assert torch.allclose(ours, result, atol=1e-5)
