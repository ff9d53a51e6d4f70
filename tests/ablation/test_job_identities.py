"""Names of a sweep's jobs: those of single runs, looked up once for what the seeds do not change, and never older than a plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest

import longcat_lab as lab
from longcat_lab.ablation import plan, read, solve
from longcat_lab.config import load
from longcat_lab.config.run import RunConfig
from longcat_lab.training import identity, provenance

pytestmark = pytest.mark.usefixtures("fresh_registry")

OWN = """
class Own(lab.Block):
    def forward(self, x):
        return x * FACTOR

@lab.register("ffn")
class OwnConfig(lab.BlockConfig):
    kind: Literal["own"] = "own"
    def budget(self, shape):
        return lab.Budget()
    def build(self, shape):
        return Own()
"""


def define(factor: str) -> None:
    """As a notebook's cell does."""
    code = compile(OWN.replace("FACTOR", factor), "cell", "exec", dont_inherit=True)  # else annotations stay text, as they are here
    exec(code, {"lab": lab, "Literal": Literal, "__name__": "__main__"})


def jobs(variants: dict[str, Any], seeds: int, **more: Any) -> list[Any]:
    asked = {"name": "names", "question": "q", "hypothesis": "h", "base": "tiny", "baseline": next(iter(variants)), "smallest_effect": 0.1}
    a = read({**asked, "variants": variants, "seeds": list(range(seeds)), **more})
    return plan(a, solve(a), Path("out"), Path("job.ipynb"))


def test_what_the_seeds_do_not_change_is_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    built, prepared, real, prepare = [], [], provenance.LongcatLM, provenance.prepare

    def build(config: Any) -> Any:
        built.append(config)
        return real(config)

    def corpus(config: Any, size: int) -> Any:
        prepared.append(size)
        return prepare(config, size)

    monkeypatch.setattr(provenance, "LongcatLM", build)
    monkeypatch.setattr(provenance, "prepare", corpus)
    variants = {
        "a": {},
        "rate": {"training.optimizer.learning_rate": 1e-3},
        "deep": {"model.num_layers": 3},
        "small": {"data.batch_size": 3},
    }
    found = jobs(variants, 50, data_seeds=list(range(100, 150)))
    assert len(found) == 200 and len(built) == 2, "two models, of 200 jobs"
    assert len(prepared) == 2
    assert len({job.identity for job in found}) == 200
    assert [job.identity for job in found[::37]] == [identity(job.config) for job in found[::37]], "as of a run alone"


def test_a_class_of_ones_own_that_is_defined_anew_is_another_job() -> None:
    """Also within one plan, where the settings are the same text."""
    known: dict[str, Any] = {}
    found = []
    for factor in ("0.0", "0.0", "0.5"):
        define(factor)
        config = load("tiny", "model.ffn.kind=own")
        found.append(identity(config, known))
        assert found[-1] == identity(config)
    assert found[0] == found[1] != found[2]
    first: RunConfig = load("tiny", "model.ffn.kind=own")
    define("0.0")
    assert [identity(first, known), identity(load("tiny", "model.ffn.kind=own"), known)] == [found[2], found[0]]


def test_a_file_that_is_edited_between_two_plans_makes_other_jobs() -> None:
    file = Path("own.py")
    text = "from typing import Literal\nimport longcat_lab as lab\n" + OWN
    variants = {"a": {}, "b": {"model.ffn.kind": "own"}}
    found = []
    for factor in ("0.0", "0.5", "0.0"):
        file.write_text(text.replace("FACTOR", factor))
        found.append([job.identity for job in jobs(variants, 2, plugins=[str(file.resolve())])])
    assert found[0] == found[2] and found[0][0::2] == found[1][0::2], "the baseline has no class of it"
    assert not set(found[0][1::2]) & set(found[1][1::2])


def test_text_that_changes_between_two_plans_makes_other_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGCAT_LAB_CACHE", str(tmp_path / "cache"))
    texts = tmp_path / "texts"
    texts.mkdir()
    words = " ".join(f"word{number} and more of it," for number in range(3000))
    source = {"data.source.kind": "files", "data.source.path": str(texts), "model.vocab_size": 300}
    found = []
    for step in range(2):
        for number in range(12):
            (texts / f"{number}.txt").write_text(f"{number} {step} {words}")
        found.append({job.identity for job in jobs({"a": source}, 2)})
    assert not found[0] & found[1]
