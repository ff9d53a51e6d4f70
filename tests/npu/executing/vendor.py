"""What torch_npu documents of its operators, in plain PyTorch: for the values of what calls them, on the executing device.

Not a simulation of an NPU: it sums as the CPU does, and takes what the documents say and refuses what they exclude.
"""

import itertools

import torch

LIBRARY = []  # kept, or the operators go

INDEXER = (
    "npu_lightning_indexer(Tensor query, Tensor key, Tensor weights, *, Tensor? actual_seq_lengths_query=None, "
    'Tensor? actual_seq_lengths_key=None, Tensor? block_table=None, str layout_query="BSND", str layout_key="BSND", '
    "int sparse_count=2048, int sparse_mode=3, bool return_value=False) -> (Tensor, Tensor)"
)
ATTENTION = (
    "npu_sparse_flash_attention(Tensor query, Tensor key, Tensor? value, Tensor sparse_indices, float scale_value, *, "
    'Tensor? query_rope=None, Tensor? key_rope=None, int sparse_block_size=1, str layout_query="BSND", str layout_kv="BSND", '
    "int sparse_mode=3, int attention_mode=0, bool return_softmax_lse=False) -> (Tensor, Tensor, Tensor)"
)
PRODUCT = (
    "npu_grouped_matmul(Tensor[] x, Tensor[] weight, *, Tensor? group_list=None, int? split_item=0, int? group_type=None, "
    "int? group_list_type=0) -> Tensor[]"
)


def activate():
    """Registers them as `torch.ops.npu.npu_...`."""
    if LIBRARY:
        return
    library = torch.library.Library("npu", "FRAGMENT")
    for schema, function in ((INDEXER, indexer), (ATTENTION, attention)):
        library.define(schema)
        library.impl(schema.partition("(")[0], function, "CompositeImplicitAutograd")
    library.define(PRODUCT)
    library.impl("npu_grouped_matmul", product, "PrivateUse1")  # no gradient, as the vendor's
    LIBRARY.append(library)


def indexer(query, key, weights, *, layout_query="BSND", layout_key="BSND", sparse_count=2048, sparse_mode=3, return_value=False, **_):
    """The keys of the highest sum over heads of w ReLU(q . k), best first, -1 behind."""
    assert layout_query == layout_key == "BSND" and key.shape[2] == 1 and query.shape[-1] == 128 and sparse_mode == 3
    queries, keys = query.shape[1], key.shape[1]
    scores = (torch.einsum("bthd,bsd->bths", query.float(), key[:, :, 0].float()).relu() * weights.float()[..., None]).sum(2)
    hidden = ~torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
    best = scores.masked_fill(hidden, -torch.inf).topk(min(sparse_count, keys), -1)
    found = query.new_full((*query.shape[:2], 1, sparse_count), -1, dtype=torch.int32)
    found[:, :, 0, : best.indices.shape[-1]] = best.indices.masked_fill(best.values == -torch.inf, -1).int()
    return found, query.new_zeros(found.shape)


def attention(
    query, key, value, sparse_indices, scale_value, *, query_rope=None, key_rope=None, sparse_block_size=1, attention_mode=0, **_
):
    """Softmax over the keys before the first -1; key and value have one head."""
    assert attention_mode == 2 and sparse_block_size == 1 and query.shape[-1] == 512 and query_rope.shape[-1] == 64
    assert query.dtype in (torch.bfloat16, torch.float16) and sparse_indices.dtype == torch.int32 and sparse_indices.is_contiguous()
    q, k = torch.cat((query, query_rope), -1).float(), torch.cat((key, key_rope), -1)[:, :, 0].float()
    indices = sparse_indices[:, :, 0]
    counted = (indices >= 0).cumprod(-1).bool()
    at = (torch.arange(len(q), device=q.device)[:, None, None], indices.clamp(min=0).long())
    scores = (q @ k[at].transpose(-1, -2) * scale_value).masked_fill(~counted[:, :, None], -torch.inf)
    largest = scores.amax(-1, keepdim=True)
    powers = (scores - largest).exp()
    total = powers.sum(-1, keepdim=True)
    out = (powers / total) @ value[:, :, 0].float()[at]
    return out.to(query.dtype), largest.squeeze(-1)[:, None].detach(), total.squeeze(-1)[:, None].detach()


def product(x, weight, *, group_list=None, split_item=0, group_type=None, group_list_type=0):
    """Groups of rows of x by their weight; or groups of columns of x with rows of the other. Of an empty group nothing is written."""
    assert split_item == 3 and group_list_type == 0 and group_list.dtype == torch.int64 and len(x) == len(weight) == 1
    (x,), (w,) = x, weight
    ends = [0, *group_list.tolist()]
    spans = [slice(start, end) for start, end in itertools.pairwise(ends)]
    if group_type == 0:
        assert ends[-1] == len(x)
        return [torch.cat([x[span] @ w[n] for n, span in enumerate(spans)])]
    assert group_type == 2
    unwritten = torch.full((x.shape[0], w.shape[1]), torch.nan, dtype=x.dtype, device=x.device)
    return [torch.stack([x[:, span] @ w[span] if span.stop > span.start else unwritten for span in spans])]
