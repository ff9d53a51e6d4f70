"""One setting swept for each arm before the question is asked, on seeds of its own: FOLDER/tuning, a sweep like any other."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longcat_lab.ablation import ends, store
from longcat_lab.ablation.match import Solution
from longcat_lab.ablation.outcome import JobsFailed, LabInterrupted
from longcat_lab.ablation.quantities import STEPS
from longcat_lab.errors import LabError

if TYPE_CHECKING:
    from longcat_lab.ablation.spec import Ablation, Tune

HOME = "tuning"  # below the sweep's folder
NAMED = 5  # failed jobs that one sentence names


class TuningFailed(JobsFailed):
    """Jobs of the tuning failed, so that nothing is chosen and no job of the question has begun. `folder` is the tuning's."""


@dataclass(frozen=True)
class Curve:
    """Of one arm: value -> mean of the metric over the tuning's seeds; only values at which none of its jobs diverged."""

    means: dict[float, float]
    lost: tuple[str, ...] = ()

    @property
    def best(self) -> float:
        """The value with the lowest mean; of equal ones the smallest."""
        return min(self.means, key=lambda value: (self.means[value], value))

    def remark(self, tried: list[float]) -> str:
        """What a reader must know of the choice; empty where there is nothing."""
        ties = sum(mean == self.means[self.best] for mean in self.means.values()) - 1
        said = [f"{ties + 1} values are equal, the smallest was taken"] if ties else []
        if self.best in (min(tried), max(tried)):
            said.append("the best is at the edge of the grid, so a better one may lie beyond it")
        return "; ".join([*said, *self.lost])


def arms(ablation: Ablation) -> list[str]:
    """The arms that are tuned: all but the controls, which take the baseline's value."""
    return [name for name in ablation.variants if name not in ablation.controls]


def variant(arm: str, number: int) -> str:
    """The name of an arm at one of its values."""
    return f"{arm}_{number}"


def question(ablation: Ablation, solution: Solution) -> dict[str, Any]:
    """The tuning's own question: every arm at every value, as variants, on the tuning's seeds."""
    tune: Tune = ablation.tune
    variants = {
        variant(arm, i): {**ablation.variants[arm], **solution.moved.get(arm, {}), **_steps(tune), tune.setting: value}
        for arm in arms(ablation)
        for i, value in enumerate(tune.values, 1)
    }
    return {
        "name": f"{ablation.name}_tuning"[:80],
        "question": f"Which {tune.setting} is best for each arm of {ablation.name}?",
        "hypothesis": "None: a choice, made on other seeds than the question's own.",
        "base": ablation.base,
        "plugins": ablation.plugins,
        "set": ablation.set,
        "baseline": next(iter(variants)),
        "variants": variants,
        "seeds": tune.seeds,
        "metric": ablation.metric,
        "smallest_effect": ablation.smallest_effect,
        **({"notebook": ablation.notebook} if ablation.notebook else {}),
        **({"resources": told} if (told := ablation.resources.model_dump(mode="json", exclude_defaults=True)) else {}),
    }


def _steps(tune: Tune) -> dict[str, int]:
    return {} if tune.steps is None else {STEPS: tune.steps}


def tuned(
    ablation: Ablation, solution: Solution, folder: Path, run: Callable[[Path, Path], Any], notebook: Path, again: str = ""
) -> Ablation:
    """The question with the best value in each arm, after the sweep that finds it has run, or gone on.

    Args:
        run: runs the question file that it is given in the folder that it is given.
        again: the command that goes on with the question itself.

    Raises:
        LabInterrupted: the tuning was stopped.
        TuningFailed: jobs of it failed. A choice made without them would be another one once they have run.
        LabError: an arm has no value at which all of its jobs finished.
    """
    from longcat_lab.config.yaml import write_yaml

    store.check_folder(folder, ablation.name)
    home = folder / HOME
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "tuning.yaml"
        path.write_text(write_yaml({**question(ablation, solution), "notebook": str(notebook)}), encoding="utf-8")
        try:
            run(path, home)
        except LabInterrupted as error:
            raise LabInterrupted(
                f"Stopped while tuning {ablation.tune.setting}, before the question's own jobs ({home}).", error.folder
            ) from None
        except JobsFailed:
            raise TuningFailed(_failed(ablation, home, again), home) from None
    return chosen(ablation, curves(ablation, home))


