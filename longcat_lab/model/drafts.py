"""Drafts of the tokens to come, by the model's prediction steps with their caches."""

from __future__ import annotations

import torch
from torch import Tensor

from longcat_lab.blocks import Cache
from longcat_lab.blocks.sparse_attention.module import Index


class AlignedDrafts:
    """The prediction steps as they are trained, with a cache each. Step k at position i reads h^{k-1}_i and token i + k.

    Positions whose token i + k is known are computed once, with the true token; the last k - 1 positions of step k hang on drafts
    and are forgotten when the drafts are judged. Where steps share a selection, step k takes that of step 1 at the same position.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.model, self.steps = model, model.config.mtp.num_nextn_predict_layers
        self.caches = [Cache() for _ in range(self.steps)]
        self.states = [torch.empty(0)] * self.steps  # h^1 ... h^D at all positions [1, n, H], those that hang on drafts at the end
        self.selections: dict[str, Tensor] = {}  # of step 1 at all positions, int32 [1, n, index_topk] by index group

    def propose(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """hidden [1, n, H]: the trunk's at positions 0 ... n - 1; tokens int64 [n + 1], all known; D drafts for what follows."""
        model, known = self.model, tokens
        count, state = hidden.shape[1], hidden if model.config.mtp.hidden == "raw" else model.norm(hidden)
        for k in range(1, self.steps + 1):
            block, cache = model.mtp.block(k), self.caches[k - 1]
            start = cache.length
            ahead = known[None, start + k : count + k]
            context = model.context(state[:, start:], cache=cache)
            context.step, context.steps = k, self.steps
            if k > 1:
                context.shared = {group: Index(indices=kept[:, start:]) for group, kept in self.selections.items()}
            fresh = block(state[:, start:], model.mtp.embed(ahead, model.embed_tokens), context)
            if k == 1:
                self._keep(context.shared, start, count)
            cache.advance(ahead)
            normed = block.norm(fresh)
            passed = fresh if model.config.mtp.hidden == "raw" else normed
            state = torch.cat((self.states[k - 1][:, :start], passed), 1) if start else passed
            self.states[k - 1] = state
            known = torch.cat((known, model.lm_head(normed[:, -1:]).argmax(-1)[0]))
        for k, cache in enumerate(self.caches, 1):
            cache.cut(max(0, count - k + 1))  # step k at position i was true where i + k <= count
        return known[len(tokens) :]

    def _keep(self, shared: dict[str, object], start: int, count: int) -> None:
        """Adds what step 1 selected at positions start ... count - 1. Where it was dense, it saw all keys: those up to each position."""
        for group, index in shared.items():
            if isinstance(index, Index) and index.indices is not None:
                width = index.indices.shape[-1]
                before = self.selections.get(group, index.indices[:, :0])[:, :start]
                if before.shape[1] < start:
                    before = _all_keys(start, width).to(index.indices)[None]
                self.selections[group] = torch.cat((before, index.indices), 1)


class ChainedDrafts:
    """The prediction steps as engines serve one repeated block: one cache, and step k stands k - 1 positions behind the known text.

    Step 1 at position i reads the trunk's state and token i + 1, as in training. Step k > 1 stands at position n + k - 2, reads the state
    of the step before it and the last draft, and sees step 1's keys up to n - 1 and the drafts' own after. Where steps share a selection,
    `index_mtp_newest` says what becomes of the keys that are newer than it.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.model, self.steps, self.cache = model, model.config.mtp.num_nextn_predict_layers, Cache()

    def propose(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """As AlignedDrafts.propose."""
        model, known, count, selection = self.model, tokens, hidden.shape[1], {}
        raw = model.config.mtp.hidden == "raw"
        state = (hidden if raw else model.norm(hidden))[:, self.cache.length :]
        for k in range(1, self.steps + 1):
            block, start = model.mtp.block(1), self.cache.length
            ahead = known[None, start + 1 : start + 1 + state.shape[1]]
            context = model.context(state, cache=self.cache)
            context.step, context.steps = k, self.steps
            if k > 1:
                attention = model.config.attention
                context.shared = {group: Index(indices=newest(kept, k - 1, attention)) for group, kept in selection.items()}
            fresh = block(state, model.mtp.embed(ahead, model.embed_tokens), context)
            if k == 1:
                chosen = {group: index for group, index in context.shared.items() if isinstance(index, Index)}
                everything = torch.arange(count, device=state.device, dtype=torch.int32)[None, None]  # what a dense step 1 saw
                selection = {g: everything if each.indices is None else each.indices[:, -1:] for g, each in chosen.items()}
            self.cache.advance(ahead)
            normed = block.norm(fresh)[:, -1:]
            state = fresh[:, -1:] if raw else normed
            known = torch.cat((known, model.lm_head(normed).argmax(-1)[0]))
        self.cache.cut(count)
        return known[len(tokens) :]


def newest(indices: Tensor, steps: int, attention: object) -> Tensor:
    """Step 1's selection [1, 1, K], made at position n - 1, for a query that stands at n - 1 + `steps`: int32 [1, 1, K'], rising.

    reuse: as it is; append: the newer positions too (K' = K + steps); slide: the window ends with the query, and what falls out of it is
    dropped.
    """
    if attention.index_mtp_newest == "reuse":
        return indices
    own = int(indices.max())
    added = torch.arange(own + 1, own + steps + 1, device=indices.device, dtype=indices.dtype)[None, None]
    if attention.index_mtp_newest == "slide":
        left = (indices > own - attention.index_local_tokens) & (indices <= own + steps - attention.index_local_tokens)
        indices = indices.masked_fill(left & (indices >= attention.index_init_tokens), -1)
    return torch.cat((indices, added), -1).sort(-1).values


def _all_keys(count: int, width: int) -> Tensor:
    """int32 [count, width]: all keys up to each position, empty places in front; the last `width` where they are more."""
    back = torch.arange(1 - width, 1)
    return (torch.arange(count)[:, None] + back).clamp(min=-1).int()
