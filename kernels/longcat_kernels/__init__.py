"""Compiled operators of longcat_lab. Importing this compiles and loads nothing: the first call of an operator does.

`available()` and `why_not()` say whether the operators can be had here, `takes(...)` whether for these tensors. On a CPU: `mixture`
is a mixture's real-expert part, `attention` softmax attention under any mask, `silu_times` the activation of SwiGLU.
"""

from __future__ import annotations

from longcat_kernels.activation import silu_times
from longcat_kernels.attention import attention
from longcat_kernels.library import available, takes, usable, why_not
from longcat_kernels.mixture import mixture

__all__ = ["attention", "available", "mixture", "silu_times", "takes", "usable", "why_not"]
