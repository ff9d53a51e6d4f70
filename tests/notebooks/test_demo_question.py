"""The demo's own question, end to end at the tiny size: command line, papermill, kernels, results, page."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pandas
import pytest

from longcat_lab.ablation import read_sweep
from longcat_lab.budget import totals
from longcat_lab.config import load

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["ablation.base=tiny", "training.steps=20", "training.optimizer.table_lr_multiplier=4"]


def command(*arguments, **options):
    return subprocess.run([sys.executable, "-m", "longcat_lab", *map(str, arguments)], capture_output=True, text=True, cwd=ROOT, **options)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "demo"
    done = command("run", "ablations/demo.yaml", "--out", folder, *SMALL)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def page(sweep):
    done = command("report", sweep)
    assert done.returncode == 0, done.stderr
    checked, path = done.stdout.splitlines()[-2:]
    assert checked.startswith("Checked: ") and path == str(sweep.resolve() / "report.html")
    return (sweep / "report.html").read_text(encoding="utf-8")


def test_every_job_is_there_with_its_record(sweep):
    results = pandas.read_parquet(sweep / "results.parquet")
    assert len(results) == 9 and set(results["status"]) == {"finished"}
    assert results.groupby("variant")["seed"].apply(sorted).tolist() == [[0, 1, 2]] * 3
    for variant, seed in zip(results["variant"], results["seed"], strict=True):
        folder = sweep / "jobs" / variant / f"seed-{seed}"
        assert {"notebook.ipynb", "run.json", "metrics.parquet"} <= {path.name for path in folder.iterdir()}
        record = json.loads((folder / "run.json").read_text())
        assert (record["variant"], record["seed"], record["sweep"]) == (variant, seed, "demo")
        assert record["config"]["seed"] == seed


def test_arms_are_matched_as_the_question_says(sweep):
    runs = read_sweep(sweep).runs
    cost = {variant: totals(load(runs[variant, 0]["config"])) for variant in ("plain", "experts", "ngram")}
    for variant in ("experts", "ngram"):
        assert cost[variant]["flops_per_token"] == pytest.approx(cost["plain"]["flops_per_token"], rel=0.01)
    assert cost["experts"]["total_params"] == pytest.approx(cost["ngram"]["total_params"], rel=0.01)
    assert cost["ngram"]["total_params"] > 1.5 * cost["plain"]["total_params"]


def test_the_page_answers_and_is_self_contained(page):
    assert "Do n-gram embeddings beat the same parameters spent on experts" in page
    assert len(re.findall(r"<b>[●○?] (seen|not seen|not resolvable): ngram better than (?:plain|experts)</b>", page)) == 2
    assert "95 % interval, n = 3" in page
    assert page.count("<svg") >= 3
    for fetched in re.findall(r"""(?:src|href)\s*=\s*["']([^"']+)""", page):
        assert fetched.startswith(("#", "data:", "jobs/")), fetched
    assert not re.search(r"url\(\s*['\"]?https?:", page) and "@import" not in page


def test_running_again_repeats_nothing(sweep):
    before = {path: path.stat().st_mtime_ns for path in sweep.glob("jobs/*/*/run.json")}
    done = command("run", "ablations/demo.yaml", "--out", sweep, *SMALL)
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in sweep.glob("jobs/*/*/run.json")} == before
