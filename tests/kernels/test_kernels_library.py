"""Compiling on first use, and what happens where it cannot be done."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import longcat_kernels
from longcat_kernels import library

ROOT = Path(__file__).resolve().parents[2]
needs_compiler = pytest.mark.skipif(not longcat_kernels.available(), reason=longcat_kernels.why_not())

USE = """
import warnings, torch, longcat_kernels
from longcat_lab.blocks.moe.experts_op import experts, experts_reference
imported = longcat_kernels.library._loaded.cache_info().currsize
a = torch.randn(9, 8), torch.rand(9, 5).topk(2).indices, torch.rand(9, 2), torch.randn(4, 12, 8), torch.randn(4, 8, 6)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    for _ in range(3):
        torch.testing.assert_close(experts(*a), experts_reference(*a), rtol=1e-4, atol=1e-4)
said = [str(w.message) for w in said if "mixture" in str(w.message).lower()]
print(f"imported: {imported}; now:", longcat_kernels.available(), len(said), longcat_kernels.why_not(), said)
"""


def start(cache, **variables):
    environment = {k: v for k, v in os.environ.items() if k not in ("CXX", library.SWITCH)}
    environment |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", library.CACHE: str(cache), "HOME": str(cache / "home"), **variables}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", USE], env=environment, cwd=ROOT, **pipes)


def output(process):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out.strip()


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Loads as a new process would, with an empty cache and these variables; returns `why_not()`."""

    def load(**variables):
        for name in ("CXX", library.SWITCH):
            monkeypatch.delenv(name, raising=False)
        for name, value in ({library.CACHE: str(tmp_path), "HOME": str(tmp_path / "home")} | variables).items():
            monkeypatch.setenv(name, value)
        return library._loaded.__wrapped__()[1]

    return load


def test_without_a_compiler_one_warning_and_plain_torch(tmp_path):
    (tmp_path / "bin").mkdir()
    out = output(start(tmp_path, PATH=str(tmp_path / "bin")))
    assert out.startswith("imported: 0; now: False 1 ") and "install g++" in out
    assert not (tmp_path / "kernels").exists()


@pytest.mark.parametrize(
    ("variable", "value", "named"),
    [
        ("CXX", "/bin/false", "could not compile"),
        ("CXX", "/nowhere/g++", "which is not there"),
        (library.SWITCH, "off", "turns the compiled operators off"),
    ],
)
def test_what_is_missing_is_said_with_what_to_do(variable, value, named, fresh):
    reason = fresh(**{variable: value})
    assert named in reason and reason.count(".") >= 1 and ("CXX" in reason or "unset" in reason)


def test_a_place_that_others_can_write_is_not_used(fresh, tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels").chmod(0o777)
    (tmp_path / "home").write_text("")  # nor is there another place
    assert "can be written by, somebody else" in fresh()


@needs_compiler
def test_two_processes_compile_at_once_into_an_empty_cache(tmp_path):
    both = [start(tmp_path), start(tmp_path)]
    assert [output(process) for process in both] == ["imported: 0; now: True 0  []"] * 2
    folder = tmp_path / "kernels"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [p.suffix for p in sorted(folder.iterdir())] == [".lock", ".so"]


def test_a_blas_without_the_names_is_said(monkeypatch):
    monkeypatch.setattr(library, "BLAS", ("sgemm_", "not_in_any_blas"))
    with pytest.raises(library.NotAvailable, match=r"not_in_any_blas.*x86 wheel"):
        library._blas()


def test_the_name_follows_source_flags_torch_and_processor(monkeypatch):
    names = [library._fingerprint(["true"])]
    for name, value in (("FLAGS", ["-O1"]), ("_processor", lambda: "another"), ("SOURCE", Path(__file__))):
        monkeypatch.setattr(library, name, value)
        names.append(library._fingerprint(["true"]))
    monkeypatch.setattr("torch.__version__", "0")
    names.append(library._fingerprint(["true"]))
    assert len(set(names)) == 5
