"""The indexer's losses: against the equations in float64, over the attentions of a group, in memory that does not grow with T S."""

import subprocess
import sys
import textwrap

import pytest
import torch

import longcat_lab as lab
from longcat_lab.blocks.context import visible_keys
from longcat_lab.blocks.sparse_attention import distill_op
from longcat_lab.blocks.sparse_attention.distill_op import attention_mass, dense_divergence, divergence, over_dynamic, restricted_mass
from longcat_lab.blocks.sparse_attention.module import SparseAttention
from longcat_lab.blocks.sparse_attention.op import index_scores, select
from longcat_lab.config import load
from longcat_lab.training.conversion import enter

CPU = torch.device("cpu")
MODEL = [
    "model.attention.kind=lsa",
    "model.attention.index_topk=12",
    "model.attention.index_head_dim=12",
    "model.attention.index_n_heads=4",
]
MODEL += ["model.attention.index_init_tokens=2", "model.attention.index_local_tokens=4", "model.num_layers=2"]
DEFAULTS = {"weight": 1.0, "served": "sum", "support": "all", "teacher": "per_head", "temperature": 1.0}


def model(*overrides):
    built = lab.build(load("tiny", *MODEL, *overrides))
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return built.double().train()


def two_documents(rows=2, length=40):
    ids = torch.stack([(torch.arange(length) >= length // 3 + 7 * row).long() for row in range(rows)])
    return torch.randint(0, 300, (rows, length)), ids


def random_index(rows=2, queries=9, keys=13, heads=3, width=4):
    return (
        torch.randn(rows, queries, heads, width, dtype=torch.float64, requires_grad=True),
        torch.randn(rows, keys, width, dtype=torch.float64, requires_grad=True),
        torch.randn(rows, queries, heads, dtype=torch.float64, requires_grad=True),
    )


# --- the loss -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_divergence_and_its_gradient_are_the_equations(temperature):
    p = torch.rand(2, 3, 5, dtype=torch.float64).softmax(-1)
    scores = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(2, 3, dtype=torch.float64)
    q = (scores / temperature).softmax(-1)
    loss = divergence(p, scores, weights, temperature)
    assert float(loss.detach()) == pytest.approx(float(((p * (p / q).log()).sum(-1) * weights).sum().detach()), rel=1e-12)
    (gradient,) = torch.autograd.grad(loss, scores)
    assert torch.allclose(gradient, weights[..., None] * (q - p) / temperature)
    assert float(divergence(q, scores, weights, temperature).detach()) == pytest.approx(0, abs=1e-14)


def test_places_without_a_key_have_no_part():
    p = torch.tensor([[[0.0, 0.3, 0.7], [0.0, 0.0, 1.0]]], dtype=torch.float64)
    inf = float("inf")
    scores = torch.tensor([[[-inf, 0.4, 0.1], [-inf, -inf, 3.0]]], dtype=torch.float64, requires_grad=True)
    loss = divergence(p, scores, torch.ones(1, 2, dtype=torch.float64))
    q = torch.tensor([0.4, 0.1], dtype=torch.float64).softmax(-1)
    assert float(loss.detach()) == pytest.approx(float((p[0, 0, 1:] * (p[0, 0, 1:] / q).log()).sum()))
    (gradient,) = torch.autograd.grad(loss, scores)
    assert gradient.isfinite().all() and not gradient[0, 1].any() and float(gradient[0, 0, 0]) == 0


@pytest.mark.parametrize("documents", [False, True])
def test_the_streamed_dense_loss_is_the_materialised_one(documents, monkeypatch):
    monkeypatch.setattr(distill_op, "CHUNK_ELEMENTS", 2 * 13 * 5 * 2)  # two queries at a time
    index = random_index()
    q, k = torch.randn(2, 9, 4, 6, dtype=torch.float64), torch.randn(2, 13, 6, dtype=torch.float64)
    first = torch.tensor([[0] * 4 + [7] * 5, [2] * 9]) if documents else None
    weights = torch.rand(2, 9, dtype=torch.float64)
    seen = visible_keys(first, 9, 13, CPU)
    attention = ((q.transpose(1, 2) @ k[:, None].transpose(-1, -2)) * 0.3).masked_fill(~seen[:, None], -torch.inf).softmax(-1)
    student = index_scores(*index).masked_fill(~seen, -torch.inf)
    expected = divergence(attention.mean(1), student, weights, 0.7)
    loss = dense_divergence(index, q, k, first, 0.3, weights, 0.7)
    assert torch.allclose(loss, expected)
    for own, other in zip(torch.autograd.grad(3 * loss, index), torch.autograd.grad(3 * expected, index), strict=True):
        assert torch.allclose(own, other, atol=1e-12)


def test_the_streamed_dense_loss_passes_gradcheck():
    index = random_index(1, 4, 5, 2, 3)
    q, k, weights = torch.randn(1, 4, 2, 3).double(), torch.randn(1, 5, 3).double(), torch.rand(1, 4).double()
    assert torch.autograd.gradcheck(lambda *index: dense_divergence(index, q, k, None, 0.4, weights), index)


def test_the_restricted_teacher_weighs_heads_by_what_they_give_the_selected_keys(monkeypatch):
    monkeypatch.setattr(distill_op, "CHUNK_ELEMENTS", 2 * 13 * 4)
    q, k = torch.randn(2, 9, 4, 6, dtype=torch.float64), torch.randn(2, 13, 6, dtype=torch.float64)
    indices = select(torch.randn(2, 9, 13), visible_keys(None, 9, 13, CPU), 5)
    full = attention_mass(q, k, None, 0.3)
    assert torch.allclose(full.sum(-1), torch.ones(2, 9, dtype=torch.float64))
    found = restricted_mass(q, k, None, 0.3, indices)
    for b, t in [(0, 0), (1, 8)]:
        keys = indices[b, t].tolist()
        of_heads = [(0.3 * k[b, : t + 5] @ q[b, t, h]).softmax(0) for h in range(4)]
        kept = torch.stack([sum(a[s] for a in of_heads) for s in keys])
        assert torch.allclose(found[b, t], kept / kept.sum())


def test_without_sinks_and_window_the_rest_is_a_distribution_of_its_own():
    indices = torch.tensor([[[-1, -1, 3, 4], [3, 4, 6, 9]]], dtype=torch.int32)  # a document that starts at key 3; queries 8 and 9 of 10
    p = torch.tensor([[[0.0, 0.0, 0.5, 0.5], [0.4, 0.1, 0.3, 0.2]]], dtype=torch.float64)
    scores = torch.randn(1, 2, 4, dtype=torch.float64)
    first = torch.tensor([[3, 3]])
    inside, rest = over_dynamic(p, scores, indices, first, 1, 2, 10)  # sink 3, windows {7, 8} and {8, 9}
    assert inside[0].tolist() == [pytest.approx([0, 0, 0, 1]), pytest.approx([0, 0.25, 0.75, 0])]
    assert rest[0].isfinite().tolist() == [[False, False, False, True], [False, True, True, False]]
    nothing, _ = over_dynamic(p, scores, indices, first, 4, 8, 10)
    assert not nothing.any() and float(divergence(nothing, scores, torch.ones(1, 2))) == 0


# --- the group ----------------------------------------------------------------------------------------------------------------


def gradients(lm, tokens, ids, ahead=False, share=1.0):
    """Gradients of the indexers by the losses alone: the model's output does not count."""
    lm.zero_grad()
    hidden = lm.hidden(tokens, ids, share=share)
    outs = [hidden, *(lm.ahead(hidden, tokens, ids, share=share) if ahead else [])]
    sum((each * 0).sum() for each in outs).backward()
    return {name: p.grad.clone() for name, p in lm.named_parameters() if ".indexer." in name and p.grad is not None}


def by_hand(lm, tokens, ids, weights, stage="sparse", support="all", teacher="per_head", temperature=1.0):
    """The same gradients from the tensors of one pass, with masks, dense softmaxes and autograd."""
    kept, length = {}, tokens.shape[1]

    def keep(module, inputs, out):
        x, context = inputs
        c_q = module.query_latent(x)
        q_nope, q_rope = module.queries(c_q, context.rope)
        c_kv, k_rope = module.latents(x, context.rope)
        kv = module.kv_b_proj(c_kv).unflatten(-1, (module.config.num_attention_heads, -1)).transpose(1, 2)
        k_nope = kv[..., : module.config.qk_nope_head_dim]
        scores = (q_nope @ k_nope.transpose(-1, -2) + q_rope @ k_rope[:, None].transpose(-1, -2)) * module.softmax_scale
        index = context.shared.get(f"index/{module.group}")  # none where all keys teach
        kept[module] = scores.detach(), index and index.indices, (x.detach(), c_q.detach(), context)

    hooks = [m.register_forward_hook(keep) for m in lm.modules() if isinstance(m, SparseAttention)]
    with torch.no_grad():
        lm.hidden(tokens, ids)
    for hook in hooks:
        hook.remove()
    lm.zero_grad()
    first = torch.where(ids == 1, (ids == 0).sum(1, keepdim=True), 0)
    seen = visible_keys(first, length, length, CPU)
    owners = {m.group: m for m in kept if m.indexer is not None}
    total = 0
    for module, (scores, indices, _) in kept.items():
        owner = owners[module.group]
        x, c_q, context = kept[owner][2]
        context.cache = None
        student = index_scores(*owner.indexer(x, c_q / owner.index_q_scale, context))
        among = seen.clone()
        if stage == "sparse":
            place = torch.where(indices < 0, length, indices).long()
            among = torch.zeros(*seen.shape[:2], length + 1, dtype=torch.bool).scatter(-1, place, True)[..., :length]
        if teacher == "per_head":
            p = scores.masked_fill(~among[:, None], -torch.inf).softmax(-1).mean(1)
        else:
            p = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1).mean(1) * among
            p = p / p.sum(-1, keepdim=True)
        if support == "dynamic":
            key, own = torch.arange(length), torch.arange(length)[:, None]
            among = among & (key >= first[..., None] + 2) & (key <= own - 4)
            p = p * among
            p = p / p.sum(-1, keepdim=True).clamp(min=1e-300)
        log_q = (student / temperature).masked_fill(~among, -torch.inf).log_softmax(-1)
        terms = torch.where(among, torch.special.xlogy(p, p) - p * log_q, 0.0).sum(-1)
        total = total + weights[module.place] * terms.mean()
    total.backward()
    return {name: p.grad.clone() for name, p in lm.named_parameters() if ".indexer." in name}


def same(found, expected):
    assert found.keys() == expected.keys() and found
    for name in expected:
        assert float(expected[name].abs().max()) > 0
        assert torch.allclose(found[name], expected[name], rtol=1e-9, atol=1e-14), name


@pytest.mark.parametrize(
    ("setting", "weights"),
    [
        ({}, [1, 1]),
        ({"served": "mean"}, [0.5, 0.5]),
        ({"served": "owner"}, [1, 0]),
        ({"served_weights": [0.25, 2.0]}, [0.25, 2.0]),
        ({"weight": 0.3}, [0.3, 0.3]),
        ({"support": "dynamic"}, [1, 1]),
        ({"teacher": "restricted"}, [1, 1]),
        ({"teacher": "restricted", "support": "dynamic"}, [1, 1]),
        ({"temperature": 0.25}, [1, 1]),
    ],
)
def test_the_owner_learns_from_every_attention_it_serves(setting, weights):
    overrides = [f"model.attention.distill.{key}={value}" for key, value in setting.items()]
    lm, (tokens, ids) = model(*overrides), two_documents()
    told = {key: setting[key] for key in ("support", "teacher", "temperature") if key in setting}
    found = gradients(lm, tokens, ids)
    same(found, by_hand(lm, tokens, ids, weights, **told))


def test_the_warm_up_teaches_over_all_keys():
    lm, (tokens, ids) = model("model.attention.cli_factor=4"), two_documents()
    enter(lm, "warmup")
    found = gradients(lm, tokens, ids)
    assert {name for name, p in lm.named_parameters() if p.grad is not None} == found.keys()
    same(found, by_hand(lm, tokens, ids, [1] * 4, stage="dense"))


def test_groups_may_be_shifted():
    lm = model("model.attention.cli_offset=1")
    attentions = [m for m in lm.modules() if isinstance(m, SparseAttention)]
    assert [m.group for m in attentions] == [0, 1, 1, 2] and [m.place for m in attentions] == [0, 0, 1, 0]
    assert [m.indexer is not None for m in attentions] == [True, True, False, True]
    tokens, ids = two_documents()
    same(gradients(lm, tokens, ids), by_hand(lm, tokens, ids, [1, 1]))


def test_the_losses_reach_the_indexers_alone_and_the_language_models_loss_nothing_of_them():
    tokens, ids = two_documents()
    lm, found = model(), []
    for weight in (0.0, 1.0):
        for module in lm.modules():
            if isinstance(module, SparseAttention):
                module.config.distill.__dict__["weight"] = weight
        lm.zero_grad()
        lm(tokens, ids).square().mean().backward()
        found.append({name: p.grad for name, p in lm.named_parameters()})
    untaught, taught = found
    assert {name for name, g in untaught.items() if g is None} == {name for name in untaught if ".indexer." in name} != set()
    assert all(g is not None for g in taught.values())
    assert all(torch.equal(untaught[name], taught[name]) for name in taught if ".indexer." not in name)


@pytest.mark.parametrize("cli_factor", [2, 4])
def test_recomputed_layers_change_no_gradient_and_tell_of_a_loss_once(cli_factor):
    """A group of four lies in two layers that are recomputed one by one."""
    overrides = [f"model.attention.cli_factor={cli_factor}", "model.mtp.num_nextn_predict_layers=2"]
    lm, (tokens, ids), found, told = model(*overrides), two_documents(), [], []
    attentions = [m for m in lm.modules() if isinstance(m, SparseAttention)]
    for recompute in (False, True):
        lm.recompute = recompute
        found.append(gradients(lm, tokens, ids, ahead=True))
        told.append([(float(m.taught[0]), m.taught[1]) for m in attentions])
        for m in attentions:
            m.after_step()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0]) and found[0].keys() == found[1].keys()
    assert told[0] == told[1] and [shares for _, shares in told[0]] == [1, 1, 1, 1, 2]


