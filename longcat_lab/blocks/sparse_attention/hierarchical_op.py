"""Hierarchical indexing in plain PyTorch: pages first, then the tokens of the best pages. What is fast sits behind `ops.py`.

Shapes and the form of a selection are those of `op.py`. Pages are counted from key 0 of the row, whatever the documents in it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longcat_lab.blocks.sparse_attention.op import index_scores, select, visible_keys
from longcat_lab.errors import LabError

POOLINGS = ("mean", "minmax")


def pooled_keys(k: Tensor, block: int, pooling: str = "mean") -> Tensor:
    """One key for each whole sub-block of `block` keys; what is left over at the end has none.

    Args:
        k: [B, S, d_I].
        pooling: mean: kbar_n = mean of k over the sub-block; minmax: [largest ; smallest] along each dimension.

    Returns:
        [B, S // block, d_I], twice as wide for minmax, in at least fp32.
    """
    k = k.to(torch.promote_types(k.dtype, torch.float32))
    blocks = k[:, : k.shape[1] // block * block].unflatten(1, (-1, block))
    return blocks.mean(2) if pooling == "mean" else torch.cat((blocks.amax(2), blocks.amin(2)), -1)


def pooled_queries(q: Tensor, pooling: str = "mean") -> Tensor:
    """What to multiply `pooled_keys` by: q itself, or for minmax [max(q, 0) ; min(q, 0)], since

    sum_d max(q_d kmax_d, q_d kmin_d) = max(q, 0) . kmax + min(q, 0) . kmin.
    """
    return q if pooling == "mean" else torch.cat((q.clamp(min=0), q.clamp(max=0)), -1)


def kept_pages(
    q: Tensor, means: Tensor, w: Tensor, visible: Tensor, position: Tensor, page: int, block: int, pages: int, pooling: str = "mean"
) -> Tensor:
    """Stage 1: the pages whose tokens are scored, bool [B, T, ceil(S / page)]; see `hierarchical_topk` for the rule.

    Args:
        q: [B, T, H_I, d_I]; means: `pooled_keys` of the row; w: [B, T, H_I].
        visible: bool [B or 1, T, S]; position: [T], the queries' own keys.
    """
    batch, (queries, keys), per_page = q.shape[0], visible.shape[1:], page // block
    seen = torch.nn.functional.pad(visible, (0, -keys % page)).expand(batch, -1, -1)
    own = torch.arange(-(-keys // page), device=q.device) == (position // page)[:, None]
    whole = seen.unflatten(-1, (-1, block)).all(-1)[..., : means.shape[1]]  # sub-blocks of which every key is visible
    scores = index_scores(pooled_queries(q, pooling), means, w).masked_fill(~whole, 0)
    scores = torch.nn.functional.pad(scores, (0, own.shape[-1] * per_page - means.shape[1])).unflatten(-1, (-1, per_page)).sum(-1)
    holds = seen.unflatten(-1, (-1, page)).any(-1)
    best = select(scores, holds & ~own, pages - 1).long()
    kept = own | torch.zeros(batch, queries, own.shape[-1] + 1, dtype=torch.bool, device=q.device).scatter(-1, best + 1, True)[..., 1:]
    return kept | (holds & (seen.sum(-1, keepdim=True) <= pages * page))


def hierarchical_topk(
    q: Tensor,
    k: Tensor,
    w: Tensor,
    first: Tensor | None,
    topk: int,
    sinks: int = 0,
    window: int = 0,
    *,
    page: int = 128,
    block: int = 8,
    pages: int = 1024,
    pooling: str = "mean",
    chunk: int = 256,
) -> Tensor:
    """`index_topk` among the tokens of the best pages only, without gradient. For long sequences at inference.

        I^page_{t,p} = sum_j w_{t,j} sum_{n in page p} ReLU(q_{t,j} . kbar_n)      kbar_n: one key a sub-block, `pooled_keys`
        S_t          = sinks + window + argtop_(topk - sinks - window) of I_{t,s} over the other visible s in the best pages

    A page is `page` keys of the row, counted from key 0, in sub-blocks of `block`. What the paper leaves open is settled so that a
    selection depends on nothing that its query does not see, and is the same token by token with a cache as for a whole sequence:

    - The query's own page is always among the `pages` kept and takes no part in the ranking: it ends after the query, and the means
      of its sub-blocks would look ahead. All pages before it are complete.
    - A page that begins before the query's document is ranked by those of its sub-blocks that lie in the document whole (by 0 where
      none does), and gives only its visible tokens. Pages do not begin where a document does: a document packed behind others is
      cut into pages at other places than alone, and may get another selection.
    - A query that sees at most pages * page keys keeps all its pages: its selection is exactly that of `index_topk`.
    - Where the pages kept hold fewer than topk tokens, places stay empty (-1).

    Of equal page scores the earlier page goes first, of equal token scores the earlier key.

    Args:
        q, k, w, first, topk, sinks, window: as in `index_topk`.
        page: P, tokens of a page; block: B, of a sub-block, a divisor of it; pages: M, pages kept for a query, its own among them.
        pooling: "mean", or "minmax", which puts the upper bound sum_d max(q_d kmax_d, q_d kmin_d) in place of q . kbar.
        chunk: queries worked on at a time; memory is O(chunk H_I S).

    Returns:
        a selection, int32 [B, T, min(topk, S)].

    Raises:
        LabError: sizes that do not fit together, or another pooling.

    Source: LSA (arXiv 2608.01662), hierarchical indexing; there P = 128, B = 8, M = 1024, mean.
    """
    check_pages(page, block, pages, pooling)
    queries, keys, parts = q.shape[1], k.shape[1], []
    with torch.no_grad():
        means = pooled_keys(k[:, : keys // page * page], block, pooling)
        for begin in range(0, queries, chunk):
            end = min(begin + chunk, queries)
            each, weight, position = q[:, begin:end], w[:, begin:end], torch.arange(begin, end, device=q.device) + keys - queries
            seen = visible_keys(first, queries, keys, q.device, begin, end)
            kept = kept_pages(each, means, weight, seen, position, page, block, pages, pooling)
            number = seen.cumsum(-1)  # 1 for the oldest visible key
            fixed = seen & ((number <= sinks) | (number > number[..., -1:] - window))
            candidates = fixed | (seen & kept.repeat_interleave(page, -1)[..., :keys])
            parts.append(select(index_scores(each, k, weight).masked_fill(fixed, torch.inf), candidates, topk))
    return torch.cat(parts, 1)


def check_pages(page: int, block: int, pages: int, pooling: str) -> None:
    """Raises LabError where these are no pages."""
    if page < 1 or block < 1 or page % block:
        raise LabError(f"a page of {page} tokens cannot be cut into sub-blocks of {block}; set block to a divisor of page")
    if pages < 1:
        raise LabError(f"pages is {pages}, and at least the query's own page is kept; set it to 1 or more")
    if pooling not in POOLINGS:
        raise LabError(f"there is no pooling '{pooling}'; set it to {' or '.join(POOLINGS)}")
