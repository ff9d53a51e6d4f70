"""A device `npu` that computes on the CPU, with gloo under the name `hccl`: shows that nothing assumes cuda, nccl or a CPU.

`activate()` builds it once a machine, into the project's cache, and puts it into this process. What it is not: a processor of its own
(memory is the host's, every call returns when its work is done), so it says nothing about streams, speed, bf16 or real operators.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import types
from pathlib import Path

import torch

FLAGS = ["-std=c++20", "-O1", "-fPIC", "-shared", "-w", "-DUSE_DISTRIBUTED", "-DUSE_C10D_GLOO"]
NAME = "executing_npu"


def activate():
    """The compiled module; the device is there from now on, in this process alone."""
    device_module = getattr(torch, "npu", None)
    if device_module is not None:
        return device_module.compiled
    torch.utils.rename_privateuse1_backend("npu")
    spec = importlib.util.spec_from_file_location(NAME, built())
    compiled = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(compiled)
    torch._register_device_module("npu", _device_module(compiled))
    torch.utils.generate_methods_for_privateuse1_backend()
    _register_hccl(compiled)
    return compiled


def built():
    """Path of the shared library; compiles where it is not there yet (minutes)."""
    here, torch_root = Path(__file__).parent, Path(torch.__file__).parent
    sources = sorted([*here.glob("*.h"), *here.glob("*.cpp")])
    parts = [torch.__version__, sysconfig.get_python_version(), *FLAGS, *(path.read_text() for path in sources)]
    fingerprint = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("LONGCAT_LAB_CACHE") or Path.home() / ".cache" / "longcat_lab") / "executing_npu"
    target = folder / f"{NAME}-{fingerprint}.so"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_suffix(f".{os.getpid()}")
    include = torch_root / "include"
    places = [f"-I{path}" for path in (include, include / "torch" / "csrc" / "api" / "include", sysconfig.get_path("include"))]
    libraries = [f"-L{torch_root / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10", "-ltorch_python"]
    command = [compiler(), *FLAGS, f"-DTORCH_EXTENSION_NAME={NAME}", *places, str(here / "module.cpp"), *libraries, "-o", str(unfinished)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the device of the tests does not compile:\n{done.stderr[:4000]}")
    os.replace(unfinished, target)  # a second process that compiled meanwhile made the same
    return target


def compiler():
    """None where there is none."""
    return next((found for name in (os.environ.get("CXX") or "g++", "c++", "clang++") if (found := shutil.which(name))), None)


class Stream:
    """All work is done when a call returns."""

    def __init__(self, *_, **__):
        pass

    def wait_stream(self, other):
        pass

    def wait_event(self, event):
        pass

    def record_event(self, event=None):
        return event or Event()

    def synchronize(self):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


class Event:
    def __init__(self, *_, **__):
        pass

    def record(self, stream=None):
        pass

    def wait(self, stream=None):
        pass

    def synchronize(self):
        pass

    def query(self):
        return True


def _device_module(compiled):
    """What `torch.get_device_module("npu")` gives: what torch itself, FSDP2 and checkpointing ask of it."""

    def index(device):
        return device if isinstance(device, int) else (torch.device(device).index or 0)

    class On:
        """`with torch.npu.device(...)`"""

        def __init__(self, device):
            self.index = index(device)

        def __enter__(self):
            self.before = compiled.current_device()
            compiled.set_device(self.index)

        def __exit__(self, *_):
            compiled.set_device(self.before)

    stream, module = Stream(), types.ModuleType("torch.npu")
    module.compiled = compiled
    module.device, module.Stream, module.Event = On, Stream, Event
    module.device_count, module.current_device = compiled.device_count, compiled.current_device
    module.set_device = lambda device: compiled.set_device(index(device))
    module.is_available = module.is_initialized = module.is_bf16_supported = lambda: True
    module._is_in_bad_fork = lambda: False
    module.get_device_name = lambda device=None: "executing stand-in"
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    module.current_stream = module.default_stream = lambda device=None: stream
    module.stream = lambda wanted: wanted or stream
    module.synchronize = lambda device=None: None
    # Its random numbers are the CPU's.
    module.get_rng_state = lambda device=None: torch.get_rng_state()
    module.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    module.manual_seed = module.manual_seed_all = lambda seed: None
    return module


def _register_hccl(compiled):
    import torch.distributed as dist

    def make(store, rank, size, timeout):
        return compiled.over_gloo(dist.ProcessGroupGloo(store, rank, size, timeout), rank, size)

    dist.Backend.register_backend("hccl", make, devices=["npu"])