def test_parts_of_a_batch_weigh_by_their_share():
    lm, (tokens, ids) = model(), two_documents()
    whole, halves = gradients(lm, tokens, ids), []
    for row in (0, 1):
        halves.append(gradients(lm, tokens[row : row + 1], ids[row : row + 1], share=0.5))
    same({name: halves[0][name] + halves[1][name] for name in whole}, whole)


def test_prediction_steps_teach_the_first_ones_indexer():
    """Sum = what the owner's step teaches and what the others do; the mean is a third of it. The gradient of step k alone is by hand."""
    tokens, ids = two_documents()
    parts = {}
    for served in ("sum", "mean", "owner"):
        torch.manual_seed(0)
        lm = model("model.mtp.num_nextn_predict_layers=3", f"model.attention.distill.served={served}")
        parts[served] = {n: g for n, g in gradients(lm, tokens, ids, ahead=True).items() if n.startswith("mtp.")}
    same({name: 3 * g for name, g in parts["mean"].items()}, parts["sum"])
    assert all(not torch.allclose(parts["owner"][name], g) for name, g in parts["sum"].items())
    torch.manual_seed(0)
    alone = model("model.mtp.num_nextn_predict_layers=3", "model.attention.distill.served=owner", "model.attention.dsa_mtp_cli=false")
    own = {n: g for n, g in gradients(alone, tokens, ids, ahead=True).items() if n.startswith("mtp.")}
    assert all(not torch.allclose(own[name], g) for name, g in parts["owner"].items())  # every step selects and teaches for itself


