"""Which part of which of our tensors a checkpoint's tensor is."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from torch import Tensor

from longcat_lab.config.model import ModelConfig
from longcat_lab.model.pretrained.config import MTP_TABLE, Naming
from longcat_lab.model.pretrained.sparse import is_sparse

ROUTER = re.compile(r"\.router\.(classifier\.weight|e_score_correction_bias)$")  # of our names: fp32 whatever the rest is

_LONGCAT = (
    (r"mtp\.layers\.0\.(enorm|hnorm)\.weight", r"model.mtp.layers.0.\1.m.weight"),
    (r"mtp\.layers\.0\.norm\.weight", "model.mtp.norm.weight"),
    (r"mtp\.layers\.0\.layer\.mlp\.(.*)", r"model.mtp.layers.0.transformer_layer.mlp.\1"),
    (r"mtp\.layers\.0\.layer\.(.*)", r"model.mtp.layers.0.\1"),
)


@dataclass(frozen=True)
class Part:
    """What one tensor of a checkpoint holds.

    shape: of the checkpoint's tensor.
    ours: name of our tensor, None where nobody needs the content (the rows that transformers gives zero-experts).
    index: the part of our tensor; () for all of it.
    copy: another tensor of the checkpoint holds the same: not read, but written again.
    spare: further leading rows that a checkpoint may have, and that are not read.
    """

    shape: tuple[int, ...]
    ours: str | None = None
    index: tuple[int | slice, ...] = ()
    copy: bool = False
    spare: int = 0

    @property
    def optional(self) -> bool:
        return self.ours is None or self.copy


def file_name(ours: str, config: ModelConfig, naming: Naming) -> str:
    """The checkpoint's name of a tensor that it holds as it is."""
    if naming == "longcat":
        for pattern, replacement in _LONGCAT:
            if match := re.fullmatch(pattern, ours):
                return match.expand(replacement)
    elif match := re.fullmatch(r"mtp\.layers\.(\d+)\.(.*)", ours):
        inner = "shared_head.norm.weight" if match[2] == "norm.weight" else match[2].removeprefix("layer.")
        return _deepseek_router(f"model.layers.{config.num_layers + int(match[1])}.{inner}")
    name = ours if ours.startswith("lm_head.") else f"model.{ours}"
    return name if naming == "longcat" else _deepseek_router(name)


def _deepseek_router(name: str) -> str:
    return name.replace(".router.classifier.", ".gate.").replace(".router.", ".gate.")


def layout(
    config: ModelConfig, naming: Naming, tensors: dict[str, Tensor], found: Collection[str] | None = None, zero_rows: bool = True
) -> dict[str, Part]:
    """Every tensor that a checkpoint of this model has or may have, by its name there.

    Args:
        tensors: our state, for the shapes alone (meta tensors do).
        found: names in the checkpoint to be read, which tell its variant (stacked experts, names of the n-gram tables); None for
            the one that is written: an expert a tensor, as published.
        zero_rows: with the gate and up rows of zero-experts, and other tensors without a use, that transformers asks for; never
            written for LongCat's sparse models, which it does not have.
    """
    zero_rows = zero_rows and not (found is None and naming == "longcat" and is_sparse(config))
    parts: dict[str, Part] = {}
    for ours, tensor in tensors.items():
        shape = tuple(tensor.shape)
        if ours.endswith((".mlp.gate_up_proj", ".mlp.down_proj")):
            parts.update(_experts(ours, tensor, config, naming, found, zero_rows))
        elif ours.endswith("embed_tokens.tables.weight"):
            parts.update(_ngrams(ours.removesuffix(".tables.weight"), tensor, config, found))
        elif not ours.endswith("embed_tokens.projection.weight"):
            parts[file_name(ours, config, naming)] = Part(shape, ours)
    parts.update(_copies(config, naming, tensors, found))
    if naming == "deepseek" and zero_rows and config.moe.n_shared_experts == 0:
        parts.update(_empty_shared(config))
    return parts


