"""What a model costs: the sum of what its blocks answer."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from longcat_lab.blocks import Budget, ModelShape
from longcat_lab.config import ModelConfig, RunConfig
from longcat_lab.errors import LabError

if TYPE_CHECKING:
    import pandas


def _model_and_shape(config: RunConfig | ModelConfig, context_length: int | None) -> tuple[ModelConfig, ModelShape]:
    model = config.model if isinstance(config, RunConfig) else config
    shape = model.shape()
    if context_length is None and isinstance(config, RunConfig):
        context_length = config.data.sequence_length
    return model, shape if context_length is None else replace(shape, sequence_length=context_length)


def _rows(config: RunConfig | ModelConfig, context_length: int | None = None) -> list[tuple[str, str, int, Budget]]:
    """(part, kind, how often, cost of all of them); they add up to the whole model."""
    model, shape = _model_and_shape(config, context_length)
    token = model.embedding.model_copy(update={"ngram": None}) if getattr(model.embedding, "ngram", None) else model.embedding
    rows = [("embedding", token.kind, 1, token.budget(shape))]
    if getattr(model.embedding, "ngram", None):
        rows.append(("ngram", model.embedding.ngram.kind, 1, model.embedding.ngram.budget(shape)))
    layers = [model.layer.budget(replace(shape, layer_index=i)) for i in range(model.num_layers)]
    rows.append(("layers", model.layer.kind, model.num_layers, sum(layers, Budget())))
    rows.append(("norm", model.norm.kind, 1, model.norm.budget(shape)))
    rows.append(("lm_head", "linear", 1, Budget.of_weights(model.hidden_size * model.vocab_size)))
    if model.mtp is not None:
        rows.append(("mtp", model.mtp.kind, model.mtp.num_nextn_predict_layers, model.mtp.budget(shape)))
    return rows


def totals(config: RunConfig | ModelConfig, context_length: int | None = None) -> dict[str, Any]:
    """total_params, active_params, flops_per_token (forward) and state_bytes_per_token of the whole model, prediction steps included;
    where there are prediction steps also total_params_without_mtp and flops_per_token_without_mtp (they are dropped at inference).
    """
    rows = _rows(config, context_length)
    total, trunk = sum((row[3] for row in rows), Budget()), sum((row[3] for row in rows if row[0] != "mtp"), Budget())
    found = {
        "total_params": total.params,
        "active_params": total.active_params,
        "flops_per_token": total.flops_per_token,
        "state_bytes_per_token": total.state_bytes_per_token,
    }
    if rows[-1][0] == "mtp":
        found.update({"total_params_without_mtp": trunk.params, "flops_per_token_without_mtp": trunk.flops_per_token})
    return found


def budget(config: RunConfig | ModelConfig, context_length: int | None = None) -> pandas.DataFrame:
    """A row a part and the total: parameters, active parameters, forward FLOPs a token, cache bytes a token (see `Budget`).

    context_length: tokens of the sequence whose mean FLOPs a token are given; data.sequence_length (of a model alone:
        max_position_embeddings) where left out.
    """
    import pandas

    rows = _rows(config, context_length)
    total = sum((row[3] for row in rows), Budget())
    if rows[-1][0] == "mtp":
        rows.append(("total without mtp", "", 1, sum((row[3] for row in rows[:-1]), Budget())))
    rows.append(("total", "", 1, total))
    columns = ["block", "kind", "count", "params", "active params", "FLOPs/token", "bytes/token"]
    return pandas.DataFrame(
        [[part, kind, n, b.params, b.active_params, round(b.flops_per_token), b.state_bytes_per_token] for part, kind, n, b in rows],
        columns=columns,
    ).set_index("block")


def activated(config: RunConfig | ModelConfig) -> pandas.DataFrame:
    """Activated parameters by k, the real experts that a token takes a mixture in the mean: from 0 (zero-experts only) to moe_topk.

    The convention of LongCat's published ranges: every weight outside the experts and the head, without the input embedding, the n-gram
    projections and the prediction steps, and k experts a mixture. `expected` marks the budget K_e that the configuration asks for.
    """
    import pandas

    model, shape = _model_and_shape(config, None)
    if not hasattr(model.moe, "expert_params") or not hasattr(model.layer, "mixtures"):
        raise LabError(f"activated: the kinds '{model.moe.kind}' and '{model.layer.kind}' need expert_params(shape) and mixtures(shape).")
    moe, places = model.moe, [replace(shape, layer_index=i) for i in range(model.num_layers)]
    mixtures = sum(model.layer.mixtures(place) for place in places)
    expert = moe.expert_params(shape)
    parts = [row[3].active_params for row in _rows(config) if row[0] not in ("ngram", "mtp")]
    base = sum(parts) - mixtures * round(moe.real_experts * expert)
    zeros = moe.zero_expert_num > 0
    ks = sorted({*(range(moe.moe_topk + 1) if zeros else ()), moe.real_experts})
    table = pandas.DataFrame({"k": ks, "activated params": [base + mixtures * round(k * expert) for k in ks]})
    table["expected"] = table["k"] == moe.real_experts
    return table.set_index("k")
