"""What a run was made of: code, versions, machine, data; and the hash that is its name."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import inspect
import json
import os
import platform
import subprocess
import sys
import types
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from longcat_lab.blocks import BlockConfig
from longcat_lab.config import RunConfig
from longcat_lab.config.plugins import CONSTANTS
from longcat_lab.data import prepare
from longcat_lab.model import LongcatLM

PACKAGE = Path(__file__).resolve().parent.parent
PLAIN = (int, float, str, bool)
# Rooms that decide a run's numbers. Reports, tables and widgets may change without making finished runs anew.
DECIDING = ("blocks", "config", "data", "model", "training")


@functools.cache
def code_hash() -> str:
    """Hash of the sources that decide a run's numbers, and of torch's version."""
    digest = hashlib.sha256(torch.__version__.encode())
    for path in sorted(path for room in DECIDING for path in (PACKAGE / room).rglob("*.py")):
        digest.update(str(path.relative_to(PACKAGE)).encode() + b"\0" + path.read_bytes())
    kernels = importlib.util.find_spec("longcat_kernels")
    for folder in kernels.submodule_search_locations or () if kernels else ():
        for path in sorted(path for path in Path(folder).iterdir() if path.suffix in (".py", ".cpp")):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def blocks_of_ones_own(config: RunConfig) -> str:
    """Hash of the classes in this model that come from outside the package (a notebook cell, a file); empty if there are none.

    It is taken over the compiled code, because a notebook's classes have no source that Python can find, and follows the
    functions and plain values of the same origin that the classes use by name.
    """
    with torch.device("meta"):
        model = LongcatLM(config.model)
    nodes = [getattr(config.model, name) for name in type(config.model).model_fields]
    nodes += [getattr(node, name) for node in nodes if isinstance(node, BlockConfig) for name in type(node).model_fields]
    used = {type(module) for module in model.modules()} | {type(node) for node in nodes if isinstance(node, BlockConfig)}
    found = {base for each in used for base in each.__mro__ if _foreign(base.__module__)}
    digest, seen = hashlib.sha256(), set()
    for each in sorted(found, key=lambda each: each.__qualname__):
        for name, value in sorted(vars(each).items()):
            _hash_code(value, digest, seen) if callable(getattr(value, "__func__", value)) else None
            if isinstance(value, PLAIN) and not name.startswith("__"):
                digest.update(f"{each.__qualname__}.{name}={value!r}".encode())
    return digest.hexdigest()[:16] if found else ""


def _foreign(module: str) -> bool:
    return module.partition(".")[0] not in ("longcat_lab", "torch", "pydantic", "builtins", "typing", "abc", "collections")


def _hash_code(value: Any, digest: Any, seen: set[Any]) -> None:
    function = inspect.unwrap(getattr(value, "__func__", value))
    if not isinstance(function, types.FunctionType) or function in seen or not _foreign(function.__module__ or ""):
        return
    seen.add(function)
    lists = function.__globals__.get(CONSTANTS, {})
    given = [*(function.__defaults__ or ()), *sorted((function.__kwdefaults__ or {}).items())]
    digest.update(repr([_plainly(value) for value in given]).encode())
    waiting = [function.__code__]
    while waiting:
        code = waiting.pop()
        constants = [_plainly(constant) for constant in code.co_consts if not isinstance(constant, types.CodeType)]
        digest.update(repr((code.co_code, code.co_names, code.co_varnames, constants)).encode())
        waiting += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
        for name in code.co_names:
            value = function.__globals__.get(name)
            if name in lists:
                digest.update(f"{name}={lists[name]}".encode())
            if isinstance(value, PLAIN) and not name.startswith("__"):  # not __file__: a copy of a plugin is the same plugin
                digest.update(f"{name}={value!r}".encode())
            _hash_code(value, digest, seen)


def _plainly(value: Any) -> str:
    """The same text in every process: sets of text have another order in each, and objects another address."""
    if isinstance(value, frozenset):
        return f"frozenset({sorted(map(repr, value))})"
    if isinstance(value, tuple):
        return f"({', '.join(map(_plainly, value))})"
    return repr(value) if value is None or isinstance(value, (*PLAIN, bytes, complex)) else type(value).__qualname__


def data_key(config: RunConfig) -> str:
    """Configurations with equal keys share one prepared corpus: the order of its sequences makes no other one."""
    return json.dumps([{**config.data.to_dict(), "seed": None}, config.model.vocab_size], sort_keys=True)


def identity(config: RunConfig, known: dict[str, Any] | None = None) -> str:
    """Name of a run: hash of its resolved configuration, its data, and the code that decides its numbers.

    Without tracking, without the layout over processes, and without the paths of plugins, whose classes' code counts.

    Prepares the data if this has not been done; that is the only slow part, and happens once.

    Args:
        known: shared by the configurations of one moment, of a sweep's jobs say: what their seeds do not change is then looked up once.
            Not to be kept: files and classes may be other ones a moment later.
    """
    known = {} if known is None else known
    resolved = {key: value for key, value in config.to_dict().items() if key not in ("tracking", "parallel", "plugins")}
    data = data_key(config)
    if data not in known:
        known[data] = prepare(config.data, config.model.vocab_size).hash
    # By text, then as nodes: a class that was defined anew has the same settings, and another name for the run.
    alike = known.setdefault(json.dumps(resolved["model"], sort_keys=True), [])
    own = next((own for model, own in alike if model == config.model), None)
    if own is None:
        alike.append((config.model, own := blocks_of_ones_own(config)))
    text = json.dumps([resolved, known[data], code_hash(), own], sort_keys=True)
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
    untracked = _git("ls-files", "--others", "--exclude-standard", "--", ".")
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
        "untracked": untracked.split("\n")[:-1] if untracked else [],  # not in uncommitted.diff
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
