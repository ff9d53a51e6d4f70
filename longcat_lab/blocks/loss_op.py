"""Losses at the end of the model: cross entropy without ever holding all logits, and the hidden z-loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # label of a position that is not scored, as in torch's cross entropy
CHUNK_ELEMENTS = 2**22  # logits that exist at a time


@dataclass(frozen=True)
class Scored:
    """Hidden states [..., H] whose next tokens `labels` [...] (int64, -100: not scored) are predicted.

    weight: of the summed cross entropy in the total; trains_head: whether its gradient reaches the head's weights.
    """

    hidden: Tensor
    labels: Tensor
    weight: float = 1.0
    trains_head: bool = True


@dataclass(frozen=True)
class Vocabulary:
    """Where others hold the other rows of the head: number of the first row here, and sum and maximum over the holders, in place."""

    first: int
    summed: Callable[[Tensor], Tensor]
    largest: Callable[[Tensor], Tensor]


def cross_entropy_reference(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """sum_t -log softmax(W h_t)_{y_t} over the labels that are not -100, in nats. hidden [T, H], head [V, H], labels [T]; a scalar."""
    return F.cross_entropy((hidden @ head.T).float(), labels, ignore_index=IGNORED, reduction="sum")


def cross_entropies(parts: list[Scored], head: Tensor, vocabulary: Vocabulary | None = None) -> tuple[Tensor, list[Tensor]]:
    """Sum over parts of weight * `cross_entropy_reference`, in chunks of rows; only one chunk's logits exist at a time.

    Gradients are computed with the logits in the forward pass (so a logit is computed once), and there is one gradient of the head
    however many parts there are: a further prediction step costs its hidden states and no logits. Parts do not share a chunk, so a
    part's loss has the same bits whatever else is scored.

    Args:
        parts: hidden states with labels; head: [V, H], the head's weight. Under autocast logits are computed in its dtype and then
            taken to fp32.
        vocabulary: the head is only some rows of it; all holders score the same hidden states, and get the same losses and gradients.

    Returns:
        the total (a scalar with gradient, fp32 or wider) and each part's own summed loss, not weighted, without gradient.
    """
    flat = [t for part in parts for t in (part.hidden.flatten(0, -2), part.labels.flatten())]
    plan = [(part.weight, part.trains_head) for part in parts]
    total, *each = _CrossEntropies.apply(plan, head, torch.is_grad_enabled(), vocabulary, *flat)
    return total, each


class _CrossEntropies(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plan, head, wants_gradients, vocabulary, *flat):
        kind = head.device.type
        narrow = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else head.dtype
        weight, wide = head.to(narrow), torch.promote_types(head.dtype, torch.float32)
        rows = max(1, CHUNK_ELEMENTS // len(head))
        head_gradient = torch.zeros_like(head, dtype=wide) if wants_gradients and ctx.needs_input_grad[1] else None
        sums, gradients = [], []
        with torch.autocast(kind, enabled=False):
            for number, (scale, trains_head) in enumerate(plan):
                hidden, labels = flat[2 * number], flat[2 * number + 1]
                wants = wants_gradients and ctx.needs_input_grad[4 + 2 * number]
                into = head_gradient if trains_head else None
                found, loss = (torch.empty_like(hidden) if wants else None), head.new_zeros((), dtype=wide)
                for start in range(0, len(hidden), rows):
                    part, target = hidden[start : start + rows].to(narrow), labels[start : start + rows]
                    logits = (part @ weight.T).to(wide)
                    log_p = logits.log_softmax(-1) if vocabulary is None else _log_softmax(logits, vocabulary)
                    there = target != IGNORED
                    # Rows of the head that are not here: the first one stands for them, with the weight 0.
                    index = target.clamp_min(0)[:, None] - (0 if vocabulary is None else vocabulary.first)
                    here = ((index >= 0) & (index < len(head))).to(wide)
                    index = index.clamp(0, len(head) - 1)
                    scored = log_p.gather(-1, index) if vocabulary is None else vocabulary.summed(log_p.gather(-1, index) * here)
                    loss -= scored[:, 0].masked_fill(~there, 0).sum()
                    if wants or into is not None:
                        # d(scale * loss) / d(logits) = scale * (p - onehot), rows without a label 0
                        p = log_p.exp_().scatter_add_(-1, index, -here)
                        p = p.mul_(torch.where(there, scale, 0.0)[:, None].to(wide)).to(narrow)
                        if wants:
                            found[start : start + rows] = p @ weight if vocabulary is None else vocabulary.summed(p @ weight)
                        if into is not None:
                            into.addmm_(p.T, part) if narrow == wide else into.add_(p.T @ part)
                sums.append(loss)
                gradients.append(found)
        ctx.head_gradient, ctx.gradients = head_gradient, gradients
        total = torch.stack([scale * loss for (scale, _), loss in zip(plan, sums, strict=True)]).sum()
        ctx.mark_non_differentiable(*sums)
        return total, *sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient, *_):
        if ctx.gradients is None:
            raise RuntimeError("cross_entropies: backward ran a second time over one forward pass; run the forward pass again.")

        def scaled(kept):
            return None if kept is None else kept.mul_(gradient)

        hidden = [each for kept in ctx.gradients for each in (scaled(kept), None)]
        head = scaled(ctx.head_gradient)
        ctx.gradients = ctx.head_gradient = None  # freed with the graph, and of no use twice
        return None, head, None, None, *hidden


def _log_softmax(logits: Tensor, vocabulary: Vocabulary) -> Tensor:
    """log_softmax over logits [T, V / holders] and those of the other holders."""
    logits = logits - vocabulary.largest(logits.amax(-1, keepdim=True))
    return logits - vocabulary.summed(logits.exp().sum(-1, keepdim=True)).log()


def hidden_z_loss(z: Tensor, padding: Tensor | None = None) -> Tensor:
    """L = (1 / T) sum_t (log sum_i exp |z_ti|)^2 in fp32: keeps the last hidden state from growing without bound.

    Args:
        z: [..., H], the last layer's output before the final norm; padding: bool [...], True where there is no token.

    Returns:
        a scalar; at least (ln H)^2, which it reaches at z = 0.

    Source: LongCat-Flash (arXiv 2509.01322), hidden z-loss (its weight is the caller's).
    """
    squares = z.to(torch.promote_types(z.dtype, torch.float32)).abs().logsumexp(-1).square()
    return squares.mean() if padding is None else squares.masked_fill(padding, 0).sum() / (~padding).sum().clamp_min(1)
