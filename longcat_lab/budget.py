"""What a model costs: the sum of what its blocks answer."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from longcat_lab.blocks import Budget
from longcat_lab.config import ModelConfig, RunConfig

if TYPE_CHECKING:
    import pandas


def _rows(config: RunConfig | ModelConfig) -> list[tuple[str, str, int, Budget]]:
    """(part, kind, how often, cost of all of them); they add up to the whole model."""
    model = config.model if isinstance(config, RunConfig) else config
    shape, head = model.shape(), model.hidden_size * model.vocab_size
    if isinstance(config, RunConfig):
        shape = replace(shape, sequence_length=config.data.sequence_length)
    token = model.embedding.model_copy(update={"ngram": None}) if getattr(model.embedding, "ngram", None) else model.embedding
    rows = [("embedding", token.kind, 1, token.budget(shape))]
    if getattr(model.embedding, "ngram", None):
        rows.append(("ngram", model.embedding.ngram.kind, 1, model.embedding.ngram.budget(shape)))
    rows.append(("layers", model.layer.kind, model.num_layers, model.num_layers * model.layer.budget(shape)))
    rows.append(("norm", model.norm.kind, 1, model.norm.budget(shape)))
    rows.append(("lm_head", "linear", 1, Budget.of_weights(head)))
    return rows


def totals(config: RunConfig | ModelConfig) -> dict[str, Any]:
    """total_params, active_params, flops_per_token (forward) and state_bytes_per_token of the whole model."""
    total = sum((row[3] for row in _rows(config)), Budget())
    return {
        "total_params": total.params,
        "active_params": total.active_params,
        "flops_per_token": total.flops_per_token,
        "state_bytes_per_token": total.state_bytes_per_token,
    }


def budget(config: RunConfig | ModelConfig) -> pandas.DataFrame:
    """A row a part and the total: parameters, active parameters, forward FLOPs a token, cache bytes a token (see `Budget`)."""
    import pandas

    rows = _rows(config)
    rows.append(("total", "", 1, sum((row[3] for row in rows), Budget())))
    columns = ["block", "kind", "count", "params", "active params", "FLOPs/token", "bytes/token"]
    return pandas.DataFrame(
        [[part, kind, n, b.params, b.active_params, round(b.flops_per_token), b.state_bytes_per_token] for part, kind, n, b in rows],
        columns=columns,
    ).set_index("block")
