"""What a configuration costs, as a small table beside the knobs: against the pinned configuration, and part by part."""

from __future__ import annotations

import dataclasses
import html
from dataclasses import replace

import torch

from longcat_lab.blocks import Budget
from longcat_lab.blocks.interface import attentions_of
from longcat_lab.config import ModelConfig, OptimizerConfig, RunConfig
from longcat_lab.model.lm import LongcatLM
from longcat_lab.training.optimizer import added_bytes

STYLE = """<style>
.lab-budget { border-collapse: collapse; font-size: .9em; line-height: 1.35; color: inherit; background: none; }
.lab-budget th, .lab-budget td { text-align: right; padding: .15em .35em; border-bottom: 1px solid #80808055; white-space: nowrap; }
.lab-budget th { font-weight: normal; opacity: .7; }
.lab-budget th:first-child, .lab-budget td:first-child { text-align: left; white-space: normal; min-width: 7em; }
.lab-wide { overflow-x: auto; }
.lab-budget td.now { font-weight: bold; }
.lab-budget .more, .lab-budget .less { border-left: 3px solid; padding-left: .4em; }
.lab-budget .more { border-left-color: #D55E00; } .lab-budget .less { border-left-color: #009E73; }
</style>"""
REMEMBERED = 8  # models whose memory is not computed again
_memory: list[tuple[ModelConfig, OptimizerConfig, float | None]] = []


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of the model and what all of it costs; places: the same by place within a layer, where there are several (attention 1, 2)."""

    name: str
    kind: str
    count: int
    cost: Budget
    places: tuple[Budget, ...] = ()


def parts(config: RunConfig) -> list[Part]:
    """The model's parts, from tokens to logits; their costs add up to `lab.budget`'s total.

    A layer of a kind of one's own is one part, since only it knows what it holds.
    """
    model = config.model
    shape = replace(model.shape(), sequence_length=config.data.sequence_length)
    ngram = getattr(model.embedding, "ngram", None)
    token = model.embedding.model_copy(update={"ngram": None}) if ngram else model.embedding
    found = [Part("token table" if token.kind == "token" else "embedding", token.kind, 1, token.budget(shape))]
    if ngram:
        found.append(Part("n-gram tables", ngram.kind, 1, ngram.budget(shape)))
    layers = [replace(shape, layer_index=i) for i in range(model.num_layers)]
    if model.layer.kind in ("scmoe", "serial", "decoder"):
        found += _inner(config, layers)
    else:
        found.append(Part("layers", model.layer.kind, model.num_layers, sum((model.layer.budget(at) for at in layers), Budget())))
    found.append(Part("final norm", model.norm.kind, 1, model.norm.budget(shape)))
    found.append(Part("head", "linear", 1, Budget.of_weights(model.hidden_size * model.vocab_size)))
    if model.mtp is not None:
        found.append(Part("mtp", model.mtp.kind, getattr(model.mtp, "num_nextn_predict_layers", 1), model.mtp.budget(shape)))
    return found


def _inner(config: RunConfig, layers: list) -> list[Part]:
    """Attention, dense networks, mixture and norms of the layers that come with the package."""
    model, per = config.model, attentions_of(config.model.layer)
    places = [[replace(at, attention_index=per * at.layer_index + s) for at in layers] for s in range(per)]
    attention = tuple(sum((model.attention.budget(at) for at in place), Budget()) for place in places)
    mixed = [at for at in layers if model.layer.mixtures(at)]
    dense_layers = layers if per == 2 else [at for at in layers if not model.layer.mixtures(at)]
    dense = tuple(sum((model.ffn.budget(at) for at in dense_layers), Budget()) for _ in range(per if dense_layers else 0))
    norms = sum((2 * per * model.norm.budget(at) for at in layers), Budget())
    found = [Part("attention", model.attention.kind, per * len(layers), sum(attention, Budget()), attention)]
    if dense:
        found.append(Part("dense networks", model.ffn.kind, per * len(dense_layers), sum(dense, Budget()), dense))
    if mixed:
        found.append(Part("mixture", model.moe.kind, len(mixed), sum((model.moe.budget(at) for at in mixed), Budget())))
    return [*found, Part("norms", model.norm.kind, 2 * per * len(layers), norms)]


def training_memory(config: RunConfig) -> float | None:
    """Bytes of weights, gradients, optimizer state and buffers, without activations; None where a block of one's own cannot be built.

    Nothing is allocated: the model is built on the meta device.
    """
    model, optimizer = config.model, config.training.optimizer
    for known_model, known_optimizer, size in _memory:
        if known_model == model and known_optimizer == optimizer:
            return size
    try:
        with torch.device("meta"):
            built = LongcatLM(model)
        added = added_bytes(built, optimizer)
        size = sum(p.nbytes + added(name, p) for name, p in built.named_parameters()) + sum(b.nbytes for b in built.buffers())
    except Exception:  # a block that is being written may raise anything; the knobs must go on turning
        size = None
    _memory.insert(0, (model, optimizer, size))
    del _memory[REMEMBERED:]
    return size


def budget_html(config: RunConfig, baseline: RunConfig | None = None, by_part: bool = True) -> str:
    """The budget as HTML: now, pinned, difference and per cent.

    by_part: with the table of `parts_html` folded under it; a view that is replaced at each turn had better keep that elsewhere, since
        what a person unfolded folds again.
    """
    try:
        now = _figures(config)
        before = None if baseline is None else now if baseline == config else _figures(baseline)
    except Exception as error:  # a block that is being written may raise anything; the knobs must go on turning
        return f"<div>The budget is not known: {html.escape(unknown(error))}</div>"
    compared = before is not None and before != now
    head = "<tr><th></th><th>now</th>" + ("<th>pinned</th><th>difference</th><th></th>" if compared else "") + "</tr>"
    rows = []
    for name, (value, unit, text) in now.items():
        cells = f"<td>{name}</td><td class='now'>{text or human(value, unit)}</td>"
        if compared:
            old, _, old_text = before[name]
            cells += f"<td>{old_text or human(old, unit)}</td>{_difference(value, old, unit)}"
        rows.append(f"<tr>{cells}</tr>")
    note = "" if compared or baseline is None else "<div style='opacity:.7;font-size:.85em'>The pinned configuration costs the same.</div>"
    table = f'<table class="lab-budget">{head}{"".join(rows)}</table>{note}'
    folded = f"<details><summary>part by part</summary>{parts_html(config, baseline)}</details>" if by_part else ""
    return f'{STYLE}<div class="lab-wide">{table}{folded}</div>'


def parts_html(config: RunConfig, baseline: RunConfig | None = None) -> str:
    """The parts of the model as an HTML table: parameters, their share and change against `baseline`, FLOPs and cache."""
    now = {part.name: part for part in parts(config)}
    before = now if baseline is None else {part.name: part for part in parts(baseline)}
    total = sum(part.cost.params for part in now.values()) or 1
    names = [*now, *(name for name in before if name not in now)]
    head = "".join(f"<th>{name}</th>" for name in ("part", "kind", "parameters", "share", "change", "", "FLOP/token", "cache/token"))
    rows = []
    for name in names:
        part = now.get(name) or Part(name, "–", 0, Budget())
        old = before[name].cost.params if name in before else 0
        kind = f"{html.escape(part.kind)} ×{part.count}" if part.count > 1 else html.escape(part.kind)
        cost, cells = part.cost, f"<td>{html.escape(name)}</td><td>{kind}</td><td class='now'>"
        cells += f"{human(cost.params)}</td><td>{cost.params / total:.1%}</td>{_difference(cost.params, old, '')}"
        rows.append(f"<tr>{cells}<td>{human(cost.flops_per_token)}</td><td>{human(cost.state_bytes_per_token, 'B')}</td></tr>")
    return f'{STYLE}<div class="lab-wide"><table class="lab-budget"><tr>{head}</tr>{"".join(rows)}</table></div>'


def unknown(error: Exception) -> str:
    """What a block of one's own said when it was asked what it costs."""
    return f"{type(error).__name__} {str(error) or 'where a block is asked for its budget'}."


