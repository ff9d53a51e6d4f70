"""What this machine has."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

MIN_FREE_GIB = 2
# What the tests of this project could not run, wherever they ran; the README says it too.
NEVER_EXERCISED = (
    "HCCL: in the tests gloo answers to its name, between processes that compute on the CPU under the device's name",
    "NCCL: no run over several GPUs",
    "operators of torch_npu: only their arguments, shapes and gradients, without values; around them, what they document",
    "a real NPU: its speed, its memory and bf16 on it",
    "several machines: many processes, but all on one",
)


@dataclass(frozen=True)
class Finding:
    """One thing looked for. `needs` says what to do where it is missing; only `required` ones keep the lab from working."""

    name: str
    present: bool
    found: str
    needs: str
    required: bool = False


def _package(name: str, extra: str | None, use: str) -> Finding:
    try:
        return Finding(name, True, metadata.version(name), "", required=extra is None)
    except metadata.PackageNotFoundError:
        how = f"pip install -c constraints.txt -e '.[{extra}]'" if extra else "pip install -c constraints.txt -e ."
        return Finding(name, False, "", f"{use}: {how}", required=extra is None)


def _kernels() -> Finding:
    """Whether the compiled operators can be had; asking compiles them, once."""
    if util.find_spec("longcat_kernels") is None:
        return Finding("kernels", False, "", "compiled operators for CPUs: pip install -c constraints.txt -e .")
    import longcat_kernels

    there = longcat_kernels.available()
    return Finding("kernels", there, "compiled operators for CPUs", "" if there else f"plain PyTorch is used: {longcat_kernels.why_not()}")


def _capabilities(device: torch.device) -> list[Finding]:
    """What a run on this machine's device would take; a device that does not answer is told in a sentence."""
    from longcat_lab.training.device import capabilities

    try:
        found = capabilities(device)
    except (RuntimeError, ValueError, AttributeError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        return [Finding("backend", False, "", f"{device} does not answer ({said}): set training.device=cpu, or mend its driver")]
    return [Finding(name, True, what, "") for name, what in found.items()]


def examine() -> list[Finding]:
    """Python, torch and its device, the packages by extra, disk, git; in the order of the printed table."""
    import torch

    python = platform.python_version()
    findings = [Finding("python", sys.version_info >= (3, 11), python, f"3.11 or newer, this is {python}", required=True)]
    findings.append(_package("torch", None, "everything"))
    device = torch.accelerator.current_accelerator(check_available=True)
    findings.append(Finding("cpu", True, f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads", ""))
    if device is None:
        findings.append(
            Finding("accelerator", False, "", "none seen: runs use the CPU in fp32; a CUDA build of torch or torch-npu with CANN adds one")
        )
    else:
        findings.append(Finding("accelerator", True, str(device), ""))
    findings += _capabilities(device or torch.device("cpu"))
    findings.append(_kernels())
    npu = util.find_spec("torch_npu") is not None
    findings.append(
        Finding("npu", npu, "torch_npu is installed", "Ascend machines only: pip install -c constraints.txt -e '.[npu]' beside CANN")
    )
    findings += [_package(name, None, "everything") for name in ("pydantic", "tokenizers", "pyarrow", "safetensors", "scipy")]
    findings += [_package(name, "notebook", "sweeps, notebooks and result pages") for name in ("papermill", "jupyterlab", "matplotlib")]
    findings.append(_package("wandb", "wandb", "tracking.wandb"))
    findings.append(_package("submitit", "slurm", "sweeps on a Slurm cluster"))
    findings.append(_package("datasets", "hub", "data.source.kind=huggingface"))
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    findings.append(Finding("disk", free >= MIN_FREE_GIB, f"{free:.0f} GiB free here", f"{free:.1f} GiB free here, {MIN_FREE_GIB} wanted"))
    git = shutil.which("git")
    findings.append(Finding("git", git is not None, git or "", "runs will not know their commit: install git"))
    return findings
