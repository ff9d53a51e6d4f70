"""The parts of a page that say what was run: mechanisms, limits, every planned job's fate, configuration, provenance."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from longcat_lab.ablation import begun, store
from longcat_lab.ablation.report.configured import DRAWN, configurations, flat, uneven
from longcat_lab.ablation.report.judged import diverged, weights
from longcat_lab.ablation.report.parts import NONE, Cell, Lines, Part, number, table
from longcat_lab.ablation.statistics import Summary
from longcat_lab.ablation.store import Sweep
from longcat_lab.config.yaml import write_yaml

FATES = {"finished": "done", **{word: word for word in ("diverged", "failed", "interrupted", "running")}, "planned": "skipped"}
LOST = "unaccounted for"
PAGE, NOTEBOOK, DIFF = "notebook.html", "notebook.ipynb", "uncommitted.diff"
UNTRACKED = 30  # names of files in no commit that the page shows
LONGEST = 60_000  # characters of a difference to its commit that are on the page; the file beside the job has all
MEASURES = {
    "real_experts_per_token": "real experts a token",
    "max_violation": "busiest expert over mean, −1",
    "load_entropy": "entropy of the experts' load (1: equal)",
    "router_cosine": "mean cosine of router rows",
    "router_gradient_ratio": "balance loss's share of the router's gradient (R_g)",
    "index_kl": "indexer's divergence from attention (nats)",
    "selected_share": "share of the keys that attention reads",
    "next_accuracy": "accuracy of the next token",
    **{f"mtp_accuracy_{k}": f"accuracy of prediction step {k}" for k in range(1, 9)},
    "accepted_length": "tokens a pass in speculative decoding",
    "rows_touched": "share of table rows read",
    "table_rms": "RMS of table entries",
    "base_variance_share": "the token row's share of the embedding's variance",
    "embedding_rms_initial": "embedding RMS at start",
    "embedding_rms_final": "embedding RMS at end",
    "first_attention_ratio_initial": "first attention over identity, norms, at start",
    "first_attention_ratio_final": "first attention over identity, norms, at end",
}


def parts(sweep: Sweep, said: Summary) -> dict[str, Part]:
    """All of it, by name; a sweep of which no job has started has no configuration."""
    configs = configurations(sweep)
    found: dict[str, Part] = {
        "mechanisms-table": table(_mechanisms(sweep)),
        "not-engaged": _not_engaged(sweep),
        "limits": Lines(tuple(_limits(sweep, said, configs)), "ul"),
        **_jobs(sweep),
        **_differences(sweep, configs),
        **_provenance(sweep),
    }
    question = (sweep.folder / "ablation.yaml").read_text(encoding="utf-8")
    return found | {"question-file": Lines((question,), "pre", "The question file")}


# ---- mechanisms and limits


def _mechanisms(sweep: Sweep) -> list[dict[str, Any]]:
    """A row a measure, a column an arm: the mean over finished seeds."""
    a, finished = sweep.ablation, sweep.results[sweep.results["status"] == "finished"]
    rows: list[dict[str, Any]] = []
    if a.evaluate:
        rows.append({"mean over finished seeds": "weights", **{name: weights(a, name)["weights"] for name in a.arms}})
    lost = {name: diverged(sweep, name) for name in a.arms}
    if any(lost.values()):
        rows.append({"mean over finished seeds": "seeds that are in no mean", **{name: lost[name] or "none" for name in a.arms}})
    for key, title in MEASURES.items():
        if key in finished and finished[key].notna().any():
            means = {name: number(finished.loc[finished["variant"] == name, key].mean(), 3) for name in a.arms}
            rows.append({"mean over finished seeds": title, **means})
    return rows


def _not_engaged(sweep: Sweep) -> Lines:
    flagged = [
        f"{variant}, seed {seed}: {sentence}"
        for (variant, seed), run in sorted(sweep.runs.items())
        for sentence in run.get("not_engaged") or []
    ]
    if flagged:
        said = "Not engaged as asked for in these jobs, which test that mechanism in part or not at all:"
        return Lines((said, *(f"– {line}" for line in flagged)))
    if (sweep.results["status"] == "finished").any():
        return Lines(("No finished job reports a mechanism that did not engage.",))
    return Lines(("No job has finished: nothing is known of the mechanisms.",))


def _limits(sweep: Sweep, said: Summary, configs: dict[str, dict[str, Any]]) -> list[str]:
    a, lines = sweep.ablation, [*said.vanishing]
    if a.vanishes and not lines:
        lines.append(f"The effect should vanish here: {a.vanishes.where}; not measured yet.")
    config = configs.get(a.baseline) or next(iter(configs.values()), {})
    try:
        model, data = config["model"], config["data"]
        tokens = config["training"]["steps"] * data["batch_size"] * data["sequence_length"]
        lines.append(
            f"One size ({model['hidden_size']} wide, {model['num_layers']} layers), one budget ({tokens:,} tokens), one kind of text "
            f"({data['source']['kind']}): nothing here says what happens at another size."
        )
    except (KeyError, TypeError):  # a configuration of another kind, or none yet
        lines.append("One size, one budget, one kind of text: nothing here says what happens at another size.")
    told: dict[str, list[str]] = {}
    for (variant, seed), run in sorted(sweep.runs.items()):
        for sentence in (*(run.get("left_out") or ()), *((run["passed_over"],) if run.get("passed_over") else ())):
            told.setdefault(str(sentence), []).append(f"{variant}/seed-{seed}")
    for sentence, jobs in told.items():
        named = ", ".join(jobs[: begun.NAMED]) + (f" and {len(jobs) - begun.NAMED} more" if len(jobs) > begun.NAMED else "")
        lines.append(f"{sentence.rstrip('.')} ({named}).")
    return lines


# ---- jobs


def _jobs(sweep: Sweep) -> dict[str, Part]:
    """Every planned cell, also one that the table of results has lost, and the sum."""
    a = sweep.ablation
    known = {(str(row["variant"]), int(row["seed"])): row for row in sweep.results.to_dict("records")}
    rows, counts = [], dict.fromkeys([*FATES.values(), LOST], 0)
    for name in a.arms:
        arm = a.evaluate.get(name)
        for seed in a.seeds:
            row, job = known.get((name, seed)), f"{arm.of if arm else name}/seed-{seed}"
            fate = FATES.get(str(row["status"]), LOST) if row is not None else LOST
            counts[fate] += 0 if arm else 1
            rows.append(
                {
                    "job": f"{name}/seed-{seed} (evaluated from {job}, not trained)" if arm else f"{name}/seed-{seed}",
                    "fate": fate,
                    "why": _why(row, fate),
                    a.metric: number(row.get(a.metric)) if row is not None else Cell(NONE),
                    "seconds": number(row.get("seconds"), 0) if row is not None else Cell(NONE),
                    "identity": str(row["identity"]) if row is not None else NONE,
                    "executed": _links(sweep, arm.of if arm else name, seed),
                }
            )
    total = len(a.variants) * len(a.seeds)
    shown = ", ".join(f"{n} {fate}" for fate, n in counts.items() if n or fate in ("done", "failed", "skipped"))
    return {
        "jobs-sum": Lines((f"{total} planned jobs: {shown}.",)),
        "jobs-table": table(rows),
        "not-planned": Lines(tuple(_not_planned(sweep))),
    }


def _not_planned(sweep: Sweep) -> list[str]:
    """Job folders that have begun and that the table above does not show: of other seeds or variants, or replaced by a change."""
    a = sweep.ablation
    planned = {(name, seed) for name in a.variants for seed in a.seeds}
    found = begun.begun(sweep.folder)

    def named(job: begun.Begun) -> str:
        value = number((job.run.get("final") or {}).get(a.metric)).text
        known = "" if value == NONE else f", {a.metric} {value}"
        return f"{job.place} ({FATES.get(str(job.run.get('status')), 'without a record')}{known})"

    lines = []
    if other := [job for job in found if job.kept and (job.variant, job.seed) not in planned]:
        lines.append(f"Also in this folder, not planned by this question: {'; '.join(named(job) for job in other)}.")
    if aside := [job for job in found if not job.kept]:
        words = "Also in this folder, set aside because configuration, data or code changed later"
        lines.append(f"{words}: {'; '.join(named(job) for job in aside)}.")
    return lines


def _why(row: dict[str, Any] | None, fate: str) -> str:
    if row is None:
        return "the question plans it, results.parquet has no row of it"
    return str(row["reason"] or "") or ("had not started when this page was made" if fate == "skipped" else "")


def _links(sweep: Sweep, variant: str, seed: int) -> Cell:
    """The executed notebook, rendered (once its job has ended) and as it is; not what another configuration left there."""
    run, place = sweep.runs.get((variant, seed)), f"jobs/{variant}/seed-{seed}"
    if run is None or not (sweep.folder / place / NOTEBOOK).is_file():
        return Cell(NONE)
    links = [("ipynb", f"{place}/{NOTEBOOK}")]
    if run.get("status") in store.DONE:
        links.insert(0, ("read", f"{place}/{PAGE}"))
    return Cell(" · ".join(words for words, _ in links), links=tuple(links))


# ---- configuration and provenance


def _differences(sweep: Sweep, configs: dict[str, dict[str, Any]]) -> dict[str, Part]:
    """What each arm sets otherwise than the baseline: the baseline's value and the arm's."""
    a = sweep.ablation
    base = a.baseline if a.baseline in configs else next(iter(configs), None)
    if base is None:
        return {"differences-words": Lines(("No job has started, there is no configuration to show.",))}
    rows: list[dict[str, Any]] = []
    theirs = flat(configs[base])
    for name in configs:
        if name == base:
            continue
        own, moved = flat(configs[name]), (a.solved.get(name) or {}).get("moved") or {}
        for key in sorted({*theirs, *own}):
            if any(other.startswith(f"{key}.") for other in (theirs if key in own else own)):
                continue  # nothing on one side, many settings on the other: each of those has its row
            before, after = theirs.get(key, NONE), own.get(key, NONE)
            if str(before) != str(after) and key not in DRAWN and not key.startswith("training.evaluations"):
                after = f"{after} (solved)" if key in moved else str(after)
                rows.append({"arm": name, **weights(a, name), "setting": key, f"{base} (baseline)": str(before), "this arm": after})
    same = [name for name in configs if name != base and all(row["arm"] != name for row in rows)]
    words = [f"What each arm sets otherwise than {base}:"] if rows else []
    words += [f"{', '.join(same)}: nothing is set otherwise than in {base}."] if same else []
    words += [f"There is no other arm than {base}."] if len(configs) == 1 else []
    words += [f"Not one configuration: {line}" for line in uneven(sweep)]
    found: dict[str, Part] = {"differences-words": Lines(tuple(words))}
    if rows:
        found["differences-table"] = table(rows)
    return found | {"baseline-configuration": Lines((write_yaml(configs[base]),), "pre", f"Full configuration of {base}")}


def _provenance(sweep: Sweep) -> dict[str, Part]:
    """Code, versions, machine and data of the jobs, a column for each way they were made; and what of the code was in no commit."""
    made: dict[str, dict[str, Any]] = {}
    counts: dict[str, int] = {}
    diffs: dict[str, tuple[str, list[str]]] = {}
    for (variant, seed), run in sorted(sweep.runs.items()):
        p = run.get("provenance") or {}
        if not p:
            continue
        place = f"jobs/{variant}/seed-{seed}/{DIFF}"
        diff = _read(sweep.folder / place) if p.get("dirty") else ""
        name = hashlib.sha256(diff.encode()).hexdigest()[:8] if diff else ""
        if diff:
            diffs.setdefault(name, (diff, []))[1].append(place)
        untracked = [str(name) for name in p.get("untracked") or []]
        more = f" and {len(untracked) - UNTRACKED} more, in run.json" if len(untracked) > UNTRACKED else ""
        versions = p.get("versions") or {}
        row = {
            "commit": (p.get("commit") or NONE)[:12] + (" + uncommitted changes" if p.get("dirty") else ""),
            "difference": Cell(f"uncommitted.diff ({name})", links=((f"uncommitted.diff ({name})", diffs[name][1][0]),)) if diff else NONE,
            "files in no commit": f"{len(untracked)}: {', '.join(untracked[:UNTRACKED])}{more}" if untracked else "0",
            "code": p.get("code") or NONE,
            "data": (p.get("data") or NONE)[:16],
            "versions": ", ".join(f"{key} {value}" for key, value in versions.items() if value) or NONE,
            "python": p.get("python") or NONE,
            "device": p.get("accelerator") or p.get("device") or NONE,
            "cores, threads": f"{p.get('cpus', NONE)}, {p.get('threads', NONE)}",
            "platform": p.get("platform") or NONE,
        }
        key = repr(row)
        made.setdefault(key, row)
        counts[key] = counts.get(key, 0) + 1
    words = [] if len(made) < 2 else ["More than one column: the jobs were not all made alike."]
    if not made:
        words = ["No job has said yet what it was made of."]
    titles = {key: f"{'' if len(made) == 1 else f'{i}: '}{counts[key]} jobs" for i, key in enumerate(made, 1)}
    known = next(iter(made.values()), {})
    rows = [{"made of": what, **{titles[key]: row[what] for key, row in made.items()}} for what in known]
    found: dict[str, Part] = {
        "provenance-words": Lines(tuple(words)),
        "provenance-table": table(rows),
    }
    for name, (diff, places) in diffs.items():
        cut = "" if len(diff) <= LONGEST else f"\n… cut here; all {len(diff):,} characters are in {places[0]}"
        found[f"diff-{name}"] = Lines((diff[:LONGEST] + cut,), "pre", f"Uncommitted changes {name}, of {len(places)} jobs")
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
