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
import warnings, torch
from longcat_lab.blocks.moe.experts_op import experts, experts_reference
a = torch.randn(9, 8), torch.rand(9, 5).topk(2).indices, torch.rand(9, 2), torch.randn(4, 12, 8), torch.randn(4, 8, 6)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    for _ in range(3):
        torch.testing.assert_close(experts(*a), experts_reference(*a), rtol=1e-4, atol=1e-4)
import longcat_kernels
said = [str(w.message) for w in said if "mixture" in str(w.message).lower()]
print(longcat_kernels.available(), len(said), longcat_kernels.why_not(), said)
"""


def start(cache, code=USE, **variables):
    environment = {k: v for k, v in os.environ.items() if k not in ("CXX", library.SWITCH)}
    environment |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", library.CACHE: str(cache), "HOME": str(cache / "home"), **variables}
    return subprocess.Popen(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def output(process):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out.strip()


@pytest.fixture
def no_path(tmp_path):
    (tmp_path / "bin").mkdir()
    return str(tmp_path / "bin")


@pytest.mark.parametrize("case", ["no compiler", "compiler fails", "no such CXX", "off"])
def test_without_them_one_warning_and_plain_torch(case, tmp_path, no_path):
    variables, named = {
        "no compiler": ({"PATH": no_path}, "install g++"),
        "compiler fails": ({"CXX": "/bin/false"}, "could not compile"),
        "no such CXX": ({"CXX": "/nowhere/g++"}, "which is not there"),
        "off": ({library.SWITCH: "off"}, "turns the compiled operators off"),
    }[case]
    out = output(start(tmp_path, **variables))
    assert out.startswith("False 1 ") and named in out


@needs_compiler
def test_two_processes_compile_at_once_into_an_empty_cache(tmp_path):
    both = [start(tmp_path), start(tmp_path)]
    assert [output(process) for process in both] == ["True 0  []"] * 2
    folder = tmp_path / "kernels"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [p.suffix for p in sorted(folder.iterdir())] == [".lock", ".so"]


@needs_compiler
def test_a_place_that_others_can_write_is_not_used(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels").chmod(0o777)
    (tmp_path / "home").write_text("")  # nor is there another place
    out = output(start(tmp_path))
    assert out.startswith("False 1 ") and "cannot be used" in out


def test_importing_compiles_nothing(tmp_path):
    code = "import longcat_lab, longcat_lab.blocks, longcat_kernels, sys; print(longcat_kernels.library._loaded.cache_info().currsize)"
    assert output(start(tmp_path, code)) == "0" and not (tmp_path / "kernels").exists()


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
