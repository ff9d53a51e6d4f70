from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, cat

from longcat_lab.blocks.context import ForwardContext, in_backward, visible_keys
from longcat_lab.blocks.interface import ModelShape
from longcat_lab.blocks.mla.module import MLA
from longcat_lab.blocks.moe.balance_op import add_loss
from longcat_lab.blocks.sparse_attention import ops
from longcat_lab.blocks.sparse_attention.distill_op import (
    attention_mass,
    dense_divergence,
    divergence,
    over_dynamic,
    restricted_mass,
)
from longcat_lab.blocks.sparse_attention.indexer import Indexer
from longcat_lab.blocks.sparse_attention.op import index_scores, select
from longcat_lab.blocks.sparse_attention.selection import Candidates, IndexerSelection, choose
from longcat_lab.errors import LabError

if TYPE_CHECKING:
    from longcat_lab.blocks.sparse_attention.config import DSAConfig

CHUNK = 256  # queries that a rule other than the indexer's ranks at a time


@dataclasses.dataclass
class Index:
    """What the first attention of a group leaves for the others.

    vectors: q, k, w of the indexer, with gradient to it alone; None where the rule has no indexer, or nothing asked for it.
    indices: the selection, int32 [B, T, K]; None while the attentions are dense.
    scores: the indexer's scores at the selected keys [B, T, K], with gradient; None where it does not learn.
    window: the last so many keys of every query are among them for certain, in the last places (as many as there are).
    """

    vectors: tuple[Tensor, Tensor, Tensor] | None = None
    indices: Tensor | None = None
    scores: Tensor | None = None
    window: int = 0


