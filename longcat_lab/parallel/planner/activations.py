"""What a pass keeps of a token between its forward and its backward part, tensor by tensor."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import Any

from longcat_lab.blocks.interface import BlockConfig, ModelShape, attentions_of

BF16, FP32, INT64, INT32, BYTE = 2, 4, 8, 4, 1
# What a recompute choice runs again in backward, by the tensor's group.
RECOMPUTE: dict[str, frozenset[str]] = {
    "none": frozenset(),
    "selective": frozenset({"norm", "swiglu"}),
    "selective+kv": frozenset({"norm", "swiglu", "kv"}),
    "full": frozenset(),  # everything but the layer's input; see `layer_bytes`
}


@dataclasses.dataclass(frozen=True)
class Keeping:
    """What decides how much operators keep. element: bytes of an activation. fused: norms are one operator, which keeps its input alone,
    and experts a grouped product of dispatched rows; else, as on a CPU, norms are made of parts, and the compiled mixture keeps gate and up
    alone.
    """

    element: int = BF16
    fused: bool = True


ACCELERATOR, CPU = Keeping(), Keeping(FP32, False)


@dataclasses.dataclass(frozen=True)
class Kept:
    """A tensor kept for backward. bytes: a token's, on one rank, before any splitting.

    group: `norm` (outputs of norms), `swiglu` (SiLU(gate) * up), `kv` (keys and values of all heads, made of latents), `fold` (experts'
    outputs, which need not be kept where the pick's weight is multiplied in before the down projection), `away` (kept only where experts
    are on other ranks), `` (kept always).
    ways: what divides it: `tensor` (heads or columns), `tokens` (ranks of the tensor axis dispatch different tokens), or ``.
    gathered: it is kept for the tokens of all context ranks.
    left: bytes that stay where the layer runs again: what it left for later layers of the pass.
    """

    name: str
    bytes: float
    group: str = ""
    ways: str = ""
    gathered: bool = False
    left: float = 0.0


def norm_kept(name: str, width: int, keep: Keeping, output: str | None = "norm", gathered: bool = False) -> list[Kept]:
    """Of a norm: its input, and its output (in the group `output`; None: nothing keeps it)."""
    found = [Kept(f"{name} before its norm", keep.element * width)]
    if output is not None:
        found.append(Kept(f"{name} after its norm", keep.element * width, output, gathered=gathered))
    return found + _made_of_parts(name, width, keep)


def _made_of_parts(name: str, width: int, keep: Keeping) -> list[Kept]:
    return [] if keep.fused else [Kept(f"{name} over its mean square, and that", keep.element * width + FP32, "norm")]


def attention_kept(attention: Any, place: ModelShape, keep: Keeping = ACCELERATOR, reuses: bool = False) -> list[Kept]:
    """Of one attention, from its normed input (counted with the norms) to the input of its output projection. reuses: the selection of an
    earlier prediction step.

    Dense: the query latent before and after its norm, the key-value latent the same, queries, keys, the up-projection's output (values
    are a view of it), the core's output and the logarithms of its sums. Sparse (absorbed): queries before and after absorption, the
    latents as keys, the mean latent of each head, its values, the indices; of the distillation the teacher's masses, the softmax of the
    index scores and where there is no mass; and for the owner of an index its inputs (the query latent without its factor; the normed
    input in fp32, for the heads' weights), its key before and after its norm, its queries and head weights.
    """
    c, e = attention, keep.element
    heads, query = c.num_attention_heads, c.num_attention_heads * c.qk_head_dim
    latent = c.kv_lora_rank + c.qk_rope_head_dim
    found = norm_kept("query latent", c.q_lora_rank, keep) if c.q_lora_rank is not None else []
    found += [Kept("key-value latent", e * latent), Kept("normed latent", e * c.kv_lora_rank, "norm", gathered=True)]
    found += _made_of_parts("key-value latent", c.kv_lora_rank, keep)
    found += [Kept("queries", e * query, ways="tensor"), Kept("logarithms of sums", FP32 * heads, ways="tensor")]
    if not (hasattr(c, "selects") and c.selects(place)):
        up = heads * (c.qk_nope_head_dim + c.v_head_dim)
        found += [Kept("keys", e * query, "kv", "tensor", True), Kept("up-projection", e * up, "kv", "tensor", True)]
        return [*found, Kept("core output", e * heads * c.v_head_dim, ways="tensor")]
    found += [
        Kept("absorbed queries", e * heads * latent, ways="tensor"),
        Kept("shared keys", e * latent, gathered=True),
        Kept("mean latents", e * heads * c.kv_lora_rank, ways="tensor"),
        Kept("core output", e * heads * c.v_head_dim, ways="tensor"),
    ]
    learns = c.selection.uses_indexer and c.distill.weight > 0
    if c.place(place.attention_index) == 0 and not reuses:
        found.append(Kept("selected keys", INT32 * c.index_topk, left=INT32 * c.index_topk))
    if learns and c.owns_index(place) and not reuses:
        index, key, scores = c.index_n_heads * c.index_head_dim, e * c.index_head_dim, FP32 * c.index_topk
        found += [
            Kept("index query latent", e * c.q_lora_rank),
            Kept("index queries", e * index, left=e * index),
            Kept("index key before its norm", key),
            Kept("index key", key, gathered=True, left=key),
            Kept("index head weights", FP32 * c.index_n_heads, left=FP32 * c.index_n_heads),
            Kept("index scores of the selected", 0.0, left=scores),
        ]
        found += _made_of_parts("index key", c.index_head_dim, keep)
        found += [Kept("index input", FP32 * place.hidden_size, "norm")] if e != FP32 else []
    if learns:
        found += [
            Kept("attention mass of the selected", FP32 * c.index_topk),
            Kept("softmax of the index scores", FP32 * c.index_topk),
            Kept("places without mass", BYTE * c.index_topk),
        ]
    return found


def ffn_kept(width: int, name: str = "ffn", keep: Keeping = ACCELERATOR) -> list[Kept]:
    """Of a SwiGLU network: gate, up, and their product."""
    e = keep.element
    return [Kept(f"{name} gate and up", e * 2 * width, ways="tensor"), Kept(f"{name} product", e * width, "swiglu", "tensor")]


def mixture_kept(moe: Any, hidden: int, keep: Keeping = ACCELERATOR) -> list[Kept]:
    """Of a mixture with K_e travelling picks a token, even routing: the router's fp32 input and probabilities, picks and weights; the
    dispatched tokens, gate and up, their product, and the experts' outputs (for the gradient of the picks' weights).
    """
    slots, picks, inner, e = moe.n_routed_experts + moe.zero_expert_num, moe.real_experts, moe.expert_ffn_hidden_size, keep.element
    found = [Kept("router input", FP32 * hidden, "norm")] if e != FP32 else []  # else what the norm made
    found += [
        Kept("router probabilities", FP32 * slots),
        Kept("picks and weights", (INT64 + FP32) * moe.moe_topk),
        Kept("dispatched tokens", e * picks * hidden, "" if keep.fused else "away", "tokens"),
        Kept("experts' gate and up", e * picks * 2 * inner, ways="tokens"),
    ]
    if keep.fused:
        found.append(Kept("experts' product", e * picks * inner, "swiglu", "tokens"))
    else:
        found.append(Kept("order of picks, which of them are zero-experts', their share", (INT64 + BYTE) * moe.moe_topk + FP32))
    found.append(Kept("experts' outputs", e * picks * hidden, "fold" if keep.fused else "away", "tokens"))
    return found + (ffn_kept(moe.shared().ffn_hidden_size, "shared experts", keep) if moe.shared() else [])


def layer_kept(layer: BlockConfig, place: ModelShape, keep: Keeping = ACCELERATOR, reuses: bool = False) -> list[Kept]:
    """Everything that one layer keeps of a token: inputs and outputs of its norms (two a pair of attention and network), attentions, dense
    networks, mixture. reuses: as in `attention_kept`."""
    hidden, each = place.hidden_size, attentions_of(layer)
    mixtures = layer.mixtures(place) if hasattr(layer, "mixtures") else 1
    found = []
    for s in range(each):
        for norm in ("attention's input", "network's input"):
            found += norm_kept(norm, hidden, keep)
        found += attention_kept(place.attention, replace(place, attention_index=each * place.layer_index + s), keep, reuses)
    for _ in range(each if each == 2 else int(not mixtures)):
        width = getattr(place.ffn, "ffn_hidden_size", place.ffn.budget(place).params // (3 * hidden))
        found += ffn_kept(width, keep=keep)
    return found + (mixture_kept(place.moe, hidden, keep) if mixtures else [])


def embedding_kept(embedding: Any, place: ModelShape, keep: Keeping) -> list[Kept]:
    """Token numbers, and the rows of n-gram tables that the projection reads."""
    ngram = getattr(embedding, "ngram", None)
    rows = [Kept("table rows", keep.element * ngram.tables * ngram.width(place))] if hasattr(ngram, "tables") else []
    return [Kept("tokens", INT64), *rows]


def head_kept(hidden: int, keep: Keeping) -> list[Kept]:
    """The last state, and the gradient that the loss made of it along with the logits."""
    return [*norm_kept("last state", hidden, keep, None), Kept("gradient of the head's input", keep.element * hidden)]


def prediction_kept(mtp: Any, place: ModelShape, keep: Keeping) -> list[Kept]:
    """Of all prediction steps: each one's embedded tokens, its state, the gradient of that; where they do not run again, all of it."""
    hidden, (layer, inner) = place.hidden_size, mtp.inner(place)
    found = []
    for step in range(mtp.num_nextn_predict_layers):
        found += [Kept("tokens ahead", INT64), *head_kept(hidden, keep)]
        own = layer_kept(layer, inner, keep, step > 0 and getattr(place.attention, "dsa_mtp_cli", False))
        if mtp.recompute:
            left = [replace(each, bytes=each.left) for each in own if each.left]
            found += [Kept("embedded tokens", keep.element * hidden), *left]
        else:
            found += norm_kept("embedded tokens", hidden, keep, None) + _made_of_parts("state", hidden, keep)
            found += [Kept("both, side by side", keep.element * 2 * hidden), *own]
    return found


def widest(kept: tuple[Kept, ...], tensor: int, context: int, away: bool = True) -> float:
    """Bytes a token of the largest tensor."""
    return max(_own(each, tensor, context) for each in kept if away or each.group != "away")


def _own(each: Kept, tensor: int, context: int) -> float:
    return each.bytes / {"tensor": tensor, "tokens": tensor, "": 1}[each.ways] * (context if each.gathered else 1)


def layer_bytes(kept: tuple[Kept, ...], hidden: float, recompute: str, fold: bool, tensor: int, context: int, away: bool = True) -> float:
    """Bytes a token of this rank's part of a sequence that `kept` takes.

    Args:
        hidden: bytes of a layer's input. recompute: key of `RECOMPUTE`; `full` keeps the layer's input, and what it left for later layers.
        fold: the picks' weights are multiplied in before the down projection. away: experts are divided.
        tensor, context: degrees.
    """
    if recompute == "full":
        return hidden + sum(each.left * (context if each.gathered else 1) for each in kept)
    again = RECOMPUTE[recompute] | ({"fold"} if fold else set()) | (set() if away else {"away"})
    return sum(_own(each, tensor, context) for each in kept if each.group not in again)
