"""What a process sends inside the forward and backward passes of a step: for attentions, networks, mixtures, tables and the head."""

from __future__ import annotations

from torch import nn

from longcat_lab.blocks.decoder_layer.module import DecoderLayer
from longcat_lab.blocks.loss_op import CHUNK_ELEMENTS
from longcat_lab.blocks.mla.module import MLA
from longcat_lab.blocks.moe.module import MoE
from longcat_lab.blocks.moe.router import Router
from longcat_lab.blocks.ngram_embedding.module import NgramEmbedding
from longcat_lab.blocks.scmoe.module import ScMoELayer
from longcat_lab.blocks.sparse_attention.module import SparseAttention
from longcat_lab.blocks.sparse_attention.selection import OracleSelection
from longcat_lab.blocks.swiglu.module import SwiGLU
from longcat_lab.blocks.table import Table
from longcat_lab.errors import LabError
from longcat_lab.parallel.collectives import gather_bytes, part_sizes, reduce_bytes
from longcat_lab.parallel.embedding_op import shard_size
from longcat_lab.parallel.planner.place import FP32, FP64, INT64, Pass, Place, Tally

Picks = tuple[int, int]  # that leave a process, and that it answers


def put_passes(here: Place, once: Picks, again: Picks, tally: Tally) -> None:
    """Layers and prediction steps. once, again: what travels to experts in forward passes that run for the first, and the second time."""
    forward = backward = 0  # of mixtures
    for run in here.passes():
        for inner in run.module.modules():
            if isinstance(inner, MLA):
                _attention(here, inner, run, tally)
            elif isinstance(inner, SwiGLU):
                _dense(here, run, tally)
            elif isinstance(inner, MoE):
                _mixture(here, inner, run, tally)
                forward, backward = forward + run.forward, backward + run.backward
            elif isinstance(inner, Router):
                _router(here, inner, run, tally)
        if run.forward > 1:
            _not_again(here, run, tally)
    if here.layout.expert == 1 or not forward:
        return
    whole = here.config.parallel.dispatch == "process"  # with each row its weights, and forwards its slots
    hidden, beside = here.config.model.hidden_size, here.config.model.moe.moe_topk if whole else 0
    carried = "expert", "all-to-all", "tokens to experts and back"
    exchanges = (3 if whole else 2) * forward + 2 * backward
    tally.put(*carried, exchanges * here.micros * here.config.parallel.moe_chunks, 0)
    for sent, answered in (once, again):
        tally.bytes[carried] += (sent * (hidden + 2 * beside) + answered * hidden) * FP32
    tally.bytes[carried] += (once[0] * hidden + once[1] * (hidden + beside)) * FP32  # gradients


def _attention(here: Place, module: MLA, run: Pass, tally: Tally) -> None:
    c, layout, rows = module.config, here.layout, here.tokens
    forward, backward = run.forward * here.micros, run.backward * here.micros
    if layout.context > 1:
        size = gather_bytes(rows * (c.kv_lora_rank + c.qk_rope_head_dim) * FP32, layout.context)
        tally.put("context", "all-gather", "latents of the whole row", forward, size)
        tally.put("context", "reduce-scatter", "gradients of latents", backward, size)
    if layout.tensor > 1:
        hidden = module.o_proj.out_features
        each = rows // len(here.chunks)
        tally.put(
            "tensor", "all-reduce", "sums of attentions", forward * len(here.chunks), reduce_bytes(each * hidden * FP32, layout.tensor)
        )
        for width in (c.q_lora_rank or hidden, c.kv_lora_rank, c.qk_rope_head_dim):
            tally.put("tensor", "all-reduce", "gradients of latents", backward, reduce_bytes(rows * width * FP32, layout.tensor))
    if isinstance(module, SparseAttention):
        _index(here, module, run, tally)


def _index(here: Place, module: SparseAttention, run: Pass, tally: Tally) -> None:
    """Index keys of the whole row, and the mean over heads that an indexer learns from."""
    c, layout = module.config, here.layout
    forward, backward = run.forward * here.micros, run.backward * here.micros
    sparse = c.selection.selects and here.config.data.sequence_length > c.index_topk
    learns = sparse and c.selection.uses_indexer and c.distill.weight > 0
    reuses = module.place > 0 or (run.step > 1 and c.dsa_mtp_cli)
    if layout.context > 1 and module.indexer is not None and not reuses:
        size = gather_bytes(here.tokens * c.index_head_dim * FP32, layout.context)
        tally.put("context", "all-gather", "index keys of the whole row", forward, size)
        tally.put("context", "reduce-scatter", "gradients of index keys", backward if learns else 0, size)
    if layout.tensor > 1 and sparse and isinstance(c.selection, OracleSelection):
        raise LabError("The traffic of selection.kind 'oracle' under parallel.tensor is not reckoned: it looks at all heads, for studies.")
    if layout.tensor > 1 and learns:
        for keys in here.chunks:
            size = here.tokens // len(here.chunks) * min(c.index_topk, keys) * FP32
            tally.put("tensor", "all-reduce", "attention mass over heads", forward, reduce_bytes(size, layout.tensor))


def _dense(here: Place, run: Pass, tally: Tally) -> None:
    if here.layout.tensor > 1:
        size = _hidden_sum(here)
        tally.put("tensor", "all-reduce", "sums of dense networks", run.forward * here.micros, size)
        tally.put("tensor", "all-reduce", "gradients of dense networks' inputs", run.backward * here.micros, size)


