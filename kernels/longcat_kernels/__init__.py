"""Compiled operators of longcat_lab. Importing this compiles and loads nothing: the first call of an operator does.

`available()` and `why_not()` say whether the operators can be had here, `takes(...)` whether for these tensors. On a CPU: `mixture`
is a mixture's real-expert part, `attention` softmax attention under any mask, `silu_times` the activation of SwiGLU, `index_topk` and
`hierarchical_topk` the selections of sparse attention, `selected_scores` the scores behind them, `sparse_attention` its core.
"""

from __future__ import annotations

from longcat_kernels.activation import silu_times
from longcat_kernels.attention import attention
from longcat_kernels.indexing import hierarchical_topk, index_topk, selected_scores
from longcat_kernels.library import available, takes, usable, why_not
from longcat_kernels.mixture import mixture
from longcat_kernels.sparse_attention import sparse_attention

__all__ = [
    "attention",
    "available",
    "hierarchical_topk",
    "index_topk",
    "mixture",
    "selected_scores",
    "silu_times",
    "sparse_attention",
    "takes",
    "usable",
    "why_not",
]