def _experts(
    ours: str, tensor: Tensor, config: ModelConfig, naming: Naming, found: Collection[str] | None, zero_rows: bool
) -> Iterator[tuple[str, Part]]:
    """The mixture's stacked tensors, an expert each or as they are. Gate rows come first in ours, as in transformers."""
    place, kind = file_name(ours, config, naming).rsplit(".", 1)
    shape, zero = tuple(tensor.shape), config.moe.zero_expert_num
    stacked, gated = f"{place}.experts.{kind}", kind == "gate_up_proj"
    if found is not None and stacked in found:
        yield stacked, Part(shape, ours, spare=zero if gated else 0)
        return
    inner = shape[1] // 2 if gated else shape[1]
    names = {"gate_proj": slice(0, inner), "up_proj": slice(inner, 2 * inner)} if gated else {"down_proj": slice(None)}
    for expert in range(shape[0] + (zero if gated and zero_rows else 0)):
        for name, rows in names.items():
            real = expert < shape[0]
            yield f"{place}.experts.{expert}.{name}.weight", Part((inner, shape[2]), ours if real else None, (expert, rows) if real else ())


def _ngrams(ours: str, tables: Tensor, config: ModelConfig, found: Collection[str] | None) -> Iterator[tuple[str, Part]]:
    """Tables and projections of the embedding `ours`, a tensor each, in Flash-Lite's names or in those of the sparse models.

    The sparse models have `model.oe_embed_tokens0.weight` and `model.oe_embed_proj0.weight`. The copy that LongCat-2.0's prediction
    module carries is written as `model.mtp.oe_embed_tokens0.weight` and so on, by analogy with `model.mtp.embed_tokens.weight`: one reader
    of the published index writes of `model.mtp.oe_*`, the names themselves were not seen. So it is read wherever below `model.mtp.`.
    """
    place = "model." if ours == "embed_tokens" else "model.mtp."
    if found is not None and place == "model.mtp.":
        place = next((match[1] for match in map(MTP_TABLE.fullmatch, found) if match), place)
    flat = is_sparse(config) if found is None else f"{place}oe_embed_tokens0.weight" in found
    kinds = ("oe_embed_tokens", "oe_embed_proj") if flat else ("ngram_embeddings.embedders.", "ngram_embeddings.post_projs.")
    table, projection = (f"{place}{kind}" for kind in kinds)
    ngram, start, width = config.embedding.ngram, 0, tables.shape[1]
    for i, rows in enumerate(ngram.moduli(config.vocab_size)):
        columns = (slice(None), slice(i * width, (i + 1) * width))
        yield f"{table}{i}.weight", Part((rows, width), f"{ours}.tables.weight", (slice(start, start + rows),))
        yield f"{projection}{i}.weight", Part((config.hidden_size, width), f"{ours}.projection.weight", columns)
        start += rows


def _copies(config: ModelConfig, naming: Naming, tensors: dict[str, Tensor], found: Collection[str] | None) -> Iterator[tuple[str, Part]]:
    """Tensors that a checkpoint repeats under a second name."""
    shape, mtp = tuple(tensors["embed_tokens.weight"].shape), config.mtp
    word = "model.ngram_embeddings.word_embeddings.weight"
    if found is not None and word in found and getattr(config.embedding, "ngram", None):
        alone = "model.embed_tokens.weight" not in found
        if alone:
            yield "model.embed_tokens.weight", Part(shape, "embed_tokens.weight", copy=True)
        yield word, Part(shape, "embed_tokens.weight", copy=not alone)
    if mtp is None:
        return
    if naming == "longcat" and not mtp.own_embedding:
        yield "model.mtp.embed_tokens.weight", Part(shape, "embed_tokens.weight", copy=True)
    if naming == "deepseek":
        for step in range(mtp.blocks):
            place = f"model.layers.{config.num_layers + step}"
            yield f"{place}.embed_tokens.weight", Part(shape, "embed_tokens.weight", copy=True)
            yield f"{place}.shared_head.head.weight", Part(shape, "lm_head.weight", copy=True)


def _empty_shared(config: ModelConfig) -> Iterator[tuple[str, Part]]:
    """transformers builds shared experts of width 0 where there are none, and asks for their tensors."""
    for layer in range(config.layer.first_k_dense_replace, config.num_layers + (config.mtp.blocks if config.mtp else 0)):
        place = f"model.layers.{layer}.mlp.shared_experts"
        yield f"{place}.gate_proj.weight", Part((0, config.hidden_size))
        yield f"{place}.up_proj.weight", Part((0, config.hidden_size))
        yield f"{place}.down_proj.weight", Part((config.hidden_size, 0))
