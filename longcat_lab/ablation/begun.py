"""Job folders of a sweep that have begun, whether or not its question still plans them, and what the question said when they did.

The question file can be edited by anybody, and a question can be asked again with other seeds or other names in a folder that has
answers. What has begun stays known by its folder, and each job's run.json keeps what was asked when the job began (`asked`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longcat_lab.ablation import store

# What decides how an answer is judged, and which answers there should be.
KEYS = ("question", "hypothesis", "metric", "smallest_effect", "claims", "baseline", "variants", "seeds", "data_seeds")
NAMED = 12  # folders that one sentence names


@dataclass(frozen=True)
class Begun:
    """One job's folder: `place` below the sweep's (jobs/VARIANT/seed-S, or in superseded), and its run.json (empty: there is none)."""

    place: str
    variant: str
    seed: int
    run: dict[str, Any]

    @property
    def kept(self) -> bool:
        """Whether it lies below jobs/, not set aside."""
        return self.place.startswith("jobs/")

    @property
    def finished(self) -> bool:
        return self.run.get("status") == "finished"

    @property
    def started(self) -> str:
        """When its last attempt began, UTC; empty where it is not known."""
        return str((self.run.get("job") or {}).get("started") or "")

    @property
    def asked(self) -> dict[str, Any] | None:
        """What the question said when it began; None for jobs of versions that did not keep it."""
        asked = self.run.get("asked")
        return asked if isinstance(asked, dict) else None


def begun(folder: Path) -> list[Begun]:
    """Every job folder that has logged anything, or whose run.json says more than `planned`; by place."""
    found = []
    for place in sorted([*folder.glob("jobs/*/seed-*"), *folder.glob("superseded/*/*/seed-*")]):
        number = place.name.split("-")[1]  # superseded folders of one name are numbered: seed-0-2
        if not number.isdecimal() or not place.is_dir():
            continue
        run, lines = store.read_run(place) or {}, place / "metrics.jsonl"
        if run.get("status", "planned") != "planned" or (lines.is_file() and lines.stat().st_size):
            found.append(Begun(place.relative_to(folder).as_posix(), place.parent.name, int(number), run))
    return found


def asked(question: dict[str, Any]) -> dict[str, Any]:
    """What a job keeps of the content of ablation.yaml."""
    return {key: question[key] for key in KEYS if question.get(key) not in (None, [], {}, "")}


def first_asked(jobs: Iterable[Begun]) -> dict[str, Any] | None:
    """What was asked when the first of those jobs began that kept it; None where there is none."""
    return next((job.asked for job in sorted(jobs, key=lambda job: job.started) if job.asked is not None), None)


def at_start(question: dict[str, Any], jobs: Iterable[Begun]) -> dict[str, Any]:
    """What the first job was asked, of the keys that the question file tells no edit of; empty where no job kept it."""
    kept = first_asked(jobs)
    return {} if kept is None else {key: kept.get(key) for key in KEYS if edits(question, key) == 0}


def edited_when(jobs: list[Begun], planned: set[tuple[str, int]]) -> str:
    """`7 jobs had finished and 1 other had begun; no longer planned: a/seed-3`: the end of a sentence about an edit of the question."""
    done, other = sum(job.finished for job in jobs), sum(not job.finished for job in jobs)
    words = [f"{done} job{'s' * (done != 1)} had finished"] if done else []
    words += [f"{other}{' other' if done else ' job'}{'s' * (other != 1)} had begun"] if other else []
    gone = [f"{job.variant}/seed-{job.seed}" for job in jobs if job.kept and (job.variant, job.seed) not in planned]
    said = ", ".join(gone[:NAMED]) + (f" and {len(gone) - NAMED} more" if len(gone) > NAMED else "")
    return " and ".join(words) + (f"; no longer planned: {said}" if gone else "")


def edited(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Keys in which two contents of ablation.yaml ask otherwise; what the runner writes there by itself, and where jobs run, is none."""
    by_itself = ("solved", "measured", "tuning", "noise", "copied", "changes", "before", "resources")
    return [key for key in {**before, **now} if _asked(before, key) != _asked(now, key) and key not in by_itself]


def _asked(question: dict[str, Any], key: str) -> Any:
    """What `key` holds, without where it is tracked: that decides no number."""
    value = question.get(key)
    if key == "set" and isinstance(value, dict):
        return {name: v for name, v in value.items() if name != "track" and not name.startswith("tracking.")} or None
    return value


def edits(question: dict[str, Any], key: str) -> int:
    """How many edits of `key` the question file tells of; see `store.write_question`."""
    heads = (str(change).partition(": ")[2].partition(" edited when ")[0] for change in question.get("changes") or [])
    return sum(key in head.split(", ") for head in heads)


def disagreements(question: dict[str, Any], jobs: Iterable[Begun]) -> list[tuple[str, Begun, Any]]:
    """(key, job, what it kept) where a job began under another question than the file holds, and the file tells of no such edit."""
    found = []
    for job in sorted(jobs, key=lambda job: job.started):
        for key in KEYS if job.asked is not None else ():
            count, known = edits(question, key), [question.get(key)]
            if count:
                known.append((question.get("before") or {}).get(key))
            if count < 2 and _plain(job.asked.get(key)) not in [_plain(value) for value in known]:
                found.append((key, job, job.asked.get(key)))
    return found


def _plain(value: Any) -> Any:
    return value or None


def brief(value: Any, length: int = 200) -> str:
    """A value of the question in a sentence."""
    text = " ".join(str(value).split()) if value not in (None, [], "") else "nothing"
    return text if len(text) <= length else text[: length - 1] + "…"


def sentences(question: dict[str, Any], jobs: list[Begun]) -> list[str]:
    """A sentence for each key of the question that was changed behind the sweep's back."""
    found: dict[str, list[tuple[Begun, Any]]] = {}
    for key, job, kept in disagreements(question, jobs):
        found.setdefault(key, []).append((job, kept))
    said = []
    for key, those in found.items():
        (first, kept), more = those[0], f" (and {len(those) - 1} more)" if len(those) > 1 else ""
        said.append(
            f"ablation.yaml has '{brief(question.get(key))}' as its {key}, but {first.place}/run.json{more} has kept "
            f"'{brief(kept)}' since its job began, and the file tells of no such edit."
        )
    return said
