"""The page of a sweep in which an arm failed and whose hypothesis was edited: what stands on it, and what it does in a browser."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import nbformat
import pandas
import pytest
from fake_rooms import question

from longcat_lab.ablation import check, judge, read, read_sweep, summary
from longcat_lab.ablation.report import content, html
from longcat_lab.ablation.report.drawn import readings
from longcat_lab.ablation.report.judged import answer
from longcat_lab.ablation.report.rendering import LARGEST, job_page

pytestmark = pytest.mark.timeout(900)  # the first test waits for nine jobs, each in a kernel of its own
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def sweep(rendered_sweep: Path) -> Path:
    return rendered_sweep


@pytest.fixture(scope="module")
def page(sweep: Path) -> html.Shown:
    return html.shown((sweep / "report.html").read_text(encoding="utf-8"))


def lines(page: html.Shown, part: str) -> str:
    return page.texts[part][0]


def column(page: html.Shown, part: str, name: str) -> dict[str, str]:
    head, *rows = page.tables[part]
    return {row[0]: row[head.index(name)] for row in rows}


def test_the_check_passes(sweep: Path) -> None:
    assert check(sweep) == []


def test_the_top_answers_and_keeps_the_first_hypothesis(sweep: Path, page: html.Shown) -> None:
    text = (sweep / "report.html").read_text(encoding="utf-8")
    places = [text.index(f'data-part="{part}"') for part in ("question", "hypothesis", "answer", "claims", "claims-table", "cost-table")]
    assert places == sorted(places)
    said = lines(page, "hypothesis")
    assert said.startswith("Hypothesis,writtenbeforerunning:bisbetter") and "editedlater,to:bisbetter&cheaper" in said
    assert re.search(r"UTC:hypothesiseditedwhen7jobshadfinished", said)
    assert re.match(
        r"With7of8jobsfinished:seen:bbetterthana;validation_bpbdiffersby-0\.1\d*,-0\.\d+to-0\.\d+\(95%interval,n=3\)", lines(page, "answer")
    )


def test_every_planned_job_has_its_fate_and_the_sum_is_right(page: html.Shown) -> None:
    assert lines(page, "jobs-sum") == html.squeezed("8 planned jobs: 7 done, 1 failed, 0 skipped.")
    fates = column(page, "jobs-table", "fate")
    assert len(fates) == 8 and {job: fate for job, fate in fates.items() if fate != "done"} == {"b/seed-3": "failed"}
    assert set(column(page, "jobs-table", "why").values()) == {"", "ValueError: loss is not finite at step 3"}


def test_differences_are_those_of_the_jobs(sweep: Path, page: html.Shown) -> None:
    results = pandas.read_parquet(sweep / "results.parquet").set_index(["variant", "seed"])["validation_bpb"]
    differences = [results["b", seed] - results["a", seed] for seed in range(3)]
    mean, sd = sum(differences) / 3, pandas.Series(differences).std()
    half = 4.302652729911275 * sd / math.sqrt(3)
    shown = column(page, "claims-table", "difference in validation_bpb")["b − a"]
    assert shown == f"{mean:+.3g}"
    assert column(page, "claims-table", "95 % interval")["b − a"] == f"{mean - half:+.3g} to {mean + half:+.3g}"
    effect = "smallest effect these seeds could resolve (one comparison)"
    assert column(page, "claims-table", effect) == column(page, "baseline-table", effect)
    assert column(page, "baseline-table", "pairs") == {"b − a": "3"} and "Leftout:seed3(bfailed)" in lines(page, "claims")
    needed = page.tables["seeds-table"][1]
    assert page.tables["seeds-table"][0][2:] == [f"pairs to resolve {effect}" for effect in ("0.01", "0.005", "0.0025")]
    counts = [int(text.replace(",", "")) for text in needed[2:]]
    assert 3 <= counts[0] <= counts[1] <= counts[2]


def test_cost_stands_beside_quality_in_all_four_conventions(sweep: Path, page: html.Shown) -> None:
    ratios = page.tables["matching-table"]
    assert ratios[0] == ["variant", "total parameters", "active parameters (held equal)", "training FLOPs", "wall-clock"]
    totals = {name: 2 * (64_000 + 700 * experts) for name, experts in (("a", 4), ("b", 12))}
    # Four seeds of 5, 6, 7 and 8 seconds, and without the one that failed.
    assert ratios[2] == ["b", f"{totals['b'] / totals['a']:.2f} ×", "1.00 ×", "1.00 ×", f"{6 / 6.5:.2f} ×"]
    assert column(page, "cost-table", "peak memory") == {"a": "123 MB", "b": "123 MB"}
    assert column(page, "cost-table", "seconds of training") == {"a": "6.5", "b": "6.0"}
    assert (sweep / "report.html").read_text(encoding="utf-8").count('class="lab-chosen"') == 3


def test_configuration_is_a_difference_to_the_baseline(page: html.Shown) -> None:
    assert page.tables["differences-table"] == [
        ["arm", "setting", "a (baseline)", "this arm"],
        ["b", "behaviour", "ok", "raise"],
        ["b", "effect", "0.0", "-0.1"],
        ["b", "model.experts", "4", "12"],
    ]


def test_provenance_shows_what_was_in_no_commit(page: html.Shown) -> None:
    made = column(page, "provenance-table", "7 jobs")
    assert made["commit"] == "c0ffeec0ffee + uncommitted changes" and made["data"] == "d" * 16
    assert made["files in no commit"] == "2: notes.txt, try.py"
    diffs = [text for part, (text,) in page.texts.items() if part.startswith("diff-")]
    assert diffs == ["-oldline+newline"]
    assert "jobs/a/seed-0/uncommitted.diff" in page.links


def test_everything_opens_without_a_network_and_is_small(sweep: Path, page: html.Shown) -> None:
    rendered = sorted(sweep.glob("jobs/*/*/notebook.html"))
    assert len(rendered) == 8
    assert (sweep / "report.html").stat().st_size < 3_000_000 and all(path.stat().st_size < 1_000_000 for path in rendered)
    for path in [sweep / "report.html", *rendered]:
        text = path.read_text(encoding="utf-8")
        assert "default-src 'none'" in text and not re.search(r"<(?:script|link|img|iframe|use)\b[^>]*(?:src|href)=[\"'](?!#|data:)", text)
        assert not re.search(r"url\(\s*['\"]?https?:", text) and "@import" not in text
    for link in page.links:
        assert (sweep / link).exists(), link
    failed = (sweep / "jobs/b/seed-3/notebook.html").read_text(encoding="utf-8")
    assert "loss is not finite at step 3" in failed and "ansi-red" in failed
    said = "This job failed: ValueError: loss is not finite at step 3."
    assert failed.index(said) < failed.index("<details><summary>Traceback</summary>") < failed.index('class="ansi-red')
    assert "This job" not in rendered[0].read_text(encoding="utf-8")


def test_notebooks_are_rendered_again_only_where_they_changed(sweep: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sweep / "jobs/a/seed-0", tmp_path / "job"))
    os.utime(folder / "notebook.html", ns=(1, 1))
    assert job_page(folder, "a job") == folder / "notebook.html" and (folder / "notebook.html").stat().st_mtime_ns == 1
    notebook = nbformat.read(folder / "notebook.ipynb", as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell("large", outputs=[nbformat.v4.new_output("stream", text="many words " * 200_000)]))
    nbformat.write(notebook, folder / "notebook.ipynb")
    page = job_page(folder, "a job")
    assert page is not None and page.stat().st_mtime_ns > 1 and page.stat().st_size <= LARGEST
    assert "are left out here: the notebook beside this page has it" in page.read_text(
        encoding="utf-8"
    ) and "validation_bpb" in page.read_text(encoding="utf-8")
    (folder / "notebook.ipynb").write_text('{"cells": [')
    assert job_page(folder, "a job") is None


def test_half_a_sweep(sweep: Path, tmp_path: Path) -> None:
    """Seed 2 has not started: the page says so, counts it, and says what cannot be told yet."""
    half = Path(shutil.copytree(sweep, tmp_path / "half"))
    frame = pandas.read_parquet(half / "results.parquet")
    late = frame["seed"] == 2
    frame.loc[late, ["validation_bpb", "seconds"]] = None
    frame["status"] = ["planned" if row else status for row, status in zip(late, frame["status"], strict=True)]
    frame["reason"] = ["" if row else reason for row, reason in zip(late, frame["reason"], strict=True)]
    frame.to_parquet(half / "results.parquet", index=False)
    for folder in half.glob("jobs/*/seed-2"):
        shutil.rmtree(folder)
    found = read_sweep(half)
    made = content.parts(found, summary(found.results, found.ablation))
    assert made["jobs-sum"].lines == ("8 planned jobs: 5 done, 1 failed, 2 skipped.",)
    assert [row[2].text for row in made["jobs-table"].rows if row[1].text == "skipped"] == ["had not started when this page was made"] * 2
    (said,) = made["answer"].lines
    assert said.startswith("With 5 of 8 jobs finished: not resolvable at this budget: b better than a; validation_bpb differs by -0.1")
    lost = frame[~((frame["variant"] == "a") & (frame["seed"] == 1))]
    lost.to_parquet(half / "results.parquet", index=False)
    found = read_sweep(half)
    made = content.parts(found, summary(found.results, found.ablation))
    assert made["jobs-sum"].lines == ("8 planned jobs: 4 done, 1 failed, 2 skipped, 1 unaccounted for.",)


def test_the_curve_of_a_failed_seed_has_its_name_and_a_mark(sweep: Path) -> None:
    """It has logged one row: a mark and no line, and a key of its own in the legend, whose words are glyphs."""
    text = (sweep / "report.html").read_text(encoding="utf-8")
    svg = re.search(r'<svg[^>]*data-figure="curve-loss".*?</svg>', text, re.DOTALL)
    assert svg is not None
    series = json.loads(html.shown(text).facts)["figures"]["curve-loss"]["series"]
    (place,) = [i for i, each in enumerate(series) if each.get("seed") == 3]
    assert series[place] | {"x": [9600], "y": [8.0]} == series[place] and series[place]["status"] == "failed"
    drawn = re.search(rf'<g id="lab-curve-loss-{place}">.*?</g>\s*</g>', svg[0], re.DOTALL)
    assert drawn and drawn[0].count("<use") == 1
    key = re.search(rf'<g id="lab-curve-loss-legend-{place}">(.*?</g>)\s*</g>', svg[0], re.DOTALL)
    assert key and "b, seed 3 (failed)" in readings(ElementTree.fromstring(f'<g xmlns:xlink="x">{key[1]}</g>'))


def test_comparisons_are_counted_where_their_number_decides(sweep: Path) -> None:
    results = pandas.read_parquet(sweep / "results.parquet")
    more = pandas.concat([results, results[results["variant"] == "b"].assign(variant="c")])
    asked = question({"a": {}, "b": {}, "c": {}}, seeds=[0, 1, 2, 3], claims=[{"better": "b", "than": "a"}])
    found = read_sweep(sweep)
    both = replace(found, results=more, ablation=read(asked))
    made = content.parts(both, summary(more, both.ablation))
    assert "smallest effect these seeds could resolve (one comparison)" in made["claims-table"].columns
    assert "smallest effect these seeds could resolve (as one of 2 comparisons)" in made["baseline-table"].columns


# ---- the answer


SHIFTS = {"seen": (-0.1, 0.001), "not seen": (0.0, 0.0005), "not resolvable": (0.0, 0.05)}


def judged(*kinds: str) -> tuple[list, object]:
    rows = []
    for seed in range(4):
        rows.append({"variant": "a", "seed": seed, "status": "finished", "reason": "", "validation_bpb": 2.0})
        for i, kind in enumerate(kinds):
            mean, sd = SHIFTS[kind]
            value = 2.0 + mean + sd * (-1.0, -0.5, 0.6, 0.9)[seed]
            rows.append({"variant": f"v{i}", "seed": seed, "status": "finished", "reason": "", "validation_bpb": value})
    arms = {"a": {}, **{f"v{i}": {} for i in range(len(kinds))}}
    claims = [{"better": f"v{i}", "than": "a"} for i in range(len(kinds))]
    ablation = read({**question(arms), "seeds": [0, 1, 2, 3], "claims": claims})
    verdicts = judge(pandas.DataFrame(rows), ablation)
    assert [v.verdict for v in verdicts] == list(kinds)
    return verdicts, ablation


@pytest.mark.parametrize(
    ("kinds", "sentence"),
    [
        (["seen"], r"Seen: v0 better than a; validation_bpb differs by -0.1, -0\.\d+ to -0\.\d+ \(95 % interval, n = 4\)\."),
        (["not seen"], r"Not seen: v0 better than a by 0.01 or more; validation_bpb differs by 0, -0\.\d+ to \+0\.\d+ \(95 %.*\)\."),
        (
            ["not resolvable"],
            r"Not resolvable at this budget: v0 better than a; validation_bpb differs by 0, -0\.\d+ to \+0\.\d+ \(95 %.*\)\.",
        ),
        (
            ["seen", "seen"],
            r"Of 2 claims both are seen \(v0 .*; v1 .*\); paired differences in validation_bpb with their 95 % intervals, n = 4\.",
        ),
        (
            ["seen", "not resolvable", "not seen", "seen"],
            r"Of 4 claims 2 are seen \(v0 [^()]*; v3 [^()]*\), 1 is not seen \(v2 [^()]*\) and 1 is not resolvable .* \(v1 [^()]*\); .*",
        ),
        ([], r"The question file makes no claim, so nothing is judged; what differs from a stands below\."),
    ],
)
def test_the_answer_is_one_sentence(kinds: list[str], sentence: str) -> None:
    said = answer(*judged(*kinds), 4, 4)
    assert re.fullmatch(sentence, re.sub(r"differs by [-+]\d[\d.e-]*e-1\d", "differs by 0", said)), said
    assert said.count(". ") == 0


# ---- in a browser

PROBE = """<script>window.addEventListener("load", () => {
  const facts = JSON.parse(document.getElementById("lab-facts").textContent), out = {};
  const svg = document.querySelector('svg[data-figure="curve-loss"]'), line = svg.querySelector('[id="lab-curve-loss-0"]');
  const path = [...line.children].find((child) => child.tagName === "path"), screen = svg.getScreenCTM();
  const corners = [...path.getAttribute("d").matchAll(/[ML] (\\S+) (\\S+)/g)];
  const at = (i) => ({ clientX: screen.a * corners[i][1] + screen.e, clientY: screen.d * corners[i][2] + screen.f, bubbles: true });
  const tip = document.getElementById("lab-tip"), series = facts.figures["curve-loss"].series;
  out.corners = corners.length;
  out.points = series[0].x.length;
  svg.dispatchEvent(new PointerEvent("pointermove", at(40)));
  out.tip = tip.textContent;
  out.y = series[0].y[40];
  svg.dispatchEvent(new PointerEvent("pointermove", { clientX: -500, clientY: -500 }));
  out.away = tip.hidden;
  const ticks = document.querySelector('svg[data-figure="differences"]');
  const use = ticks.querySelector('[id="lab-differences-0"] use'), place = ticks.getScreenCTM();
  const there = { clientX: place.a * use.getAttribute("x") + place.e, clientY: place.d * use.getAttribute("y") + place.f };
  ticks.dispatchEvent(new PointerEvent("pointermove", there));
  out.tick = tip.textContent;
  const key = svg.querySelector('[id="lab-curve-loss-legend-0"]');
  key.dispatchEvent(new MouseEvent("click", { bubbles: true }));
  out.hidden = ["lab-curve-loss-0", "lab-curve-loss-0-band"].map((id) => getComputedStyle(svg.querySelector(`[id="${id}"]`)).display);
  out.other = getComputedStyle(svg.querySelector('[id="lab-curve-loss-1"]')).display;
  svg.dispatchEvent(new PointerEvent("pointermove", at(40)));
  out.hiddenTip = tip.hidden || !tip.textContent.startsWith("a:");
  key.dispatchEvent(new KeyboardEvent("keydown", { key: "Enter" }));
  out.shown = getComputedStyle(svg.querySelector('[id="lab-curve-loss-0"]')).display;
  const table = document.querySelector('table[data-part="cost-table"]'), head = table.tHead.rows[0].cells[1];
  const order = () => [...table.tBodies[0].rows].map((row) => row.cells[0].textContent);
  head.click(); out.up = order(); head.click(); out.down = order(); out.sort = head.getAttribute("aria-sort");
  window.dispatchEvent(new Event("beforeprint"));
  out.unfolded = [...document.querySelectorAll("details")].every((each) => each.open);
  const said = document.createElement("pre"); said.id = "probe"; said.textContent = JSON.stringify(out); document.body.append(said);
});</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no browser here")
def test_figures_and_tables_answer_the_pointer_and_the_keyboard(sweep: Path, tmp_path: Path) -> None:
    text = (sweep / "report.html").read_text(encoding="utf-8")
    (tmp_path / "page.html").write_text(text.replace("</body>", PROBE + "</body>"), encoding="utf-8")
    off = ["--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND", "--proxy-server=127.0.0.1:9"]
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", *off, f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        [*command, "--virtual-time-budget=5000", "--dump-dom", f"file://{tmp_path / 'page.html'}"],
        capture_output=True,
        text=True,
        timeout=200,
    )
    found = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    out = json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert out["corners"] == out["points"] == 120
    assert (
        out["tip"].startswith("a: ")
        and float(out["tip"].split()[1]) == pytest.approx(out["y"], rel=1e-4)
        and "training tokens" in out["tip"]
    )
    assert out["away"] is True and re.match(r"b − a, seed [012]: -0\.\d+", out["tick"])
    assert out["hidden"] == ["none", "none"] and out["other"] != "none" and out["hiddenTip"] and out["shown"] != "none"
    assert out["up"] == ["a", "b"] and out["down"] == ["b", "a"] and out["sort"] == "descending"
    assert out["unfolded"] is True
