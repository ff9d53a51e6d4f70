"""The parts of a page that answer: question, hypothesis, the answer in one sentence, claims, paired differences, seeds needed."""

from __future__ import annotations

from typing import Any

from longcat_lab.ablation import begun, store
from longcat_lab.ablation.ends import DIVERGED
from longcat_lab.ablation.paired import FEWEST, seeds_needed
from longcat_lab.ablation.report.parts import NONE, Cell, Lines, Part, figures, marked, number, table
from longcat_lab.ablation.spec import Ablation
from longcat_lab.ablation.statistics import Contrast, Summary, Verdict, against_baseline, noise, signed
from longcat_lab.ablation.store import Sweep

MARKS = {"seen": "●", "not seen": "○", "not resolvable": "?"}
WORDS = {"seen": "seen", "not seen": "not seen", "not resolvable": "not resolvable at this budget"}
MEANING = (
    "seen: significant (5 %, Holm) in the claimed direction. not seen: the interval has no room for an effect that matters. "
    "not resolvable: these seeds cannot tell, or the arm that they speak for diverged where the other did not."
)
FEW = 6  # claims whose intervals fit into one sentence


def parts(sweep: Sweep, said: Summary) -> dict[str, Part]:
    """Everything that is judged or compared, by name."""
    a = sweep.ablation
    untrained = [f"{name} is evaluated from {arm.of} with other settings, not trained." for name, arm in a.evaluate.items()]
    jobs = sweep.results[sweep.results["variant"].isin(list(a.variants))]
    done, planned = int((jobs["status"] == "finished").sum()), len(a.variants) * len(a.seeds)
    lost = int((jobs["status"] == DIVERGED).sum())
    ended = f", {lost} diverged" if lost else ""
    matters = f"smallest effect that was said to matter: {a.smallest_effect:g}"
    found: dict[str, Part] = {
        "question": Lines((a.question,), "h1"),
        "hypothesis": Lines(_hypothesis(sweep)),
        "answer": Lines((answer(said.verdicts, a, done, planned, lost),)),
        "claims": Lines(tuple(_claim(verdict) for verdict in said.verdicts)),
        "reading": Lines(
            (
                f"{done} of {planned} jobs finished{ended}; arms are paired by seed. "
                f"Primary metric: {a.metric}, lower is better; {matters}.",
                MEANING,
                *untrained,
                *said.notes,
            )
        ),
        "arms": table(_arms(sweep)),
    }
    if said.verdicts:
        rows = [_comparison(v.contrast, v.adjusted_p) | {"verdict": WORDS[v.verdict]} for v in said.verdicts]
        found["claims-table"] = table(rows)
    beside = against_baseline(sweep.results, a)
    if beside:
        found["baseline-table"] = table([_comparison(c, p) for c, p in beside])
        how = "one comparison" if len(beside) == 1 else f"p after Holm over these {len(beside)} comparisons"
        found["baseline-words"] = Lines((f"Every arm against the baseline {a.baseline}, {how}; described, not judged.",))
    every: dict[frozenset[str], Contrast] = {}
    for c in [*(v.contrast for v in said.verdicts), *(c for c, _ in beside)]:
        every.setdefault(frozenset((c.better, c.than)), c)
    found["seeds-table"] = table([_needed(c, a.smallest_effect) for c in every.values()])
    found["secondary"] = Lines(tuple(said.secondary), "ul")
    return found


def answer(verdicts: list[Verdict], ablation: Ablation, done: int, planned: int, diverged: int = 0) -> str:
    """One sentence: which claims are seen, not seen, or not resolvable at this budget, each with its difference and interval."""
    lost = f" and {diverged} diverged" if diverged else ""
    so_far = "" if done == planned else f"With {done} of {planned} jobs finished{lost}: "
    if not verdicts:
        said = f"the question file makes no claim, so nothing is judged; what differs from {ablation.baseline} stands below."
    elif len(verdicts) == 1:
        v = verdicts[0]
        c, word = v.contrast, WORDS[v.verdict]
        by = f" by {ablation.smallest_effect:g} or more" if v.verdict == "not seen" and not _worse(c) else ""
        before = f"{c.divergence}, and where both finished " if c.divergence else ""
        said = f"{word}: {c.better} better than {c.than}{by}; {before}{c.metric} differs by {_with_interval(c)}{_small(v, ablation)}."
    else:
        said = _several(verdicts, ablation)
    return so_far + said if so_far else said[0].upper() + said[1:]


