"""How layers order their parts: the shortcut, the serial and the decoder layer, and what arms that differ in this alone share."""

import pytest
import torch

from longcat_lab.budget import totals
from longcat_lab.config import load
from longcat_lab.model import build


def model_of(*overrides):
    return build(load("tiny", *overrides)).double().eval()


def states(model):
    x = torch.randn(2, 8, model.config.hidden_size, dtype=torch.float64)
    return x, model.context(x, torch.tensor([[0] * 3 + [1] * 5, [0] * 8]))


def test_shortcut_layer_is_the_published_order():
    """The mixture reads what the first attention made and joins at the end."""
    model = model_of()
    (x, context), layer = states(model), model.layers[0]
    a0 = x + layer.self_attn[0](layer.input_layernorm[0](x), context)
    u = layer.post_attention_layernorm[0](a0)
    b0 = a0 + layer.mlps[0](u)
    a1 = b0 + layer.self_attn[1](layer.input_layernorm[1](b0), context)
    y = a1 + layer.mlps[1](layer.post_attention_layernorm[1](a1)) + layer.mlp(u)
    torch.testing.assert_close(layer(x, context), y)


def test_serial_layer_feeds_the_mixture_what_the_second_attention_made():
    model = model_of("model.layer.kind=serial")
    (x, context), layer = states(model), model.layers[0]
    a0 = x + layer.self_attn[0](layer.input_layernorm[0](x), context)
    b0 = a0 + layer.mlps[0](layer.post_attention_layernorm[0](a0))
    a1 = b0 + layer.self_attn[1](layer.input_layernorm[1](b0), context)
    v = layer.post_attention_layernorm[1](a1)
    torch.testing.assert_close(layer(x, context), a1 + layer.mlps[1](v) + layer.mlp(v))


@pytest.mark.parametrize("first_dense", [0, 1, 2])
def test_decoder_layer_is_one_attention_and_one_network_or_mixture(first_dense):
    model = model_of("model.layer.kind=decoder", "model.num_layers=2", f"model.layer.first_k_dense_replace={first_dense}")
    x, context = states(model)
    for number, layer in enumerate(model.layers):
        assert hasattr(layer.mlp, "router") == (number >= first_dense)
        a = x + layer.self_attn(layer.input_layernorm(x), context)
        torch.testing.assert_close(layer(x, context), a + layer.mlp(layer.post_attention_layernorm(a)))


def test_serial_and_shortcut_arms_share_names_initial_values_and_cost():
    one, other = load("tiny", "model.num_layers=2"), load("tiny", "model.num_layers=2", "model.layer.kind=serial")
    a, b = build(one), build(other)
    assert list(a.state_dict()) == list(b.state_dict())
    assert all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())
    assert totals(one) == totals(other)
    tokens = torch.randint(0, 512, (1, 8))
    assert not torch.allclose(a(tokens), b(tokens), atol=1e-3)


def test_decoder_arms_share_initial_values_where_names_agree():
    a = build(load("tiny", "model.num_layers=2", "model.layer.kind=decoder")).state_dict()
    b = build(load("tiny", "model.num_layers=2", "model.layer.kind=decoder", "model.layer.first_k_dense_replace=1")).state_dict()
    both = a.keys() & b.keys()
    assert {name for name in a if name.startswith("layers.1.")} < both and "layers.0.self_attn.o_proj.weight" in both
    assert all(torch.equal(a[name], b[name]) for name in both)


@pytest.mark.parametrize("kind", ["scmoe", "serial", "decoder"])
def test_every_layer_hands_padding_and_share_to_its_mixture(kind):
    model = model_of(f"model.layer.kind={kind}").train()
    x = torch.randn(1, 8, 32, dtype=torch.float64)
    model.layers[0](x, model.context(x, padding=torch.arange(8)[None] >= 5))
    assert int(model.layers[0].mlp.router.counts.sum()) == 5 * 2


def variances(x, *overrides):
    """Of the query's and the key's two parts at initialisation, for a unit input of a wide model with narrow latents."""
    config = load(
        "tiny",
        "model.hidden_size=1024",
        "model.attention.q_lora_rank=64",
        "model.attention.kv_lora_rank=32",
        "model.attention.qk_nope_head_dim=32",
        "model.attention.qk_rope_head_dim=32",
        "model.attention.num_attention_heads=8",
        "model.initializer_range=0.02",
        *overrides,
    )
    module = build(config).layers[0].self_attn[0]
    c_kv, k_rope = module.latents(x, (torch.ones(200, 16), torch.zeros(200, 16)))
    q = module.q_b_proj(module.query_latent(x)).unflatten(-1, (8, 64))
    k_nope, v = module.kv_b_proj(c_kv).unflatten(-1, (8, -1)).split((32, config.model.attention.v_head_dim), -1)
    parts = {"q_nope": q[..., :32], "q_rope": q[..., 32:], "k_nope": k_nope, "v": v, "k_rope": k_rope}
    return {name: float(part.var()) for name, part in parts.items()}


@torch.no_grad()
def test_scale_corrections_give_all_parts_of_queries_and_keys_the_same_variance():
    """k_rope comes from the hidden state itself, so its variance is sigma^2 H; the latents' follow their width without correction."""
    x = torch.randn(1, 200, 1024)
    scaled, plain = variances(x), variances(x, "model.attention.mla_scale_q_lora=false", "model.attention.mla_scale_kv_lora=false")
    for name, value in scaled.items():
        assert abs(value / (0.02**2 * 1024) - 1) < 0.15, name
    for name, factor in {"q_nope": 1024 / 64, "q_rope": 1024 / 64, "k_nope": 1024 / 32, "v": 1024 / 32, "k_rope": 1}.items():
        assert abs(scaled[name] / plain[name] / factor - 1) < 1e-3, name
