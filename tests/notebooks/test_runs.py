"""Runs that lie in folders, listed, picked and compared: real runs in every state, and folders that hold something else."""

import re
import shutil
import subprocess
import sys
import time

import pytest

import longcat_lab as lab
from longcat_lab.files import read_json, write_json
from longcat_lab.notebook.figures import curves
from longcat_lab.notebook.panel.earlier import compared
from longcat_lab.notebook.runs import runs

LONG = "import longcat_lab as lab; lab.fit(lab.load('tiny', 'training.steps=100000'), {!r}, progress=False)"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    home = tmp_path_factory.mktemp("work") / "runs"
    lab.fit(lab.load("tiny", "training.evaluate_every=10"), home / "single/base", progress=False)
    lab.fit(lab.load("tiny", "model.hidden_size=64", "tracking.wandb_project=x"), home / "single/wide", progress=False)
    lab.fit(lab.load("tiny", "seed=3"), home / "panel/stopped", progress=False, stop=lambda: True)
    for variant in ("plain", "wide"):
        for seed in (0, 1):
            place = home / f"demo/jobs/{variant}/seed-{seed}"
            shutil.copytree(home / "single" / {"plain": "base", "wide": "wide"}[variant], place)
            record = read_json(place / "run.json")
            record["config"]["seed"] = seed
            write_json(place / "run.json", {**record, "sweep": "demo", "variant": variant, "seed": seed})
    shutil.copytree(home / "single/base", home / "demo/superseded/0123/plain/seed-0")
    record = read_json(home / "single/base/run.json")
    (home / "killed").mkdir()
    write_json(home / "killed/run.json", {**record, "status": "running", "final": {}, "timings": {"started": record["timings"]["started"]}})
    for name, text in (("cut", '{"status": '), ("list", "[1]"), ("foreign", '{"status": "ok", "accuracy": 1}')):
        (home / "odd" / name).mkdir(parents=True)
        (home / "odd" / name / "run.json").write_text(text)
    (home / "odd/half").mkdir()
    (home / "odd/half/metrics.jsonl").write_text("")
    return home


def test_every_run_is_found_and_what_is_none_is_counted(folder):
    found = runs(folder)
    jobs = [f"demo/jobs/{variant}/seed-{seed}" for variant in ("plain", "wide") for seed in (0, 1)]
    assert sorted(found.names) == sorted([*jobs, "killed", "panel/stopped", "single/base", "single/wide"])
    assert found.skipped == 4 and "Skipped: 4 with no readable run.json." in repr(found)
    assert runs(folder / "single/base").names == ["base"]
    assert runs(folder / "demo/superseded").names == ["0123/plain/seed-0"]
    started = found.frame["started"].tolist()
    assert started == sorted(started, reverse=True)
    with pytest.raises(lab.LabError, match=r"There is no folder '.*nowhere'"):
        runs(folder / "nowhere")
    (folder.parent / "empty").mkdir(exist_ok=True)
    empty = runs(folder.parent / "empty")
    assert len(empty) == 0 and "0 runs" in repr(empty) and "0 runs" in empty._repr_html_() and len(empty.frame) == 0


def test_a_row_says_what_the_record_says(folder):
    frame = runs(folder).frame.set_index("name")
    record = lab.Run(folder / "single/wide").record
    row = frame.loc["single/wide"]
    assert (row["status"], row["step"], row["steps"]) == ("finished", 20, 20)
    assert row["validation_bpb"] == record["final"]["validation_bpb"] and row["shuffled_bpb"] == record["final"]["shuffled_bpb"]
    assert row["params"] == record["budget"]["total_params"] and row["active"] == record["budget"]["active_params"]
    assert row["flops_per_token"] == record["budget"]["flops_per_token"] and row["seconds"] == record["timings"]["training_seconds"]
    stopped = frame.loc["panel/stopped"]
    assert (stopped["status"], stopped["step"], stopped["seed"], stopped["reason"]) == ("interrupted", 1, 3, "stopped as asked")
    assert frame.loc["killed", "status"] == "interrupted"  # its record says running, but nobody trains there
    assert tuple(frame.loc["demo/jobs/wide/seed-1", ["sweep", "variant", "seed"]]) == ("demo", "wide", 1)


def test_runs_that_train_now_are_there_with_their_progress(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", LONG.format(str(tmp_path / "now"))])
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "now/progress.json").exists() or not (tmp_path / "now/metrics.jsonl").read_text():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        found = runs(tmp_path)
        row = found.frame.iloc[0]
        assert row["status"] == "running" and 0 < row["step"] < row["steps"] == 100000 and row["seconds"] > 0 and row["loss"] > 0
        assert 'data-state="running"' in found._repr_html_() and "/ 100,000" in found._repr_html_()
        assert "running" in repr(found.compare())
    finally:
        process.kill()
        process.wait()
    assert runs(tmp_path).frame["status"].tolist() == ["interrupted"]


def test_picking_gives_runs_again(folder):
    found = runs(folder)
    assert sorted(found["demo/*"]["*/seed-1"].names) == ["demo/jobs/plain/seed-1", "demo/jobs/wide/seed-1"]
    assert sorted(found[["single/base", "killed"]].names) == ["killed", "single/base"]
    assert found.latest(2).names == found.names[:2] and len(found.latest(99)) == 8
    low = found.where("status == 'finished' and params > 60000")
    assert low.names and all("wide" in name for name in low.names)
    assert found.open("single/wide").record == lab.Run(folder / "single/wide").record == found.open("*gle/wide").record
    assert [run.path for run in found["single/base"]] == [folder / "single/base"]


