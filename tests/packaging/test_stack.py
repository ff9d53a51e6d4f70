"""pyproject.toml (ranges), constraints.txt (exact versions) and environment.yml (conda) agree, and what is installed is what they say."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
OLDEST_PYTHON = "3.11.0"
ALONE = "npu"  # the one extra that must never come in by itself


def lock_lines() -> list[str]:
    return [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]


def lock() -> dict[str, Version]:
    return {canonicalize_name(n): Version(v) for n, v in (line.split("==") for line in lock_lines())}


def requirements() -> list[tuple[str, Requirement]]:
    rows = [("core", line) for line in PROJECT["dependencies"]]
    rows += [(extra, line) for extra, lines in EXTRAS.items() for line in lines]
    return [(where, Requirement(line)) for where, line in rows]


def installed() -> dict[str, importlib.metadata.Distribution]:
    return {canonicalize_name(d.metadata["Name"]): d for d in importlib.metadata.distributions() if d.metadata["Name"]}


def public(version: str) -> Version:
    """Without the local part: torch 2.13.0+cpu counts as 2.13.0."""
    return Version(Version(version).public)


# --- pyproject.toml and the lock


@pytest.mark.parametrize(("where", "wanted"), requirements(), ids=lambda p: p if isinstance(p, str) else p.name)
def test_every_requirement_has_a_locked_version_in_its_range(where, wanted):
    version = lock().get(canonicalize_name(wanted.name))
    assert version is not None, f"{wanted.name} ({where}) has no line in constraints.txt: run `make lock`"
    assert wanted.specifier.contains(version, prereleases=True), f"constraints.txt has {version}, pyproject.toml wants {wanted}"


def test_lock_lines_are_exact_sorted_and_unique():
    for line in lock_lines():
        assert re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line), f"not a plain exact pin: {line!r}"
    assert lock_lines() == sorted(set(lock_lines()), key=lambda line: line.split("==")[0])
    assert len(lock()) == len(lock_lines())


def test_lock_holds_the_pins_that_matter():
    pins = lock()
    assert pins["torch"] == Version("2.13.0")
    assert pins["torch-npu"] == pins["torch"], "torch-npu follows torch version by version"
    assert pins["jsonschema"] < Version("4.25"), "jsonschema 4.25 quadruples the import time of papermill"


def test_lock_holds_the_whole_closure():
    """Walk what the installed packages ask for, from this project and every extra: each name is locked."""
    pins, have, seen = lock(), installed(), set()
    todo = [r for _, r in requirements()]
    while todo:
        wanted = todo.pop()
        name = canonicalize_name(wanted.name)
        extras = ("", *sorted(wanted.extras))
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        if name not in have or re.match(r"nvidia-|cuda-|triton$", name):  # other extras; the CUDA builds of torch pin their own
            continue
        assert name in pins, f"{name} is needed but has no line in constraints.txt: run `make lock`"
        below = [Requirement(line) for line in have[name].requires or []]
        todo += [r for r in below if r.marker is None or any(r.marker.evaluate({"extra": extra}) for extra in extras)]


def test_oracles_are_locked_installed_and_required_by_nothing():
    """They would change the text that the demo trains on, were they in an extra."""
    described = tomllib.loads((ROOT / "pyproject.toml").read_text())
    oracles = {canonicalize_name(Requirement(line).name): Requirement(line) for line in described["dependency-groups"]["oracles"]}
    assert not oracles.keys() & {canonicalize_name(wanted.name) for _, wanted in requirements()}
    for name, wanted in oracles.items():
        version = lock()[name] if name != "triton" else Version("3.7.1")  # the lock leaves it to torch, whose CUDA builds pin this one
        assert wanted.specifier.contains(version)
        assert (wanted.marker is not None and not wanted.marker.evaluate()) or installed()[name].version == str(version)


def test_npu_comes_only_when_asked_for():
    """torch-npu breaks `import torch` on a machine without CANN."""
    assert [where for where, r in requirements() if canonicalize_name(r.name) == "torch-npu"] == [ALONE]
    for where, wanted in requirements():
        if canonicalize_name(wanted.name) == canonicalize_name(PROJECT["name"]):
            assert ALONE not in wanted.extras, f"extra {where} pulls in extra {ALONE}"
    recipes = "".join((ROOT / name).read_text() for name in ("Makefile", "environment.yml", "tools/setup_env.py", ".ci/run"))
    assert not re.search(r"\[[^\]\n]*\bnpu\b", recipes), "a default recipe installs the npu extra"


# --- environment.yml and the lock


def conda() -> tuple[dict, list[str]]:
    """(the file, its pip lines)."""
    env = yaml.safe_load((ROOT / "environment.yml").read_text())
    (pip,) = [entry["pip"] for entry in env["dependencies"] if isinstance(entry, dict)]
    return env, pip


def test_environment_yml_asks_for_the_oldest_python_and_free_channels():
    env, _ = conda()
    assert set(env) == {"name", "channels", "dependencies"}
    assert env["channels"] == ["conda-forge", "nodefaults"]
    plain = [d for d in env["dependencies"] if isinstance(d, str)]
    assert {re.match(r"[a-z]+", d)[0] for d in plain} == {"python", "pip"}, "conda brings Python and pip, pip brings the rest"
    assert f"python={OLDEST_PYTHON.rpartition('.')[0]}" in plain
    assert Version(OLDEST_PYTHON) in SpecifierSet(PROJECT["requires-python"])


def test_environment_yml_pins_equal_the_lock():
    _, pip = conda()
    pins = [Requirement(line) for line in pip if not line.startswith("-")]
    assert "torch" in {p.name for p in pins}, "torch needs its exact pin: a range can fetch gigabytes"
    for pin in pins:
        assert str(pin.specifier) == f"=={lock()[canonicalize_name(pin.name)]}", f"environment.yml has {pin}, constraints.txt differs"


def test_environment_yml_installs_this_project_under_the_lock():
    _, pip = conda()
    assert "--constraint constraints.txt" in pip
    (editable,) = [line for line in pip if line.startswith("-e ")]
    assert set(Requirement(editable.removeprefix("-e ").replace(".", "x", 1)).extras) == {"notebook"}


# --- what is installed here


def test_installed_versions_are_the_locked_ones():
    pins = lock()
    differ = {
        name: f"installed {dist.version}, locked {pins[name]}"
        for name, dist in installed().items()
        if name in pins and public(dist.version) != pins[name]
    }
    assert not differ, f"this environment is not the locked one (`make setup` makes it): {differ}"


def test_every_default_requirement_is_installed():
    have = installed()
    missing = [r.name for where, r in requirements() if where in ("core", "notebook", "dev") and canonicalize_name(r.name) not in have]
    assert not missing, f"not installed: {missing}"


def test_locked_packages_accept_the_oldest_python():
    """A release may drop 3.11.0 to 3.11.4 (distributions ship those) while 3.11.9 would still install it."""
    refuse = {
        name: dist.metadata["Requires-Python"]
        for name, dist in installed().items()
        if name in lock() and OLDEST_PYTHON not in SpecifierSet(dist.metadata["Requires-Python"] or "")
    }
    assert not refuse, f"these refuse Python {OLDEST_PYTHON}: {refuse}"


# --- what importing costs

HEAVY = ["papermill", "ipykernel", "IPython", "ipywidgets", "jupyterlab", "wandb", "matplotlib", "triton", "torch_npu", "xformers"]


def imported_by(code: str) -> set[str]:
    """Top-level modules in sys.modules after running `code` in a fresh interpreter."""
    code += "\nimport json, sys\nprint(json.dumps(sorted({m.partition('.')[0] for m in sys.modules})))"
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "COV_"))}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=env, timeout=240)
    assert out.returncode == 0, out.stderr
    return set(json.loads(out.stdout.splitlines()[-1]))


def test_importing_the_library_loads_nothing_of_jupyter_or_trackers():
    ours = imported_by("import longcat_lab") - imported_by("import torch")  # a CUDA or NPU build of torch may load its own backend
    assert "longcat_lab" in ours
    loaded = sorted(set(HEAVY) & ours)
    assert not loaded, f"`import longcat_lab` loads {loaded}; import these where they are used"
