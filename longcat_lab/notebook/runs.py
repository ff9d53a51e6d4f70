"""Runs as a table that can be read, sorted, picked from and compared."""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from longcat_lab.errors import LabError
from longcat_lab.node import nearest
from longcat_lab.notebook.listing.found import Found, find
from longcat_lab.training import Run

if TYPE_CHECKING:
    import pandas

    from longcat_lab.notebook.listing.comparison import Comparison

TEXT = ("name", "status", "started", "sweep", "variant", "reason")


def runs(folder: str | Path = "runs") -> Runs:
    """Every run below `folder`, also those that train now: single runs, panel runs and jobs of sweeps, at any depth.

    Raises:
        LabError: there is no such folder.
    """
    if not Path(folder).is_dir():
        raise LabError(f"There is no folder '{folder}': give the one that holds runs, as in lab.runs('runs').")
    return Runs(Path(folder), *find(Path(folder)))


class Runs:
    """Runs as they were when they were looked at, newest first; `lab.runs(folder)` looks again.

    `runs["demo/*"]`, `runs[["a", "b"]]`, `runs.where("validation_bpb < 3")` and `runs.latest(3)` pick some; each gives Runs again.

    folder: where they were looked for; names are relative to it.
    skipped: folders there with something like a run that cannot be read.
    """

    def __init__(self, folder: Path, found: Sequence[Found], skipped: int = 0) -> None:
        self.folder, self.found, self.skipped = folder, list(found), skipped

    @property
    def names(self) -> list[str]:
        return [run.name for run in self.found]

    def __len__(self) -> int:
        return len(self.found)

    def __iter__(self) -> Iterator[Run]:
        return (Run(run.path) for run in self.found)

    @functools.cached_property
    def frame(self) -> pandas.DataFrame:
        """One row a run: name, status, step, steps, started, seconds (of training), validation_bpb, params, active, flops_per_token,
        seed, sweep, variant, reason, tokens_per_second, peak_memory_bytes, loss (the last one of a run that trains), final metrics.
        """
        import pandas

        rows = [run.row for run in self.found]
        frame = pandas.DataFrame(rows, columns=list(dict.fromkeys(key for row in rows for key in row)) or ["name", "status"])
        if rows:
            frame["started"] = pandas.to_datetime(frame["started"], utc=True)
            frame = frame.assign(**{column: pandas.to_numeric(frame[column]) for column in frame if column not in TEXT})
        return frame

    def __getitem__(self, wanted: str | Iterable[str]) -> Runs:
        """Runs by name or by pattern (`*` and `?` as in file names, over slashes too), or by a list of these.

        Raises:
            LabError: no run has such a name.
        """
        if isinstance(wanted, int | slice):
            raise LabError(f"runs[{wanted!r}]: give a name, a pattern such as 'demo/*', or a list of them; runs.latest(n) counts.")
        return self._only(name for each in ([wanted] if isinstance(wanted, str) else wanted) for name in self._matching(each))

    def _matching(self, wanted: str) -> list[str]:
        names = self.names
        found = [wanted] if wanted in names else fnmatch.filter(names, wanted)
        if not found:
            hint = nearest(wanted, names)
            hint = hint if len(names) <= 12 or hint.endswith("?") else "."
            raise LabError(f"There is no run '{wanted}' among the {len(names)} in {self.folder}{hint}")
        return found

    def _only(self, names: Iterable[str]) -> Runs:
        kept = set(names)
        return Runs(self.folder, [run for run in self.found if run.name in kept])

    def where(self, condition: str) -> Runs:
        """Runs of which `condition` is true: a condition of `DataFrame.query` on the columns of `frame`.

        Raises:
            LabError: it cannot be read, or names no column.
        """
        try:
            names = list(self.frame.query(condition, engine="python")["name"])
        except Exception as error:  # of many kinds: it is somebody's text
            said = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            example = "status == 'finished' and validation_bpb < 3"
            raise LabError(f'where({condition!r}): {said}; write columns of .frame, as in "{example}".') from None
        return self._only(names)

    def latest(self, count: int = 1) -> Runs:
        """The `count` runs that started last."""
        return Runs(self.folder, self.found[: max(0, count)])

    def open(self, name: str) -> Run:
        """The run of this name (or the only one that the pattern fits), with metrics, configuration and model.

        Raises:
            LabError: none or several have it.
        """
        found = self[name].found
        if len(found) > 1:
            raise LabError(f"'{name}' fits {len(found)} runs ({', '.join(run.name for run in found[:3])}, ...): name one.")
        return Run(found[0].path)

    def compare(self, metric: str | Sequence[str] = "loss", *, by: str = "run", skip: float = 0.05) -> Comparison:
        """These runs side by side: curves on common axes, only the settings that differ, summaries.

        Args:
            metric: column of `Run.metrics`, or several: a figure each.
            by: `run` draws a line a run; `variant` a line a variant of a sweep, with a band from its lowest to its highest seed.
            skip: share of the first steps that is not drawn.

        Raises:
            LabError: there is no run to compare, or none has logged the metric as numbers.
        """
        from longcat_lab.notebook.listing.comparison import compare

        return compare(self.found, [metric] if isinstance(metric, str) else list(metric), by, skip)

    def said(self) -> str:
        """How many there are, in words."""
        states: dict[str, int] = {}
        for run in self.found:
            states[run.status] = states.get(run.status, 0) + 1
        parts = ", ".join(f"{count} {state}" for state, count in states.items())
        more = f" Skipped: {self.skipped} with no readable run.json." if self.skipped else ""
        return f"{len(self)} run{'s' * (len(self) != 1)} in {self.folder}{': ' * bool(parts)}{parts}.{more}"

    def __repr__(self) -> str:
        if not self.found:
            return self.said()
        columns = ["name", "status", "step", "steps", "validation_bpb"]
        return f"{self.said()}\n{self.frame[columns].head(30).to_string(index=False)}"

    def _repr_html_(self) -> str:
        from longcat_lab.notebook.listing.table import table

        return table(self)
