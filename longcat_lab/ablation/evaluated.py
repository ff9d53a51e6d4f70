"""Arms that are not trained: a variant's trained weights, evaluated with other settings of its model.

The variant's jobs do the evaluating (`training.evaluations`) and leave `ARM/METRIC` beside their own metrics; here these become rows of
their own. Such an arm has no job and no folder.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from longcat_lab.ablation.rooms import Rooms
from longcat_lab.errors import LabError

if TYPE_CHECKING:
    from longcat_lab.ablation.match import Solution
    from longcat_lab.ablation.spec import Ablation

FROM = "evaluated_from"  # column of results.parquet: the variant whose weights an arm has; empty for an arm that is trained
OF_THE_JOB = ("seed", "status", "reason", "identity", "not_engaged")


def arms_of(ablation: Ablation, variant: str) -> list[str]:
    """The arms that are evaluated from one variant."""
    return [name for name, arm in ablation.evaluate.items() if arm.of == variant]


def configurations(ablation: Ablation, trained: dict[str, Any], rooms: Rooms) -> dict[str, Any]:
    """Arm -> its variant's configuration with its own settings.

    Raises:
        LabError: a setting does not fit.
    """
    found = {}
    for name, arm in ablation.evaluate.items():
        try:
            found[name] = rooms.apply(trained[arm.of], arm.set)
        except LabError as error:
            raise LabError(f"Arm '{name}': {error}") from None
    return found


def asked(ablation: Ablation, trained: dict[str, Any], rooms: Rooms) -> dict[str, Any]:
    """The variants' configurations, in which those that others are evaluated from say so.

    Raises:
        LabError: a variant's own `training.evaluations` has an arm's name.
    """
    found = dict(trained)
    for variant in dict.fromkeys(arm.of for arm in ablation.evaluate.values()):
        own = (trained[variant].to_dict().get("training") or {}).get("evaluations") or {}
        names = arms_of(ablation, variant)
        if twice := [name for name in names if name in own]:
            raise LabError(f"Arm '{twice[0]}': training.evaluations of '{variant}' has this name already; give the arm another.")
        arms = {**own, **{name: ablation.evaluate[name].set for name in names}}
        found[variant] = rooms.apply(trained[variant], {"training.evaluations": arms})
    return found


def check(ablation: Ablation, solution: Solution, rooms: Rooms) -> None:
    """Raises LabError where an arm needs weights that its variant does not train."""
    for variant in dict.fromkeys(arm.of for arm in ablation.evaluate.values()):
        try:
            rooms.check_evaluations(solution.configs[variant])
        except LabError as error:
            raise LabError(f"Variant '{variant}': {error}") from None


def rows(row: dict[str, Any], arms: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """A job's row without what belongs to its arms, then a row for each of them.

    Args:
        row: see `store.result_row`; has `ARM/METRIC` once the job has finished.
        arms: arm -> totals of its configuration.
    """
    own = {key: value for key, value in row.items() if key.partition("/")[0] not in arms or "/" not in key}
    if not arms:
        return [own]
    job = {key: row[key] for key in OF_THE_JOB if key in row}
    found = [own | {FROM: ""}]
    for name, totals in arms.items():
        measures = {key.removeprefix(f"{name}/"): value for key, value in row.items() if key.startswith(f"{name}/")}
        # The seconds are the job's, most of them of training: this arm took none of those.
        found.append({**measures, **totals, "variant": name, **job, "seconds": None, FROM: row["variant"]})
    return found