def human(value: float | None, unit: str = "") -> str:
    """A number with three digits and a prefix: 9.06 M, 12.3 GFLOP; – for None."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    sign, size = "−" if value < 0 else "", abs(value)
    for prefix in ("", "k", "M", "G" if unit else "B", "T", "P", "E", "Z"):
        if size < 999.5 or prefix == "Z":
            number = f"{size:.0f}" if not prefix and float(size).is_integer() else f"{size:#.3g}".rstrip(".")
            return f"{sign}{number} {prefix}{unit}".rstrip()
        size /= 1000
    raise AssertionError  # the last prefix returns


def _figures(config: RunConfig) -> dict[str, tuple[float | None, str, str]]:
    """Name to (value, unit, text where the number alone says too little)."""
    cost, training = sum((part.cost for part in parts(config)), Budget()), config.training
    each = config.data.batch_size * config.data.sequence_length
    tokens = training.steps * each
    return {
        "parameters": (cost.params, "", ""),
        "active parameters a token": (cost.active_params, "", ""),
        "forward a token": (cost.flops_per_token, "FLOP", ""),
        "decoding cache a token": (cost.state_bytes_per_token, "B", ""),
        "training memory without activations": (training_memory(config), "B", ""),
        "training tokens": (
            tokens,
            "",
            f"{human(tokens)} <span style='opacity:.7;font-weight:normal'>({training.steps:,} × {each:,})</span>",
        ),
        "training": (3.0 * cost.flops_per_token * tokens, "FLOP", ""),
    }


def _difference(value: float | None, old: float | None, unit: str) -> str:
    if value is None or old is None or value == old:
        return "<td>=</td><td></td>" if value == old else "<td>–</td><td></td>"
    gap, side = value - old, "more" if value > old else "less"
    share = f"{gap / old:+.1%}".replace("-", "−") if old else "new"
    return f"<td class='{side}'>{'+' if gap > 0 else ''}{human(gap, unit)}</td><td>{share}</td>"
