"""What the README says is run as it stands there."""

import re
from pathlib import Path

import pytest

from longcat_lab.ablation import read, solve

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_python(number, fresh_registry, capsys):
    exec(compile(blocks("python")[number], f"README python {number}", "exec"), {"__name__": "readme"})
    assert "total" in capsys.readouterr().out


def test_question(tmp_path):
    (question,) = blocks("yaml")
    assert len(question.strip().splitlines()) <= 12
    path = tmp_path / "zero_experts.yaml"
    path.write_text(question)
    solution = solve(read(path))
    real = {name: config.model.moe.real_experts for name, config in solution.configs.items()}
    assert real == {"without": 2.0, "with": 2.0}


def test_everything_it_names_is_there():
    for place in re.findall(r"`((?:longcat_lab|notebooks|ablations|tests|tools)/[\w/.*]*)`", README):
        assert (ROOT / place).exists(), place
    for target in re.findall(r"make (\w+)", README):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE) or target in ("sure",), target
    for picture in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README):
        assert (ROOT / picture).is_file() and (ROOT / picture).stat().st_size < 2**20, picture


@pytest.mark.parametrize("path", sorted((ROOT / "ablations").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_question_in_the_repository_can_be_solved(path):
    question = read(path)
    solution = solve(question)
    assert set(solution.configs) == set(question.variants) and question.name == path.stem
