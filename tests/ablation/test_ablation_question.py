"""The question file, what is matched, and the jobs that come of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_rooms import FAKE, question
from hypothesis import given
from hypothesis import strategies as st

from longcat_lab.ablation import plan, read, solve
from longcat_lab.ablation.match import nearest_value
from longcat_lab.ablation.spec import Ablation
from longcat_lab.errors import LabError

TWO: dict[str, Any] = {"plain": {}, "b": {"model.kind": "b"}}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"sedes": [1]}, "Unknown key 'sedes', did you mean 'seeds'"),
        ({"claims": [{"better": "b", "than": "plain", "betterr": "b"}]}, "did you mean 'better'"),
        ({"claims": [{"better": "c", "than": "plain"}]}, r"claim 1 \('better'\) names 'c', which is not a variant"),
        ({"claims": [{"better": "b", "than": "b"}]}, "compares 'b' with itself"),
        ({"baseline": "plane"}, "'baseline' names 'plane', which is not a variant, did you mean 'plain'"),
        ({"seeds": [0, 1, 0]}, "'seeds' has one seed twice"),
        ({"seeds": []}, "'seeds'"),
        ({"seeds": [0, -1]}, "must not be negative"),
        ({"seeds": [0, 2**31]}, "'seeds' must be below 2\\*\\*31 = 2147483648, got 2147483648"),
        ({"name": "../evil"}, "'name'"),
        ({"variants": {"a/b": {}}, "baseline": "a/b"}, "'variants"),
        ({"variants": {"plain": {}, False: {}}}, "put it in quotes"),
        ({"smallest_effect": 0}, "'smallest_effect'"),
        ({"set": {"seed": 3}}, "'set' sets 'seed', but seeds come from 'seeds'"),
        ({"match": [{"quantity": "params", "reference": "plain"}]}, "'match.0.quantity'"),
        ({"match": [{"quantity": "total_params", "reference": "plane"}]}, "match 1 .* names 'plane'"),
        ({"match": [{"quantity": "total_params", "reference": "plain", "free": {"plain": "model.width"}}]}, "holds 'plain' to itself"),
        (
            {"match": [{"quantity": "total_params", "reference": "plain", "variants": [], "free": {"b": "model.width"}}]},
            "not among its 'variants'",
        ),
        (
            {"match": [{"quantity": q, "reference": "plain", "free": {"b": "model.width"}} for q in ("total_params", "active_params")]},
            "both move",
        ),
        ({"metric": None}, "'metric'"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(LabError, match=sentence) as error:
        read({**question(TWO), **change})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["name: [", "name: a\nname: b\n", "- 1\n", "", "\tname: x", "name: \x00"])
def test_malformed_files_are_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "q.yaml"
    path.write_text(text)
    with pytest.raises(LabError, match=r"q\.yaml"):
        read(path)


def test_overrides_go_on_top_of_set_or_change_the_question() -> None:
    a = read(question(TWO, set={"model.depth": 3, "effect": 0.5}), ["model.depth=4", "ablation.seeds=[3, 4]", "effect=1e-3"])
    assert a.set == {"model.depth": 4, "effect": 0.001} and a.seeds == [3, 4]
    assert solve(a, FAKE).configs["b"].model.depth == 4
    for wrong, sentence in [("depth", "write it as key=value"), ("ablation.sets=1", "did you mean 'set'"), ("a=[", "Override 'a=\\['")]:
        with pytest.raises(LabError, match=sentence):
            read(question(TWO), [wrong])


@pytest.mark.parametrize("wrong", [[1], 5, 0, "depth"])
def test_set_that_is_no_mapping_is_named_with_overrides_too(wrong: Any) -> None:
    with pytest.raises(LabError, match="'set': input should be a valid dict") as error:
        read(question(TWO, set=wrong), ["model.depth=4"])
    assert "\n" not in str(error.value)


def test_base_beside_the_question_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
        (folder / "both.yaml").write_text("effect: 1.0\n")
    (here / "only.yaml").write_text("effect: 2.0\n")
    (there / "mine.yaml").write_text("effect: 3.0\n")
    monkeypatch.chdir(here)
    for base, found in [
        ("mine.yaml", there / "mine.yaml"),
        ("both.yaml", there / "both.yaml"),
        ("only.yaml", here / "only.yaml"),
        ("gone.yaml", "gone.yaml"),
        ("small", "small"),
        (str(here / "both.yaml"), here / "both.yaml"),
    ]:
        (there / "q.yaml").write_text(yaml.safe_dump(question(TWO, base=base)))
        assert read(there / "q.yaml").base == str(found)
    assert read(question(TWO, base="mine.yaml")).base == "mine.yaml", "plain data lies beside nothing"


def test_every_key_is_described() -> None:
    assert all(field.description for field in Ablation.model_fields.values())


# ---- matching

MATCHED = {
    "plain": {"model.width": 512},
    "experts": {"model.width": 512, "model.experts": 600},
    "ngram": {"model.width": 512, "model.depth": 3},
}
RULES = [
    {
        "quantity": "flops_per_token",
        "reference": "plain",
        "tolerance": 0.02,
        "free": {"experts": "model.width", "ngram": "model.width"},
    },
    {"quantity": "total_params", "reference": "ngram", "variants": ["experts"], "tolerance": 0.01, "free": {"experts": "model.experts"}},
]


def test_coupled_rules_are_met_together() -> None:
    solution = solve(read(question(MATCHED, match=RULES)), FAKE)
    t = solution.totals
    for name in ("experts", "ngram"):
        assert t[name]["flops_per_token"] == pytest.approx(t["plain"]["flops_per_token"], rel=0.02)
    assert t["experts"]["total_params"] == pytest.approx(t["ngram"]["total_params"], rel=0.01)
    assert solution.moved["plain"] == {} and solution.moved["ngram"] == {"model.width": 344}, "a multiple of 8, as the configuration asks"
    assert solution.configs["experts"].model.width == solution.moved["experts"]["model.width"]
    assert solution.table.loc["ngram", "moved"] == "model.width=344"
    # The settled question is its own solution.
    settled = {name: {**values, **solution.moved[name]} for name, values in MATCHED.items()}
    assert solve(read(question(settled, match=RULES)), FAKE).totals == t


@pytest.mark.parametrize(
    ("rule", "sentence"),
    [
        (
            {"free": {"experts": "model.width"}},
            r"total_params of 'experts' should be within 1 % of .*nearest is .* at model.width=8 .*% off",
        ),
        ({}, "'experts' should be .* nothing of it is free"),
        ({"free": {"experts": "model.frozen"}}, "model.frozen does not change total_params of 'experts'"),
        (
            {"free": {"experts": "model.kind"}},
            "model.kind of 'experts', which is 'plain' there; it must be a setting that holds a whole number",
        ),
        ({"free": {"experts": "model.gone"}}, "model.gone of 'experts', which is None there"),
    ],
)
def test_rules_that_cannot_be_met(rule: dict[str, Any], sentence: str) -> None:
    arms = {"plain": {}, "experts": {"model.experts": 4000}}
    with pytest.raises(LabError, match=sentence):
        solve(read(question(arms, match=[{"quantity": "total_params", "reference": "plain", **rule}])), FAKE)


def test_unknown_override_of_a_variant() -> None:
    with pytest.raises(LabError, match=r"Variant 'b': Unknown key 'model\.experst', did you mean 'experts'"):
        solve(read(question({"plain": {}, "b": {"model.experst": 8}})), FAKE)


@given(
    start=st.integers(1, 400),
    target=st.floats(-50, 9000),
    slope=st.integers(1, 20),
    step=st.sampled_from([1, 2, 8, 24]),
    top=st.integers(400, 5000),
    falling=st.booleans(),
)
def test_bisection_finds_what_trying_all_would(start: int, target: float, slope: int, step: int, top: int, falling: bool) -> None:
    start = start // step * step or step

    def total(x: int) -> float | None:
        if x < 1 or x > top or x % step:
            return None
        return slope * x * (-1 if falling else 1) + (9000 if falling else 0)

    found = nearest_value(total, start, target)
    best = min(abs(total(x) - target) for x in range(step, top + 1, step))  # type: ignore[operator]
    assert found is not None and abs(total(found) - target) == best  # type: ignore[operator]


def test_with_the_real_configurations() -> None:
    """The demo's question in small: n-gram embeddings against as many parameters in experts, at equal FLOPs."""
    arms = {"plain": {}, "experts": {"model.moe.n_routed_experts": 24}, "ngram": {"model.embedding.ngram": {"order": 3}}}
    width = "model.ffn.ffn_hidden_size"
    rules = [
        {"quantity": "flops_per_token", "reference": "plain", "tolerance": 0.02, "free": {"experts": width, "ngram": width}},
        {**RULES[1], "free": {"experts": "model.moe.n_routed_experts"}},
    ]
    totals = solve(read({**question(arms, match=rules), "base": "tiny"})).totals
    assert totals["experts"]["total_params"] == pytest.approx(totals["ngram"]["total_params"], rel=0.01)
    assert totals["experts"]["total_params"] > 2 * totals["plain"]["total_params"]
    for name in ("experts", "ngram"):
        assert totals[name]["flops_per_token"] == pytest.approx(totals["plain"]["flops_per_token"], rel=0.02)
    with pytest.raises(LabError, match=r"Variant 'b': .*n_routed_expert.*did you mean 'n_routed_experts'"):
        solve(read({**question({"plain": {}, "b": {"model.moe.n_routed_expert": 8}}), "base": "tiny"}))
    with pytest.raises(LabError, match="did you mean 'nano'"):
        solve(read({**question({"plain": {}}), "base": "nanno"}))


# ---- jobs


def test_jobs_are_paired_and_ordered(tmp_path: Path) -> None:
    a = read(question(TWO, seeds=[5, 6]))
    jobs = plan(a, solve(a, FAKE), tmp_path, tmp_path / "n.ipynb", FAKE)
    assert [job.name for job in jobs] == ["plain/seed-5", "b/seed-5", "plain/seed-6", "b/seed-6"]
    assert [job.config.seed for job in jobs] == [5, 5, 6, 6] and len({job.identity for job in jobs}) == 4
    assert jobs[1].folder == tmp_path / "jobs" / "b" / "seed-5" and jobs[1].record()["status"] == "planned"


def test_importing_the_room_is_light() -> None:
    code = "import longcat_lab, sys; before = set(sys.modules); import longcat_lab.ablation; print(*sorted(set(sys.modules) - before))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert loaded == ["longcat_lab.ablation"]
