"""Rivals of the n-gram embedding: each one's equation by hand, its cost at a shape of its own, documents, decoding, training."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

import longcat_lab as lab
from longcat_lab.blocks import Cache, ForwardContext, kinds
from longcat_lab.blocks.engram.op import convolve, convolve_reference, engram_reference, gate
from longcat_lab.blocks.swiglu.module import SwiGLU
from longcat_lab.blocks.table import Table
from longcat_lab.budget import totals
from longcat_lab.config import ConfigError, load
from longcat_lab.model import build, generate, speculate
from longcat_lab.training import mechanisms
from longcat_lab.training.optimizer import roles, split

NGRAM, FFN = "model.embedding.ngram", "model.ffn"
KINDS = {
    "hash_sum": (f"{NGRAM}.kind=hash_sum",),
    "bigram_lambda": (f"{NGRAM}.kind=bigram_lambda",),
    "signs": (f"{NGRAM}.kind=bigram_lambda", f"{NGRAM}.sign_rows=50"),
    "ple": (f"{NGRAM}.kind=ple", f"{NGRAM}.per_layer_width=6"),
    "engram": (f"{NGRAM}.kind=engram", f"{NGRAM}.injection_layers=[0, 1]", f"{NGRAM}.table_rows=300"),
    "ple_swiglu": (f"{FFN}.kind=ple_swiglu",),
    "plne_swiglu": (f"{FFN}.kind=plne_swiglu", f"{FFN}.table_rows=300"),
    "plne_swiglu, token rows": (f"{FFN}.kind=plne_swiglu", f"{FFN}.token_rows=true", f"{FFN}.hash=random_base", f"{FFN}.table_rows=300"),
}


def configured(name, *overrides):
    return load("tiny", "model.num_layers=2", *KINDS[name], *overrides)


@torch.no_grad()
def model_of(name, *overrides):
    """In fp64, with nothing at a value (zero, one) that would hide it."""
    model = build(configured(name, *overrides)).double().eval()
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def context_of(tokens, documents=None, embedded=None):
    return ForwardContext((torch.empty(0), torch.empty(0)), tokens=tokens, document_ids=documents, embedded=embedded)


def norm(x, gain=1.0, eps=1e-5):
    return gain * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def random_tokens(*shape):
    return torch.randint(0, 512, shape)


# Equations


def test_hash_sum_is_the_mean_of_full_rows():
    embedding, tokens = model_of("hash_sum").embed_tokens, random_tokens(2, 9)
    rows, table = embedding.tables.addresses(tokens), embedding.tables.weight
    expected = (embedding.weight[tokens] + sum(table[rows[..., i]] for i in range(4))) / 5
    torch.testing.assert_close(embedding(tokens), expected)


def bigram(tokens, first, second, rows):
    """((first t_i) xor (second t_{i-1})) mod rows in Python, with token 0 before the first."""
    return [((t * first) ^ (before * second)) % rows for t, before in zip(tokens, [0, *tokens], strict=False)]


@pytest.mark.parametrize("name", ["bigram_lambda", "signs"])
def test_bigram_rows_enter_before_each_layer(name):
    embedding, tokens = model_of(name, f"{NGRAM}.injection_layers=[1]", f"{NGRAM}.table_rows=101").embed_tokens, random_tokens(1, 9)
    x, context = torch.randn(1, 9, 32, dtype=torch.float64), context_of(tokens)
    torch.testing.assert_close(embedding(tokens), embedding.weight[tokens])
    assert embedding.enter(0, x, context) is x and embedding.enter(2, x, context) is x
    row = embedding.tables.weight[bigram(tokens[0].tolist(), 36313, 27191, 101)]
    if name == "signs":
        ((one, _), (two, _)) = ((w[0], w) for w in embedding.sign_addresses.plan.weights)
        assert (one, two) != (36313, 27191) and embedding.signs.shape == (53, 32)  # 53: the first prime from 50 on
        chosen = embedding.signs[bigram(tokens[0].tolist(), one, two, 53)]
        assert set(embedding.signs.flatten().tolist()) == {-1, 1} and "signs" not in embedding.state_dict()
        row = row * chosen
    torch.testing.assert_close(embedding.enter(1, x, context), x + embedding.lambdas * row)


def test_bigram_lambda_starts_as_the_plain_model():
    model, plain, tokens = build(configured("bigram_lambda")), build(load("tiny", "model.num_layers=2")), random_tokens(1, 9)
    assert torch.equal(model(tokens), plain(tokens)) and model.embed_tokens.lambdas.tolist() == pytest.approx([0.1, 0.1])
    model.hidden(tokens).square().mean().backward()
    assert model.embed_tokens.tables.weight.grad.count_nonzero() > 0


def test_ple_by_its_equation():
    embedding, tokens = model_of("ple", "model.embedding.std=0.3").embed_tokens, random_tokens(2, 5)
    x, e = torch.randn(2, 2, 5, 32, dtype=torch.float64)
    context = context_of(tokens, embedded=e)
    assert embedding.enter(0, x, context) is x
    for layer in range(2):
        part = slice(6 * layer, 6 * layer + 6)
        read = norm(e * 32**-0.5 / 0.3 @ embedding.context_projection.weight[part].T, embedding.context_norm.weight)
        p = (read + 6**0.5 * embedding.per_layer.weight[tokens][..., part]) / 2**0.5
        inner = F.gelu(x @ embedding.gates[layer].weight.T, approximate="tanh") * p
        expected = x + norm(inner @ embedding.projections[layer].weight.T, embedding.norms[layer].weight)
        torch.testing.assert_close(embedding.enter(layer + 1, x, context), expected)


@pytest.mark.parametrize("across", [False, True])
def test_engram_by_its_equation(across):
    """The convolution in Python loops: lags 0, 3, 6, 9 (order 3), inside a document unless `across`."""
    model = model_of("engram", f"{NGRAM}.conv_boundary={'none' if across else 'documents'}")
    layer, tokens = model.embed_tokens.engrams["1"], random_tokens(1, 20)
    documents = torch.tensor([[0] * 8 + [1] * 12])
    h, context = torch.randn(1, 20, 32, dtype=torch.float64), context_of(tokens, documents)
    e = layer.tables.weight[layer.tables.addresses(tokens, documents)].flatten(-2)
    s = (norm(h, layer.hidden_norm.weight) * norm(e @ layer.key.weight.T, layer.key_norm.weight)).sum(-1) / 32**0.5
    v = torch.sigmoid(s.sign() * s.abs().sqrt())[..., None] * (e @ layer.value.weight.T)
    n, c = norm(v, layer.conv_norm.weight), torch.zeros_like(v)
    for t in range(20):
        for j in range(4):
            if t >= 3 * j and (across or documents[0, t] == documents[0, t - 3 * j]):
                c[0, t] += layer.conv[j] * n[0, t - 3 * j]
    expected = h + v + c * torch.sigmoid(c)
    torch.testing.assert_close(layer(h, context), expected)
    torch.testing.assert_close(model.embed_tokens.enter(1, h, context), expected)
    gains = (layer.hidden_norm.weight, layer.key_norm.weight, layer.conv_norm.weight)
    inside = None if across else documents
    reference = engram_reference(h, e, layer.key.weight, layer.value.weight, gains, layer.conv, 3, inside, 1e-5)
    torch.testing.assert_close(reference, expected)


@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("packed", [False, True])
def test_both_convolutions_agree_and_have_the_right_gradient(taps, packed):
    x, w = torch.randn(2, 9, 3, dtype=torch.float64, requires_grad=True), torch.randn(taps, 3, dtype=torch.float64, requires_grad=True)
    documents = torch.tensor([[0] * 4 + [1] * 5, [0, 1] + [2] * 7]) if packed else None
    torch.testing.assert_close(convolve(x, w, 2, documents), convolve_reference(x, w, 2, documents))
    for operation in (convolve, convolve_reference):
        assert gradcheck(lambda x, w, op=operation: op(x, w, 2, documents), (x, w))
    torch.testing.assert_close(convolve(x[:, :1], w, 2, None), x[:, :1] * w[0])  # shorter than the reach


def test_gate_gradient():
    h, key = (torch.randn(1, 4, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert gradcheck(gate, (h, key))
    shut = torch.zeros(1, 1, 6, requires_grad=True)
    gate(shut, shut).sum().backward()
    assert shut.grad.isfinite().all()  # the root's slope at 0 is cut


def test_ple_swiglu_by_its_equation():
    network, tokens, x = model_of("ple_swiglu").layers[1].mlps[0], random_tokens(2, 5), torch.randn(2, 5, 32, dtype=torch.float64)
    raised = network.token_rows.weight[tokens]
    expected = (F.silu(x @ network.gate_proj.weight.T) * raised) @ network.down_proj.weight.T
    torch.testing.assert_close(network(x, context_of(tokens)), expected)


@pytest.mark.parametrize("name", ["plne_swiglu", "plne_swiglu, token rows"])
def test_plne_swiglu_by_its_equation(name):
    network, tokens, x = model_of(name).layers[0].mlps[1], random_tokens(2, 5), torch.randn(2, 5, 32, dtype=torch.float64)
    raised = network.tables.weight[network.tables.addresses(tokens)].flatten(-2) @ network.up_proj.weight.T
    if network.token_rows is not None:
        raised = (raised + network.token_rows.weight[tokens]) / 5
    expected = (F.silu(x @ network.gate_proj.weight.T) * raised) @ network.down_proj.weight.T
    torch.testing.assert_close(network(x, context_of(tokens)), expected)


def test_networks_with_a_drawn_hash_draw_each_their_own_and_others_share_addresses():
    drawn, alike = (
        [mlp.tables.addresses.plan for layer in build(configured(name)).layers for mlp in layer.mlps]
        for name in ("plne_swiglu, token rows", "plne_swiglu")
    )
    assert len(set(drawn)) == 4 and len(set(alike)) == 1
    decoder = ("model.layer.kind=decoder", "model.layer.first_k_dense_replace=2", f"{FFN}.hash=random_base")
    layers = build(configured("plne_swiglu", *decoder)).layers
    assert layers[0].mlp.tables.addresses.plan != layers[1].mlp.tables.addresses.plan


# Costs: V 600, H 24, L 3

COSTS = [
    ("ngram", "hash_sum", {"order": 4, "splits": 1, "table_rows": 50}, (50 + 52 + 54) * 24, 0, 0),
    ("ngram", "bigram_lambda", {"table_rows": 53}, 53 * 24 + 3, 0, 0),
    ("ngram", "bigram_lambda", {"table_rows": 53, "injection_layers": [2], "sign_rows": 7}, 53 * 24 + 1, 0, 0),
    ("ngram", "ple", {"per_layer_width": 5}, 600 * 3 * 5 + 3 * 2 * 24 * 5 + 24 * 3 * 5 + 5 + 3 * 24, 6 * 3 * 24 * 5, 0),
    (
        "ngram",
        "engram",
        {"order": 2, "splits": 2, "table_rows": 53, "table_width": 7, "injection_layers": [0, 2]},
        2 * ((53 + 59) * 7 + 2 * 24 * 14 + 4 * 24 + 3 * 24),
        2 * (4 * 24 * 14 + 2 * 4 * 24),
        2 * 2 * 24,
    ),
    ("ngram", "engram", {"splits": 1, "table_rows": 53, "conv_kernel": 0}, (53 + 59) * 12 + 2 * 24 * 24 + 2 * 24, 4 * 24 * 24, 0),
    ("ffn", "ple_swiglu", {"ffn_hidden_size": 40}, 600 * 40 + 2 * 24 * 40, 4 * 24 * 40, 0),
    ("ffn", "ple_swiglu", {"ffn_hidden_size": 40, "injection_layers": [1]}, 3 * 24 * 40, 6 * 24 * 40, 0),
    (
        "ffn",
        "plne_swiglu",
        {"ffn_hidden_size": 40, "splits": 1, "table_rows": 50, "table_width": 7},
        (50 + 52) * 7 + 14 * 40 + 2 * 24 * 40,
        2 * 14 * 40 + 4 * 24 * 40,
        0,
    ),
    (
        "ffn",
        "plne_swiglu",
        {"ffn_hidden_size": 40, "splits": 1, "table_rows": 50, "token_rows": True},
        (50 + 52) * 12 + 600 * 40 + 24 * 40 + 2 * 24 * 40,
        2 * 24 * 40 + 4 * 24 * 40,
        0,
    ),
]


@pytest.mark.parametrize(("role", "kind", "settings", "params", "flops", "state"), COSTS)
def test_costs_are_these_formulas(role, kind, settings, params, flops, state):
    shape = replace(load("tiny").model.shape(), hidden_size=24, vocab_size=600, num_layers=3)
    config = kinds(role)[kind](**settings)
    config.check(shape)
    found = config.budget(shape)
    assert (found.params, found.flops_per_token, found.state_bytes_per_token) == (params, flops, state)
    module = config.build(shape, 0.02) if role == "ngram" else config.build(shape)
    assert sum(p.numel() for p in module.parameters()) == params + (600 * 24 if role == "ngram" else 0)
    looked_up = sum(m.weight.numel() for m in module.modules() if isinstance(m, Table))
    assert found.active_params == params - looked_up


def test_the_cache_keeps_the_bytes_that_engram_declares():
    config, cache = configured("engram"), Cache()
    model = build(config).eval()
    with torch.no_grad():
        model.hidden(random_tokens(1, 5), cache=cache)
    kept = [cache._kept[id(layer)][0].shape[-1] for layer in model.embed_tokens.engrams.values()]
    assert 2 * sum(kept) == config.model.embedding.ngram.budget(config.model.shape()).state_bytes_per_token == 2 * 2 * 32


# Initial values


@pytest.mark.parametrize(("ratio", "normalised", "expected"), [(1.0, True, 1.0), (0.0, True, 1.0), (0.4, True, 1.0), (1.0, False, 5**-0.5)])
def test_hash_sum_starts_with_the_rms_asked_for(ratio, normalised, expected):
    settings = (f"{NGRAM}.table_init_ratio={ratio}", f"{NGRAM}.normalised_init={str(normalised).lower()}", "model.hidden_size=128")
    embedding = build(configured("hash_sum", *settings)).embed_tokens
    assert embedding(random_tokens(8, 64)).square().mean().sqrt().item() == pytest.approx(0.05 * expected, rel=0.05)


@pytest.mark.parametrize("name", ["ple_swiglu", "plne_swiglu", "plne_swiglu, token rows"])
def test_what_is_looked_up_starts_with_the_rms_of_an_up_projection(name):
    model, tokens = build(configured(name, "model.hidden_size=128")), random_tokens(8, 64)
    raised = model.layers[0].mlps[0].looked_up(context_of(tokens))
    plain = build(load("tiny", "model.hidden_size=128")).layers[0].mlps[0].up_proj(torch.randn(8, 64, 128))
    assert raised.square().mean().sqrt().item() == pytest.approx(plain.square().mean().sqrt().item(), rel=0.05)


def test_engram_values_start_with_the_rms_of_the_token_rows_and_without_a_convolution():
    model, tokens = build(configured("engram", "model.hidden_size=128")), random_tokens(8, 64)
    layer = model.embed_tokens.engrams["0"]
    e = layer.tables.read(layer.tables.addresses(tokens)).flatten(-2)
    assert layer.value(e).square().mean().sqrt().item() == pytest.approx(0.05, rel=0.05) and layer.conv.count_nonzero() == 0


def test_per_layer_inputs_start_with_rms_one_and_enter_with_the_initial_gain():
    model, tokens = build(configured("ple", "model.hidden_size=128")), random_tokens(8, 64)
    embedding, context = model.embed_tokens, context_of(tokens, embedded=model.embed_tokens(tokens))
    assert embedding.inputs(tokens, context.embedded).square().mean().sqrt().item() == pytest.approx(1, rel=0.1)
    assert embedding.norms[1].weight.tolist() == pytest.approx([0.1] * 128)
    x = torch.zeros(8, 64, 128)
    assert torch.equal(embedding.enter(1, x, context), x)  # GELU(0) = 0


@pytest.mark.parametrize("name", KINDS)
def test_what_a_variant_shares_with_the_plain_model_starts_alike(name):
    plain, model = build(load("tiny", "model.num_layers=2")).state_dict(), build(configured(name)).state_dict()
    alike = [key for key in plain if key in model and torch.equal(plain[key], model[key])]
    differ = {key for key in plain if key in model} - set(alike)
    expected = {"hash_sum": "embed_tokens.weight", "plne_swiglu": "up_proj.weight"}.get(name.split(",")[0], "nothing")
    assert all(key.endswith(expected) for key in differ) and len(alike) > 20
    if name == "hash_sum":  # up to the factor that makes up for the mean
        torch.testing.assert_close(model["embed_tokens.weight"], plain["embed_tokens.weight"] * 5**0.5)
    missing = {key.rsplit(".", 2)[-2] for key in plain.keys() - model.keys()}
    assert missing <= {"up_proj"}


# Documents, decoding, gradients


@pytest.mark.parametrize("name", KINDS)
def test_packed_documents_equal_separate_documents(name):
    model, tokens = model_of(name), random_tokens(1, 30)
    sizes = [9, 1, 13, 7]
    documents = torch.repeat_interleave(torch.arange(4), torch.tensor(sizes))[None]
    with torch.no_grad():
        packed = model.hidden(tokens, documents)
        apart = torch.cat([model.hidden(each) for each in tokens.split(sizes, 1)], 1)
    torch.testing.assert_close(packed, apart, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", KINDS)
def test_decoding_equals_reading_at_once(name):
    """Also after a cut, as drafts that were not accepted leave it."""
    model, tokens = model_of(name), random_tokens(2, 30)
    with torch.no_grad():
        whole = model.hidden(tokens)
        for sizes in ([1] * 30, [11, 1, 2, 9, 7]):
            cache = Cache()
            pieces = torch.cat([model.hidden(piece, cache=cache) for piece in tokens.split(sizes, 1)], 1)
            torch.testing.assert_close(pieces, whole, rtol=1e-8, atol=1e-8)
        cache.cut(13)
        torch.testing.assert_close(model.hidden(tokens[:, 13:], cache=cache), whole[:, 13:], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("recompute", [False, True])
def test_sparse_gradients_are_the_dense_ones(name, recompute):
    model, tokens, found = model_of(name).train(), random_tokens(2, 12), []
    model.recompute = recompute
    tables = {key: module for key, module in model.named_modules() if isinstance(module, Table)}
    assert tables
    for sparse in (False, True):
        for table in tables.values():
            table.sparse_gradients = sparse
        model.zero_grad(set_to_none=True)
        model.hidden(tokens).square().mean().backward()
        assert all(table.weight.grad.is_sparse == sparse for table in tables.values())
        found.append({key: p.grad.to_dense() for key, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and all(found[0][f"{key}.weight"].count_nonzero() for key in tables)
    for key in found[0]:
        torch.testing.assert_close(found[0][key], found[1][key])


# In a model


@pytest.mark.parametrize("name", KINDS)
def test_a_short_run_trains_it(name, tmp_path):
    training = ("steps=2", "schedule.warmup_steps=0", "log_every=1", "evaluation_sequences=2")
    config = configured(name, "data.batch_size=2", *(f"training.{each}" for each in training))
    run = lab.fit(config, tmp_path / "run", progress=False)
    assert run.record["status"] == "finished" and not [said for said in run.record["not_engaged"] if "router" not in said]
    before, after = build(config).state_dict(), run.model.state_dict()
    tables = [key for key, module in run.model.named_modules() if isinstance(module, Table)]
    assert all(not torch.equal(before[f"{key}.weight"], after[f"{key}.weight"]) for key in tables)


def test_measures_are_of_the_mechanism():
    for name, key, value in (("bigram_lambda", "mean_lambda", 0.1), ("ple", "mean_gain", 0.1), ("engram", "gate", 0.5)):
        model = build(configured(name)).train()
        model.hidden(random_tokens(2, 20))
        measured = mechanisms.over_blocks(mechanisms.late_means([mechanisms.statistics(model)]))
        assert measured[key] == pytest.approx(value, rel=0.2)


@pytest.mark.parametrize(
    ("name", "measured", "sentence"),
    [
        ("bigram_lambda", {"mean_lambda": 0.0}, "its scales are 0"),
        ("bigram_lambda", {}, "its scales are 0"),
        ("ple", {"mean_gain": 0.0}, "its norms are 0"),
    ],
)
def test_what_took_no_part_says_so(name, measured, sentence):
    (said,) = build(configured(name)).embed_tokens.not_engaged(measured)
    assert sentence in said
    assert build(configured(name)).embed_tokens.not_engaged(dict.fromkeys(("mean_lambda", "mean_gain"), 0.1)) == []


def test_a_shut_gate_says_so():
    layer = build(configured("engram")).embed_tokens.engrams["0"]
    assert layer.not_engaged({"gate": 0.4}) == [] and "made no step" in layer.not_engaged({})[0]
    assert "shut (mean 0.002)" in layer.not_engaged({"gate": 0.002})[0]


@pytest.mark.parametrize("name", [name for name in KINDS if name != "plne_swiglu, token rows"])
def test_speculative_text_is_the_plain_one_and_carried_tables_are_never_read(name):
    mtp = ["num_nextn_predict_layers=2"]
    if NGRAM in KINDS[name][0]:
        mtp += ["own_embedding=true", "own_ngram_tables=true"]
    model = build(configured(name, *(f"model.mtp.{each}" for each in mtp), "model.initializer_range=0.2")).double().eval()
    prompt = random_tokens(6)
    assert torch.equal(speculate(model, prompt, 12).tokens, generate(model, prompt, 12))
    model.train().hidden(random_tokens(1, 9))
    assert not any(key.startswith("mtp") for key in mechanisms.statistics(model))
    assert not any(said.startswith("mtp.embed_tokens") for said in mechanisms.not_engaged(model, {}))


def test_optimizer_roles():
    """Filters and scales are vectors; the rows of W_c are a matrix for each layer."""
    engram, bigram, ple, network = (build(configured(name)) for name in ("engram", "bigram_lambda", "ple", "ple_swiglu"))
    assert roles(engram)["embed_tokens.engrams.0.conv"] == roles(bigram)["embed_tokens.lambdas"] == "vector"
    muon = {row.name: row for row in split(ple, load("tiny", "training.optimizer.kind=muon").training.optimizer)}
    assert muon["embed_tokens.context_projection.weight"].stack == 2 and muon["embed_tokens.per_layer.weight"].role == "table"
    assert roles(network)["layers.0.mlps.0.token_rows.weight"] == roles(engram)["embed_tokens.engrams.1.tables.weight"] == "table"


@pytest.mark.parametrize("name", ["ple_swiglu", "plne_swiglu"])
def test_other_layers_and_the_prediction_steps_stay_plain(name):
    mtp = ("model.mtp.num_nextn_predict_layers=1", "model.mtp.block=layer")
    config = configured(name, f"{FFN}.injection_layers=[1]", *mtp)
    model = build(config)
    assert [type(layer.mlps[0]) is SwiGLU for layer in model.layers] == [True, False]
    assert all(type(mlp) is SwiGLU for mlp in model.mtp.layers[0].layer.mlps)
    assert totals(config)["total_params"] == sum(t.numel() for t in model.state_dict().values())
    tokens = random_tokens(1, 9)
    assert model.ahead(model.hidden(tokens), tokens)[0].shape == (1, 9, 32)


@pytest.mark.parametrize(
    ("name", "override", "sentence"),
    [
        ("hash_sum", f"{NGRAM}.table_width=8", "table_width: the rows of hash_sum are added without a projection"),
        ("bigram_lambda", f"{NGRAM}.table_width=8", "table_width"),
        (
            "bigram_lambda",
            f"{NGRAM}.multipliers=[3]",
            r"multipliers: \[3\] are not 2 \(order\) odd numbers above 0: write so many, or null",
        ),
        ("bigram_lambda", f"{NGRAM}.sign_rows=9300000000000000000", "sign_rows: .* the hash would leave 64 bits"),
        ("bigram_lambda", f"{NGRAM}.injection_layers=[2]", "injection_layers: .* from 0 to 1"),
        ("engram", f"{NGRAM}.injection_layers=[1, 0]", "injection_layers"),
        ("engram", f"{NGRAM}.splits=7", "14 tables .* do not divide hidden_size 32"),
        ("ple_swiglu", f"{FFN}.injection_layers=[]", "model.ffn.injection_layers"),
        ("plne_swiglu", f"{FFN}.splits=5", "model.ffn: 10 tables"),
        ("plne_swiglu", f"{FFN}.injection_layers=[5]", "model.ffn.injection_layers"),
        ("ple_swiglu", "model.layer.kind=decoder", "ple_swiglu stands in the dense networks, and layers from 0 on have none"),
    ],
)
def test_settings_that_do_not_fit_are_refused(name, override, sentence):
    with pytest.raises(ConfigError, match=sentence) as error:
        configured(name, override)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "overrides"), [("hash_sum", ("splits=5",)), ("bigram_lambda", ("order=3", "splits=3"))])
def test_full_rows_need_not_divide_the_width(name, overrides):
    model = model_of(name, *(f"{NGRAM}.{each}" for each in overrides))
    assert model(random_tokens(1, 7)).isfinite().all() and model.embed_tokens.tables.weight.shape[1] == 32


def test_bigrams_have_the_public_multipliers_and_longer_ones_have_drawn_ones():
    config = configured("bigram_lambda").model.embedding.ngram
    assert [lag[0] for lag in config.plan(512).weights] == [36313, 27191]
    drawn = configured("bigram_lambda", f"{NGRAM}.order=3").model.embedding.ngram.plan(512)
    assert len(drawn.weights) == 3 and drawn.weights[0][0] != 36313


def test_signs_are_not_drawn_for_a_model_without_memory():
    """A billion rows of signs: the budget's meta model has their shape and takes nothing."""
    with torch.device("meta"):
        model = build(configured("bigram_lambda", f"{NGRAM}.sign_rows=1000000000"))
    assert model.embed_tokens.signs.is_meta and len(model.embed_tokens.signs) > 10**9
