"""The operators of an Ascend NPU (torch_npu) behind the arguments of longcat_lab's own: what they take is mapped, nothing is computed here.

Importing this imports nothing else: where torch_npu is loaded its operators are registered with torch, and are asked for by name.
`takes_...` says whether an operator's limits hold for these tensors; where they do not, plain PyTorch computes on the device.

Tested for shapes and gradients against torch_npu 2.13.0 under FakeTensorMode, and for values against the documented contract of each
operator in plain PyTorch. Never run on an NPU.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

DEVICE = "npu"
SWITCH = "LONGCAT_LAB_KERNELS"
HALF = (torch.bfloat16, torch.float16)
HEADS = (1, 2, 4, 8, 16, 32, 64, 128)  # of queries; keys have one
LATENT, ROPE = 512, 64  # MLA's widths, the only ones that sparse attention takes
INDEX_HEADS, INDEX_WIDTH, INDEX_TOPK = 64, 128, 2048
CAUSAL = 3  # sparse_mode: the last query sees the last key
ABSORBED = 2  # attention_mode: one latent key, which is the value too, with its rotary part beside it
CUMULATIVE = 0  # group_list_type: ends of groups, not their sizes
BY_ROWS, BY_DEPTH = 0, 2  # group_type: groups of rows; groups along the dimension that is summed over


def has(name: str) -> bool:
    """Whether torch_npu's operator of this name can be called in this process."""
    off = os.environ.get(SWITCH, "").lower() in ("off", "0", "no", "false")
    return not off and hasattr(getattr(torch.ops, DEVICE), name)


