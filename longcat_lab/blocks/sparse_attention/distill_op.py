"""How an indexer learns: the divergence of its softmax from what attention gives each key.

Teacher p_t and student q_t are distributions over the same keys of query t: p from the attention's own weights, without gradient,
q = softmax of the index scores over a temperature. The loss is KL(p_t || q_t), a mean over the queries that count. Its gradient by the
scores is (q - p) / temperature on those keys.

Source: DeepSeek-V3.2 report, eq. 3 and 4; over several layers LSA (arXiv 2608.01662), cross-layer indexing. The papers write a sum over
queries; a mean is the same but for the weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longcat_lab.blocks.context import visible_keys
from longcat_lab.blocks.sparse_attention.op import index_scores

CHUNK_ELEMENTS = 1 << 22  # of one chunk's scores of all heads


def attention_mass(q: Tensor, k: Tensor, first: Tensor | None, scale: float, begin: int = 0, end: int | None = None) -> Tensor:
    """p_{t,s} = (1/H) sum_h softmax_s(scale q_{t,h} . k_s) over all visible keys, for the queries `begin` ... `end` - 1; no gradient.

    Args:
        q: [B, T, H, d]; k: [B, S, d], one key for all heads (MLA absorbed); first: as in `visible_keys`.

    Returns:
        [B, end - begin, S], in at least fp32.
    """
    end = q.shape[1] if end is None else end
    wide = torch.promote_types(q.dtype, torch.float32)
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        seen = visible_keys(first, q.shape[1], k.shape[1], q.device, begin, end)
        keys, mass = k.to(wide).transpose(1, 2), 0
        for head in range(q.shape[2]):  # one at a time: what is kept is [B, t, S]
            scores = (q[:, begin:end, head].to(wide) @ keys).mul_(scale).masked_fill_(~seen, -torch.inf)
            mass = mass + scores.softmax(-1)
        return mass / q.shape[2]


def restricted_mass(q: Tensor, k: Tensor, first: Tensor | None, scale: float, indices: Tensor) -> Tensor:
    """`attention_mass` over all keys, restricted to a selection and scaled to sum to 1: [B, T, K], 0 where there is no key. O(T S) work."""
    parts = []
    for begin, end in _chunks(q, k.shape[1], heads=1):
        mass = attention_mass(q, k, first, scale, begin, end)
        parts.append(mass.gather(-1, indices[:, begin:end].clamp(min=0).long()))
    kept = torch.cat(parts, 1).masked_fill(indices < 0, 0.0)
    return kept / kept.sum(-1, keepdim=True).clamp(min=torch.finfo(kept.dtype).tiny)  # all of it elsewhere: 0, no teacher


def divergence(p: Tensor, scores: Tensor, weights: Tensor, temperature: float = 1.0) -> Tensor:
    """sum_t weights_t KL(p_t || softmax(scores_t / temperature)) in nats, with gradient by the scores.

    Args:
        p: [B, T, K], no gradient; scores: [B, T, K], -inf where there is no key; weights: [B, T]. p need not sum to 1 (all 0: no loss).
    """
    wide = torch.promote_types(scores.dtype, torch.float32)
    p = p.detach().to(wide)
    log_q = (scores.to(wide) / temperature).log_softmax(-1).masked_fill(p == 0, 0.0)
    return ((torch.special.xlogy(p, p) - p * log_q).sum(-1) * weights).sum()


def over_dynamic(
    p: Tensor, scores: Tensor, indices: Tensor, first: Tensor | None, sinks: int, window: int, keys: int
) -> tuple[Tensor, Tensor]:
    """Teacher and scores without the keys that are selected always: p scaled to sum to 1 over the others, scores -inf there.

    A query whose keys are all sinks or window has p = 0, hence no loss.
    """
    queries = indices.shape[1]
    own = torch.arange(keys - queries, keys, device=indices.device)[:, None]
    start = 0 if first is None else first[..., None]
    dynamic = (indices >= start + sinks) & (indices <= own - window)
    p = p * dynamic
    total = p.sum(-1, keepdim=True)
    scores = torch.where(dynamic | (total == 0), scores, -torch.inf)  # no row without any finite score
    return p / total.clamp(min=torch.finfo(p.dtype).tiny), scores


class _Streamed(torch.autograd.Function):
    """The loss and, made along with it, its gradients by the index vectors: chunk by chunk of queries."""

    @staticmethod
    def forward(ctx, index_q, index_k, index_w, q, k, first, scale, weights, temperature):
        leaves = [each.detach().requires_grad_() for each in (index_q, index_k, index_w)]
        gradients = [torch.zeros_like(each) for each in leaves]
        total = 0.0
        for begin, end in _chunks(q, k.shape[1], heads=index_q.shape[2] + 2):
            mass = attention_mass(q, k, first, scale, begin, end)
            seen = visible_keys(first, q.shape[1], k.shape[1], q.device, begin, end)
            # A graph that ends here: where layers keep no activations, its backward pass must not make them run again.
            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is):
                part = [leaves[0][:, begin:end], leaves[1], leaves[2][:, begin:end]]
                scores = index_scores(*part).masked_fill(~seen, -torch.inf)
                loss = divergence(mass, scores, weights[:, begin:end], temperature)
                found = torch.autograd.grad(loss, part)
            gradients[0][:, begin:end], gradients[2][:, begin:end] = found[0], found[2]
            gradients[1] += found[1]
            total = total + loss.detach()
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx, given):
        return *(each * given.to(each.dtype) for each in ctx.saved_tensors), None, None, None, None, None, None


def _as_it_is(saved: Tensor) -> Tensor:
    return saved


def dense_divergence(
    index: tuple[Tensor, Tensor, Tensor],
    q: Tensor,
    k: Tensor,
    first: Tensor | None,
    scale: float,
    weights: Tensor,
    temperature: float = 1.0,
) -> Tensor:
    """`divergence` over all visible keys: the dense warm-up's loss. Nothing of size T S is kept, neither for a head nor for their mean.

    Args:
        index: q, k, w of `index_scores`, which get the gradient; q, k, first, scale: the teacher's, of `attention_mass`.
        weights: [B, T].
    """
    return _Streamed.apply(*index, q.detach(), k.detach(), first, scale, weights, temperature)


def _chunks(q: Tensor, keys: int, heads: int) -> list[tuple[int, int]]:
    step = max(1, CHUNK_ELEMENTS // max(1, q.shape[0] * keys * heads))
    return [(at, min(at + step, q.shape[1])) for at in range(0, q.shape[1], step)]