def _several(verdicts: list[Verdict], ablation: Ablation) -> str:
    """All claims in one sentence, gathered by verdict; of many claims without their intervals."""
    count, pairs = len(verdicts), sorted({v.contrast.n for v in verdicts})
    groups = {word: [v for v in verdicts if v.verdict == kind] for kind, word in WORDS.items()}
    listed = []
    for word, those in groups.items():
        if those:
            how_many = f"{len(those)} {'is' if len(those) == 1 else 'are'}"
            if len(those) == count:
                how_many = "both are" if count == 2 else f"all {count} are"
            listed.append(f"{how_many} {word} ({'; '.join(_phrase(v, ablation, count) for v in those)})")
    joined = ", ".join(listed[:-1]) + (" and " if len(listed) > 1 else "") + listed[-1]
    if pairs[-1] < 2:
        return f"of {count} claims {joined}; an interval needs two pairs."
    with_what = "with their 95 % intervals" if count <= FEW else "(their intervals are below)"
    counted = f"{pairs[0]}" if len(pairs) == 1 else f"{pairs[0]} to {pairs[-1]}"
    return f"of {count} claims {joined}; paired differences in {ablation.metric} {with_what}, n = {counted}."


def _phrase(v: Verdict, ablation: Ablation, claims: int) -> str:
    c = v.contrast
    known = "no pair yet" if c.n == 0 else signed(c.mean)
    if claims <= FEW and c.n > 1:
        known += " in all pairs" if c.constant else f", {signed(c.low)} to {signed(c.high)}"
    before = f"{c.divergence}, else " if c.divergence else ""
    return f"{c.better} better than {c.than}: {before}{known}{_small(v, ablation)}"


def _with_interval(c: Contrast) -> str:
    if c.n == 0:
        return "an unknown amount, no pair is complete"
    if c.n == 1:
        return f"{signed(c.mean)} in one pair, which has no interval"
    if c.constant:
        return f"exactly {signed(c.mean)} in all {c.n} pairs"
    return f"{signed(c.mean)}, {c.interval}"


def _worse(c: Contrast) -> bool:
    return c.n >= FEWEST and c.low > 0


def _small(v: Verdict, ablation: Ablation) -> str:
    if v.verdict == "not seen" and _worse(v.contrast):
        return ", it is worse"
    return ", less than was said to matter" if v.verdict == "seen" and -v.contrast.mean < ablation.smallest_effect else ""


def _claim(v: Verdict) -> str:
    c = v.contrast
    counted = f" and {v.comparisons} comparisons" if v.comparisons > 1 else ""
    power = f" With {c.n} pairs at this spread{counted}, 80 % power needs a true effect of {c.resolvable:.3g} or more." if c.n > 1 else ""
    flips = f" {c.without_normality}" if c.n >= FEWEST and not c.constant else ""
    return f"{MARKS[v.verdict]} {v.verdict}: {c.better} better than {c.than}\n{v.sentence}{power}{flips}"


def _hypothesis(sweep: Sweep) -> tuple[str, ...]:
    """The hypothesis as the jobs kept it when they began, what was edited later, and what of this nobody recorded."""
    a, question, jobs = sweep.ablation, store.read_question(sweep.folder), begun.begun(sweep.folder)
    starts = sorted(job.started for job in jobs if job.started)
    began = f" The first of the jobs here started {_minute(starts[0])}." if starts else ""
    told = [job for job in jobs if job.asked is not None]
    behind = begun.sentences(question, jobs)
    if any(key == "hypothesis" for key, _, _ in begun.disagreements(question, jobs)):
        kept = begun.brief((begun.first_asked(jobs) or {}).get("hypothesis"), 2000)
        said = [f"Hypothesis, as the first job kept it when it began: {kept}", f"ablation.yaml now says: {a.hypothesis}"]
    elif jobs and not told:
        said = [f"Hypothesis: {a.before.get('hypothesis') or a.hypothesis}"]
    elif begun.edits(question, "hypothesis") and "hypothesis" not in a.before:
        said = [f"Hypothesis: {a.hypothesis}", "It was edited when answers were there, and its first wording was not kept."]
    else:
        said = [f"Hypothesis, written before running: {a.before.get('hypothesis') or a.hypothesis}"]
    if a.before.get("hypothesis"):
        said.append(f"The hypothesis was edited later, to: {a.hypothesis}")
    said += behind
    if a.changes:
        said += [f"The question was edited after answers were there: {change}." for change in a.changes]
    elif not behind and (told or not jobs):
        said.append(f"The question file has not been edited since a job began.{began}")
    if jobs and not told:
        which = "the job that has begun" if len(jobs) == 1 else f"the {len(jobs)} jobs that have begun"
        said.append(
            f"The hypothesis at the start was not recorded: {which} here are of a version that did not keep it, so nothing in this folder "
            f"shows that it was written before running.{began}"
        )
    elif told and not behind:
        rest = len(jobs) - len(told)
        who = "The one job that has begun has" if len(jobs) == 1 else f"All {len(jobs)} jobs that have begun have"
        who = f"{len(told)} of the {len(jobs)} jobs that have begun have" if rest else who
        without = f"; of the other {rest} it was not recorded" if rest else ""
        said.append(f"{who} kept the question and the hypothesis as they were at the start{without}.")
    return tuple(said)


