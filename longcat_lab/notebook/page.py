"""The parts of a sweep's result page, each a method that displays one part; the report notebook puts them in order.

What is said is made in `ablation.report`, from the folder alone, and checked against it later; here it is put beside its figures.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from longcat_lab.ablation import read_sweep, summary
from longcat_lab.ablation.report import content, cost, points
from longcat_lab.ablation.report import html as markup
from longcat_lab.ablation.report.configured import configurations
from longcat_lab.budget import budget
from longcat_lab.config import load
from longcat_lab.errors import LabError
from longcat_lab.notebook.figures import architecture_costs, band_curves, differences, quality_against_cost
from longcat_lab.notebook.style import picture


class Page:
    """One sweep, read once; each method displays one part of its page, also when only some jobs are finished."""

    def __init__(self, folder: str | Path) -> None:
        self.sweep = read_sweep(folder)
        self.ablation, self.results = self.sweep.ablation, self.sweep.results
        self.summary = summary(self.results, self.ablation)
        self.parts = content.parts(self.sweep, self.summary)
        self.classes = content.classes(self.summary)
        self.facts = content.facts(self.sweep, self.summary, self.parts)
        self.figures: dict[str, dict[str, Any]] = self.facts["figures"]

    def _show(self, *pieces: str) -> None:
        from IPython.display import HTML, display

        if text := "\n".join(piece for piece in pieces if piece):
            display(HTML(text))

    def _part(self, name: str) -> str:
        return markup.of_part(name, self.parts[name], self.classes.get(name, ())) if name in self.parts else ""

    def answer(self) -> None:
        """Question, hypothesis as it was before the run, the answer in one sentence, and each claim."""
        said = self._part("answer").join(content.ANSWER)
        self._show(self._part("question"), self._part("hypothesis"), said, self._part("claims"), self._part("reading"))

    def effect(self) -> None:
        """Paired differences with intervals, of claims and of every arm against the baseline; seeds for smaller effects; the arms."""
        a = self.ablation
        if "differences" in self.figures:
            rest = points.compared(self.sweep, self.summary)[len(self.summary.verdicts) :]
            drawn = differences(self.summary.verdicts, a.smallest_effect, a.metric, rest, "differences")
            self._show(picture(drawn, f"Paired differences in {a.metric} with their intervals", "differences"))
        else:
            self._show(content.SENTENCES["no pair"])
        title = content.TITLES
        if self.summary.verdicts:
            self._show(title["claims"], self._part("claims-table"))
        self._show(title["baseline"] if "baseline-table" in self.parts else "", *map(self._part, _NAMES["baseline"]))
        if self.parts["seeds-table"].rows:
            self._show(title["seeds"], self._part("seeds-table"))
        self._show(title["arms"], self._part("arms"), self._part("secondary"))

    def learning(self) -> None:
        """Curves of the arms over training: the loss, and the primary metric where it was logged."""
        for name, figure in self.figures.items():
            if name.startswith("curve-"):
                words = f"{figure['y']} of each arm over tokens, mean and range of its seeds"
                self._show(picture(band_curves(figure["series"], figure["y"], name), words, name))
        if not any(name.startswith("curve-") for name in self.figures):
            self._show(content.SENTENCES["no curve"])

    def fairness(self) -> None:
        """What the arms cost beside what they reach, under all four conventions, and which of them was held equal."""
        self._show(*map(self._part, _NAMES["cost"]))
        if "cost" in self.figures:
            chosen = {name: "held equal in part" if ":" in words else words for name, words in cost.held(self.ablation).items()}
            drawn = quality_against_cost(self.figures["cost"]["series"], self.ablation.metric, chosen, "cost")
            self._show(picture(drawn, f"{self.ablation.metric} of each arm over four measures of its cost", "cost"))
        tables, why = self._budgets()
        if tables:
            self._show(picture(architecture_costs(tables), content.BY_PART))
        self._show(content.SENTENCES.get(why, ""))

    def _budgets(self) -> tuple[dict[str, Any], str]:
        """Arm -> parameters and FLOPs by part, as this code counts them, or none and the key of the sentence that says why."""
        found, recorded = {}, cost.costs(self.sweep)
        for name, config in configurations(self.sweep).items():
            if config.get("plugins"):
                return {}, "own blocks"  # loading them would run code of the folder
            try:
                table = budget(load(config))
            except (LabError, OSError):  # settings or plugins of another time
                return {}, "other settings"
            if not math.isclose(table.loc["total", "params"], recorded[name]["total_params"] or math.nan, rel_tol=1e-6):
                return {}, "other totals"
            found[name] = table
        return found, ""

    def mechanisms(self) -> None:
        """Whether each arm's mechanism took part, and the scale of the embedding with and without tables."""
        self._show(self._part("mechanisms-table"), self._part("not-engaged"))

    def limits(self) -> None:
        """Where the effect should vanish, and what this page cannot say."""
        self._show(self._part("limits"))

    def jobs(self) -> None:
        """Every planned job, how it ended, and where its notebook is; and what else has begun in the folder."""
        self._show(self._part("jobs-sum"), self._part("jobs-table"), self._part("not-planned"))

    def configuration(self) -> None:
        """What each arm sets otherwise than the baseline, the baseline's configuration, and the question file."""
        self._show(*map(self._part, _NAMES["configuration"]))

    def provenance(self) -> None:
        """Code, versions, machine and data of the jobs; more than one column means that they were not all made alike."""
        self._show(*map(self._part, _NAMES["provenance"]), *(self._part(name) for name in self.parts if name.startswith("diff-")))

    def numbers(self) -> None:
        """Every text and number of the page, and every point of its figures, for machines; shows nothing."""
        self._show(markup.of_facts(self.facts))


_NAMES = {
    "baseline": ("baseline-words", "baseline-table"),
    "cost": ("cost-table", "matching-table", "matching-words", "tuning-table"),
    "configuration": ("differences-words", "differences-table", "baseline-configuration", "question-file"),
    "provenance": ("provenance-words", "provenance-table"),
}
