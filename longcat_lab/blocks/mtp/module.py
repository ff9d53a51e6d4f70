from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longcat_lab.blocks.context import ForwardContext, taken
from longcat_lab.blocks.interface import Block, ModelShape
from longcat_lab.blocks.table import Table

if TYPE_CHECKING:
    from longcat_lab.blocks.mtp.config import MTPConfig


class MTPBlock(Block):
    """One prediction block.

        h^k_i = Layer( W_eh [ norm_e(E(t_{i+k})) ; norm_h(h^{k-1}_i) ] ),   P^k_{i+k+1} = Head(norm(h^k_i))

    h^{k-1} is the state before the final norm that its step's logits take (`hidden: raw`, as the equations read), or after it
    (`normed`, as transformers and the released servers run DeepSeek's and LongCat's weights).
    Source: DeepSeek-V3 (arXiv 2412.19437) eq. 21 to 23, with the order inside the brackets that the released weights have
    (embedding first). Parameter names are those of the LongCat checkpoints where they have one.
    """

    def __init__(self, config: MTPConfig, shape: ModelShape) -> None:
        super().__init__()
        layer, place = config.inner(shape)
        self.enorm, self.hnorm, self.norm = (shape.norm.build(shape) for _ in range(3))
        self.eh_proj = nn.Linear(2 * shape.hidden_size, shape.hidden_size, bias=False)
        self.layer = layer.build(place)

    def forward(self, hidden: Tensor, embedded: Tensor, context: ForwardContext) -> Tensor:
        """hidden h^{k-1}, embedded E(t_{i+k}), both [B, T, H]; h^k [B, T, H], not yet normed."""
        return self.layer(self.eh_proj(torch.cat((self.enorm(embedded), self.hnorm(hidden)), -1)), context)


class MTP(Block):
    """D prediction steps after the trunk, of D blocks or of one block that is applied D times.

    Its input embedding is the plain one: n-gram tables are not read. Step 1 starts from the trunk's hidden state.
    """

    def __init__(self, config: MTPConfig, shape: ModelShape) -> None:
        super().__init__()
        self.config = config
        own = config.own_embedding_config(shape)
        self.embed_tokens = own.build(shape) if own else None
        for module in self.embed_tokens.modules() if self.embed_tokens is not None else ():
            if isinstance(module, Table):
                module.idle = True
        self.layers = nn.ModuleList(MTPBlock(config, shape) for _ in range(config.blocks))

    def block(self, step: int) -> MTPBlock:
        """The block of prediction step `step` (1 ... D)."""
        return self.layers[0 if self.config.repeat_block else step - 1]

    def embed(self, tokens: Tensor, trunk: nn.Module) -> Tensor:
        """E(t) by rows alone, of its own embedding or of the trunk's. tokens [B, T] to [B, T, H]."""
        weight = (self.embed_tokens if self.embed_tokens is not None else trunk).weight
        return nn.functional.embedding(tokens, weight.detach() if self.config.detach and self.embed_tokens is None else weight)

    def forward(self, hidden: Tensor, tokens: Tensor, trunk: nn.Module, context: Callable[[], ForwardContext]) -> list[Tensor]:
        """All steps over a whole sequence, each position with the true tokens ahead of it (teacher forcing).

        Args:
            hidden: [B, T, H], h^0 of the trunk, normed where `hidden` says so; tokens: int64 [B, T]; trunk: the trunk's embedding. Where
                a part of the rows runs here hidden states are of that part, and tokens of the whole rows.
            context: makes the context of one step (positions and masks are the trunk's).

        Returns:
            D tensors [B, T, H], normed for the head. At the last k positions of a row step k has no true token ahead and takes
            token 0: its labels are ignored there, and nothing before looks at them.
        """
        found, h = [], hidden.detach() if self.config.detach else hidden
        for step in range(1, self.config.num_nextn_predict_layers + 1):
            block, ahead = self.block(step), nn.functional.pad(tokens[:, step:], (0, min(step, tokens.shape[1])))
            place = self._context(context(), tokens, step)
            inputs = (h, self.embed(taken(ahead, place.part), trunk), place)
            recompute = self.config.recompute and torch.is_grad_enabled()
            h = checkpoint(block, *inputs, use_reentrant=False) if recompute else block(*inputs)
            found.append(block.norm(h))
            h = h if self.config.hidden == "raw" else found[-1]
        return found

    def _context(self, context: ForwardContext, tokens: Tensor, step: int) -> ForwardContext:
        context.step, context.steps = step, self.config.num_nextn_predict_layers
        return _without_the_end(context, tokens, step)

    def not_engaged(self, measured: dict[str, float]) -> list[str]:
        return [] if measured.get("mtp_loss_1") else ["no prediction step was trained: its loss weight was 0 to the end"]


def _without_the_end(context: ForwardContext, tokens: Tensor, step: int) -> ForwardContext:
    """`context` with the last `step` positions of each row as padding: what they read is no token, and no expert should work on it."""
    end = torch.zeros_like(tokens, dtype=torch.bool)
    end[:, max(0, tokens.shape[1] - step) :] = True
    if context.part is not None:
        context.real = 1 - end.double().mean()
    end = taken(end, context.part)
    context.padding = end if context.padding is None else context.padding | end
    return context


def step_labels(labels: Tensor, document_ids: Tensor | None, step: int, ignored: int = -100) -> Tensor:
    """What step k predicts at position i: the label of position i + k, where that lies in the row and in i's document.

    Args:
        labels: int64 [B, T], the next token of each position, or `ignored` where that belongs to another document.
        document_ids: [B, T], or None for one document a row; step: k.

    Returns:
        int64 [B, T].
    """
    length = labels.shape[1]
    moved = torch.full_like(labels, ignored)
    if step < length:
        moved[:, : length - step] = labels[:, step:]
        if document_ids is not None:
            same = document_ids[:, step:] == document_ids[:, : length - step]
            moved[:, : length - step].masked_fill_(~same, ignored)
    return moved