def test_padding_teaches_nothing():
    lm, (tokens, ids) = model(), two_documents()
    padding = torch.zeros_like(tokens, dtype=torch.bool)
    padding[1] = True
    lm.zero_grad()
    (lm.hidden(tokens, ids, padding=padding) * 0).sum().backward()
    found = {name: p.grad.clone() for name, p in lm.named_parameters() if ".indexer." in name}
    same(found, gradients(lm, tokens[:1], ids[:1]))


def test_the_log_has_the_loss_of_every_attention():
    lm, (tokens, ids) = model(), two_documents()
    gradients(lm, tokens, ids)
    for name, module in lm.named_modules():
        if isinstance(module, SparseAttention):
            loss, shares = module.taught
            module.after_step()
            assert module.statistics()["index_kl"] == pytest.approx(float(loss) / shares) and float(loss) > 0, name
            assert module.taught == (0.0, 0.0)
            assert ("selected_share" in module.statistics()) == (module.place == 0)


def test_evaluation_teaches_nothing():
    lm, (tokens, ids) = model().eval(), two_documents()
    assert not gradients(lm, tokens, ids)


def test_the_dense_loss_keeps_nothing_of_the_size_of_all_pairs():
    """4096 x 4096 in fp32 are 64 MiB for one head; there are 8 + 4 of them, and several times in a backward that keeps them."""
    code = """
        import re, torch
        from longcat_lab.blocks.sparse_attention.distill_op import dense_divergence
        def peak(length):
            index = [torch.randn(1, length, 4, 32), torch.randn(1, length, 32), torch.randn(1, length, 4)]
            index = [each.requires_grad_() for each in index]
            q, k = torch.randn(1, length, 8, 48), torch.randn(1, length, 48)
            dense_divergence(tuple(index), q, k, None, 0.1, torch.full((1, length), 1 / length)).backward()
            return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
        before = peak(256)
        print(peak(4096) - before)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert 4 < float(done.stdout) < 160
