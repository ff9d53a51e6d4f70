"""Bits per byte: loss in a unit that does not depend on the tokenizer.

Convention: a label is scored when it stands for text. Ignored labels (-100) and special tokens (the end of a document, 0 bytes) are
left out on both sides: their loss is not in the sum, and they count no bytes.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from longcat_lab.errors import LabError


def scored(labels: torch.Tensor, token_bytes: np.ndarray | torch.Tensor) -> torch.Tensor:
    """bool, shape of `labels`: which positions enter bits per byte. Multiply the per-token loss with it before summing."""
    return _bytes(labels, token_bytes) > 0


def label_bytes(labels: torch.Tensor, token_bytes: np.ndarray | torch.Tensor) -> int:
    """Bytes of text that the scored labels stand for. `labels` int64, any shape; `token_bytes` int64 [vocab_size]."""
    return int(_bytes(labels, token_bytes).sum())


def bits_per_byte(nll_sum_nats: float, n_bytes: int) -> float:
    """Bits per byte of text, from the summed negative log likelihood (nats) of the scored labels and their bytes.

    Raises:
        LabError: there are no bytes.
    """
    if n_bytes <= 0:
        raise LabError("Bits per byte need at least one byte of predicted text, and there was none: evaluate on more sequences.")
    return nll_sum_nats / math.log(2) / n_bytes


def _bytes(labels: torch.Tensor, token_bytes: np.ndarray | torch.Tensor) -> torch.Tensor:
    table = torch.as_tensor(token_bytes, device=labels.device)
    return torch.where(labels >= 0, table[labels.clamp(min=0)], 0)