def _failed(ablation: Ablation, home: Path, again: str) -> str:
    """Which jobs, and what to do. The tuning's own driver names a file that is gone by now."""
    results = store.load_results(home)
    bad = results[~results["status"].isin(ends.SETTLED)]
    jobs = [f"{row['variant']}/seed-{row['seed']}: {row['reason'] or row['status']}" for row in bad.to_dict("records")]
    more = f"; and {len(jobs) - NAMED} more" if len(jobs) > NAMED else ""
    return (
        f"The tuning of {ablation.tune.setting} has failed, so nothing is chosen and no job of the question itself has begun: "
        f"{len(jobs)} of its {len(results)} jobs did not finish ({'; '.join(jobs[:NAMED])}{more}); see job.log and notebook.ipynb in "
        f"{home / 'jobs'}, and run them once more with: {again} (or take a value at which no job can run out of 'tune.values')."
    )


def curves(ablation: Ablation, home: Path) -> dict[str, Curve]:
    """Arm -> what its values reached, once every job has finished or diverged. A rate that is too high is a result: it is left out."""
    results, tune = store.load_results(home), ablation.tune
    found = {}
    for arm in arms(ablation):
        means, lost = {}, []
        for i, value in enumerate(tune.values, 1):
            rows = results[results["variant"] == variant(arm, i)]
            done = rows[rows["status"] == "finished"]
            values = [float(v) for v in done[ablation.metric]] if ablation.metric in done else []
            if len(values) == len(tune.seeds) and all(map(math.isfinite, values)):
                means[value] = sum(values) / len(values)
            else:
                why = sorted({str(status) for status in rows["status"] if status != "finished"}) or [f"no {ablation.metric}"]
                lost.append(f"{value:g} is left out ({', '.join(why)})")
        if not means:
            raise LabError(f"Tuning found no {tune.setting} at which all jobs of '{arm}' finish; see {home} and change 'tune.values'.")
        found[arm] = Curve(means, tuple(lost))
    return found


def chosen(ablation: Ablation, found: dict[str, Curve]) -> Ablation:
    """The question with each arm at its best value, and what was tried."""
    tune = ablation.tune
    best = {arm: curve.best for arm, curve in found.items()}
    best |= dict.fromkeys(ablation.controls, best[ablation.baseline])
    told = {
        "setting": tune.setting,
        "metric": ablation.metric,
        "seeds": tune.seeds,
        **({"steps": tune.steps} if tune.steps else {}),
        "chosen": best,
        "means": {arm: [[value, mean] for value, mean in curve.means.items()] for arm, curve in found.items()},
        "remarks": {arm: said for arm, curve in found.items() if (said := curve.remark(tune.values))},
    }
    seeds = ", ".join(map(str, tune.seeds))
    tried = ", ".join(f"{value:g}" for value in tune.values)
    words = f"{tune.setting} of each arm, the best of {tried} on seeds {seeds}, which are not the seeds here"
    return ablation.model_copy(
        update={
            "variants": {name: {**overrides, tune.setting: best[name]} for name, overrides in ablation.variants.items()},
            "tuning": told,
            "tuned": f"{ablation.tuned.rstrip('. ')}. Also {words}" if ablation.tuned else words,
        }
    )


def lines(ablation: Ablation) -> list[str]:
    """What a page says of each arm's choice; the curve is in its table."""
    told = ablation.tuning
    if not told:
        return []
    taken = ", ".join(f"{arm} {value:g}" for arm, value in told["chosen"].items())
    remarks = [f"{arm}: {said}" for arm, said in told["remarks"].items()]
    return [f"{told['setting']} was tuned beforehand on seeds {', '.join(map(str, told['seeds']))}: {taken}."] + [
        f"Of the tuning of {remark}." for remark in remarks
    ]
