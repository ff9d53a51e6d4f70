"""Curves over training as points: the mean over an arm's seeds and the lowest and highest of them, thinned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from longcat_lab.ablation import store

if TYPE_CHECKING:
    import pandas

    from longcat_lab.ablation.store import Sweep

POINTS = 120  # of a curve: as many as can be told apart; longer paths would be simplified when drawn, and lose their points
SKIP = 0.05  # share of the first tokens that is not drawn, so that the fall at the start does not flatten the rest


def bands(runs: Mapping[str, Sequence[pandas.DataFrame]], metric: str = "loss", skip: float = SKIP) -> list[dict[str, Any]]:
    """An arm each: `arm`, `n` seeds, and as many `x` (tokens), `y` (mean), `low` and `high`.

    Only what all seeds of an arm have logged is there; rows without a finite value are left out.
    """
    found = []
    for name, tables in runs.items():
        values = [known for table in tables if len(known := _finite(table, metric))]
        shared = sorted(set.intersection(*(set(each.index) for each in values))) if values else []
        shared = [x for x in shared if x >= skip * max(shared)]
        if not shared:
            continue
        if len(shared) > POINTS:
            shared = [shared[i] for i in np.unique(np.linspace(0, len(shared) - 1, POINTS).round().astype(int))]
        all_of_them = np.array([each.loc[shared].to_numpy() for each in values])
        lines = {"y": all_of_them.mean(0), "low": all_of_them.min(0), "high": all_of_them.max(0)}
        found.append({"arm": name, "n": len(values), "x": [int(x) for x in shared], **{key: _rounded(v) for key, v in lines.items()}})
    return found


def _finite(table: pandas.DataFrame, metric: str) -> pandas.Series:
    """The metric over tokens, without the rows that have none."""
    import pandas

    if metric not in table or "tokens" not in table:
        return pandas.Series(dtype=float)
    column = table.drop_duplicates("tokens", keep="last").set_index("tokens")[metric].astype(float)
    return column[np.isfinite(column)]


def _rounded(values: np.ndarray) -> list[float]:
    return [float(f"{value:.6g}") for value in values]


def of_sweep(sweep: Sweep) -> dict[str, list[dict[str, Any]]]:
    """Metric -> its curves: the training loss, and the primary metric and bits per byte where they were logged over training.

    An arm's curve is that of its finished seeds; a seed that ended otherwise has a curve of its own, with `seed` and `status`.
    """
    import pandas

    done: dict[str, list[pandas.DataFrame]] = {name: [] for name in sweep.ablation.variants}
    rest: list[tuple[str, int, str, pandas.DataFrame]] = []
    for (variant, seed), run in sorted(sweep.runs.items(), key=lambda pair: pair[0][1]):
        path = store.job_folder(sweep.folder, variant, seed) / "metrics.parquet"
        if not path.is_file() or variant not in done:
            continue
        if run.get("status") == "finished":
            done[variant].append(pandas.read_parquet(path))
        elif run.get("status") in store.DONE:  # a running job's table grows while the page is read
            rest.append((variant, seed, run["status"], pandas.read_parquet(path)))
    found = {}
    for metric in dict.fromkeys(("loss", sweep.ablation.metric, "validation_bpb")):
        series = bands({name: tables for name, tables in done.items() if tables}, metric)
        for variant, seed, status, table in rest:
            series += [{**each, "seed": seed, "status": status} for each in bands({variant: [table]}, metric)]
        if any(
            len(each["x"]) > 1 or "seed" in each for each in series
        ):  # what a seed that ended badly has logged is drawn, if only a point
            found[metric] = series
    return found
