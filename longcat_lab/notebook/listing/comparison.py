"""Some runs side by side: their curves on common axes, the settings in which they differ, their summaries."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longcat_lab.errors import LabError
from longcat_lab.node import nearest
from longcat_lab.notebook.listing.found import Found
from longcat_lab.training.trackers import read_rows

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

DRAWN = 12  # lines of a figure; more cannot be told apart
DESCRIPTION = "{} over training tokens, a line a run"
LABELS = {"loss": "training loss (nats a token)", "train_bpb": "training bits per byte", "validation_bpb": "validation bits per byte"}
FIRST = (
    "status",
    "step",
    "steps",
    "validation_bpb",
    "params",
    "active",
    "flops_per_token",
    "seconds",
    "tokens_per_second",
    "peak_memory_bytes",
)
NOT_SETTINGS = ("tracking", "plugins")  # they decide no number


@dataclass(frozen=True)
class Comparison:
    """What `Runs.compare` found; a notebook shows all of it.

    Attributes:
        figures: metric -> its curves.
        differences: a row a setting that is not the same in all runs, a column a run; None where a run has no such setting.
        summary: a row a quantity, a column a run.
        note: what these curves can and cannot say.
    """

    figures: dict[str, Figure]
    differences: pandas.DataFrame
    summary: pandas.DataFrame
    note: str

    def __repr__(self) -> str:
        parts = (self.note, "Settings that differ:", self.differences.to_string(), "Summary:", self.summary.to_string())
        return "\n\n".join(parts)

    def _ipython_display_(self) -> None:
        from IPython.display import display

        from longcat_lab.notebook.style import show

        for metric, figure in self.figures.items():
            show(figure, DESCRIPTION.format(metric))
        display({"text/html": self._tables(), "text/plain": repr(self)}, raw=True)

    def _repr_html_(self) -> str:
        from longcat_lab.notebook.style import picture

        return "".join(picture(figure, DESCRIPTION.format(metric)) for metric, figure in self.figures.items()) + self._tables()

    def _tables(self) -> str:
        from longcat_lab.notebook.listing.table import asset, shown

        settings = _html(self.differences, _setting) if len(self.differences) else "<p>They have the same settings.</p>"
        return (
            f"<style>{asset('table.css')}</style><p>{html.escape(self.note)}</p>"
            f"<h4>Settings that differ</h4>{settings}<h4>Summary</h4>{_html(self.summary, shown)}"
        )


def compare(found: Sequence[Found], metrics: Sequence[str], by: str, skip: float) -> Comparison:
    """See `Runs.compare`."""
    from longcat_lab.notebook.figures import curves

    if not found:
        raise LabError("There is no run to compare: pick at least one.")
    if by not in ("run", "variant"):
        raise LabError(f"by={by!r}: write 'run' or 'variant'.")
    labels = _labels([run.name for run in found])
    tables = {run.name: metrics_of(run.path) for run in found}
    several = len({_sweep(run) for run in found}) > 1
    lines: dict[str, list[pandas.DataFrame]] = {}
    for run, label in zip(found, labels, strict=True):
        lines.setdefault(_arm(run, label, several) if by == "variant" else label, []).append(tables[run.name])
    figures = {}
    for metric in metrics:
        _check(metric, list(tables.values()))
        with_it = {label: each for label, each in lines.items() if any(metric in table for table in each)}
        chosen = dict(list(with_it.items())[:DRAWN])
        figures[metric] = curves(chosen, metric, LABELS.get(metric, metric), skip)
    more = f" The first {DRAWN} of {len(lines)} are drawn." if len(lines) > DRAWN else ""
    return Comparison(figures, _differences(found, labels), _summary(found, labels), _note(found) + more)


def _sweep(run: Found) -> Path | None:
    """The sweep's folder, of a job in FOLDER/jobs/VARIANT/seed-S."""
    place = run.path.resolve().parents
    return place[2] if run.row["sweep"] and run.row["variant"] and len(place) > 3 else None


