"""The parts of a sweep's result page, each a method that displays one part; the report notebook puts them in order."""

from __future__ import annotations

import html
import math
from pathlib import Path
from typing import Any

from longcat_lab.ablation import Verdict, noise, read_sweep, summary
from longcat_lab.budget import budget
from longcat_lab.config import apply, load, write_yaml
from longcat_lab.errors import LabError
from longcat_lab.notebook.figures import architecture_costs, curves, differences
from longcat_lab.notebook.style import show

MARKS = {"seen": "●", "not seen": "○", "not resolvable": "?"}
STYLE = """<style>
.lab-verdict { border-left: 4px solid #808080; padding: .4em .9em; margin: .7em 0; }
.lab-verdict b { font-size: 1.1em; }
.lab-seen { border-color: #009E73; } .lab-not-seen { border-color: #D55E00; } .lab-not-resolvable { border-color: #808080; }
table.lab { border-collapse: collapse; font-size: .9em; margin: .6em 0; }
table.lab th, table.lab td { text-align: right; padding: .25em .7em; border-bottom: 1px solid #80808055; vertical-align: top; }
table.lab th:first-child, table.lab td:first-child { text-align: left; }
.lab-wide { overflow-x: auto; }
</style>"""


def _table(rows: list[dict[str, Any]], text: tuple[str, ...] = ()) -> str:
    """Rows as an HTML table; every value is escaped, except columns named in `text`, which are HTML already."""
    if not rows:
        return "<p>none</p>"
    head = "".join(f"<th>{html.escape(str(key))}</th>" for key in rows[0])
    body = "".join(
        "<tr>" + "".join(f"<td>{value if key in text else html.escape(str(value))}</td>" for key, value in row.items()) + "</tr>"
        for row in rows
    )
    return f'<div class="lab-wide"><table class="lab"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _number(value: Any, digits: int = 4) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    return f"{value:,.{digits}f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