class SparseAttention(MLA):
    """MLA over index_topk selected keys a query: those that its rule picks, or that the first attention of its group picked.

    Attentions 0 ... cli_factor - 1 of the model make one group, and so on. The first of a group selects, and leaves index vectors and
    selection in `context.shared`; the others have no indexer and attend to the same keys with queries and keys of their own.
    Prediction steps after the first do likewise (`dsa_mtp_cli`). The core is MLA in its absorbed form over the selected keys, O(T K);
    where no more than index_topk keys exist this is dense MLA, bit for bit.

    The indexer sees its inputs without gradient, and selection has none, so that the language model's loss never reaches it. While
    training each attention of the group adds weight x KL(its own attention weights || softmax of the index scores) where it stands, so
    that no attention's weights outlive it; the sum over the group is LSA's objective.

    stage: `dense` (all keys, the indexer does not learn), `warmup` (all keys, it learns over all of them) or `sparse`.

    Source: DSA: DeepSeek-V3.2 report; LSA (sinks and window, cross-layer indexing): arXiv 2608.01662.
    """

    stage = "sparse"

    def __init__(self, config: DSAConfig, shape: ModelShape) -> None:
        super().__init__(config, shape)
        self.group, self.place = config.group(shape.attention_index), config.place(shape.attention_index)
        self.members, self.members_in_layer = config.members(self.group, shape), config.members_in_layer(shape)
        self.indexer = Indexer(config, shape) if config.owns_index(shape) else None
        # What the indexer sees of the query latent: LongCat's factor taken out again, or left in.
        self.index_q_scale = self.q_scale if config.index_query_latent == "normed" else 1.0
        self.kept: tuple[Tensor, Tensor] | None = None  # pairs selected and pairs visible, in the training passes since the last step
        # Of the passes since the last step: their index KL, each weighed by its share of the batch, and the sum of these shares.
        self.taught: tuple[Tensor | float, float] = (0.0, 0.0)
        self.told: dict[str, float] = {}

    def attend(
        self, x: Tensor, c_q: Tensor, q_nope: Tensor, q_rope: Tensor, c_kv: Tensor, k_rope: Tensor, context: ForwardContext
    ) -> Tensor:
        keys = context.length or c_kv.shape[1]
        sparse = self.stage == "sparse" and self.config.selection.selects and keys > self.config.index_topk
        learns = self.learns(sparse)
        if not sparse:
            if not self.reuses(context) and (learns or context.cache is not None):
                with torch.set_grad_enabled(learns):  # with a cache: later tokens will look at these keys
                    self.leave(Index(self.vectors(x, c_q, context) if self.indexer is not None else None), context)
            out = super().attend(x, c_q, q_nope, q_rope, c_kv, k_rope, context)
            self.kept = None if self.training else self.kept
            if not learns:
                return out
        q = self.absorbed_queries(q_nope, q_rope)
        k = cat((c_kv, k_rope), -1).to(q.dtype)
        if not sparse:
            return self.learn(out, self.dense_divergence(q, k, x, context), context)
        index = self.shared(context) if self.reuses(context) else self.leave(self.select(x, c_q, q, k, context, learns), context)
        values = k[..., : self.config.kv_lora_rank]
        latent, mass = ops.sparse_attention(q, k, values, index.indices, self.softmax_scale, index.window)
        out = self.o_proj(self.raised(latent))
        return self.learn(out, self.sparse_divergence(index, mass, q, k, x, context), context) if learns else out

    def attend_in_chunks(self, x: Tensor, c_q: Tensor, *rest: Any) -> Tensor:
        """As dense MLA does it; the index keys of the whole row come too, once for all chunks."""
        context: ForwardContext = rest[-1]
        if self.indexer is not None and not self.reuses(context):
            with torch.set_grad_enabled(self.learns(self.stage == "sparse")):
                q, k, w = self.indexer(x.detach(), c_q.detach() / self.index_q_scale, context)
                k = context.part.whole(k)
            for here, chunk in context.chunks:
                chunk.shared[f"vectors/{self.group}"] = q[:, here], k[:, : chunk.keys], w[:, here]
        return super().attend_in_chunks(x, c_q, *rest)

    def reuses(self, context: ForwardContext) -> bool:
        return self.place > 0 or (context.step > 1 and self.config.dsa_mtp_cli)

    def learns(self, sparse: bool) -> bool:
        """Whether an indexer that this attention uses is taught in this pass, by it or by others of the group."""
        taught = self.training and torch.is_grad_enabled() and self.config.selection.uses_indexer and self.config.distill.weight > 0
        return taught and (sparse or (self.stage == "warmup" and self.config.selection.selects))

    def teaching_weight(self, context: ForwardContext) -> float:
        """Weight of this attention's KL: the distillation's, and its share in the group (of attentions, or of prediction steps)."""
        distill = self.config.distill
        place, size = self.place, self.members
        if context.step:
            steps = context.steps if self.config.dsa_mtp_cli else 1
            place, size = place + (context.step - 1 if steps > 1 else 0) * self.members_in_layer, steps * self.members_in_layer
        elif distill.served_weights:
            return distill.weight * distill.served_weights[place]
        return distill.weight * {"sum": 1.0, "mean": 1 / size, "owner": float(place == 0)}[distill.served]

    # --- the group's index --------------------------------------------------------------------------------------------------------

    def leave(self, index: Index, context: ForwardContext) -> Index:
        context.shared[f"index/{self.group}"] = index
        return index

    def shared(self, context: ForwardContext) -> Index:
        """What the first attention of the group left in this pass."""
        index = context.shared.get(f"index/{self.group}")
        if index is None:
            raise LabError(
                f"Attention group {self.group} has no selection: an attention that reuses one (model.attention.cli_factor "
                f"{self.config.cli_factor}) runs without the first of its group; set cli_factor to 1."
            )
        return index

    def vectors(self, x: Tensor, c_q: Tensor, context: ForwardContext) -> tuple[Tensor, Tensor, Tensor]:
        known = context.shared.get(f"vectors/{self.group}") if context.length else None
        return self.indexer(x.detach(), c_q.detach() / self.index_q_scale, context) if known is None else known

    def select(self, x: Tensor, c_q: Tensor, q: Tensor, k: Tensor, context: ForwardContext, learns: bool) -> Index:
        """The group's index, made here. q [B, T, heads, d] and k [B, S, d] are this attention's own, absorbed."""
        with torch.set_grad_enabled(learns):
            vectors = self.vectors(x, c_q, context) if self.indexer is not None else None
        with torch.no_grad():
            indices = self.indices(vectors, q.detach(), k.detach(), context)
        if self.training and not in_backward():
            seen = torch.arange(1, k.shape[1] + 1, device=q.device)[-q.shape[1] :] - (0 if context.first is None else context.first)
            chosen, visible = self.kept or (0, 0)
            self.kept = chosen + (indices >= 0).sum(), visible + seen.expand(q.shape[:2]).sum()
        scores = ops.selected_scores(*vectors, indices) if learns else None
        return Index(vectors, indices, scores, self.config.index_local_tokens)

    def indices(self, vectors: tuple[Tensor, Tensor, Tensor] | None, q: Tensor, k: Tensor, context: ForwardContext) -> Tensor:
        """int32 [B, T, index_topk] by the rule."""
        c, rule = self.config, self.config.selection
        fixed = (c.index_topk, c.index_init_tokens, c.index_local_tokens)
        if type(rule) is IndexerSelection:
            pages = c.hierarchical
            decoding = context.cache is not None and context.cache.length > 0
            if pages is not None and not self.training and pages.applies(self.group, decoding, k.shape[1]):
                how = {"page": pages.page, "block": pages.block, "pages": pages.pages, "pooling": pages.pooling}
                return ops.hierarchical_topk(*vectors, context.first, *fixed, **how)
            return ops.index_topk(*vectors, context.first, *fixed)
        queries, keys, parts = q.shape[1], k.shape[1], []
        position = torch.arange(keys, device=q.device)
        for begin in range(0, queries, CHUNK):
            end = min(begin + CHUNK, queries)
            seen = visible_keys(context.first, queries, keys, q.device, begin, end).expand(len(q), -1, -1)
            at = Candidates(
                seen,
                position[keys - queries + begin : keys - queries + end],
                position,
                self.group,
                lambda b=begin, e=end: index_scores(vectors[0][:, b:e], vectors[1], vectors[2][:, b:e]),
                lambda b=begin, e=end: attention_mass(self.all_heads(q), k, context.first, self.softmax_scale, b, e),
            )
            parts.append(select(choose(rule, at), seen, *fixed))
        return cat(parts, 1)

    # --- teaching it --------------------------------------------------------------------------------------------------------------

    def counted(self, x: Tensor, context: ForwardContext) -> Tensor:
        """Weight of each query in the mean KL, [B, T]: padding does not count."""
        real = torch.ones(x.shape[:2], device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
        real = real if context.padding is None else real.masked_fill(context.padding, 0.0)
        return real / (real.sum() if context.real is None else real.numel() * context.real).clamp(min=1)

    def dense_divergence(self, q: Tensor, k: Tensor, x: Tensor, context: ForwardContext) -> Tensor:
        index, weights = self.shared(context).vectors, self.counted(x, context)
        return dense_divergence(index, self.all_heads(q), k, context.first, self.softmax_scale, weights, self.config.distill.temperature)

    def over_heads(self, mass: Tensor) -> Tensor:
        """`mass`, a mean over the heads that are here, over all heads; replaced where others have the rest."""
        return mass

    def all_heads(self, q: Tensor) -> Tensor:
        """q [B, T, heads here, d] of all heads, for what looks at it without gradient; replaced where others have the rest."""
        return q

    def sparse_divergence(self, index: Index, mass: Tensor, q: Tensor, k: Tensor, x: Tensor, context: ForwardContext) -> Tensor:
        c, scores = self.config, index.scores
        if c.distill.teacher == "restricted":
            mass = restricted_mass(q.detach(), k.detach(), context.first, self.softmax_scale, index.indices)
        mass = self.over_heads(mass)
        if c.distill.support == "dynamic":
            fixed = (c.index_init_tokens, c.index_local_tokens)
            mass, scores = over_dynamic(mass, scores, index.indices, context.first, *fixed, k.shape[1])
        return divergence(mass, scores, self.counted(x, context), c.distill.temperature)

    def learn(self, out: Tensor, loss: Tensor, context: ForwardContext) -> Tensor:
        """`out`, with the loss hung on it."""
        if not in_backward():  # recomputed layers tell of it once
            total, shares = self.taught
            self.taught = total + context.share * loss.detach(), shares + context.share
        return add_loss(out, loss, self.teaching_weight(context) * context.share)

    # --- what it tells ------------------------------------------------------------------------------------------------------------

    def combine(self, summed: Callable[[Tensor], Tensor]) -> None:
        if self.taught[1]:
            total, shares = self.taught
            both = summed(torch.stack((total.double(), total.new_tensor(shares, dtype=torch.float64))))
            self.taught = both[0], float(both[1])
        if self.kept is not None:
            self.kept = tuple(summed(torch.stack(self.kept)))

    def after_step(self) -> None:
        self.told = {}
        total, shares = self.taught
        if shares:
            self.told["index_kl"] = float(total) / shares
            self.taught = (0.0, 0.0)
            if not math.isfinite(self.told["index_kl"]):
                raise LabError(
                    f"The index KL of attention group {self.group} is {self.told['index_kl']}: lower model.attention.distill.weight, "
                    "training.optimizer.index_lr_multiplier or the learning rate."
                )
        if self.kept is not None:
            chosen, visible = self.kept
            self.told["selected_share"] = float(chosen) / float(visible)
            self.kept = None

    def statistics(self) -> dict[str, float]:
        """index_kl: KL in nats of this attention's weights from the group's index; selected_share: selected of the visible pairs of
        query and key (of the attention that selects), in the last step.
        """
        return self.told

    def not_engaged(self, measured: dict[str, float]) -> list[str]:
        if self.place > 0 or not self.config.selection.selects:
            return []
        said = []
        if self.indexer is not None and "index_kl" not in measured:
            said.append("its indexer was not trained: it selects with the weights it had before")
        if measured.get("selected_share", 1.0) >= 1:
            said.append(f"it left no key out (no document was longer than index_topk {self.config.index_topk})")
        return said
