"""Positions in config.json, both ways: `rope_parameters` (transformers 5) and `rope_theta` with `rope_scaling` (before)."""

from __future__ import annotations

import math
from typing import Any

from longcat_lab.blocks import BlockConfig
from longcat_lab.model.pretrained.keys import Keys

YARN_KEYS = {"factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor"}


def rope_settings(keys: Keys, max_position_embeddings: int) -> dict[str, Any]:
    """Settings of the `rope` role.

    Raises:
        LabError: a kind of positions or a setting that the model does not have, or two descriptions that disagree.
    """
    theta = keys.get(float, "rope_theta", default=None)
    found = {
        name: _settings(keys, name, described, theta, max_position_embeddings)
        for name in ("rope_parameters", "rope_scaling")
        if (described := keys.get(dict, name, default=None))
    }
    if not found:
        return _settings(keys, "rope_parameters", {}, theta, max_position_embeddings)
    first, *others = found.values()
    if others and others[0] != first:
        raise keys.error("'rope_parameters' and 'rope_scaling' describe different positions: keep one of them.")
    return first


def _settings(keys: Keys, name: str, described: dict[str, Any], theta: float | None, max_position_embeddings: int) -> dict[str, Any]:
    kind = described.get("rope_type") or described.get("type") or "default"
    if kind not in ("default", "yarn", "deepseek_yarn"):
        raise keys.error(f"'{name}' has rope_type {kind!r}, which cannot be expressed: only default and yarn can.")
    yarn = kind != "default"
    for key, value in described.items():
        plain = key in ("rope_type", "type", "rope_theta") or value == {"partial_rotary_factor": 1, "truncate": True}.get(key)
        if not plain and value is not None and not (yarn and key in YARN_KEYS):
            raise keys.error(f"'{name}.{key}' is {value!r}, which cannot be expressed with rope_type {kind!r}.")

    inner = Keys({k: v for k, v in described.items() if not isinstance(v, dict | list)}, keys.path)
    theta = inner.get(float, "rope_theta", default=theta)
    if theta is None:
        raise keys.error("'rope_theta' is missing.")
    if not yarn:
        return {"kind": "rope", "theta": theta}
    original = inner.get(int, "original_max_position_embeddings", default=max_position_embeddings)
    factor = inner.get(float, "factor", default=max_position_embeddings / original)
    # 0 means "as if left out" for both of these, here and in transformers.
    beta_fast, beta_slow = inner.get(float, "beta_fast", default=0.0) or 32.0, inner.get(float, "beta_slow", default=0.0) or 1.0
    mscale, all_dim = inner.get(float, "mscale", default=0.0), inner.get(float, "mscale_all_dim", default=0.0)
    amplitude = inner.get(float, "attention_factor", default=None)
    return {
        "kind": "yarn",
        "theta": theta,
        "factor": factor,
        "original_max_position_embeddings": original,
        "beta_fast": beta_fast,
        "beta_slow": beta_slow,
        "mscale": _mscale_of(keys, name, factor, mscale, all_dim, amplitude),
        "mscale_all_dim": all_dim,
    }


def _m(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0


def _mscale_of(keys: Keys, name: str, factor: float, mscale: float, all_dim: float, amplitude: float | None) -> float:
    """Our `mscale`, such that m(mscale) / m(mscale_all_dim) is what transformers multiplies cosines and sines by.

    That is attention_factor where given, else the same ratio where both weights are given, else m(1).
    """
    if amplitude is None:
        if mscale and all_dim:
            return mscale
        if not all_dim:
            return 1.0
        amplitude = _m(factor, 1.0)
    if math.isclose(amplitude, _m(factor, mscale) / _m(factor, all_dim), rel_tol=1e-12):
        return mscale
    wanted = amplitude * _m(factor, all_dim) - 1
    if wanted < 0 or factor <= 1:
        raise keys.error(f"'{name}.attention_factor' of {amplitude} cannot be expressed with factor {factor}: leave it out.")
    return wanted / (0.1 * math.log(factor))


def rope_keys(rope: BlockConfig) -> dict[str, Any]:
    """The keys of config.json for a `rope` or `yarn` configuration, in both forms."""
    if rope.kind == "rope":
        return {"rope_theta": rope.theta, "rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": rope.theta}}
    described = {
        "factor": rope.factor,
        "original_max_position_embeddings": rope.original_max_position_embeddings,
        "beta_fast": rope.beta_fast,
        "beta_slow": rope.beta_slow,
        "mscale": rope.mscale,
        "mscale_all_dim": rope.mscale_all_dim,
    }
    if not (rope.mscale and rope.mscale_all_dim):  # transformers then takes m(1) for the cosines, unless told
        described["attention_factor"] = _m(rope.factor, rope.mscale) / _m(rope.factor, rope.mscale_all_dim)
    return {
        "rope_theta": rope.theta,
        "rope_scaling": {"type": "yarn", "rope_type": "yarn", **described},
        "rope_parameters": {"rope_type": "yarn", "rope_theta": rope.theta, **described},
    }