def _hidden_sum(here: Place) -> int:
    return reduce_bytes(here.tokens * here.config.model.hidden_size * FP32, here.layout.tensor)


def _mixture(here: Place, module: MoE, run: Pass, tally: Tally) -> None:
    """Counts of picks, and what tensor ranks hand each other because each sends its part of the tokens."""
    layout, c = here.layout, module.config
    if layout.expert == 1:
        return
    forward, backward = run.forward * here.micros, run.backward * here.micros
    keys = 1 if here.config.parallel.dispatch == "process" else c.n_routed_experts // layout.expert
    counts = gather_bytes(here.config.parallel.moe_chunks * keys * INT64, layout.expert)
    tally.put("expert", "all-to-all", "counts of picks", forward, counts)
    if layout.tensor > 1:
        longest, hidden = max(part_sizes(here.tokens, layout.tensor)), here.config.model.hidden_size
        tally.put("tensor", "all-gather", "mixtures' outputs", forward, gather_bytes(longest * hidden * FP32, layout.tensor))
        for width in (hidden, c.moe_topk):
            size = gather_bytes(longest * width * FP32, layout.tensor)
            tally.put("tensor", "all-gather", "gradients of mixtures' inputs", backward, size)


def _router(here: Place, module: Router, run: Pass, tally: Tally) -> None:
    c, ways = module.config, here.layout.context
    if ways > 1 and c.balance_loss_alpha:
        size = reduce_bytes((c.n_routed_experts + c.zero_expert_num) * FP64, ways)
        tally.put("context", "all-reduce", "counts of whole rows for the balance loss", run.forward * here.micros, size)


def _not_again(here: Place, run: Pass, tally: Tally) -> None:
    """A second forward pass ends where nothing more is kept: it does not reach what is summed or gathered behind a layer's last product,
    that of the mixture where experts are elsewhere (its answers are waited for last), or as the layer has it.
    """
    layout = here.layout
    if layout.tensor == 1:
        return
    layer = getattr(run.module, "layer", run.module)
    dense = isinstance(layer, DecoderLayer) and layer.dense
    if layout.expert > 1 and not dense:
        size = max(part_sizes(here.tokens, layout.tensor)) * here.config.model.hidden_size * FP32
        tally.put("tensor", "all-gather", "mixtures' outputs", -here.micros, gather_bytes(size, layout.tensor))
    elif dense or type(layer) is ScMoELayer or layer.mlp.shared_experts is not None:
        tally.put("tensor", "all-reduce", "sums of dense networks", -here.micros, _hidden_sum(here))


def put_tables(here: Place, rows: tuple[int, int], summed: tuple[int, ...], tally: Tally) -> None:
    """rows: asked of others, and answered; summed: for each table most rows that a copy has a gradient for."""
    tables = [each for each in here.model.modules() if isinstance(each, Table) and not each.idle]
    layout, embedding = here.layout, here.model.embed_tokens
    if not tables or layout.world == 1:
        return
    if type(embedding) is not NgramEmbedding or len(tables) > 1:
        raise LabError("The traffic of n-gram tables is reckoned for model.embedding.ngram.kind=ngram_embedding alone: name that one.")
    if not here.first:
        return
    [table], ways, config = tables, layout.embedding, embedding.config
    width = table.weight.shape[1]
    reads = here.micros * ((embedding.projection is not None) + len(embedding.layer_projections))
    if layout.tensor > 1:
        longest = max(part_sizes(here.tokens * config.tables, layout.tensor))
        tally.put("tensor", "all-gather", "table rows", reads, gather_bytes(longest * width * FP32, layout.tensor))
    if ways > 1:
        tally.put("embedding", "all-to-all", "counts of rows", reads, gather_bytes(INT64, ways))
        carried = "embedding", "all-to-all", "row numbers, rows, and their gradients"
        tally.put(*carried, 3 * reads, 0)
        tally.bytes[carried] += rows[0] * (INT64 + width * FP32) + rows[1] * width * FP32
    copies = layout.embedding_replicate
    if copies == 1:
        return
    if here.config.training.optimizer.table_optimizer == "adamw":
        held = shard_size(len(table.weight), ways, here.at["embedding"])
        tally.put("data", "all-reduce", "sum of table gradients", 1, reduce_bytes(held * width * FP32, copies))
        return
    tally.put("data", "all-gather", "numbers of rows with a gradient", 1, gather_bytes(INT64, copies))
    for most in (each for each in summed if each):
        tally.put("data", "all-gather", "rows with a gradient", 1, gather_bytes(most * INT64, copies))
        tally.put("data", "all-gather", "gradients of rows", 1, gather_bytes(most * width * FP32, copies))


def put_head(here: Place, tally: Tally) -> None:
    """The softmax over a divided vocabulary, chunk by chunk of tokens: its maximum and sum, the label's logit, and the states' gradient."""
    ways, head = here.layout.tensor, here.model.lm_head
    if ways == 1 or not here.last or not isinstance(head, nn.Linear):
        return
    parts = 1 + (here.config.model.mtp.num_nextn_predict_layers if here.prediction_weight else 0)
    rows = max(1, CHUNK_ELEMENTS // (len(head.weight) // ways))
    for start in range(0, here.tokens, rows):
        chunk = min(rows, here.tokens - start)
        times = parts * here.micros
        tally.put("tensor", "all-reduce", "softmax of the head", 3 * times, reduce_bytes(chunk * FP32, ways))
        tally.put("tensor", "all-reduce", "gradients of the head's input", times, reduce_bytes(chunk * head.in_features * FP32, ways))