@pytest.mark.parametrize(
    ("ask", "sentence"),
    [
        (lambda found: found["single/bas"], r"There is no run 'single/bas' among the 8 in .*, did you mean 'single/base'\?"),
        (lambda found: found["x/*"], "There is no run 'x/\\*' among the 8"),
        (lambda found: found[3], "give a name, a pattern"),
        (lambda found: found.open("single/*"), "fits 2 runs .*: name one"),
        (lambda found: found.where("loss <"), "write columns of .frame, as in"),
        (lambda found: found.where("nothing > 3"), "name 'nothing' is not defined; write columns"),
        (lambda found: found.compare("los"), "None of these runs has logged numbers as 'los', did you mean 'loss'"),
        (lambda found: found.where("step < 0").compare(), "There is no run to compare"),
        (lambda found: found.compare(by="seed"), "write 'run' or 'variant'"),
    ],
)
def test_what_cannot_be_picked_is_one_sentence(folder, ask, sentence):
    with pytest.raises(lab.LabError, match=sentence) as caught:
        ask(runs(folder))
    assert "\n" not in str(caught.value)


def test_a_comparison_holds_curves_only_what_differs_and_summaries(folder):
    pair = runs(folder)[["single/base", "single/wide"]].compare(["loss", "validation_bpb"])
    assert sorted(pair.differences.columns) == ["base", "wide"]  # without the folder that both have in common
    assert pair.differences.loc["model.hidden_size"].to_dict() == {"base": 32, "wide": 64}
    assert sorted(pair.differences.index) == ["model.hidden_size", "training.evaluate_every"]
    finals = {name: lab.Run(folder / "single" / name).record["final"] for name in ("base", "wide")}
    assert pair.summary.loc["validation_bpb"].to_dict() == {name: final["validation_bpb"] for name, final in finals.items()}
    lines = pair.figures["loss"].axes[0].get_lines()
    assert sorted(line.get_label() for line in lines) == ["base", "wide"]
    losses = {name: lab.Run(folder / "single" / name).metrics["loss"].tolist() for name in ("base", "wide")}
    assert {line.get_label(): [float(y) for y in line.get_ydata()] for line in lines} == {
        name: pytest.approx(values, rel=1e-5) for name, values in losses.items()
    }
    assert [line.get_label() for line in pair.figures["validation_bpb"].axes[0].get_lines()] == ["base"]
    assert pair.note == "A single run has no error bar: a difference between two of them may be that of their seeds."
    page = pair._repr_html_()
    assert page.count("<svg") == 2 and "model.hidden_size" in page and "model.num_layers" not in page and pair.note in page


def test_a_metric_with_a_single_point_is_drawn(folder, tmp_path):
    lab.fit(lab.load("tiny", "training.steps=5", "training.log_every=5"), tmp_path / "short", progress=False)
    assert len(lab.Run(tmp_path / "short").metrics) == 1
    (line,) = runs(tmp_path).compare().figures["loss"].axes[0].get_lines()
    assert line.get_marker() != "None" and line.get_markevery() is None  # else the line's only point is between two marks
    point = lab.Run(tmp_path / "short").metrics.assign(tokens=1)
    made = curves({"two seeds": [point, point.assign(loss=point["loss"] + 1)]})
    ((low, high),) = (stroke[:, 1] for each in made.axes[0].collections for stroke in each.get_segments())
    assert high - low == pytest.approx(1, rel=1e-4)


def test_a_panel_compares_with_the_runs_that_a_list_would_hold(folder):
    listed = {run.path.resolve() for run in runs(folder).found}
    assert {each for each in compared([folder]) if each.name not in ("cut", "list", "foreign")} == listed
    aside = folder / "demo/superseded/0123/plain/seed-0"
    assert compared(aside) == [aside.resolve()] == compared(folder / "demo/superseded")
    with pytest.raises(lab.LabError, match="there is no run in"):
        compared(folder / "odd/half")


def test_paired_seeds_point_to_the_report_and_can_be_drawn_as_bands(folder):
    compared = runs(folder)["demo/*"].compare(by="variant")
    assert compared.note.endswith(f"(longcat-lab report {folder / 'demo'}).")
    assert sorted(line.get_label() for line in compared.figures["loss"].axes[0].get_lines()) == ["plain", "wide"]
    assert "longcat-lab" not in runs(folder)["demo/*/seed-0"].compare().note


def test_the_table_needs_no_script_and_its_script_sorts(folder, tmp_path):
    page = runs(folder)._repr_html_()
    table = page[page.index("<table") : page.index("</table>")]
    assert table.count("<tr>") == 9 and "<script" not in table and "http" not in page
    script = page[page.index("<script>") : page.index("</script>")]
    assert len(script.splitlines()) <= 40
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no browser here")
    click = "document.querySelectorAll('table.lab-runs th button')[{}].click();"
    orders = {}
    for name, clicks in (("newest", ""), ("largest", click.format(6)), ("smallest", click.format(6) * 2)):
        (tmp_path / "page.html").write_text(f"<body>{page}<script>{clicks}</script></body>")
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", f"--user-data-dir={tmp_path / 'user'}"]
        asked = [browser, *flags, "--virtual-time-budget=2000", "--dump-dom", f"file://{tmp_path / 'page.html'}"]
        shown = subprocess.run(asked, capture_output=True, text=True, timeout=120).stdout
        rows = re.findall(r"<tr><td.*?</tr>", shown)
        orders[name] = [float(re.findall(r'data-value="([^"]*)"', row)[6]) for row in rows]
    params = runs(folder).frame["params"].tolist()
    assert orders == {"newest": params, "largest": sorted(params, reverse=True), "smallest": sorted(params)}
