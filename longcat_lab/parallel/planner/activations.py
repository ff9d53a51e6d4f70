"""What one layer keeps of a token between its forward and its backward pass, tensor by tensor."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import Any

from longcat_lab.blocks.interface import BlockConfig, ModelShape, attentions_of

BF16, FP32, INT64, INT32 = 2, 4, 8, 4
# What a recompute choice runs again in backward, by the tensor's group.
RECOMPUTE: dict[str, frozenset[str]] = {
    "none": frozenset(),
    "selective": frozenset({"norm", "swiglu"}),
    "selective+kv": frozenset({"norm", "swiglu", "kv"}),
    "full": frozenset(),  # everything but the layer's input; see `layer_bytes`
}


@dataclasses.dataclass(frozen=True)
class Kept:
    """A tensor kept for backward. bytes: a token's, on one rank, before any splitting.

    group: `norm` (outputs of norms), `swiglu` (SiLU(gate) * up), `kv` (keys and values of all heads, made of latents), `fold` (experts'
    outputs, which need not be kept where the pick's weight is multiplied in before the down projection), or `` (kept always).
    ways: what divides it: `tensor` (heads or columns), `tokens` (ranks of the tensor axis dispatch different tokens), or ``.
    gathered: it is kept for the tokens of all context ranks.
    """

    name: str
    bytes: float
    group: str = ""
    ways: str = ""
    gathered: bool = False


def attention_kept(attention: Any, place: ModelShape) -> list[Kept]:
    """Of one attention, from its normed input (counted with the norms) to the input of its output projection.

    Dense: the query latent before and after its norm, the key-value latent the same, queries, keys, the up-projection's output (values
    are a view of it), the core's output. Sparse (absorbed): queries before and after absorption, the latents as keys, the mean latent
    of each head, its values, the indices, and for the owner of an index its queries, key, head weights, and the selected scores.
    """
    c = attention
    heads, query = c.num_attention_heads, c.num_attention_heads * c.qk_head_dim
    latent = c.kv_lora_rank + c.qk_rope_head_dim
    found = []
    if c.q_lora_rank is not None:
        found += [Kept("query latent", BF16 * c.q_lora_rank), Kept("normed query latent", BF16 * c.q_lora_rank, "norm")]
    found.append(Kept("key-value latent", BF16 * latent))
    found.append(Kept("normed latent", BF16 * c.kv_lora_rank, "norm", gathered=True))
    found.append(Kept("queries", BF16 * query, ways="tensor"))
    if not (hasattr(c, "selects") and c.selects(place)):
        up = heads * (c.qk_nope_head_dim + c.v_head_dim)
        found += [Kept("keys", BF16 * query, "kv", "tensor", True), Kept("up-projection", BF16 * up, "kv", "tensor", True)]
        return [*found, Kept("core output", BF16 * heads * c.v_head_dim, ways="tensor")]
    found += [
        Kept("absorbed queries", BF16 * heads * latent, ways="tensor"),
        Kept("shared keys", BF16 * latent, gathered=True),
        Kept("mean latents", BF16 * heads * c.kv_lora_rank, ways="tensor"),
        Kept("core output", BF16 * heads * c.v_head_dim, ways="tensor"),
    ]
    if c.owns_index(place):
        index = c.index_n_heads * c.index_head_dim
        found += [
            Kept("selected keys", INT32 * c.index_topk),
            Kept("index queries", BF16 * index),
            Kept("index key", BF16 * c.index_head_dim, gathered=True),
            Kept("index head weights", BF16 * c.index_n_heads),
            Kept("index scores of the selected", FP32 * c.index_topk),
        ]
    return [*found, Kept("attention mass of the selected", FP32 * c.index_topk)]


def ffn_kept(width: int, name: str = "ffn") -> list[Kept]:
    """Of a SwiGLU network: gate, up, and their product."""
    return [Kept(f"{name} gate and up", BF16 * 2 * width, ways="tensor"), Kept(f"{name} product", BF16 * width, "swiglu", "tensor")]


def mixture_kept(moe: Any, hidden: int) -> list[Kept]:
    """Of a mixture with K_e travelling picks a token, even routing: the router's fp32 input and probabilities, picks and weights; the
    dispatched tokens, gate and up, their product, and the experts' outputs (for the gradient of the picks' weights).
    """
    slots, picks, inner = moe.n_routed_experts + moe.zero_expert_num, moe.real_experts, moe.expert_ffn_hidden_size
    found = [
        Kept("router input", FP32 * hidden, "norm"),
        Kept("router probabilities", FP32 * slots),
        Kept("picks and weights", (INT64 + FP32) * moe.moe_topk),
        Kept("dispatched tokens", BF16 * picks * hidden, ways="tokens"),
        Kept("experts' gate and up", BF16 * picks * 2 * inner, ways="tokens"),
        Kept("experts' product", BF16 * picks * inner, "swiglu", "tokens"),
        Kept("experts' outputs", BF16 * picks * hidden, "fold", "tokens"),
    ]
    return found + (ffn_kept(moe.shared().ffn_hidden_size, "shared experts") if moe.shared() else [])


def layer_kept(layer: BlockConfig, place: ModelShape) -> list[Kept]:
    """Everything that one layer keeps of a token: inputs and outputs of its norms (two a pair of attention and network), attentions, dense
    networks, mixture."""
    hidden, each = place.hidden_size, attentions_of(layer)
    mixtures = layer.mixtures(place) if hasattr(layer, "mixtures") else 1
    found = []
    for s in range(each):
        for norm in ("input", "post-attention"):
            found += [Kept(f"{norm} norm's input", BF16 * hidden), Kept(f"{norm} norm's output", BF16 * hidden, "norm")]
        found += attention_kept(place.attention, replace(place, attention_index=each * place.layer_index + s))
    for _ in range(each if each == 2 else int(not mixtures)):
        width = getattr(place.ffn, "ffn_hidden_size", place.ffn.budget(place).params // (3 * hidden))
        found += ffn_kept(width)
    return found + (mixture_kept(place.moe, hidden) if mixtures else [])


def widest(kept: tuple[Kept, ...], tensor: int, context: int) -> float:
    """Bytes a token of the largest tensor."""
    split = {"tensor": tensor, "tokens": tensor, "": 1}
    return max(each.bytes / split[each.ways] * (context if each.gathered else 1) for each in kept)


def layer_bytes(kept: tuple[Kept, ...], hidden: int, recompute: str, fold: bool, tensor: int, context: int) -> float:
    """Bytes a token of this rank's part of a sequence that `kept` takes.

    Args:
        recompute: key of `RECOMPUTE`; `full` keeps the layer's input alone.
        fold: the picks' weights are multiplied in before the down projection.
        tensor, context: degrees.
    """
    if recompute == "full":
        return BF16 * hidden
    again = RECOMPUTE[recompute] | ({"fold"} if fold else frozenset())
    split = {"tensor": tensor, "tokens": tensor, "": 1}
    return sum(each.bytes / split[each.ways] * (context if each.gathered else 1) for each in kept if each.group not in again)