def _arm(run: Found, label: str, several: bool) -> str:
    """What a run is a seed of; arms of different sweeps are different arms, whatever they are called."""
    sweep = _sweep(run)
    return label if sweep is None else f"{sweep.name}: {run.row['variant']}" if several else run.row["variant"]


def metrics_of(folder: Path) -> pandas.DataFrame:
    """One row a logged step, of a run that trains now too; empty where nothing is logged."""
    import pandas

    return pandas.DataFrame(read_rows(folder / "metrics.jsonl"))


def _check(metric: str, tables: list[pandas.DataFrame]) -> None:
    known = sorted({column for table in tables for column in table if not any(isinstance(value, list) for value in table[column])})
    if metric not in known:
        hint = nearest(metric, known)
        raise LabError(f"None of these runs has logged numbers as '{metric}'{hint}{'' if hint.endswith('?') else '.'}")


def _labels(names: list[str]) -> list[str]:
    """Names without the folders that all have in common."""
    parts = [name.split("/") for name in names]
    shared = 0
    while len(names) > 1 and all(len(each) > shared + 1 for each in parts) and len({each[shared] for each in parts}) == 1:
        shared += 1
    return ["/".join(each[shared:]) for each in parts]


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {key: value}
    return {path: inner for name, each in value.items() for path, inner in _flat(each, f"{key}.{name}" if key else name).items()}


def _differences(found: Sequence[Found], labels: list[str]) -> pandas.DataFrame:
    import pandas

    settings = [_flat({key: value for key, value in run.record["config"].items() if key not in NOT_SETTINGS}) for run in found]
    keys = list(dict.fromkeys(key for each in settings for key in each))
    differing = [key for key in keys if len({json.dumps(each.get(key), sort_keys=True) for each in settings}) > 1]
    rows = [[each.get(key) for each in settings] for key in differing]
    return pandas.DataFrame(rows, index=pandas.Index(differing, name="setting"), columns=labels, dtype=object)


def _summary(found: Sequence[Found], labels: list[str]) -> pandas.DataFrame:
    import pandas

    keys = list(dict.fromkeys([*FIRST, *(run_key for run in found for run_key in run.record.get("final") or {})]))
    keys = [key for key in keys if any(run.row.get(key) is not None for run in found)]
    rows = [[run.row.get(key) for run in found] for key in keys]
    return pandas.DataFrame(rows, index=pandas.Index(keys, name="quantity"), columns=labels, dtype=object)


def _note(found: Sequence[Found]) -> str:
    """Whether an error bar is to be had."""
    alone = "A single run has no error bar: a difference between two of them may be that of their seeds."
    sweeps: dict[Path, dict[str, set[int]]] = {}
    for run in found:
        if (sweep := _sweep(run)) is not None:
            sweeps.setdefault(sweep, {}).setdefault(run.row["variant"], set()).add(run.row["seed"])
    paired = [str(folder) for folder, seeds in sweeps.items() if len(seeds) > 1 and len(set.intersection(*seeds.values())) > 1]
    if not paired:
        return alone
    return f"{alone} These are paired by seed: the report of their sweep has the intervals (longcat-lab report {' or '.join(paired)})."


def _setting(_: str, value: Any) -> str:
    return "–" if value is None else json.dumps(value) if isinstance(value, bool | list | dict) else str(value)


def _html(frame: pandas.DataFrame, shown: Callable[[str, Any], str]) -> str:
    head = "".join(f'<th scope="col">{html.escape(str(name))}</th>' for name in frame.columns)
    body = "".join(
        f'<tr class="lab-differs"><th scope="row" class="lab-word">{html.escape(str(key))}</th>'
        f"{''.join(f'<td>{html.escape(shown(str(key), value))}</td>' for value in row)}</tr>"
        for key, row in zip(frame.index, frame.itertuples(index=False, name=None), strict=True)
    )
    corner = f'<th class="lab-word">{frame.index.name}</th>'
    return f'<div class="lab-runs-frame"><table class="lab-runs"><thead><tr>{corner}{head}</tr></thead><tbody>{body}</tbody></table></div>'
