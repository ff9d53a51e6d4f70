"""`longcat-lab report --check`: a page that agrees passes, and every kind of disagreement is told in a sentence; faults are real edits."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nbformat
import pandas
import pytest

from longcat_lab.ablation import check, read_sweep
from longcat_lab.ablation.report import html
from longcat_lab.ablation.report.rendering import settle_results
from longcat_lab.ablation.store import Lock
from longcat_lab.errors import LabError

pytestmark = pytest.mark.timeout(900)  # the first test waits for nine jobs, each in a kernel of its own
JOB = Path("jobs/b/seed-1")


@pytest.fixture
def copied(rendered_sweep: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(rendered_sweep, tmp_path / "copied"))


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "longcat_lab", *map(str, arguments)], capture_output=True, text=True)


def test_a_whole_page_agrees_also_where_it_was_copied_to(rendered_sweep: Path, copied: Path) -> None:
    assert check(rendered_sweep) == [] and check(copied) == []
    done = command("report", "--check", copied)
    assert done.returncode == 0 and "agree, and every planned job is accounted for" in done.stdout


# ---- faults


def edit(path: Path, change: Callable[[str], str]) -> None:
    before = path.read_text(encoding="utf-8")
    after = change(before)
    assert after != before
    path.write_text(after, encoding="utf-8")


def edit_parquet(path: Path, change: Callable[[pandas.DataFrame], pandas.DataFrame]) -> None:
    change(pandas.read_parquet(path)).to_parquet(path, index=False)


def edit_notebook(path: Path, change: Callable[[nbformat.NotebookNode], object]) -> None:
    notebook = nbformat.read(path, as_version=4)
    change(notebook)
    nbformat.write(notebook, path)


def edit_run(folder: Path, change: Callable[[dict], None]) -> None:
    run = json.loads((folder / JOB / "run.json").read_text())
    change(run)
    (folder / JOB / "run.json").write_text(json.dumps(run))


def cell(folder: Path, part: str, row: int, column: int) -> str:
    return html.shown((folder / "report.html").read_text(encoding="utf-8")).tables[part][row][column]


def a_number_of_a_table(folder: Path) -> None:
    shown = cell(folder, "arms", 2, 2)
    last = str((int(shown[-1]) + 1) % 10)
    edit(folder / "report.html", lambda text: text.replace(f">{shown}<", f">{shown[:-1]}{last}<", 1))


def a_number_of_the_answer(folder: Path) -> None:
    edit(folder / "report.html", lambda text: re.sub(r'(<div data-part="answer"><p>[^<]*?)-0\.1', r"\1-0.2", text, count=1))


def a_number_of_the_json(folder: Path) -> None:
    edit(folder / "report.html", lambda text: re.sub(r'(\["123 MB",)123456789', r"\g<1>123456788", text, count=1))


def a_point_of_a_curve(folder: Path) -> None:
    edit(folder / "report.html", lambda text: re.sub(r'("arm":"a","n":4,"x":\[\d+,)\d', r"\g<1>9", text, count=1))


def a_sentence_too_many(folder: Path) -> None:
    edit(folder / "report.html", lambda text: text.replace("</main>", "<p>and 99 % better</p></main>"))


def a_part_taken_out(folder: Path) -> None:
    edit(folder / "report.html", lambda text: re.sub(r'<div class="lab-wide"><table class="lab" data-part="matching.*?</div>', "", text))


def a_number_of_the_report_notebook(folder: Path) -> None:
    shown = json.dumps(cell(folder, "arms", 2, 2), ensure_ascii=False)[1:-1]
    edit(folder / "report.ipynb", lambda text: text.replace(f">{shown}<", ">1.2345 ± 0.0100<", 1))


def a_shown_metric(folder: Path) -> None:
    edit(folder / JOB / "notebook.ipynb", lambda text: re.sub(r"('validation_bpb': )\d", r"\g<1>7", text, count=1))


def a_metric_no_longer_shown(folder: Path) -> None:
    edit_notebook(folder / JOB / "notebook.ipynb", lambda notebook: notebook.cells[-1].update(outputs=[]))


def shuffled_counts(folder: Path) -> None:
    def swap(notebook: nbformat.NotebookNode) -> None:
        code = [each for each in notebook.cells if each.cell_type == "code"]
        code[1].execution_count, code[2].execution_count = code[2].execution_count, code[1].execution_count

    edit_notebook(folder / JOB / "notebook.ipynb", swap)


def counts_of_a_second_run(folder: Path) -> None:
    def later(notebook: nbformat.NotebookNode) -> None:
        for each in notebook.cells:
            if each.cell_type == "code":
                each.execution_count += 3

    edit_notebook(folder / "report.ipynb", later)


def a_cell_not_run(folder: Path) -> None:
    edit_notebook(folder / JOB / "notebook.ipynb", lambda notebook: notebook.cells[-1].update(execution_count=None))


def no_notebook(folder: Path) -> None:
    (folder / JOB / "notebook.ipynb").unlink()


def no_rendered_notebook(folder: Path) -> None:
    (folder / JOB / "notebook.html").unlink()


def a_number_of_the_rendered_notebook(folder: Path) -> None:
    edit(folder / JOB / "notebook.html", lambda text: re.sub(r"(validation_bpb(?:&#39;|'|&apos;): )\d", r"\g<1>7", text, count=1))


def a_number_of_the_table(folder: Path) -> None:
    def change(frame: pandas.DataFrame) -> pandas.DataFrame:
        frame.loc[(frame["variant"] == "b") & (frame["seed"] == 1), "validation_bpb"] += 1e-6
        return frame

    edit_parquet(folder / "results.parquet", change)


def a_dropped_row(folder: Path) -> None:
    edit_parquet(folder / "results.parquet", lambda frame: frame[~((frame["variant"] == "b") & (frame["seed"] == 1))])


def a_row_twice(folder: Path) -> None:
    edit_parquet(folder / "results.parquet", lambda frame: pandas.concat([frame, frame.iloc[[0]]]))


def a_row_that_nobody_planned(folder: Path) -> None:
    edit_parquet(folder / "results.parquet", lambda frame: pandas.concat([frame, frame.iloc[[0]].assign(seed=17)]))


def another_status(folder: Path) -> None:
    edit_parquet(folder / "results.parquet", lambda frame: frame.assign(status=["failed", *frame["status"][1:]]))


def a_final_metric(folder: Path) -> None:
    edit_run(folder, lambda run: run["final"].update(validation_bpb=run["final"]["validation_bpb"] - 0.01))


def a_time(folder: Path) -> None:
    edit_run(folder, lambda run: run["timings"].update(training_seconds=99.0))


def a_setting(folder: Path) -> None:
    for seed in range(4):
        path = folder / f"jobs/b/seed-{seed}/run.json"
        path.write_text(path.read_text().replace('"effect": -0.1', '"effect": -0.4'))


def no_record(folder: Path) -> None:
    (folder / JOB / "run.json").unlink()


def a_logged_loss(folder: Path) -> None:
    edit_parquet(folder / JOB / "metrics.parquet", lambda frame: frame.assign(loss=frame["loss"] + 0.5))


def no_curves(folder: Path) -> None:
    (folder / JOB / "metrics.parquet").unlink()


def another_hypothesis(folder: Path) -> None:
    edit(folder / "ablation.yaml", lambda text: text.replace("b is better", "a is better"))


def one_more_seed(folder: Path) -> None:
    edit(folder / "ablation.yaml", lambda text: text.replace("- 3\n", "- 3\n- 4\n"))


FAULTS: dict[Callable[[Path], None], str] = {
    a_number_of_a_table: r"report.html: table 'arms', row 'b', column 'validation_bpb \(mean ± sd\)' shows \d",
    a_number_of_the_answer: r"report.html: 'answer' shows '…",
    a_number_of_the_json: r"report.html: its JSON has 123456788\S* at parts / cost-table / rows / 0 / \d+ / 1, the run folder",
    a_point_of_a_curve: r"report.html: its JSON has 9\d+ at figures / curve-loss",
    a_sentence_too_many: r"report.html shows 'and 99 % better', which stands in no part",
    a_part_taken_out: r"report.html shows the part 'matching-table' 0 times",
    a_number_of_the_report_notebook: r"report.ipynb: table 'arms', row 'b'",
    a_shown_metric: r"jobs/b/seed-1/notebook.ipynb shows validation_bpb = 7\.\d+, its run.json has 1\.9",
    a_metric_no_longer_shown: r"jobs/b/seed-1/notebook.ipynb does not show the final metrics",
    shuffled_counts: r"execution counts of jobs/b/seed-1/notebook.ipynb are 1, 3, 2, 4, not 1 to 4",
    counts_of_a_second_run: r"execution counts of report.ipynb are 4, 5",
    a_cell_not_run: r"jobs/b/seed-1/notebook.ipynb was executed up to its code cell 3 of 4",
    no_notebook: r"jobs/b/seed-1/notebook.ipynb is missing",
    no_rendered_notebook: r"jobs/b/seed-1/notebook.html, the rendered notebook, is missing",
    a_number_of_the_rendered_notebook: r"jobs/b/seed-1/notebook.html does not show what notebook.ipynb says: \{'validation_bpb'",
    a_number_of_the_table: r"results.parquet has validation_bpb = 1\.9\d+ for b/seed-1, jobs/b/seed-1/run.json has 1\.9",
    a_dropped_row: r"planned job b/seed-1 is unaccounted for: results.parquet has no row of it",
    a_row_twice: r"results.parquet has more than one row of a/seed-0",
    a_row_that_nobody_planned: r"results.parquet has a row of a/seed-17, which the question does not plan",
    another_status: r"results.parquet calls a/seed-0 failed, jobs/a/seed-0/run.json calls it finished",
    a_final_metric: r"jobs/b/seed-1/notebook.ipynb shows validation_bpb = 1\.9\d*, its run.json has 1\.\d",
    a_time: r"table 'cost-table', row 'b', column 'seconds of training' shows 6.0 where the run folder gives 7.0",
    a_setting: r"table 'differences-table', row 'b', column 'this arm' shows -0.1 where the run folder gives -0.4",
    no_record: r"results.parquet calls b/seed-1 finished, but jobs/b/seed-1/run.json is missing",
    a_logged_loss: r"report.html: its JSON has \d[\d.]* at figures / curve-loss",
    no_curves: r"jobs/b/seed-1/metrics.parquet is missing",
    another_hypothesis: r"report.html: 'hypothesis' shows '…",
    one_more_seed: r"planned job a/seed-4 is unaccounted for",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_is_told(fault: Callable[[Path], None], copied: Path) -> None:
    fault(copied)
    problems = check(copied)
    assert any(re.search(FAULTS[fault], problem) for problem in problems), problems
    assert all(problem.endswith((".", "…")) and "\n" not in problem for problem in problems)


def test_the_command_fails_with_a_sentence_each(copied: Path) -> None:
    a_dropped_row(copied)
    no_notebook(copied)
    done = command("report", copied, "--check")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "b/seed-1 is unaccounted for" in done.stderr and "notebook.ipynb is missing" in done.stderr
    (copied / "report.html").unlink()
    with pytest.raises(LabError, match=r"no page in .* to check: make it with longcat-lab report"):
        check(copied)


def test_a_table_that_its_driver_did_not_live_to_write_is_told_and_mended(copied: Path) -> None:
    """The driver was killed: the table still says running, run.json is the truth; a live driver's table may lag behind."""

    def before(frame: pandas.DataFrame) -> pandas.DataFrame:
        frame["status"] = frame["status"].astype(object)
        frame.loc[0, ["status", "seconds", "validation_bpb"]] = ["running", None, None]
        return frame

    edit_parquet(copied / "results.parquet", before)
    assert read_sweep(copied).results["status"].tolist() == ["finished"] * 7 + ["failed"]
    lock = Lock.take(copied)
    assert lock is not None and check(copied) == []
    lock.release()
    (told,) = check(copied)
    assert re.match(r"results.parquet calls a/seed-0 running, jobs/a/seed-0/run.json calls it finished: render the report again", told)
    settle_results(read_sweep(copied))
    assert check(copied) == []
