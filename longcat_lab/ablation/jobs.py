"""One question becomes jobs: every variant with every seed."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longcat_lab.ablation import evaluated, places, plugin_copies, store
from longcat_lab.ablation.match import Solution
from longcat_lab.ablation.quantities import setting
from longcat_lab.ablation.rooms import Rooms
from longcat_lab.ablation.spec import Ablation
from longcat_lab.errors import LabError
from longcat_lab.files import read_json
from longcat_lab.node import nearest


@dataclass(frozen=True, eq=False)
class Job:
    """One run of one variant with one seed.

    Attributes:
        sweep: the ablation's name.
        config: the resolved configuration, seed included.
        identity: hash of configuration, data and code; a finished job with this identity is not run again.
        folder: where everything of this job lives.
        notebook: the notebook that runs it.
        arms: arms that are evaluated from it -> totals of their configurations.
    """

    sweep: str
    variant: str
    seed: int
    config: Any
    identity: str
    totals: dict[str, float]
    folder: Path
    notebook: Path
    arms: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.variant}/seed-{self.seed}"

    def record(self) -> dict[str, Any]:
        """The content of run.json before the job has started."""
        return {
            "status": "planned",
            "reason": None,
            "identity": self.identity,
            "config": self.config.to_dict(),
            "provenance": {},
            "timings": {},
            "budget": self.totals,
            "final": {},
            "variant": self.variant,
            "seed": self.seed,
            "sweep": self.sweep,
            "job": {"notebook": str(self.notebook)},
            **({"arms": self.arms} if self.arms else {}),
        }


Cells = dict[tuple[str, int], Any]


def cells(ablation: Ablation, solution: Solution, rooms: Rooms | None = None) -> Cells:
    """(variant, seed) -> configuration, seed by seed, so that whole pairs are there early and half a sweep can already be read.

    Raises:
        LabError: a job, which is a process of its own, could not make its configuration.
    """
    rooms = rooms or Rooms()
    for kind, configs in (("Variant", solution.configs), ("Arm", solution.evaluated)):
        for name, config in configs.items():
            try:
                rooms.check_portable(config)
            except LabError as error:
                raise LabError(f"{kind} '{name}': {error}") from None
    pairs = [(name, seed, config) for seed in ablation.seeds for name, config in solution.configs.items()]
    return {(name, seed): rooms.apply(config, ablation.drawn(name, seed, setting(config, "data.seed"))) for name, seed, config in pairs}


def plan(ablation: Ablation, solution: Solution, folder: Path, notebook: Path, rooms: Rooms | None = None) -> list[Job]:
    """Every job of the sweep. Their identities need the prepared data, which is made here if it is not there yet."""
    rooms = rooms or Rooms()
    jobs: list[Job] = []
    known: dict[str, Any] = {}
    for (variant, seed), config in cells(ablation, solution, rooms).items():
        home, identity = store.job_folder(folder, variant, seed), rooms.identity(config, known)
        arms = {name: solution.totals[name] for name in evaluated.arms_of(ablation, variant)}
        config = plugin_copies.moved(config, folder, solution.plugins)
        jobs.append(Job(ablation.name, variant, seed, config, identity, solution.totals[variant], home, notebook, arms))
    if edited := [path for path, source in rooms.contents(list(solution.plugins)).items() if source != solution.plugins[path]]:
        raise LabError(f"{edited[0]} was edited while the sweep was being prepared: run it again.")
    return jobs


def unmeasured(ablation: Ablation, job: Job, measured: Collection[str]) -> str | None:
    """The sentence for the first metric of the question that neither a finished job nor an arm evaluated on its weights has among
    `measured`, or None.
    """
    wanted = [("metric", ablation.metric), *(("also", name) for name in ablation.also)]
    if ablation.vanishes:
        wanted.append(("vanishes.metric", ablation.vanishes.metric))
    known = [name for name in measured if name not in ("variant", "seed", "status", "reason", "identity") and "/" not in name]
    known += [name.removeprefix(f"{arm}/") for arm in job.arms for name in measured if name.startswith(f"{arm}/")]
    for place, name in wanted:
        if name not in known:
            hint = nearest(name, known)
            return f"'{place}' names '{name}', which {job.name} has finished without{hint}{'' if hint.endswith('?') else '.'}"
    return None


def find_notebook(ablation: Ablation, question: str | Path | None = None) -> Path:
    """The notebook that runs one job: as given, or beside the question file, or in the repository.

    Raises:
        LabError: it is in none of these places, leads out of them, or is no notebook.
    """
    name = ablation.notebook if ablation.notebook is not None else "notebooks/run.ipynb"
    file = Path(question) if question is not None else None
    folders = [Path.cwd(), *([file.resolve().parent] if file is not None else [])] if ablation.notebook is not None else []
    found = places.inside(name, [*folders, places.REPOSITORY], file)
    where = ablation.at("notebook") if ablation.notebook is not None else ""
    if not found:
        raise LabError(f"{where}'notebook' names {name}, {places.LEAVES}")
    place = places.first(found)
    if place is None:
        raise LabError(f"{where}The notebook of '{ablation.name}' is not there: looked for {', '.join(map(str, found))}.")
    content = read_json(place)
    if not isinstance(content, dict) or type(content.get("nbformat")) is not int or not isinstance(content.get("cells"), list):
        raise LabError(f"{where}{place} is no notebook: name a file that Jupyter has written (JSON with nbformat and cells).")
    return place


def check_processes(ablation: Ablation, solution: Solution, notebook: Path, rooms: Rooms) -> None:
    """Raises LabError where jobs of many processes were asked for and a configuration or the notebook cannot have them."""
    together = ablation.resources.together
    if together == 1:
        return
    for name, config in solution.configs.items():
        try:
            rooms.check_layout(config, together)
        except LabError as error:
            raise LabError(f"Variant '{name}', with {together} processes: {error}") from None
    cells = (read_json(notebook) or {}).get("cells") or []
    given = ["".join(cell.get("source") or "") for cell in cells if "parameters" in (cell.get("metadata") or {}).get("tags", [])]
    if not any(re.search(r"^processes\b[^=\n]*=", text, re.MULTILINE) for text in given):
        raise LabError(
            f"resources asks for {together} processes, and {notebook} has no parameter for them: add `processes = None` to its cell of "
            "parameters, and `nproc=processes` to its lab.fit."
        )
