"""Compiles the C++ sources once a machine, keeps the shared library under the person's own cache, and loads it.

They have no header of torch, so that compiling takes some five seconds; matrix products are those of the BLAS that torch
itself carries, found by name in its library and handed over by address.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import warnings
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("longcat.cpp")  # includes the others
# Not -ffast-math: a NaN must stay one, and a sum keeps its order.
FLAGS = ["-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC"]
SWITCH, CACHE = "LONGCAT_LAB_KERNELS", "LONGCAT_LAB_CACHE"
BLAS = ("sgemm_", "dgemm_", "MKL_Set_Num_Threads_Local")
SUFFIX = {torch.float32: "f32", torch.float64: "f64"}  # of the functions of one dtype


class NotAvailable(Exception):
    """One sentence: what is missing, and what to do about it."""


def available() -> bool:
    """Whether the compiled operators can be used here; compiles them when no process did so before. Never warns."""
    return not _loaded()[1]


def why_not() -> str:
    """One sentence that says what is missing and what to do; empty when `available()`."""
    return _loaded()[1]


def usable() -> bool:
    """`available()`, with one warning a process when it is not; what falls back to plain PyTorch asks this."""
    if _loaded()[1]:
        _warn_once()
    return not _loaded()[1]


def takes(*tensors: torch.Tensor) -> bool:
    """Whether the operators work on these, and are `usable()`: plain tensors on a CPU, all float32 or all float64, nothing traced."""
    plain = all(type(t) in (torch.Tensor, torch.nn.Parameter) and t.device.type == "cpu" for t in tensors)
    same = plain and tensors[0].dtype in SUFFIX and all(t.dtype == tensors[0].dtype for t in tensors)
    return same and not torch.compiler.is_compiling() and usable()


def library() -> ctypes.CDLL:
    """The loaded library.

    Raises:
        NotAvailable: with the sentence of `why_not()`.
    """
    loaded, reason = _loaded()
    if loaded is None:
        raise NotAvailable(reason)
    return loaded


@functools.cache
def _warn_once() -> None:
    warnings.warn(
        f"Mixtures of experts, attention and indexing run on plain PyTorch, which is slower: {why_not()}", RuntimeWarning, stacklevel=4
    )


@functools.cache
def _loaded() -> tuple[ctypes.CDLL | None, str]:
    try:
        if os.environ.get(SWITCH, "").lower() in ("off", "0", "no", "false"):
            raise NotAvailable(f"{SWITCH}={os.environ[SWITCH]} turns the compiled operators off; unset it to have them.")
        blas = _blas()
        return _load(_compiled(), blas), ""
    except NotAvailable as error:
        return None, str(error)
    except OSError as error:
        return None, f"the compiled operators could not be made or loaded ({error}); mend that, or set {SWITCH}=off."


def _blas() -> list[ctypes.c_void_p]:
    """Addresses of the functions named in `BLAS`, in the library that torch has loaded already."""
    try:
        process = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return [ctypes.cast(getattr(process, name), ctypes.c_void_p) for name in BLAS]
    except (OSError, AttributeError) as error:
        raise NotAvailable(f"this build of torch does not offer MKL's matrix product ({error}); an x86 wheel of torch does.") from None


def _load(path: Path, blas: list[ctypes.c_void_p]) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(path))
    loaded.longcat_set_blas(*blas)
    pointer, whole = ctypes.c_void_p, ctypes.c_int64
    loaded.longcat_sort_picks.argtypes = [pointer, whole, whole, pointer, pointer]
    loaded.longcat_sort_picks.restype = whole
    forms = {  # arguments of both directions, then the pointers that the backward one adds
        "longcat": ([pointer] * 7 + [whole] * 6 + [pointer], 4),
        "longcat_sparse": ([pointer] * 8 + [ctypes.c_double, whole], 4),
        "longcat_attention": ([pointer] * 8 + [ctypes.c_double, whole], 4),
        "longcat_selected": ([pointer] * 6 + [whole], 4),
        "longcat_gated": ([pointer] * 2 + [whole] * 2 + [pointer], 2),
    }
    for suffix in SUFFIX.values():
        getattr(loaded, f"longcat_index_topk_{suffix}").argtypes = [pointer] * 6 + [whole]
        for name, (arguments, added) in forms.items():
            getattr(loaded, f"{name}_forward_{suffix}").argtypes = arguments
            getattr(loaded, f"{name}_backward_{suffix}").argtypes = [*arguments, *[pointer] * added]
    return loaded


def _compiled() -> Path:
    """The shared library's path; compiles where it is not there yet."""
    compiler = _compiler()
    folder = _folder()
    path = folder / f"longcat-{_fingerprint(compiler)}.so"
    if path.exists():
        _check_own(path)
        return path
    with open(folder / "compiling.lock", "w") as lock:
        with contextlib.suppress(OSError):  # a file system without locks: two may compile, and the last one's file stays
            fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            _compile(compiler, path)
    return path


