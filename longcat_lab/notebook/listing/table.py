"""The table of runs as a notebook shows it: readable without a script, sortable with one, on white and on black."""

from __future__ import annotations

import html
import math
from datetime import datetime
from importlib import resources
from typing import TYPE_CHECKING, Any

from longcat_lab.notebook.panel.words import clock, count

if TYPE_CHECKING:
    from longcat_lab.notebook.runs import Runs

SHOWN = 200  # rows; `frame` has all of them
HEADS = {
    "name": "run",
    "status": "status",
    "step": "steps",
    "started": "started (UTC)",
    "seconds": "training",
    "validation_bpb": "validation bpb",
    "params": "parameters",
    "active": "active",
    "flops_per_token": "FLOPs a token",
    "seed": "seed",
    "sweep": "sweep",
    "variant": "variant",
}
WORDS = ("name", "status", "sweep", "variant")  # left-aligned


def table(runs: Runs) -> str:
    """`runs` as HTML."""
    rows = [run.row for run in runs.found[:SHOWN]]
    columns = [key for key in HEADS if key not in ("sweep", "variant") or any(row[key] for row in rows)]
    head = "".join(f'<th scope="col"{_side(key)}><button type="button">{HEADS[key]}</button></th>' for key in columns)
    body = "\n".join(f"<tr>{''.join(_cell(key, row) for key in columns)}</tr>" for row in rows)
    more = f" The newest {SHOWN} are shown; <code>.frame</code> has all." if len(runs) > SHOWN else ""
    said = f'<p class="lab-runs-said">{html.escape(runs.said())}{more}</p>'
    if not rows:
        return said
    frame = f'<div class="lab-runs-frame"><table class="lab-runs"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    return f"<style>{asset('table.css')}</style>{said}{frame}<script>{asset('table.js')}</script>"


def asset(name: str) -> str:
    """The text of a file beside this one."""
    return (resources.files(__package__) / name).read_text(encoding="utf-8")


def shown(key: str, value: Any) -> str:
    """A value as a person reads it."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if key == "started":
        return f"{value:%Y-%m-%d %H:%M}"
    if key in ("seconds", "training_seconds"):
        return clock(value)
    if key in ("params", "active", "flops_per_token", "tokens", "tokens_per_second"):
        return count(value)
    if key == "peak_memory_bytes":
        return f"{count(value)}B"
    return (f"{value:.4f}" if abs(value) >= 0.01 or value == 0 else f"{value:.3g}") if isinstance(value, float) else str(value)


def _side(key: str) -> str:
    return ' class="lab-word"' if key in WORDS else ""


def _cell(key: str, row: dict[str, Any]) -> str:
    value = row[key]
    if key == "step":
        share = min(1.0, row["step"] / max(1, row["steps"]))
        bar = f'<span class="lab-bar"><span style="width:{100 * share:.0f}%"></span></span>' if share < 1 else ""
        of = f" / {row['steps']:,}" if share < 1 else ""
        return f'<td data-value="{share:.4f}">{bar}{row["step"]:,}{of}</td>'
    title = f' title="{html.escape(str(row["reason"]))}"' if key == "status" and row.get("reason") else ""
    state = f' data-state="{html.escape(str(value))}"' if key == "status" else ""
    return f'<td{_side(key)}{title}{state} data-value="{html.escape(_sorted_by(value))}">{html.escape(shown(key, value))}</td>'


def _sorted_by(value: Any) -> str:
    if isinstance(value, datetime):
        return f"{value.timestamp():.3f}"
    return "" if value is None or (isinstance(value, float) and math.isnan(value)) else str(value)