def _minute(stamp: str) -> str:
    return stamp[:16].replace("T", " ") + " UTC" if stamp.endswith(("+00:00", "Z")) else stamp


# ---- tables


def _comparison(c: Contrast, adjusted: float) -> dict[str, Any]:
    counted = "one comparison" if c.comparisons == 1 else f"as one of {c.comparisons} comparisons"
    interval = Cell(f"{signed(c.low)} to {signed(c.high)}", c.low) if c.n > 1 else Cell(NONE)
    return {
        "comparison": f"{c.better} − {c.than}",
        "pairs": number(c.n, 0),
        f"difference in {c.metric}": marked(figures(c.mean, sign=True), c.divergence),
        "95 % interval": interval,
        "p": _p(c.p if c.n >= FEWEST else None),
        "p (Holm)": _p(adjusted),
        "p (sign flips)": _p(c.flipped if c.n >= FEWEST else None),
        f"smallest effect these seeds could resolve ({counted})": figures(c.resolvable),
    }


def _p(value: Any) -> Cell:
    shown = figures(value, 2)
    return Cell("< 0.0001", shown.value) if shown.value is not None and shown.value < 0.0001 else shown


def _needed(c: Contrast, matters: float) -> dict[str, Any]:
    """Pairs that would resolve the effect that matters, half and a quarter of it, at the spread that was seen."""
    row: dict[str, Any] = {"comparison": f"{c.better} − {c.than}", "sd of a pair's difference": marked(figures(c.sd), c.divergence)}
    for share in (1, 2, 4):
        effect = matters / share
        needed = seeds_needed(effect, c.sd, c.alpha) if c.n > 1 else None
        missing = Cell("more than 10,000") if c.n > 1 else Cell(NONE)
        row[f"pairs to resolve {effect:.3g}"] = missing if needed is None else number(needed, 0)
    return row


def _arms(sweep: Sweep) -> list[dict[str, Any]]:
    a, rows = sweep.ablation, []
    metrics = dict.fromkeys([a.metric, *a.also, *([a.vanishes.metric] if a.vanishes else [])])
    spread = {metric: noise(sweep.results, metric) for metric in metrics if metric in sweep.results}
    for name in a.arms:
        done = (sweep.results["variant"] == name) & (sweep.results["status"] == "finished")
        row: dict[str, Any] = {"variant": name, **weights(a, name), "seeds": number(int(done.sum()), 0)}
        for metric, each in spread.items():
            mean, sd = (number(each.loc[name, key]) if name in each.index else Cell(NONE) for key in ("mean", "sd"))
            shown = Cell(f"{mean.text} ± {sd.text}", mean.value) if mean.value is not None else Cell(NONE)
            row[f"{metric} (mean ± sd)"] = marked(shown, diverged(sweep, name))
        rows.append(row)
    return rows


def diverged(sweep: Sweep, name: str) -> str:
    """`3 of 6 seeds diverged`, of an arm; empty where none did."""
    own = sweep.results[sweep.results["variant"] == name]["status"]
    count = int((own == DIVERGED).sum())
    return f"{count} of {len(own)} seeds diverged" if count else ""


def weights(ablation: Ablation, name: str) -> dict[str, str]:
    """A cell that says whose weights an arm has, where some arms are not trained."""
    if not ablation.evaluate:
        return {}
    arm = ablation.evaluate.get(name)
    return {"weights": f"evaluated from {arm.of}, not trained" if arm else "trained"}