class Page:
    """One sweep, read once; each method displays one part of its page, also when only some jobs are finished."""

    def __init__(self, folder: str | Path) -> None:
        self.sweep = read_sweep(folder)
        self.ablation, self.results = self.sweep.ablation, self.sweep.results
        self.summary = summary(self.results, self.ablation)
        self.configs = {}
        for (variant, _), run in sorted(self.sweep.runs.items(), key=lambda pair: pair[0][1]):
            self.configs.setdefault(variant, run["config"])
        for name, arm in self.ablation.evaluate.items():
            if arm.of in self.configs:
                self.configs[name] = apply(self.configs[arm.of], {**arm.set, "training.evaluations": {}}).to_dict()
        self.arms = [name for name in self.ablation.arms if name in self.configs]

    def _weights(self, name: str) -> dict[str, str]:
        """A cell that says whose weights an arm has, where some arms are not trained."""
        if not self.ablation.evaluate:
            return {}
        arm = self.ablation.evaluate.get(name)
        return {"weights": f"evaluated from {arm.of}, not trained" if arm else "trained"}

    def _show(self, text: str) -> None:
        from IPython.display import HTML, display

        display(HTML(text))

    def answer(self) -> None:
        """Question, hypothesis, verdicts."""
        a, esc = self.ablation, html.escape
        jobs = self.results[self.results["variant"].isin(list(a.variants))]
        done = int((jobs["status"] == "finished").sum())
        parts = [STYLE, f"<h1>{esc(a.question)}</h1>", f"<p><b>Hypothesis, written before running:</b> {esc(a.hypothesis)}</p>"]
        for verdict in self.summary.verdicts:
            parts.append(self._verdict(verdict))
        matters = f"smallest effect that was said to matter: {a.smallest_effect:g}"
        parts += [
            f"<p>{done} of {len(jobs)} jobs finished; arms are paired by seed. "
            f"Primary metric: {esc(a.metric)}, lower is better; {matters}. ",
            "<b>seen</b>: significant (5 %, Holm) in the claimed direction. "
            "<b>not seen</b>: the interval has no room for an effect that matters. "
            "<b>not resolvable</b>: these seeds cannot tell.</p>",
        ]
        untrained = [f"{name} is evaluated from {arm.of} with other settings, not trained." for name, arm in a.evaluate.items()]
        parts += [f"<p>{esc(note)}</p>" for note in [*untrained, *self.summary.notes]]
        self._show("\n".join(parts))

    def _verdict(self, verdict: Verdict) -> str:
        c = verdict.contrast
        counted = f" and {verdict.comparisons} comparisons" if verdict.comparisons > 1 else ""
        power = (
            f" With {c.n} pairs at this spread{counted}, 80 % power needs a true effect of {c.resolvable:.3g} or more." if c.n > 1 else ""
        )
        return (
            f'<div class="lab-verdict lab-{verdict.verdict.replace(" ", "-")}"><b>{MARKS[verdict.verdict]} {verdict.verdict}</b>: '
            f"{html.escape(c.better)} better than {html.escape(c.than)}<br>{html.escape(verdict.sentence + power)}</div>"
        )

    def effect(self) -> None:
        """Paired differences with intervals, and the table of arms."""
        a = self.ablation
        if any(v.contrast.n for v in self.summary.verdicts):
            show(differences(self.summary.verdicts, a.smallest_effect, a.metric), f"Paired differences in {a.metric} with their intervals")
        rows = []
        metrics = [a.metric, *a.also, *([a.vanishes.metric] if a.vanishes else [])]
        spread = {metric: noise(self.results, metric) for metric in metrics if metric in self.results}
        for name in a.arms:
            done = (self.results["variant"] == name) & (self.results["status"] == "finished")
            row: dict[str, Any] = {"variant": name, **self._weights(name), "seeds": int(done.sum())}
            for metric, table in spread.items():
                mean, sd = float(table.loc[name, "mean"]), float(table.loc[name, "sd"])
                row[f"{metric} (mean ± sd)"] = "–" if math.isnan(mean) else f"{_number(mean)} ± {_number(sd)}"
            rows.append(row)
        self._show(_table(rows))
        self._show("".join(f"<p>{html.escape(line)}</p>" for line in self.summary.secondary))

    def learning(self) -> None:
        """Training curves of the arms."""
        import pandas

        runs: dict[str, list[pandas.DataFrame]] = {}
        for variant, seed in self.sweep.runs:
            path = self.sweep.folder / "jobs" / variant / f"seed-{seed}" / "metrics.parquet"
            if path.exists():
                runs.setdefault(variant, []).append(pandas.read_parquet(path))
        if runs:
            runs = {name: runs[name] for name in self.ablation.variants if name in runs}
            show(curves(runs), "Training loss of each arm over tokens, mean and range of its seeds")

    def fairness(self) -> None:
        """What was held equal, and what the arms really cost."""
        a, rows = self.ablation, []
        means = self.results[self.results["status"] == "finished"].groupby("variant").mean(numeric_only=True)
        for name in self.arms:
            cost = budget(load(self.configs[name])).loc["total"]
            measured = means.loc[name] if name in means.index else {}
            rates = [run["timings"].get("tokens_per_second") for (variant, _), run in self.sweep.runs.items() if variant == name]
            rates = [rate for rate in rates if rate]
            rows.append(
                {
                    "variant": name,
                    **self._weights(name),
                    "parameters": _number(int(cost["params"])),
                    "active": _number(int(cost["active params"])),
                    "FLOPs/token": _number(int(cost["FLOPs/token"])),
                    "tokens": _number(float(measured.get("tokens", math.nan)), 0),
                    "epochs": _number(float(measured.get("epochs", math.nan)), 2),
                    "tokens/s": _number(sum(rates) / len(rates) if rates else None, 0),
                    "seconds": _number(float(measured.get("seconds", math.nan)), 0),
                }
            )
        self._show(_table(rows))
        if self.arms:
            show(architecture_costs({n: budget(load(self.configs[n])) for n in self.arms}), "Parameters and FLOPs of each arm by part")
        lines = []
        for rule in a.match:
            held = rule.variants or [name for name in a.variants if name != rule.reference]
            moved = "; ".join(f"{name}: {key}" for name, key in rule.free.items())
            lines.append(
                f"{rule.quantity} of {', '.join(held)} held within {100 * rule.tolerance:g} % of {rule.reference}"
                + (f" by moving {moved}" if moved else "")
            )
        lines.append(f"Tuned: {a.tuned}" if a.tuned else "The question file names nothing that was tuned.")
        self._show("<ul>" + "".join(f"<li>{html.escape(line)}.</li>".replace("..", ".") for line in lines) + "</ul>")

    def mechanisms(self) -> None:
        """Whether each arm's mechanism took part, and the scale of the embedding with and without tables."""
        columns = {
            "real_experts_per_token": "real experts a token",
            "max_violation": "busiest expert over mean, −1",
            "load_entropy": "entropy of the experts' load (1: equal)",
            "router_cosine": "mean cosine of router rows",
            "router_gradient_ratio": "balance loss's share of the router's gradient (R_g)",
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
        finished = self.results[self.results["status"] == "finished"]
        rows = []
        for name in self.ablation.arms:
            own = finished[finished["variant"] == name]
            row = {"variant": name, **self._weights(name)}
            for key, title in columns.items():
                if key in finished:
                    row[title] = _number(float(own[key].mean()), 3) if len(own) else "–"
            rows.append(row)
        self._show(_table(rows))
        flagged = [
            f"{variant}, seed {seed}: {sentence}"
            for (variant, seed), run in sorted(self.sweep.runs.items())
            for sentence in run.get("not_engaged", [])
        ]
        if flagged:
            lines = "".join(f"<li>{html.escape(line)}</li>" for line in flagged)
            said = "<b>Not engaged as asked for</b> in these jobs, which test that mechanism in part or not at all:"
            self._show(f"<p>{said}</p><ul>{lines}</ul>")
        elif len(finished):
            self._show("<p>No finished job reports a mechanism that did not engage.</p>")

    def limits(self) -> None:
        """Where the effect should vanish, and what this page cannot say."""
        lines = [*self.summary.vanishing]
        if self.ablation.vanishes and not lines:
            lines.append(f"The effect should vanish here: {self.ablation.vanishes.where}; not measured yet.")
        for change in self.ablation.changes:
            lines.append(f"The question was edited after answers were there: {change}")
        if self.arms:
            config = load(self.configs[self.arms[0]])
            tokens, model = config.training.steps * config.data.batch_size * config.data.sequence_length, config.model
            lines.append(
                f"One size ({model.hidden_size} wide, {model.num_layers} layers), one budget ({tokens:,} tokens), one kind of text "
                f"({config.data.source.kind}): nothing here says what happens at another size."
            )
        self._show("<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>")

    def jobs(self) -> None:
        """Every planned job, how it ended, and where its notebook is."""
        rows = []
        for row in self.results.to_dict("records"):
            arm = self.ablation.evaluate.get(row["variant"])
            name = f"{row['variant']}/seed-{row['seed']}"
            job = f"{arm.of}/seed-{row['seed']}" if arm else name
            place = f"jobs/{job}"
            link = (
                f'<a href="{html.escape(place)}/notebook.ipynb">notebook</a>'
                if (self.sweep.folder / place / "notebook.ipynb").exists()
                else "–"
            )
            rows.append(
                {
                    "job": f"{name} (evaluated from {job}, not trained)" if arm else name,
                    "status": row["status"],
                    "reason": row["reason"] or "",
                    self.ablation.metric: _number(row.get(self.ablation.metric)),
                    "seconds": _number(row.get("seconds"), 0),
                    "identity": row["identity"],
                    "executed": link,
                }
            )
        self._show(_table(rows, text=("executed",)))

    def configuration(self) -> None:
        """The baseline's configuration, what each other arm changes, and the question file."""
        base = self.ablation.baseline if self.ablation.baseline in self.configs else next(iter(self.configs), None)
        if base is None:
            raise LabError(f"{self.sweep.folder}: no job has started, there is no configuration to show.")
        flat = {name: _flat(config) for name, config in self.configs.items()}
        rows = [{"setting": "weights", **{name: self._weights(name)["weights"] for name in self.arms}}] if self.ablation.evaluate else []
        for key in sorted({key for config in flat.values() for key in config}):
            values = {name: flat[name].get(key, "–") for name in self.arms}
            if key != "seed" and not key.startswith("training.evaluations.") and len({str(value) for value in values.values()}) > 1:
                rows.append({"setting": key, **values})
        self._show("<p>What differs between the arms:</p>" + _table(rows))
        for title, text in (
            (f"Full configuration of {base}", write_yaml(self.configs[base])),
            ("The question file", (self.sweep.folder / "ablation.yaml").read_text(encoding="utf-8")),
        ):
            self._show(f"<details><summary>{html.escape(title)}</summary><pre>{html.escape(text)}</pre></details>")

    def provenance(self) -> None:
        """Code, versions, machine and data of the jobs; more than one row means that they were not all made alike."""
        seen: dict[str, dict[str, Any]] = {}
        for run in self.sweep.runs.values():
            p = run.get("provenance") or {}
            row = {
                "commit": (p.get("commit") or "–")[:12] + (" + uncommitted changes" if p.get("dirty") else ""),
                "code": p.get("code", "–"),
                "data": (p.get("data") or "–")[:16],
                "torch": p.get("versions", {}).get("torch", "–"),
                "python": p.get("python", "–"),
                "device": p.get("accelerator") or p.get("device", "–"),
                "platform": p.get("platform", "–"),
            }
            if p:
                seen[str(row)] = {**row, "jobs": seen.get(str(row), {"jobs": 0})["jobs"] + 1}
        self._show(_table(list(seen.values())))


def _flat(data: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys."""
    if not isinstance(data, dict):
        return {prefix: data}
    return {key: value for name, inner in data.items() for key, value in _flat(inner, f"{prefix}.{name}" if prefix else name).items()}
