"""Compiled operators of longcat_lab. Importing this compiles and loads nothing: the first call of an operator does.

`available()` and `why_not()` say whether the operators can be had here; `mixture` is the mixture's real-expert part on a CPU.
"""

from __future__ import annotations

from longcat_kernels.library import available, usable, why_not
from longcat_kernels.mixture import mixture

__all__ = ["available", "mixture", "usable", "why_not"]
