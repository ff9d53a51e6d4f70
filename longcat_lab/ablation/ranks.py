"""Whether two sweeps, of two sizes say, put the same arms in the same order."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longcat_lab.ablation.ends import DIVERGED
from longcat_lab.errors import LabError

if TYPE_CHECKING:
    import pandas as pd

    from longcat_lab.ablation.spec import Ablation

FEWEST = 3  # arms: of two, the order alone is there


@dataclass(frozen=True)
class Ranks:
    """Two orders of the same arms.

    Attributes:
        arms: what both have finished jobs of.
        means: of each arm, in either sweep; lower is better.
        tau, tau_p: Kendall's tau-b; two-sided p, exact where no means are equal.
        rho, rho_p: Spearman's rank correlation; two-sided p over all orders where the arms are few, else by Student's t.
        agreeing: share of pairs of arms in the same order in both.
        least_p: the smallest p that so many arms can give.
        diverged: one phrase per arm and sweep of which seeds diverged, as its mean is of the others; and the arms that have none left.
    """

    metric: str
    arms: tuple[str, ...]
    means: tuple[tuple[float, ...], tuple[float, ...]]
    tau: float
    tau_p: float
    rho: float
    rho_p: float
    agreeing: float
    least_p: float
    diverged: tuple[str, ...] = ()

    @property
    def sentence(self) -> str:
        n = len(self.arms)
        pairs = n * (n - 1) // 2
        apart = f"; seeds that diverged are in no mean ({'; '.join(self.diverged)})" if self.diverged else ""
        return (
            f"Kendall's tau {self.tau:+.2f} (p = {self.tau_p:.2g}; {n} arms allow none below {self.least_p:.2g}), Spearman's rho "
            f"{self.rho:+.2f} (p = {self.rho_p:.2g}), {round(self.agreeing * pairs)} of {pairs} pairs of arms in the same order{apart}"
        )


def rank_agreement(folder_a: str | Path, folder_b: str | Path, metric: str | None = None) -> Ranks:
    """How far two sweeps agree in the order of the arms that both have, by name, the controls left out.

    Args:
        metric: the first sweep's primary metric when left out.

    Raises:
        LabError: there is no sweep, they do not have three arms in common with finished jobs, or all arms of one are equal.
    """
    from longcat_lab.ablation.store import load_results, read_sweep

    sweep = read_sweep(folder_a)
    return agreement(sweep.results, load_results(folder_b), metric or sweep.ablation.metric, str(folder_b), [*sweep.ablation.controls])


def agreement(ours: pd.DataFrame, theirs: pd.DataFrame, metric: str, other: str, without: list[str]) -> Ranks:
    """The same of two tables of results; see `rank_agreement`."""
    from scipy import stats

    known = [_means(table, metric) for table in (ours, theirs)]
    arms = tuple(name for name in known[0] if name in known[1] and name not in without)
    shared = [name for name in dict.fromkeys(ours["variant"]) if name in set(theirs["variant"]) and name not in without]
    diverged = [each for name in shared for each in (_diverged(ours, name, "here"), _diverged(theirs, name, f"in {other}")) if each]
    diverged += [f"{name} is not ranked" for name in shared if diverged and name not in arms]
    if len(arms) < FEWEST:
        apart = f"; seeds that diverged are in none ({'; '.join(diverged)})" if diverged else ""
        raise LabError(f"The ranks of {len(arms)} arms cannot be compared with {other}: {FEWEST} with finished jobs are needed{apart}.")
    x, y = ([means[name] for name in arms] for means in known)
    if len({*x}) == 1 or len({*y}) == 1:
        raise LabError(f"The ranks cannot be compared with {other}: all arms have one {metric}.")
    tau, pairs = stats.kendalltau(x, y), [(i, j) for i in range(len(arms)) for j in range(i)]
    rho, p = stats.spearmanr(x, y)
    if len(arms) <= 8:  # 40 320 orders
        first, second = (stats.rankdata(each) - (len(arms) + 1) / 2 for each in (x, y))

        def product(order: Any, axis: int) -> Any:  # rho, but for a constant
            return (order * second).sum(axis=axis)

        found = stats.permutation_test((first,), product, permutation_type="pairings", n_resamples=math.inf, vectorized=True)
        p = found.pvalue
    same = sum((x[i] - x[j]) * (y[i] - y[j]) > 0 for i, j in pairs) / len(pairs)
    least = 2 / math.factorial(len(arms))
    numbers = float(tau.statistic), float(tau.pvalue), float(rho), float(p)
    return Ranks(metric, arms, (tuple(x), tuple(y)), *numbers, same, least, tuple(diverged))


def _means(results: pd.DataFrame, metric: str) -> dict[str, float]:
    done = results[results["status"] == "finished"]
    if metric not in done:
        return {}
    return {str(name): float(value) for name, value in done.groupby("variant", sort=False)[metric].mean().dropna().items()}


def _diverged(results: pd.DataFrame, name: str, where: str) -> str:
    own = results[results["variant"] == name]["status"]
    count = int((own == DIVERGED).sum())
    return f"{name} {where}: {count} of {len(own)}" if count else ""


def lines(results: pd.DataFrame, ablation: Ablation) -> list[str]:
    """What a page says of `compare_with`."""
    from longcat_lab.ablation.store import load_results

    if ablation.compare_with is None:
        return []
    name = Path(ablation.compare_with).name
    try:
        found = agreement(results, load_results(ablation.compare_with), ablation.metric, name, [*ablation.controls])
    except LabError as error:
        return [str(error)]
    return [f"Against the sweep {name}, of another size or budget, {ablation.metric} orders {', '.join(found.arms)}: {found.sentence}."]
