"""Plugins in question files: what the sweep's folder keeps of them when files change or move, with real jobs; matching; mistakes."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_rooms import PARAMETERS, write_notebook
from rich.console import Console

from longcat_lab.ablation import load_results, read, read_sweep, run, solve
from longcat_lab.errors import LabError

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples" / "plugins"
JOB = """
import longcat_lab as lab
from longcat_lab.files import read_json
lab.fit(lab.load(read_json(f"{job_folder}/run.json")["config"]), job_folder, progress=False)
"""  # what notebooks/run.ipynb does, without its figures
SMOKE = ["training.steps=4", "training.evaluation_sequences=4", "training.schedule.warmup_steps=1"]


pytestmark = pytest.mark.usefixtures("fresh_registry")


def command(*arguments: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "longcat_lab", *map(str, arguments)], capture_output=True, text=True)


def quiet() -> Console:
    return Console(file=io.StringIO())


def small(folder: Path, step: int = 4, **more: Any) -> Path:
    """The example's question with one seed and an arm that is evaluated: two jobs, one of which trains under the rule of a file."""
    text = (EXAMPLES / "rule.py").read_text().replace("self.every ==", f"(self.every * {step}) ==")
    (folder / "rules.py").write_text(text)
    asked = yaml.safe_load((EXAMPLES / "question.yaml").read_text())
    del asked["claims"]
    arms = {"combed": {"of": "window", "set": {"model.attention.selection.kind": "comb"}}}
    write_notebook(folder / "job.ipynb", PARAMETERS, JOB)
    asked |= {
        "notebook": str(folder / "job.ipynb"),
        "plugins": ["rules.py"],
        "evaluate": arms,
        "seeds": [0],
        **more,
    }
    (folder / "q.yaml").write_text(yaml.safe_dump(asked))
    return folder / "q.yaml"


def test_an_edited_plugin_makes_its_jobs_anew_and_a_folder_is_whole_by_itself(tmp_path: Path) -> None:
    question, out = small(tmp_path), tmp_path / "out"
    run(question, out, 2, SMOKE, console=quiet())
    first = load_results(out).set_index("variant")
    assert set(first["status"]) == {"finished"} and set(first.index) == {"window", "comb", "combed"}
    assert first.loc["combed", "validation_bpb"] != first.loc["window", "validation_bpb"]

    old = (out / "plugins" / "rules.py").read_bytes()
    small(tmp_path, 1)
    run(question, out, 2, SMOKE, console=quiet())
    second = load_results(out).set_index("variant")
    assert second.loc["window", "identity"] == first.loc["window", "identity"], "it has no class of the file"
    assert second.loc["comb", "identity"] != first.loc["comb", "identity"] and set(second["status"]) == {"finished"}
    assert (out / "superseded" / first.loc["comb", "identity"] / "comb" / "seed-0" / "run.json").is_file()
    (aside,) = (out / "superseded" / "plugins").iterdir()
    assert aside.read_bytes() == old and (out / "plugins" / "rules.py").read_bytes() != old
    (change,) = read(out / "ablation.yaml").changes
    assert "plugins/rules.py edited when 2 jobs had finished" in change

    # The sweep's own question file, in a folder that has moved, without the file that it was made from: nothing is left to do.
    (tmp_path / "rules.py").unlink()
    moved = tmp_path / "moved"
    out.rename(moved)
    before = {path: path.read_bytes() for path in moved.glob("jobs/*/*/run.json")}
    run(moved / "ablation.yaml", moved, 1, console=quiet())
    assert {path: path.read_bytes() for path in moved.glob("jobs/*/*/run.json")} == before

    # A job that did not end goes on in the folder's new place.
    record = moved / "jobs" / "comb" / "seed-0" / "run.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "status": "interrupted", "reason": "stopped", "final": {}}))
    run(moved / "ablation.yaml", moved, 1, console=quiet())
    again = json.loads(record.read_text())
    assert again["status"] == "finished" and again["config"]["plugins"] == [str(moved / "plugins" / "rules.py")]

    # Nothing of a sweep is imported but the copies that its question file tells of, by hash.
    sweep = read_sweep(moved)
    assert {tuple(job["config"]["plugins"]) for job in sweep.runs.values()} == {(str(moved / "plugins" / "rules.py"),)}
    record.write_text(json.dumps({**again, "config": {**again["config"], "plugins": ["/etc/evil.py"]}}))
    assert read_sweep(moved).runs["comb", 0]["config"]["plugins"] == [str(moved / "plugins" / "rules.py")]
    with open(moved / "plugins" / "rules.py", "a") as file:
        file.write("open('was_here', 'w')\n")
    page = command("report", moved)
    assert page.returncode == 2 and "rules.py is not the file that the sweep ran with" in page.stderr and page.stderr.count("\n") == 1
    assert not Path("was_here").exists()
    shutil.rmtree(moved / "plugins")
    with pytest.raises(LabError, match=r"rules\.py is not there, and without it the sweep's configurations cannot be read"):
        read_sweep(moved)
    asked = (moved / "ablation.yaml").read_text()
    (tmp_path / "outside.py").write_text("")
    (moved / "ablation.yaml").write_text(asked.replace("plugins/rules.py:", "../outside.py:"))
    with pytest.raises(LabError, match=r"'copied' names \.\./outside\.py, which is not in the sweep's own folder plugins"):
        read_sweep(moved)


