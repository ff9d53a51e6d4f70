"""What a reader would believe and no number contradicts: each is really written into a page, a notebook or a record, and each is told."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import nbformat
import pandas
import pytest
from test_report_check import edit, edit_notebook, edit_parquet, edit_run

from longcat_lab.ablation import check, read_sweep, render
from longcat_lab.ablation.report import html
from longcat_lab.ablation.report.rendering import MADE, job_page, makers, page_text

pytestmark = pytest.mark.timeout(900)  # the first test waits for nine jobs, each in a kernel of its own
JOB, FAILED = Path("jobs/b/seed-1"), Path("jobs/b/seed-3")
PATH = re.compile(r'(<g id="lab-curve-loss-0">\s*<path[^>]*? d=")([^"]*)')


@pytest.fixture
def copied(rendered_sweep: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(rendered_sweep, tmp_path / "copied"))


def raised(found: re.Match[str]) -> str:
    """A line 40 points higher from its second point on."""
    first, *rest = re.findall(r"([ML]) (\S+) (\S+)", found[2])
    return found[1] + " ".join([" ".join(first), *(f"{a} {x} {float(y) - 40}" for a, x, y in rest)])


def in_page(change: Callable[[str], str]) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "report.html", change)


def in_outputs(folder: Path, change: Callable[[str], str]) -> None:
    """Edits what report.ipynb shows and makes the page of it anew, as somebody would who knows how pages are made."""

    def each(notebook: nbformat.NotebookNode) -> None:
        before = json.dumps(notebook)
        for one in notebook.cells:
            for output in one.get("outputs", []):
                if "text/html" in output.get("data", {}):
                    output.data["text/html"] = change(output.data["text/html"])
        assert json.dumps(notebook) != before

    edit_notebook(folder / "report.ipynb", each)
    again(folder)


def again(folder: Path) -> None:
    text = page_text(read_sweep(folder), nbformat.read(folder / "report.ipynb", as_version=4))
    (folder / "report.html").write_text(text, encoding="utf-8")


def of_another_version(folder: Path) -> None:
    """The page as another nbconvert might have written it: another note, and white space where it means nothing."""
    edit(folder / "report.html", lambda text: text.replace(makers(), "nbconvert 6").replace("</tr><tr>", "</tr>\n<tr>"))


def claim(where: str) -> Callable[[str], str]:
    return lambda text: text.replace('<div data-part="hypothesis"', where + '<div data-part="hypothesis"', 1)


def rows_of_the_job_table(text: str) -> str:
    return re.sub(r"<tr>(<td[^>]*>b/seed-3)", r"<tr hidden>\1", text)


def swapped(text: str) -> str:
    return text.replace('href="jobs/b/seed-1/notebook.html"', 'href="jobs/a/seed-1/notebook.html"')


PAGE: dict[str, tuple[Callable[[str], str], str]] = {
    "a curve moved": (lambda text: PATH.sub(raised, text), ""),
    "links swapped": (swapped, r"'.*jobs/a/seed-1/notebook.html.*' where that gives '.*jobs/b/seed-1/notebook.html"),
    "a row hidden": (rows_of_the_job_table, "tr hidden"),
    "a number in a summary": (
        claim("<details><summary>b better by 0.9</summary></details>"),
        "shows 'b better by 0.9', which stands in no",
    ),
    "a number in a picture": (claim('<svg><text y="9">b better by 0.9</text></svg>'), "shows 'b better by 0.9', which stands in no part"),
    "a number among the author's words": (
        claim('<div class="text_cell_render"><p>b better by 0.9</p></div>'),
        "it has '.*text_cell_render",
    ),
    "a claim without a digit": (claim("<p><b>Seen: b is better.</b></p>"), "shows 'Seen: b is better.', which stands in no part"),
    "another title": (lambda text: re.sub("<title>.*?</title>", "<title>b is better</title>", text), "<title>b is better"),
    "a script": (lambda text: text.replace("</body>", "<script>document.title = 1</script></body>"), "<script>document.title"),
    "a style": (lambda text: text.replace("</style></head>", "[data-part=answer] { display: none }</style></head>"), "data-part=answer"),
}


@pytest.mark.parametrize("fault", PAGE)
@pytest.mark.parametrize("version", ["this", "another"])
def test_a_page_holds_nothing_of_its_own(fault: str, version: str, copied: Path) -> None:
    change, sentence = PAGE[fault]
    if version == "another":
        of_another_version(copied)
        assert check(copied) == []
    in_page(change)(copied)
    problems = check(copied)
    assert problems and all(problem.startswith("report.html ") for problem in problems), problems
    if version == "this":
        assert any(re.search(sentence, problem) for problem in problems), problems
        assert any("report.html is not what report.ipynb becomes: it has '" in problem for problem in problems)


MADE_AGAIN: dict[str, tuple[Callable[[str], str], str]] = {
    "a curve moved": (lambda text: PATH.sub(raised, text), "the figure 'curve-loss' draws a where its numbers are not"),
    "all curves moved": (
        lambda text: re.sub(r'(<g id="lab-curve-loss-\d">\s*<path[^>]*? d=")([^"]*)', raised, text),
        "the figure 'curve-loss' draws",
    ),
    "a curve moved by a transform": (
        lambda text: text.replace('<g id="lab-curve-loss-0">', '<g id="lab-curve-loss-0" transform="translate(0 -40)">'),
        "the figure 'curve-loss' moves or hides a",
    ),
    "a point of an arm moved": (
        lambda text: re.sub(r'(<g id="lab-cost-1">.*?<use [^>]*?y=")([\d.]+)', lambda m: f"{m[1]}{float(m[2]) + 9}", text, flags=re.DOTALL),
        "the figure 'cost' draws b where its numbers are not",
    ),
    "a band narrowed": (
        lambda text: re.sub(
            r'(<g id="lab-curve-loss-0-band">.*?<path [^>]*?d="M \S+ \S+\s+L \S+ )(\S+)',
            lambda m: f"{m[1]}{float(m[2]) + 9}",
            text,
            flags=re.DOTALL,
        ),
        "draws the range of a where its numbers are not",
    ),
    "words in a picture": (lambda text: text.replace("</svg>", '<text y="9">b better</text></svg>'), "a picture holds an element 'text'"),
    "a style in a picture": (
        lambda text: re.sub(r'(<style type="text/css">)', r"\1#lab-curve-loss-0{display:none}", text),
        "a picture holds a style of its own",
    ),
    "a picture of no figure": (
        claim("<svg aria-label='b is better'></svg>"),
        "shows a picture 'b is better', which the run folder does not",
    ),
    "a figure twice": (lambda text: re.sub(r'(<svg [^>]*data-figure="cost".*?</svg>)', r"\1\1", text, flags=re.DOTALL), "'cost' 2 times"),
    "a row hidden": (rows_of_the_job_table, "report.ipynb holds '.*' where the run folder gives nothing, or something else"),
    "links swapped": (swapped, "report.ipynb holds '.*' where the run folder gives nothing, or something else"),
    "a claim without a digit": (claim("<p>Seen: b is better.</p>"), "report.ipynb holds '<p>Seen: b is better.</p>' where"),
}


@pytest.mark.parametrize("fault", MADE_AGAIN)
def test_a_page_made_anew_of_an_edited_notebook_does_not_pass(fault: str, copied: Path) -> None:
    change, sentence = MADE_AGAIN[fault]
    in_outputs(copied, change)
    problems = check(copied)
    assert any(re.search(sentence, problem) for problem in problems), problems


def test_a_page_of_other_cells_does_not_pass(copied: Path) -> None:
    def authored(notebook: nbformat.NotebookNode) -> None:
        next(each for each in notebook.cells if each.cell_type == "markdown" and "The effect" in each.source).source += "\n\nSeen."

    def printed(notebook: nbformat.NotebookNode) -> None:
        notebook.cells[-1].outputs.append(nbformat.v4.new_output("stream", text="Seen: b is better."))

    for change, sentence in (
        (authored, r"Cell \d+ of report.ipynb is not that of"),
        (printed, "shows something that is no part of the page: Seen"),
    ):
        edit_notebook(copied / "report.ipynb", change)
        again(copied)
        assert any(re.search(sentence, problem) for problem in check(copied))


# ---- executed notebooks


def test_a_jobs_page_is_what_its_notebook_becomes(copied: Path) -> None:
    edit(copied / JOB / "notebook.html", lambda text: text.replace("</main>", "<p>and better than all</p></main>"))
    (told,) = check(copied)
    assert re.match(r"jobs/b/seed-1/notebook.html is not what notebook.ipynb becomes: it has '.*and better than all", told)
    edit(copied / JOB / "notebook.html", lambda text: re.sub(rf'(<meta name="{MADE}" content=")[^"]*', r"\1nbconvert 6", text))
    assert any("another head, style or script" in each for each in check(copied)), "told by what stands around the notebook, too"
    assert job_page(copied / JOB, "demo: b, seed 1") is not None and check(copied) == []
    edit(copied / JOB / "notebook.html", lambda text: re.sub(rf'(<meta name="{MADE}" content=")[^"]*', r"\1nbconvert 6", text))
    assert check(copied) == [], "untouched, and of another version"
    edit(copied / JOB / "notebook.html", lambda text: re.sub(r"<td>\d+</td>", "<td>9</td>", text, count=1))
    assert any("does not show what notebook.ipynb says: an output differs" in each for each in check(copied))


def test_an_edited_table_of_parameters_does_not_pass(copied: Path) -> None:
    """In the notebook, whose page is made anew; with the hash that its job kept, without it, and with sums that still fit."""

    def other(total: str, row: str, column: int = 0) -> Callable[[nbformat.NotebookNode], None]:
        def change(notebook: nbformat.NotebookNode) -> None:
            (data,) = [
                o.data for each in notebook.cells for o in each.get("outputs", []) if "<table>" in o.get("data", {}).get("text/html", "")
            ]
            for key, opening in (("text/html", "<td>{}</td><td>"), ("text/plain", "{} ")):
                for name, value in (("all", row), ("total", total)):
                    data[key] = re.sub(f"({opening.format(name)})\\d+" + "(?!.*block)", rf"\g<1>{value}", data[key])

        return change

    path, page = copied / JOB / "notebook.ipynb", "demo: b, seed 1"
    right = path.read_bytes()
    budget = json.loads((copied / JOB / "run.json").read_text())["budget"]["total_params"]
    edit_notebook(path, other("999", "999"))
    job_page(copied / JOB, page)
    problems = check(copied)
    assert any("notebook.ipynb is not the file that its job left: it was changed after" in each for each in problems), problems
    edit_run(copied, lambda run: run["job"].pop("notebook_sha256"))  # as jobs of earlier versions
    (told,) = check(copied)
    assert told == f"jobs/b/seed-1/notebook.ipynb shows 999 as the total of params, its run.json has {budget}."
    path.write_bytes(right)
    edit_notebook(path, other(str(budget), "999"))
    job_page(copied / JOB, page)
    (told,) = check(copied)
    assert told == f"jobs/b/seed-1/notebook.ipynb shows {budget} as the total of params, which is not the sum of its rows."
    path.write_bytes(right)
    edit_notebook(path, _plain_only)
    job_page(copied / JOB, page)
    (told,) = check(copied)
    assert "shows other numbers for all in its table than in the text of the same output" in told


def _plain_only(notebook: nbformat.NotebookNode) -> None:
    for each in notebook.cells:
        for output in each.get("outputs", []):
            if "<table>" in output.get("data", {}).get("text/html", ""):
                output.data["text/plain"] = re.sub(r"all \d+", "all 7", output.data["text/plain"])


# ---- the table of results and the records


def broken(frame: pandas.DataFrame, **values: object) -> pandas.DataFrame:
    for key, value in values.items():
        frame[key] = [value if status == "failed" else own for status, own in zip(frame["status"], frame[key], strict=True)]
    return frame


def lines(folder: Path, change: Callable[[list[dict]], None]) -> None:
    path = folder / JOB / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    change(rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


RECORDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a number of a failed job": (
        lambda folder: edit_parquet(folder / "results.parquet", lambda frame: broken(frame, validation_bpb=1.0)),
        r"results.parquet has validation_bpb = 1 for b/seed-3, jobs/b/seed-3/run.json has none",
    ),
    "the reason of a failed job": (
        lambda folder: edit_parquet(folder / "results.parquet", lambda frame: broken(frame, reason="the disk was full")),
        r"results.parquet has 'the disk was full' as reason of b/seed-3, jobs/b/seed-3/run.json has 'ValueError: loss is",
    ),
    "what did not engage": (
        lambda folder: edit_run(folder, lambda run: run.update(not_engaged=["no expert was chosen"])),
        r"results.parquet has '' as not_engaged of b/seed-1, jobs/b/seed-1/run.json has 'no expert was chosen'",
    ),
    "a failed job called planned": (
        lambda folder: edit_parquet(folder / "results.parquet", lambda frame: broken(frame, status="planned")),
        r"results.parquet calls b/seed-3 planned, jobs/b/seed-3/run.json calls it failed: render the report again",
    ),
    "a logged row": (
        lambda folder: lines(folder, lambda rows: rows[4].update(loss=0.5)),
        r"jobs/b/seed-1/metrics.jsonl and metrics.parquet do not agree: row 5 has loss = 0.5 and \d",
    ),
    "a column": (
        lambda folder: lines(folder, lambda rows: rows[4].update(other=0.5)),
        r"metrics.jsonl and metrics.parquet do not have the same columns: other is in one of them",
    ),
    "rows at the end": (lambda folder: lines(folder, lambda rows: rows.__delitem__(slice(-9, None))), "have 291 and 300 rows"),
    "a setting of one seed": (
        lambda folder: edit_run(folder, lambda run: run["config"]["model"].update(width=72)),
        r"b/seed-1 was not run with the settings of b/seed-0: it has model.width 72 and not 64",
    ),
    "a claim of one job": (
        lambda folder: edit_run(folder, lambda run: run["asked"].update(smallest_effect=0.5)),
        r"ablation.yaml has '0.01' as its smallest_effect, but jobs/b/seed-1/run.json has kept '0.5' since its job began",
    ),
}


def dropped(folder: Path) -> None:
    """The worst seed taken out of the question and of the table."""
    edit(folder / "ablation.yaml", lambda text: text.replace("- 2\n- 3\n", "- 3\n"))
    edit_parquet(folder / "results.parquet", lambda frame: frame[frame["seed"] != 2])


RECORDS["a seed that is no longer planned"] = (
    dropped,
    r"ablation.yaml has '\[0, 1, 3\]' as its seeds, but jobs/./seed-./run.json \(and 7 more\) has kept '\[0, 1, 2, 3\]' since",
)


@pytest.mark.parametrize("fault", RECORDS)
def test_records_agree_with_each_other(fault: str, copied: Path) -> None:
    do, sentence = RECORDS[fault]
    do(copied)
    problems = check(copied)
    assert any(re.search(sentence, problem) for problem in problems), problems


# ---- made anew: what the page itself says


def texts(folder: Path) -> dict[str, list[str]]:
    return html.shown((folder / "report.html").read_text(encoding="utf-8")).texts


def test_what_was_changed_behind_the_sweeps_back_is_on_the_page_that_is_made_anew(copied: Path) -> None:
    edit(copied / "ablation.yaml", lambda text: text.replace("b is better & cheaper", "a is better").replace("b is better", "a is better"))
    edit_run(copied, lambda run: run["config"]["model"].update(width=72))
    shutil.copytree(copied / "jobs/a/seed-0", copied / "jobs/a/seed-9")
    shutil.copytree(copied / "jobs/a", copied / "jobs/dropped")
    render(copied)
    shown = texts(copied)
    said = shown["hypothesis"][0]
    assert said.startswith("Hypothesis,asthefirstjobkeptitwhenitbegan:bisbetterablation.yamlnowsays:aisbetter"), said
    assert "writtenbeforerunning" not in said and "hasnotbeenedited" not in said
    other = shown["not-planned"][0]
    assert (
        other.startswith("Alsointhisfolder,notplannedbythisquestion:jobs/a/seed-9(done,validation_bpb2.")
        and other.count("jobs/dropped/") == 5
    )
    assert "Notoneconfiguration:b/seed-1wasnotrunwiththesettingsofb/seed-0" in shown["differences-words"][0]
    problems = check(copied)
    assert any(re.match("ablation.yaml has 'a is better' as its hypothesis, but jobs/./seed-./run.json", each) for each in problems), (
        problems
    )
    assert len(problems) == 2 and "b/seed-1 was not run with the settings" in problems[0], "all else agrees"
    shutil.rmtree(copied / "jobs/dropped")
    assert any("'not-planned' shows" in each for each in check(copied))


def test_a_sweep_of_an_earlier_version_is_rendered_and_checked(copied: Path) -> None:
    """Its jobs kept neither the question nor the hash of their notebook: the page says so of the hypothesis."""
    for path in copied.glob("jobs/*/*/run.json"):
        run = json.loads(path.read_text())
        assert run.pop("asked")["hypothesis"] == "b is better" and len(run["job"].pop("notebook_sha256")) == 16
        path.write_text(json.dumps(run))
    render(copied)
    assert check(copied) == []
    said = texts(copied)["hypothesis"][0]
    assert "writtenbeforerunning:" not in said and "Thehypothesisatthestartwasnotrecorded:the8jobs" in said
