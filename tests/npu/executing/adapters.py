"""A process with the executing `npu` and the vendor's operators as documented: our adapters against our references on the CPU."""

import os

import torch
import torch.nn.functional as F

from longcat_kernels import npu
from longcat_lab.blocks.moe import experts_op
from longcat_lab.blocks.sparse_attention import op, ops
from longcat_lab.errors import LabError
from longcat_lab.training.device import capabilities, choose
from tests.npu import executing
from tests.npu.executing import vendor

BF16 = torch.bfloat16


def main():
    executing.activate()
    each_process_takes_its_own_device()
    q, k, w = torch.randn(2, 24, 4, 128).to(BF16), torch.randn(2, 40, 128).to(BF16), torch.rand(2, 24, 4).to(BF16)  # w > 0: few ties at 0
    assert not npu.takes_index_topk(*there(q, k, w), None, 8)  # no such operator yet
    assert capabilities(torch.device("npu"))["sparse attention"].startswith("plain")
    vendor.activate()
    assert capabilities(torch.device("npu")) == {
        "backend": "cpu:gloo,npu:hccl",
        "bf16": "autocast",
        "grouped product": "of torch_npu",
        "sparse attention": "of torch_npu",
    }
    indices_are_those_of_the_reference(q, k, w)
    sparse_attention_is_that_of_the_reference()
    mixture_is_that_of_the_reference()
    an_empty_group_gets_no_gradient()
    limits_are_kept(q, k, w)


def each_process_takes_its_own_device():
    count = torch.accelerator.device_count()
    os.environ.update(LOCAL_RANK="1", LOCAL_WORLD_SIZE="2")
    assert choose("auto").type == choose("npu").type == "npu" and torch.accelerator.current_device_index() == 1
    refused("npu:3", "one device for the 2 processes")
    os.environ["LOCAL_WORLD_SIZE"] = str(count + 1)
    refused("auto", f"which has {count} devices")
    del os.environ["LOCAL_RANK"], os.environ["LOCAL_WORLD_SIZE"]
    assert choose("npu:3").index == 3  # one process may
    torch.accelerator.set_device_index(0)


def refused(name, sentence):
    try:
        choose(name)
    except LabError as error:
        assert sentence in str(error), error
    else:
        raise AssertionError(f"{name} was taken")


def there(*tensors):
    return [tensor.to("npu") for tensor in tensors]


def close(found, expected, tolerance):
    scale = float(expected.abs().max())
    torch.testing.assert_close(found.cpu().float(), expected.float(), rtol=0, atol=tolerance * scale)


def indices_are_those_of_the_reference(q, k, w):
    for topk in (1, 8, 40, 64):  # more than there are for the first queries, and for all
        assert npu.takes_index_topk(*there(q, k, w), None, topk)
        found = ops.index_topk(*there(q, k, w), None, topk)
        assert torch.equal(found.cpu(), op.index_topk(q, k, w, None, topk)), topk


def sparse_attention_is_that_of_the_reference():
    """Values in fp32 here, in bf16 there: one rounding of the result (2^-9) and of each gradient that is added up."""
    q, k = torch.randn(2, 24, 4, 576).to(BF16), torch.randn(2, 40, 576).to(BF16)
    indices = torch.full((2, 24, 12), -1, dtype=torch.int32)
    for query in range(24):
        many = min(12, query + 1)  # the first ones see few
        indices[:, query, 12 - many :] = torch.randperm(17 + query)[:many].sort().values.int()
    out = torch.randn(2, 24, 4, 512)

    def run(q, k, indices, place):
        q, k = q.to(place).requires_grad_(), k.to(place).requires_grad_()
        o, mass = ops.sparse_attention(q, k, k[..., :512], indices.to(place), 0.05)
        (o.float() * out.to(place)).sum().backward()
        return o.detach(), mass, q.grad, k.grad

    v = k.to("npu")[..., :512]
    assert not npu.takes_sparse_attention(*there(q, k), v)  # not the key's own columns
    for found, expected in zip(run(q, k, indices, "npu"), run(q.float(), k.float(), indices, "cpu"), strict=True):
        assert found.dtype == BF16
        close(found, expected, 1e-2)


def mixture_is_that_of_the_reference():
    """fp32 on the CPU; in bf16 on the device some four roundings lie behind each number, of 2^-9 each."""
    shapes = ((20, 16), (20, 3), (5, 16, 16), (5, 16, 8))
    inputs = [torch.randn(shape).to(BF16) for shape in shapes]
    slots = torch.randint(0, 7, (20, 3))
    slots[slots == 2] = 6  # one without a token; 5 and 6 are zero-experts
    assert experts_op.product_for(*there(inputs[0], *inputs[2:])) is npu.grouped_product
    outcomes = []
    for place, dtype, function in (("npu", BF16, experts_op.experts), ("cpu", torch.float32, experts_op.experts_reference)):
        u, weights, gate_up, down = (each.to(place, dtype).requires_grad_() for each in inputs)
        out = function(u, slots.to(place), weights, gate_up, down)
        out.float().sum().backward()
        outcomes.append([out.detach(), *(each.grad for each in (u, weights, gate_up, down))])
    for found, expected in zip(*outcomes, strict=True):
        close(found, expected, 2e-2)


def an_empty_group_gets_no_gradient():
    x, weights, ends = torch.randn(6, 8), torch.randn(4, 8, 8), torch.tensor([0, 4, 4, 6], dtype=torch.int32)
    outcomes = []
    for place, product in (("npu", npu.grouped_product), ("cpu", lambda x, w, ends: F.grouped_mm(x, w, offs=ends))):
        held = [each.clone().to(place).requires_grad_() for each in (x, weights)]
        out = product(*held, ends.to(place))
        out.backward(torch.ones_like(out))
        outcomes.append([out.detach(), *(each.grad for each in held)])
    for found, expected in zip(*outcomes, strict=True):
        close(found, expected, 1e-6)
    assert not outcomes[0][2].cpu()[[0, 2]].any()


def limits_are_kept(q, k, w):
    """Where an operator would refuse, or compute something else, it is not asked."""
    first = torch.zeros(2, 24, dtype=torch.int64, device="npu")
    takes = npu.takes_index_topk
    assert not takes(q, k, w, None, 8)  # on the CPU
    assert not takes(*there(q.float(), k.float(), w.float()), None, 8)
    assert not takes(*there(q[..., :64], k[..., :64], w), None, 8)  # another width
    assert not takes(*there(q[:, :, :3], k, w[:, :, :3]), None, 8)  # three heads
    assert not takes(*there(q, k, w), first, 8)  # documents
    assert not takes(*there(q, k, w), None, 8, 1, 2)  # sinks and window
    assert not takes(*there(q, k, w), None, 2049)
    q, k = torch.zeros(1, 4, 4, 96, dtype=BF16, device="npu"), torch.zeros(1, 4, 96, dtype=BF16, device="npu")
    assert not npu.takes_sparse_attention(q, k, k[..., :64])  # another latent width
    q, k = torch.zeros(1, 4, 4, 576, dtype=BF16, device="npu"), torch.zeros(1, 4, 576, dtype=BF16, device="npu")
    assert npu.takes_sparse_attention(q, k, k[..., :512])
    assert not npu.takes_sparse_attention(q[:, :, :3], k, k[..., :512])
    os.environ[npu.SWITCH] = "off"
    assert not npu.takes_sparse_attention(q, k, k[..., :512])


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
