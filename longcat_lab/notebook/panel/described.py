"""The few words that the architecture's picture writes on its parts, and which parts differ between two configurations."""

from __future__ import annotations

from longcat_lab.blocks import BlockConfig, DSAConfig, ModelShape, MoEConfig, MTPConfig, SwiGLUConfig, YarnConfig
from longcat_lab.blocks.ngram_embedding.hash_config import HashSettings
from longcat_lab.blocks.ple.config import PLEConfig
from longcat_lab.blocks.ple_ffn.config import LookupSettings
from longcat_lab.config import ModelConfig, RunConfig
from longcat_lab.notebook.panel.budget_view import human

OWN_KIND = ["a kind of its own"]


def position_line(rope: BlockConfig) -> str:
    stretch = f" × {rope.factor:g}" if isinstance(rope, YarnConfig) else ""
    return f"{rope.kind}{stretch}" + (f", base {rope.theta:,.10g}" if hasattr(rope, "theta") else "")


def selection_lines(attention: DSAConfig, shape: ModelShape) -> list[str]:
    """How many keys a query reads, and which of them always."""
    length, most, sinks = shape.sequence_length, attention.index_topk, attention.index_init_tokens
    if not attention.selection.selects:
        return [f"reads all {length:,} keys"]
    first = f"reads {most:,} of {length:,} keys:" if attention.selects(shape) else f"top {most:,}, more than the {length:,} keys:"
    rule = "index" if attention.selection.uses_indexer else attention.selection.kind
    parts = [f"{sinks:,} sink{'s' * (sinks > 1)}"] if sinks else []
    parts += [f"{attention.index_local_tokens:,} window"] if attention.index_local_tokens else []
    return [first, " + ".join([*parts, f"{most - sinks - attention.index_local_tokens:,} by {rule}"])]


def mixture_lines(moe: BlockConfig) -> list[str]:
    if not isinstance(moe, MoEConfig):
        return OWN_KIND
    lines = [f"{moe.n_routed_experts:,} experts × {moe.expert_ffn_hidden_size:,}"]
    if moe.zero_expert_num:
        lines += [f"{moe.zero_expert_num:,} zero-experts", f"  ({moe.zero_expert_type})"]
    if moe.n_shared_experts:
        lines.append(f"{moe.n_shared_experts} shared")
    lines.append(f"top {moe.moe_topk}, {moe.real_experts:.3g} real")
    if moe.n_group > 1:
        lines.append(f"{moe.topk_group} of {moe.n_group} groups")
    return lines


def dense_lines(ffn: BlockConfig) -> list[str]:
    if isinstance(ffn, LookupSettings):
        rows = "n-grams" if isinstance(ffn, HashSettings) else "tokens"
        return [f"inner width {ffn.ffn_hidden_size:,}", f"up-projection looked up by {rows}"]
    return [f"inner width {ffn.ffn_hidden_size:,}"] if isinstance(ffn, SwiGLUConfig) else OWN_KIND


def ngram_lines(ngram: BlockConfig, shape: ModelShape) -> list[str]:
    if isinstance(ngram, PLEConfig):
        return [f"a row of {ngram.per_layer_width} for each", "token and layer, gated", "in behind the layer"]
    if not isinstance(ngram, HashSettings):
        return OWN_KIND
    layers = getattr(ngram, "injection_layers", None)
    if at_input(ngram):
        where = "added to the token's row"
    elif layers is None:
        where = "added before each layer"
    else:
        where = f"enters before layer {layers[0]}"
    where += f", +{len(layers) - 1}" if layers and len(layers) > 1 else ""
    return [f"{ngram.tables} tables, {human(ngram.moduli(shape.vocab_size)[0])} rows", f"of width {ngram.width(shape):,} each", where]


def at_input(ngram: BlockConfig) -> bool:
    """Whether the rows are part of the input embedding; else they join the residual stream before layers."""
    if ngram.kind in ("engram", "bigram_lambda", "ple"):
        return False
    return 0 in getattr(ngram, "injection_layers", [0])


def mtp_lines(mtp: BlockConfig, attention: BlockConfig) -> list[str]:
    if not isinstance(mtp, MTPConfig):
        return OWN_KIND
    steps = mtp.num_nextn_predict_layers
    lines = ["attention + dense" if mtp.block == "dense" else "a layer of the trunk"]
    if steps > 1:
        lines.append("one block, repeated" if mtp.repeat_block else "a block for each step")
    if getattr(getattr(attention, "selection", None), "uses_indexer", False) and steps > 1:
        lines.append("all use step 1's index" if attention.dsa_mtp_cli else "each step its index")
    if mtp.own_embedding:
        lines.append("own embedding" + (" + tables" if mtp.own_ngram_tables else ""))
    return lines


def differing(config: RunConfig, baseline: RunConfig) -> set[str]:
    """Names of the drawn parts whose settings differ."""
    now, old = config.model, baseline.model
    vocabulary = now.vocab_size != old.vocab_size
    found = {
        "input": config.data.sequence_length != baseline.data.sequence_length,
        "token table": vocabulary or _token(now) != _token(old),
        "embedding": _token(now) != _token(old),
        "n-gram tables": getattr(now.embedding, "ngram", None) != getattr(old.embedding, "ngram", None),
        "layer": now.layer != old.layer or now.num_layers != old.num_layers or now.hidden_size != old.hidden_size,
        "attention": now.attention != old.attention or now.rope != old.rope,
        "dense networks": now.ffn != old.ffn,
        "mixture": now.moe != old.moe,
        "final norm": now.norm != old.norm,
        "head": vocabulary,
        "mtp": now.mtp != old.mtp,
    }
    return {name for name, differs in found.items() if differs}


def _token(model: ModelConfig) -> BlockConfig:
    """The embedding without its tables."""
    return model.embedding.model_copy(update={"ngram": None}) if hasattr(model.embedding, "ngram") else model.embedding