def test_arms_with_blocks_of_ones_own_are_matched(tmp_path: Path) -> None:
    """The files of the base and of the question together; the width of a block of one's own is what moves."""
    asked = {
        "name": "ffn",
        "question": "q",
        "hypothesis": "h",
        "base": str(EXAMPLES / "ffn.yaml"),
        "plugins": [str(EXAMPLES / "rule.py")],
        "baseline": "squared",
        "variants": {
            "squared": {},
            "swiglu": {"model.ffn.kind": "swiglu"},
            "comb": {"model.attention.kind": "lsa", "model.attention.selection.kind": "comb", "model.ffn.ffn_hidden_size": 40},
        },
        "match": [
            {"quantity": "total_params", "reference": "swiglu", "free": {"squared": "model.ffn.ffn_hidden_size"}, "variants": ["squared"]},
        ],
        "seeds": [0],
        "smallest_effect": 0.1,
    }
    solution = solve(read(asked))
    assert solution.moved["squared"] == {"model.ffn.ffn_hidden_size": 108}  # 2 x 108 = 3 x 72
    assert solution.totals["squared"]["total_params"] == solution.totals["swiglu"]["total_params"]
    assert [Path(path).name for path in solution.plugins] == ["ffn.py", "rule.py"]
    assert all(config.plugins == list(solution.plugins) for config in solution.configs.values())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"plugins": "rules.py"}, "'plugins': write a list of Python files"),
        ({"plugins": ["absent.py"]}, r"'plugins' names .*absent\.py, which cannot be read"),
        ({"set": {"plugins": ["rules.py"]}}, "'set' sets 'plugins', but they are the same for every variant"),
        ({"plugins": []}, "there is no selection kind 'comb'.*One of your own must be in a Python file that 'plugins' names"),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    question = small(tmp_path, **change)
    with pytest.raises(LabError, match=sentence) as error:
        run(question, tmp_path / "out", 1, console=quiet())
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_files_of_one_name_have_copies_of_their_own(tmp_path: Path) -> None:
    from longcat_lab.ablation import plugin_copies

    contents = {"/a/rules.py": b"1", "/b/rules.py": b"2", "/c/other.py": b"1", "/d/rules.py": b"3"}
    assert plugin_copies.names(contents) == {
        "/a/rules.py": "rules.py",
        "/b/rules.py": "rules-2.py",
        "/c/other.py": "rules.py",
        "/d/rules.py": "rules-3.py",
    }
    copied = plugin_copies.write(tmp_path, contents)
    assert plugin_copies.kept(tmp_path, copied) == [str(tmp_path / "plugins" / name) for name in ("rules.py", "rules-2.py", "rules-3.py")]
