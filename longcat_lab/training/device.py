"""Which device, backend and operators a run takes, by capability: the only module that asks what there is."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from longcat_lab.errors import LabError
from longcat_lab.model.memory import free_memory


def choose(name: str) -> torch.device:
    """`auto` is the accelerator that is really there, else the CPU; any other name is taken as torch writes it.

    Of the processes that a launcher started on this machine each takes the accelerator of its number (LOCAL_RANK), before anything
    is put on one.

    Raises:
        LabError: there is no such device, or none for this process.
    """
    there = torch.accelerator.current_accelerator(check_available=True)
    if there is not None and name.partition(":")[0] in ("auto", there.type):
        _take_own(name)
    if name == "auto":
        return there or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # a device that holds no values (meta) cannot train either
    except (RuntimeError, AssertionError, NotImplementedError):
        raise LabError(f"training.device '{name}' cannot be used on this machine: write auto or cpu.") from None
    return device


def _take_own(name: str) -> None:
    beside, count = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.accelerator.device_count()
    if beside == 1 or count == 1:  # one that is seen alone may be each process's own: some launchers hide the others
        return
    if ":" in name:
        raise LabError(
            f"training.device '{name}' is one device for the {beside} processes of this machine: write auto or {name.partition(':')[0]}."
        )
    if beside > count:  # each says so, for only the first one is heard
        raise LabError(f"{beside} processes were started on this machine, which has {count} devices: start at most {count} here.")
    torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))


def backend(device: torch.device) -> str:
    """Of torch.distributed: the device's own beside gloo, which what lies in host memory (plain data, checkpoints) goes over."""
    import torch.distributed as dist

    own = dist.get_default_backend_for_device(device)
    return own if device.type == "cpu" else f"cpu:gloo,{device.type}:{own}"


def autocast(device: torch.device, precision: str) -> torch.autocast | contextlib.nullcontext:
    """bf16 autocast where asked for, or (auto) where the accelerator computes in bf16; CPUs without it are faster in fp32."""
    wants = precision == "bf16" or (precision == "auto" and device.type != "cpu" and _has_bf16(device))
    return torch.autocast(device.type, dtype=torch.bfloat16) if wants else contextlib.nullcontext()


def capabilities(device: torch.device) -> dict[str, str]:
    """What a run on `device` takes, by what it is for: a few words each. Each is asked of what decides it while training."""
    from longcat_lab.blocks.moe import experts_op
    from longcat_lab.blocks.sparse_attention import ops

    dtype = torch.bfloat16 if isinstance(autocast(device, "auto"), torch.autocast) else torch.float32
    u, weights = torch.zeros(8, 16, device=device, dtype=dtype), torch.zeros(1, 16, 16, device=device, dtype=dtype)
    q, k = torch.zeros(1, 1, 1, 576, device=device, dtype=dtype), torch.zeros(1, 1, 576, device=device, dtype=dtype)
    values, compiled = k[..., :512], experts_op.kernel_takes(u, weights, weights)
    return {
        "backend": backend(device),
        "bf16": "autocast" if dtype == torch.bfloat16 else "not on its own: fp32 unless training.precision=bf16",
        "grouped product": "compiled" if compiled else _whose(experts_op.product_for(u, weights, weights), "none: expert by expert"),
        "sparse attention": _whose(ops.attention_for(q, k, values), "plain PyTorch in chunks of queries"),
    }


def _whose(found: Any, none: str) -> str:
    place = getattr(found, "__module__", "")
    makers = {"longcat_kernels.npu": "of torch_npu", "longcat_kernels.triton_sparse_attention": "in Triton"}
    return none if found is None else makers.get(place, "compiled" if place.startswith("longcat_kernels") else "of torch")


def free_bytes(device: torch.device) -> int:
    """Memory that may still be taken there: on an accelerator, on the host, or on both where they are one."""
    return free_memory() if device.type == "cpu" else torch.accelerator.get_memory_info(device)[0]


def start_peak(device: torch.device) -> None:
    """From now on `peak_bytes` counts anew, where the system can do that."""
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int:
    """Highest memory since `start_peak`: what tensors took on the accelerator, or the resident set of this whole process."""
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated(device)
    with contextlib.suppress(OSError, StopIteration):  # Linux; the other counter may hold the peak of the process that started this one
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _has_bf16(device: torch.device) -> bool:
    supported = getattr(torch.get_device_module(device), "is_bf16_supported", None)
    return bool(supported()) if supported else True


@contextlib.contextmanager
def deterministic(threads: int) -> Iterator[None]:
    """Same bits each time: deterministic kernels only, a fixed number of CPU threads; both as before afterwards."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it CUDA's matrix products refuse to be deterministic
    before, filled = torch.get_num_threads(), torch.utils.deterministic.fill_uninitialized_memory
    was, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # finds bugs, does not change results, costs time
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was, warn_only=warned)
        torch.utils.deterministic.fill_uninitialized_memory = filled
        torch.set_num_threads(before)
