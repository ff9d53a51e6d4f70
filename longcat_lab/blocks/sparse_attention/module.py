from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longcat_lab.blocks.context import ForwardContext
from longcat_lab.blocks.interface import ModelShape
from longcat_lab.blocks.mla.module import MLA
from longcat_lab.blocks.mla.op import causal_mask
from longcat_lab.blocks.sparse_attention.indexer import Indexer
from longcat_lab.blocks.sparse_attention.op import selection
from longcat_lab.errors import LabError

if TYPE_CHECKING:
    from longcat_lab.blocks.sparse_attention.config import DSAConfig


class SparseAttention(MLA):
    """MLA over index_topk selected keys a query: the set that its indexer picks, or that the owner of its group picked.

    Attentions 0 ... cli_factor - 1 of the model make one group, and so on. The first of a group owns an indexer and leaves its
    selection in `context.shared`; the others have none and attend to the same set with queries and keys of their own.
    Where no more than index_topk keys exist this is MLA, bit for bit.

    This is the readable reference: a mask over dense attention, O(T S). The indexer is not trained here: it sees its inputs detached
    and runs without gradient (selection has none), so that the language model's loss never reaches it. Its distillation and a core
    of O(T index_topk) are not written yet.

    Source: DSA: DeepSeek-V3.2 report; LSA (sinks and window, cross-layer indexing): arXiv 2608.01662.
    """

    def __init__(self, config: DSAConfig, shape: ModelShape) -> None:
        super().__init__(config, shape)
        self.group = shape.attention_index // config.cli_factor
        self.indexer = Indexer(config, shape) if config.owns_index(shape) else None
        # What the indexer sees of the query latent: LongCat's factor taken out again, or left in.
        self.index_q_scale = self.q_scale if config.index_query_latent == "normed" else 1.0
        self.kept: tuple[Tensor, Tensor] | None = None  # pairs selected and pairs visible in the last training pass

    def visible(self, x: Tensor, c_q: Tensor, context: ForwardContext) -> Tensor | None:
        """bool [B, 1, T, S]: the selected keys of each query; the pass's own mask where it has no more than index_topk keys."""
        seen = x.shape[1] + (0 if context.cache is None else context.cache.length)
        with torch.no_grad():
            if seen <= self.config.index_topk:
                if self.indexer is not None and context.cache is not None:
                    self.indexer.keys(x.detach(), context)  # later tokens will look at these
                if self.training:
                    self.kept = None
                return context.mask
            return self.select(x.detach(), c_q.detach() / self.index_q_scale, context)[:, None]

    def select(self, x: Tensor, c_q: Tensor, context: ForwardContext) -> Tensor:
        """The group's selection, bool [B, T, S]: made here by the owner, or taken from what the owner noted in this pass."""
        c, note = self.config, f"selection/{self.group}"
        if note in context.shared and (self.indexer is None or c.dsa_mtp_cli):
            return context.shared[note]
        if self.indexer is None:
            raise LabError(
                f"Attention group {self.group} has no selection: an attention that reuses one (model.attention.cli_factor "
                f"{c.cli_factor}) runs without the first of its group; set cli_factor to 1."
            )
        scores = self.indexer(x, c_q, context)
        visible = causal_mask(*scores.shape[1:], x.device)[None] if context.mask is None else context.mask[:, 0]
        chosen = selection(scores, visible, c.index_topk, c.index_init_tokens, c.index_local_tokens)
        context.shared[note] = chosen
        if self.training:
            self.kept = chosen.sum(), visible.sum() * (len(chosen) // len(visible))
        return chosen

    def statistics(self) -> dict[str, float]:
        """selected_share: selected of the visible pairs of query and key, in the last training pass; the owner's alone."""
        if self.indexer is None or self.kept is None:
            return {} if self.indexer is None else {"selected_share": 1.0}
        chosen, visible = self.kept
        return {"selected_share": float(chosen) / float(visible)}

    def not_engaged(self, measured: dict[str, float]) -> list[str]:
        if self.indexer is None:
            return []
        said = ["its indexer is not trained yet: it selects with its initial weights"]
        if measured.get("selected_share", 1.0) >= 1:
            said.append(f"it left no key out (no document was longer than index_topk {self.config.index_topk})")
        return said