def takes_sparse_attention(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """q [B, T, H, 576], k [B, S, 576] and v its first 512 columns, in half precision."""
    widths = q.dim() == 4 and k.dim() == 3 and q.shape[3] == k.shape[2] == LATENT + ROPE and v.shape[2] == LATENT
    return widths and q.shape[2] in HEADS and _there(q, k, v) and _first_columns(v, k) and has("npu_sparse_flash_attention")


def sparse_attention(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, scale: float, window: int = 0) -> tuple[Tensor, Tensor]:
    """`longcat_kernels.sparse_attention`; `takes_sparse_attention(q, k, v)` must hold.

    The vendor's operator stops at the first -1 of a selection, which here stands in front: each is turned round. What a selected key
    gets of all heads together is not among its results, and is computed again from its logarithms' parts.
    """
    selected = indices.flip(-1)[:, :, None].contiguous()
    out, largest, total = torch.ops.npu.npu_sparse_flash_attention(
        q[..., :LATENT],
        k[:, :, None, :LATENT],
        v[:, :, None],
        selected,
        scale,
        query_rope=q[..., LATENT:],
        key_rope=k[:, :, None, LATENT:],
        sparse_block_size=1,
        layout_query="BSND",
        layout_kv="BSND",
        sparse_mode=CAUSAL,
        attention_mode=ABSORBED,
        return_softmax_lse=True,
    )
    with torch.no_grad():
        return out, _mass(q.detach(), k.detach(), indices, scale, largest.detach().squeeze(1), total.detach().squeeze(1))


def _mass(q: Tensor, k: Tensor, indices: Tensor, scale: float, largest: Tensor, total: Tensor) -> Tensor:
    """(1/H) sum_h exp(scale q_h . k_s - largest_h) / total_h of the selected keys, [B, T, K]; largest and total [B, T, H].

    Some queries at a time, for each gathers its keys.
    """
    batch, queries, chosen = indices.shape
    chunk, parts = max(1, (1 << 24) // max(batch * chosen * k.shape[2], 1)), []
    for at in range(0, queries, chunk):
        here = slice(at, at + chunk)
        picked = indices[:, here].clamp(min=0).long().flatten(1)[..., None].expand(-1, -1, k.shape[2])
        keys = k.gather(1, picked).unflatten(1, indices[:, here].shape[1:])
        scores = (q[:, here] @ keys.transpose(-1, -2)).float() * scale
        weights = (scores - largest[:, here, :, None]).exp() / total[:, here, :, None]
        parts.append(weights.masked_fill((indices[:, here] < 0)[:, :, None], 0.0).mean(2))
    return torch.cat(parts, 1).to(q.dtype)


def takes_index_topk(q: Tensor, k: Tensor, w: Tensor, first: Tensor | None, topk: int, sinks: int = 0, window: int = 0) -> bool:
    """q [B, T, H_I, 128], k [B, S, 128], w [B, T, H_I] in half precision; one document a row, no sinks, no window, topk up to 2048."""
    plain = first is None and sinks == 0 and window == 0 and 0 < topk <= INDEX_TOPK
    widths = q.dim() == 4 and q.shape[3] == INDEX_WIDTH and q.shape[2] in HEADS and q.shape[2] <= INDEX_HEADS
    return plain and widths and _there(q, k, w) and has("npu_lightning_indexer")


def index_topk(q: Tensor, k: Tensor, w: Tensor, first: Tensor | None, topk: int, sinks: int = 0, window: int = 0) -> Tensor:
    """`longcat_kernels.index_topk`; `takes_index_topk` of the same arguments must hold. Of equal scores either key may be taken."""
    with torch.no_grad():
        found, _ = torch.ops.npu.npu_lightning_indexer(
            q.contiguous(),
            k[:, :, None].contiguous(),
            w.contiguous(),
            layout_query="BSND",
            layout_key="BSND",
            sparse_count=topk,
            sparse_mode=CAUSAL,
        )
        return found.squeeze(2).sort(-1).values[..., -min(topk, k.shape[1]) :].int()  # -1, where there are fewer, comes to the front


def takes_grouped_product(x: Tensor, weights: Tensor) -> bool:
    """x [P, K] and weights [N, K, M], in half precision."""
    return _there(x, weights) and x.dim() == 2 and weights.dim() == 3 and has("npu_grouped_matmul")


def grouped_product(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """y_p = x_p W_n for rows p of group n: `torch.nn.functional.grouped_mm(x, weights, offs=ends)`, with its gradients.

    Args:
        x: [P, K], sorted by group; weights: [N, K, M], views too; ends: int [N], where each group ends (the last one at P).

    Returns:
        [P, M]. `takes_grouped_product(x, weights)` must hold.
    """
    return _GroupedProduct.apply(x, weights, ends.to(torch.int64))


class _GroupedProduct(Function):
    """The vendor's operator has no gradient of its own; each is a grouped product again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(x, weights, ends)
        return _product(x, weights, ends, BY_ROWS)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weights, ends = ctx.saved_tensors
        wants_x, wants_weights = ctx.needs_input_grad[:2]
        d_out = d_out.contiguous()  # it may come as one number for all
        d_x = _product(d_out, weights.transpose(1, 2), ends, BY_ROWS) if wants_x else None
        d_weights = _product(x.t(), d_out, ends, BY_DEPTH) if wants_weights else None
        if d_weights is not None:  # what is said of a group without rows is that nothing is written
            sizes = ends.diff(prepend=ends.new_zeros(1))
            d_weights = d_weights.masked_fill((sizes == 0)[:, None, None], 0.0)
        return d_x, d_weights, None


def _product(x: Tensor, other: Tensor, ends: Tensor, group_type: int) -> Tensor:
    return torch.ops.npu.npu_grouped_matmul([x], [other], group_list=ends, split_item=3, group_type=group_type, group_list_type=CUMULATIVE)[
        0
    ]


def _there(*tensors: Tensor) -> bool:
    plain = all(t.device.type == DEVICE and t.dtype == tensors[0].dtype and 0 not in t.shape for t in tensors)
    return plain and tensors[0].dtype in HALF


def _first_columns(v: Tensor, k: Tensor) -> bool:
    shared = v.untyped_storage()._cdata == k.untyped_storage()._cdata and v.storage_offset() == k.storage_offset()
    return shared and v.stride() == k.stride() and v.shape[:2] == k.shape[:2]
