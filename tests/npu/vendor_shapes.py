"""Runs in a process of its own, with torch_npu and stand-ins for CANN: calls the vendor's operators as we would, on fake tensors.

Prints one line of JSON: by name, shapes and dtypes of results and of gradients, or the error.
"""

import json

import torch
import torch_npu
from torch._subclasses import FakeTensorMode
from torch_npu.op_plugin.meta import _meta_registrations

from longcat_kernels import npu

# Of LongCat's size, with few tokens: batch, tokens, keys, heads, selected keys, experts, picks a token, hidden width, expert width.
B, T, S, H, K = 2, 128, 256, 64, 64
E, PICKS, WIDTH, INNER = 8, 4, 512, 256
BF16 = torch.bfloat16


def main():
    _meta_registrations.get_soc_version = lambda: 250  # it would ask the card
    found = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        for function in (sparse_attention, index_topk, index_scores, grouped_product, experts, permute, fused_attention, dense_attention):
            try:
                found[function.__name__] = described(function())
            except Exception as error:  # each is told apart
                found[function.__name__] = f"{type(error).__name__}: {error}"[:2000]
    found["devices"] = [torch.npu.device_count(), str(torch.accelerator.current_accelerator())]
    found["backend"] = torch.distributed.get_default_backend_for_device("npu")
    found["version"] = torch_npu.__version__
    print(json.dumps(found))


def described(values):
    return {name: [list(value.shape), str(value.dtype), value.device.type] if value is not None else None for name, value in values.items()}


def made(*shape, dtype=BF16, learns=True):
    return torch.empty(*shape, dtype=dtype, device="npu:0", requires_grad=learns)


def sparse_attention():
    q, k = made(B, T, H, 576), made(B, S, 576)
    v, indices = k[..., :512], torch.zeros(B, T, K, dtype=torch.int32, device="npu:0")
    assert npu.takes_sparse_attention(q, k, v)
    out, mass = npu.sparse_attention(q, k, v, indices, 0.1)
    out.sum().backward()
    return {"out": out, "mass": mass, "dq": q.grad, "dk": k.grad}


def index_topk():
    q, k, w = made(B, T, H, 128), made(B, S, 128), made(B, T, H)
    assert npu.takes_index_topk(q, k, w, None, K)
    return {"indices": npu.index_topk(q, k, w, None, K)}


def index_scores():
    """The indexer's own scores, with gradients."""
    q, k, w = made(B, T, H, 128), made(B, S, 128), made(B, T, H)
    indices, scores = torch.ops.npu.npu_lightning_indexer(q, k[:, :, None], w, sparse_count=K, sparse_mode=3, return_value=True)
    scores.sum().backward()
    return {"indices": indices, "scores": scores, "dq": q.grad, "dk": k.grad, "dw": w.grad}


def grouped_product():
    x, weights = made(T, WIDTH), made(E, INNER, WIDTH)
    ends = torch.zeros(E, dtype=torch.int32, device="npu:0")
    assert npu.takes_grouped_product(x, weights)
    out = npu.grouped_product(x, weights.transpose(1, 2), ends)
    out.sum().backward()
    return {"out": out, "dx": x.grad, "dw": weights.grad}


def experts():
    """Without the wrapper: no gradient is known, so that one must be written."""
    x, weights = made(T, WIDTH), made(E, WIDTH, INNER)
    ends = torch.zeros(E, dtype=torch.int64, device="npu:0")
    torch.ops.npu.npu_grouped_matmul([x], [weights], group_list=ends, split_item=3, group_type=0)[0].sum().backward()
    return {"dx": x.grad}


def permute():
    """Tokens to their experts and back, with the weights of the picks."""
    x, weights = made(T, WIDTH), made(T, PICKS, dtype=torch.float32)
    slots = torch.zeros(T, PICKS, dtype=torch.int64, device="npu:0")
    sent, order = torch.ops.npu.npu_moe_token_permute(x, slots, num_out_tokens=T * PICKS)
    back = torch.ops.npu.npu_moe_token_unpermute(sent, order, probs=weights)
    back.sum().backward()
    return {"sent": sent, "order": order, "back": back, "dx": x.grad, "dweights": weights.grad}


def fused_attention():
    """MLA's dense form, with its two widths and a mask of documents (True: hidden, the other way round than torch's)."""
    q, k, v = made(B, H, T, 192), made(B, H, S, 192), made(B, H, S, 128)
    mask = torch.zeros(B, 1, T, S, dtype=torch.bool, device="npu:0")
    out = torch.ops.npu.npu_fusion_attention(q, k, v, H, "BNSD", atten_mask=mask, scale=0.1)[0]
    out.sum().backward()
    return {"out": out, "dq": q.grad, "dk": k.grad, "dv": v.grad}


def dense_attention():
    """What our dense attention calls on every accelerator: torch's own."""
    q, k, v = made(B, H, T, 192), made(B, H, S, 192), made(B, H, S, 128)
    mask = torch.zeros(B, 1, T, S, dtype=torch.bool, device="npu:0")
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.1)
    out.sum().backward()
    return {"out": out, "dq": q.grad, "dv": v.grad}


if __name__ == "__main__":
    main()
