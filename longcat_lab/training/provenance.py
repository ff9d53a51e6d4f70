"""What a run was made of: code, versions, machine, data; and the hash that is its name."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from longcat_lab.config import RunConfig
from longcat_lab.data import prepare

PACKAGE = Path(__file__).resolve().parent.parent
# Rooms that decide a run's numbers. Reports, tables and widgets may change without making finished runs anew.
DECIDING = ("blocks", "config", "data", "model", "training")


@functools.cache
def code_hash() -> str:
    """Hash of the sources that decide a run's numbers, and of torch's version."""
    digest = hashlib.sha256(torch.__version__.encode())
    for path in sorted(path for room in DECIDING for path in (PACKAGE / room).rglob("*.py")):
        digest.update(str(path.relative_to(PACKAGE)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def identity(config: RunConfig) -> str:
    """Name of a run: hash of its resolved configuration (without tracking), its data, and the code that decides its numbers.

    Prepares the data if this has not been done; that is the only slow part, and happens once.
    """
    resolved = {key: value for key, value in config.to_dict().items() if key != "tracking"}
    corpus = prepare(config.data, config.model.vocab_size)
    text = json.dumps([resolved, corpus.hash, code_hash()], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _git(*arguments: str) -> str | None:
    try:
        found = subprocess.run(["git", "-C", str(PACKAGE), *arguments], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout if found.returncode == 0 else None


def uncommitted_changes() -> str:
    """The difference between the working tree and its commit; empty when there is none or the code is not in git."""
    return _git("diff", "HEAD", "--", ".") or ""


def provenance(data_hash: str, device: torch.device) -> dict[str, Any]:
    """What run.json keeps so that a number can be traced."""
    commit, status = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--", ".")
    distributions = ("longcat_lab", "torch", "numpy", "tokenizers", "pydantic", "papermill")
    versions = {}
    for name in distributions:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    accelerator = torch.get_device_module(device).get_device_name(device) if device.type not in ("cpu", "meta") else None
    return {
        "commit": commit.strip() if commit else None,
        "dirty": bool(status) if status is not None else None,
        "code": code_hash(),
        "data": data_hash,
        "python": platform.python_version(),
        "versions": versions,
        "platform": platform.platform(),
        "device": str(device),
        "accelerator": accelerator,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "command": Path(sys.argv[0]).name,
    }