def _compile(compiler: list[str], path: Path) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    command = [*compiler, *FLAGS, str(SOURCE), "-o", str(temporary)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)
        if done.returncode != 0:
            said = next(
                (line for line in done.stderr.splitlines() if "error" in line.lower()), done.stderr.strip()[-200:] or "it said nothing"
            )
            raise NotAvailable(f"{compiler[0]} could not compile them ({said}); install a recent g++, or set CXX to one.")
        temporary.chmod(0o700)
        os.replace(temporary, path)
    except subprocess.TimeoutExpired:
        raise NotAvailable(f"{compiler[0]} did not finish compiling them in five minutes; set CXX to another compiler.") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _compiler() -> list[str]:
    wanted = os.environ.get("CXX", "").strip()
    for candidate in [wanted] if wanted else ["c++", "g++", "clang++"]:
        words = shlex.split(candidate)
        if words and shutil.which(words[0]):
            return words
    if wanted:
        raise NotAvailable(f"CXX names '{wanted}', which is not there; unset it, or set it to a C++ compiler.")
    raise NotAvailable("there is no C++ compiler; install g++ (Debian and Ubuntu: apt install g++), or set CXX to one.")


def _fingerprint(compiler: list[str]) -> str:
    """Of everything the machine code depends on; -march=native must never reach a processor of another kind."""
    said = subprocess.run([*compiler, "--version"], capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    sources = [path.read_text(encoding="utf-8") for path in (SOURCE, *sorted(SOURCE.parent.glob("*.cpp")))]
    parts = [*sources, " ".join(FLAGS), " ".join(compiler), said.stdout, torch.__version__, _processor()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def _processor() -> str:
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0].splitlines()
        return "\n".join(
            line for line in lines if line.split("\t")[0].strip() in ("vendor_id", "cpu family", "model", "model name", "flags")
        )
    return " ".join(platform.uname())


def _folder() -> Path:
    """`$LONGCAT_LAB_CACHE/kernels`, else `~/.cache/longcat_lab/kernels`: the first that is, or can be made, this person's alone."""
    roots = [Path(os.environ[CACHE])] if os.environ.get(CACHE) else []
    with contextlib.suppress(RuntimeError):  # no home
        roots.append(Path.home() / ".cache" / "longcat_lab")
    reasons = []
    for root in roots:
        folder = root.absolute() / "kernels"
        try:
            root.mkdir(parents=True, exist_ok=True)
            folder.mkdir(mode=0o700, exist_ok=True)
            _check_own(folder)
            return folder
        except OSError as error:
            reasons.append(f"{folder} cannot be used ({error.strerror}); set {CACHE} to a folder of your own.")
        except NotAvailable as error:
            reasons.append(str(error))
    raise NotAvailable(reasons[0] if reasons else f"there is no place for the library: set {CACHE} to a folder of your own.")


def _check_own(path: Path) -> None:
    """Machine code is loaded only from a place that nobody else can write."""
    found = path.lstat()
    kind = stat.S_ISDIR(found.st_mode) or stat.S_ISREG(found.st_mode)
    if not kind or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise NotAvailable(f"{path} belongs to, or can be written by, somebody else; remove it, or set {CACHE} to a folder of your own.")
