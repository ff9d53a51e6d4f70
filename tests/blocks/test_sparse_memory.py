"""Sparse attention in training keeps nothing of the size of all pairs of query and key."""

import os
import subprocess
import sys
import textwrap

import pytest

CODE = """
    import re
    import torch
    from longcat_lab.blocks import ForwardContext, LSAConfig, ModelShape, RMSNormConfig, RopeConfig

    def peak(length):
        shape = ModelShape(hidden_size=256, vocab_size=300, sequence_length=length, norm=RMSNormConfig(), rope=RopeConfig())
        sizes = dict(num_attention_heads=8, q_lora_rank=64, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32)
        attention = LSAConfig(**sizes, index_n_heads=4, index_head_dim=32, index_topk=64).build(shape).train()
        first = (torch.arange(length) // 3000 * 3000)[None]  # packed documents
        context = ForwardContext(RopeConfig().build(shape)(length, 16, torch.empty(0)), first)
        x = torch.randn(1, length, 256, requires_grad=True)
        attention(x, context).square().mean().backward()
        assert attention.indexer.wk.weight.grad.abs().sum() > 0 and attention.taught[1] == 1
        # Not getrusage, whose peak begins with that of the process that started this one.
        return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

    before = peak(256)
    print(peak(LENGTH) - before)
"""


def rise(length, kernels):
    """MiB by which the peak of a process rises, forward and backward with the index loss."""
    code = textwrap.dedent(CODE).replace("LENGTH", str(length))
    told = {**os.environ, "LONGCAT_LAB_KERNELS": kernels, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=told)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


@pytest.mark.parametrize(("kernels", "length", "bound"), [("on", 8192, 300), ("off", 4096, 300)])
def test_memory_does_not_grow_with_the_square_of_the_length(kernels, length, bound):
    """8192 x 8192 is 64 MiB in bool, 256 MiB in fp32, for each of 8 heads. Twice the length may take twice, not four times."""
    half, whole = rise(length // 2, kernels), rise(length, kernels)
    assert half > 20
    assert whole < bound, (half, whole)
    assert whole < 2.6 * half, (half, whole)
