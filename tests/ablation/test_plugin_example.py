"""The example of a sweep with a block of one's own: real jobs, by the command that the README names, and their page."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from longcat_lab.ablation import check, load_results

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples" / "plugins"
SMOKE = ["training.steps=4", "training.evaluation_sequences=4", "training.schedule.warmup_steps=1"]


def command(*arguments: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "longcat_lab", *map(str, arguments)], capture_output=True, text=True)


@pytest.mark.slow
def test_the_examples_sweep_runs_and_is_reported(tmp_path: Path) -> None:
    """Two arms, three seeds, jobs in processes of their own, by the command that the README names."""
    out = tmp_path / "out"
    done = command("run", EXAMPLES / "question.yaml", "--out", out, *SMOKE)
    assert done.returncode == 0, done.stderr
    frame = load_results(out)
    assert len(frame) == 6 and set(frame["status"]) == {"finished"} and set(frame["variant"]) == {"window", "comb"}
    copy = out / "plugins" / "rule.py"
    assert copy.read_bytes() == (EXAMPLES / "rule.py").read_bytes()
    asked = yaml.safe_load((out / "ablation.yaml").read_text())
    assert asked["plugins"] == ["plugins/rule.py"] and asked["copied"]["plugins/rule.py"]["of"] == str(EXAMPLES / "rule.py")
    for variant in ("window", "comb"):
        record = json.loads((out / "jobs" / variant / "seed-0" / "run.json").read_text())
        (told,) = record["provenance"]["plugins"]
        assert record["config"]["plugins"] == [str(copy)] and told["sha256"] == asked["copied"]["plugins/rule.py"]["sha256"]
    assert not (frame[frame["variant"] == "comb"]["train_loss"].to_numpy() == frame[frame["variant"] == "window"]["train_loss"]).any()

    moved = tmp_path / "moved"  # the original path is not needed for the page, and the sweep may lie elsewhere by then
    out.rename(moved)
    page = command("report", moved)
    assert page.returncode == 0, page.stderr
    text = (moved / "report.html").read_text(encoding="utf-8")
    assert "a page runs no code of its folder" in text
    assert "Of sixteen keys a query" in text and re.search("seen|not resolvable", text)

    # Wherever the sweep is copied to, its page agrees with it: nothing on it names the place where it was made.
    assert "plugins/rule.py" in text and str(tmp_path) not in re.sub(r'<pre data-part="question-file">.*?</pre>', "", text, flags=re.DOTALL)
    copy = shutil.copytree(moved, tmp_path / "elsewhere" / "copy")
    assert check(copy) == []
