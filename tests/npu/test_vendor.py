"""The vendor's own operators, from its wheel beside stand-ins for CANN: what we pass fits, and what comes back has the right shape.

FakeTensorMode computes nothing: values are not tested here.
"""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from tests.npu import cann

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
VERSION = "2.13.0"
BF16, WHOLE, SINGLE = "torch.bfloat16", "torch.int32", "torch.float32"


@pytest.fixture(scope="module")
def wheel():
    """The unpacked wheel, in the project's cache: never installed, for without CANN it breaks `import torch`."""
    if torch.__version__.partition("+")[0] != VERSION or torch.version.cuda is not None:
        pytest.skip(f"torch-npu {VERSION} fits the CPU build of torch {VERSION}, and this is {torch.__version__}")
    if not all(map(shutil.which, ("gcc", "nm"))):
        pytest.skip("gcc and nm are needed to make stand-ins for CANN")
    root = Path(os.environ.get("LONGCAT_LAB_CACHE") or Path.home() / ".cache" / "longcat_lab") / "torch_npu"
    there = root / VERSION
    if not there.exists():
        root.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(root), f"torch-npu=={VERSION}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        except subprocess.TimeoutExpired:
            pytest.skip(f"the wheel of torch-npu {VERSION} did not arrive in ten minutes")
        if done.returncode != 0:
            pytest.skip(f"the wheel of torch-npu {VERSION} cannot be had here: {(done.stderr.strip().splitlines() or ['no reason'])[-1]}")
        found = next(root.glob(f"torch_npu-{VERSION}-*.whl"))
        unfinished = root / f"{VERSION}.{os.getpid()}"
        with zipfile.ZipFile(found) as archive:
            archive.extractall(unfinished)
        os.replace(unfinished, there)
        found.unlink()
    return there


@pytest.fixture(scope="module")
def seen(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cann")
    cann.make(wheel, folder)
    environment = cann.environment(folder, wheel)
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), environment["PYTHONPATH"]])
    program = str(Path(__file__).with_name("vendor_shapes.py"))
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def on_npu(**shapes):
    return {name: [list(shape), dtype, "npu"] for name, (*shape, dtype) in shapes.items()}


EXPECTED = {
    "sparse_attention": on_npu(out=(2, 128, 64, 512, BF16), mass=(2, 128, 64, BF16), dq=(2, 128, 64, 576, BF16), dk=(2, 256, 576, BF16)),
    "index_topk": on_npu(indices=(2, 128, 64, WHOLE)),
    "index_scores": on_npu(
        indices=(2, 128, 1, 64, WHOLE),
        scores=(2, 128, 1, 64, BF16),
        dq=(2, 128, 64, 128, BF16),
        dk=(2, 256, 128, BF16),
        dw=(2, 128, 64, BF16),
    ),
    "grouped_product": on_npu(out=(128, 256, BF16), dx=(128, 512, BF16), dw=(8, 256, 512, BF16)),
    "permute": on_npu(sent=(512, 512, BF16), order=(512, WHOLE), back=(128, 512, BF16), dx=(128, 512, BF16), dweights=(128, 4, SINGLE)),
    "fused_attention": on_npu(
        out=(2, 64, 128, 128, BF16), dq=(2, 64, 128, 192, BF16), dk=(2, 64, 256, 192, BF16), dv=(2, 64, 256, 128, BF16)
    ),
    "dense_attention": on_npu(out=(2, 64, 128, 128, BF16), dq=(2, 64, 128, 192, BF16), dv=(2, 64, 256, 128, BF16)),
}


def test_the_wheel_gives_devices_and_a_backend(seen):
    assert seen["devices"] == [8, "npu"] and seen["backend"] == "hccl" and seen["version"].startswith(VERSION)


@pytest.mark.parametrize("name", EXPECTED)
def test_an_operator_takes_what_we_pass_and_has_gradients(seen, name):
    assert seen[name] == EXPECTED[name]


def test_the_grouped_product_still_has_no_gradient_of_its_own(seen):
    """The wrapper may go when this fails."""
    assert seen["experts"] == {"dx": None}
