"""Hashed n-gram embedding: row addresses, and the fused mean of token and n-gram branches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def table_moduli(vocab_size: int, vocab_ratio: float, order: int, splits: int) -> list[int]:
    """M_i = floor(ratio * V) + 2 i + 1 for table i = (n - 2) * splits + k, n = 2 ... order: rows of each table.

    Computed in floating point as the released code does. Source: LongCat-Flash-Lite (arXiv 2601.21204), released configurations.
    """
    return [int(vocab_ratio * vocab_size + 2 * i + 1) for i in range((order - 1) * splits)]


def previous_tokens(tokens: Tensor, document_ids: Tensor | None, lag: int) -> Tensor:
    """s_j(i) = t_{i-j} where position i - j exists and lies in the same document, else 0. [B, T] to [B, T]."""
    if lag == 0:
        return tokens
    shifted = F.pad(tokens, (lag, 0))[:, : tokens.shape[1]]
    if document_ids is not None:
        shifted = shifted * (F.pad(document_ids, (lag, 0), value=-1)[:, : tokens.shape[1]] == document_ids)
    return shifted


def ngram_rows_reference(
    tokens: Tensor, document_ids: Tensor | None, vocab_size: int, order: int, splits: int, moduli: list[int]
) -> Tensor:
    """H_{n,k}(i) = (sum_{j=0}^{n-1} s_j(i) (V^j mod m)) mod m: the row of each table, the current token with weight 1.

    Args:
        tokens: int64 [B, T]; document_ids: int64 [B, T], no negative ids, or None for one document a row.
        moduli: rows of the tables, n-major as in `table_moduli`.

    Returns:
        int64 [B, T, E], rows inside each table. Every product stays below vocab_size * max(moduli), so int64 never overflows.

    Source: arXiv 2601.21204 eq. 2 and its footnote 2.
    """
    columns = []
    for table, m in enumerate(moduli):
        n = table // splits + 2
        total = sum(previous_tokens(tokens, document_ids, j) * pow(vocab_size, j, m) for j in range(n))
        columns.append(total % m)
    return torch.stack(columns, -1)


def ngram_rows(tokens: Tensor, document_ids: Tensor | None, weights: Tensor, moduli: Tensor) -> Tensor:
    """`ngram_rows_reference` with all tables in one multiply, sum and modulo.

    Args:
        weights: int64 [order, E], V^j mod m_e where lag j belongs to table e, else 0; moduli: int64 [E].
    """
    lags = torch.stack([previous_tokens(tokens, document_ids, j) for j in range(weights.shape[0])], -1)
    return (lags[..., :, None] * weights).sum(-2) % moduli


def fuse_reference(token: Tensor, rows: Tensor, projection: Tensor, scale: float) -> Tensor:
    """e = scale / (E + 1) * (E_0[t] + sum_i W_i r_i), the sum as one product of [W_1 ... W_E] with the concatenated rows.

    Args:
        token: [B, T, H]; rows: [B, T, E, d] with E d = H; projection: [H, E d].

    Returns:
        [B, T, H].

    Source: arXiv 2601.21204 eq. 3 (scale 1). This is also the fast form: the E + 1 branches are never laid out.
    """
    branches = rows.shape[-2] + 1
    return (scale / branches) * (token + F.linear(rows.flatten(-2), projection))
