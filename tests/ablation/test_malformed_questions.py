"""Question files that are wrong in many ways: each gives one sentence with the line, and starts nothing."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from longcat_lab.ablation import Ablation, places, read
from longcat_lab.ablation.jobs import find_notebook
from longcat_lab.ablation.words import SHORT
from longcat_lab.cli.main import main
from longcat_lab.errors import LabError

RUN, RULE = (Path(__file__).parents[2] / name for name in ("notebooks/run.ipynb", "examples/plugins/rule.py"))

GOOD = """\
name: small
question: Is it so?
hypothesis: It is.
base: tiny
set:
  training.steps: 12
baseline: plain
variants:
  plain: {}
  ngram:
    model.embedding.ngram.order: 3
  other: {model.num_layers: 2}
evaluate:
  bare: {of: ngram, set: {}}
seeds: [0, 1, 2]
match:
  - quantity: total_params
    reference: plain
    variants: []
metric: validation_bpb
smallest_effect: 0.1
claims:
  - {better: ngram, than: plain}
  - better: other
    than: plain
"""

MATCH = "match:\n  - quantity: total_params\n    reference: plain\n    variants: []"
RATE = "training.optimizer.learning_rate"

# What is replaced by what; the line that must be named; a part of the sentence.
CASES = [
    ("seeds:", "sedes:", 15, "Unknown key 'sedes', did you mean 'seeds'?"),
    ("than: plain\n", "then: plain\n", 25, "Unknown key 'claims.1.then', did you mean 'than'?"),
    ("    reference: plain", "    referense: plain", 18, "did you mean 'reference'?"),
    ("of: ngram", "off: ngram", 14, "the key False in 'evaluate.bare' is not text"),
    ("model.embedding.ngram.order", "model.embedding.ngram.ordre", 11, "did you mean 'order'?"),
    ("model.num_layers", "model.num_layer", 12, "Unknown key 'model.num_layer', did you mean 'num_layers'?"),
    ("  training.steps", "  training.stepps", 6, "Unknown key 'training.stepps', did you mean 'steps'?"),
    ("training.steps: 12", "training.steps: twelve", 6, "'training.steps': input should be a valid integer, got 'twelve'."),
    ("training.steps: 12", "training.steps: 1.5", 6, "valid integer, got 1.5."),
    ("training.steps: 12", "seed: 12", 6, "seeds come from 'seeds'"),
    ("training.steps: 12", "1: 12", 6, "the key 1 in 'set' is not text to YAML; put it in quotes."),
    ("order: 3", "order: 99999999999999999999999", 11, "model.embedding.ngram.order"),
    ("base: tiny", "base: tinny", 4, "There is no preset 'tinny', did you mean 'tiny'?"),
    ("base: tiny", "base: gone/x.yaml", 4, "cannot be read"),
    ("base: tiny", "base: ../out.yaml", 4, "'base' names ../out.yaml, which leads out of the question's folder"),
    ("base: tiny", "base: a/../../out.yaml", 4, "which leads out"),
    ("base: tiny", "base: link.yaml", 4, "which leads out"),
    ("base: tiny", 'base: "a\\0b.yaml"', 4, "'base' names 'a\\x00b.yaml', and no path holds that character."),
    ("base: tiny", f"base: {'x' * 300}.yaml", 4, "cannot be read"),
    ("base: tiny", "base: [tiny]", 4, "'base': input should be a valid string"),
    ("baseline: plain", "baseline: plane", 7, "'baseline' names 'plane', which is not a variant, did you mean 'plain'?"),
    ("baseline: plain", "baseline: bare", 7, "which is evaluated and not trained"),
    ("baseline: plain", "baseline: [plain]", 7, "'baseline': input should be a valid string, got ['plain']."),
    ("baseline: plain", "baseline: {plain: 1}", 7, "'baseline': input should be a valid string"),
    ("set:\n  training.steps: 12", "control: feature_off\nset: [a]", 6, "'set': input should be a valid dictionary, got ['a']."),
    ("training.steps: 12", "model.embedding.ngram.kind: [x]\ncontrol: feature_off", 11, "in 'ngram': name it (switch_off:"),
    ("  plain: {}\n", "  plain: {}\n  plain: {}\n", 10, "the key 'plain' is there twice, first in line 9"),
    ("  plain: {}\n", "  plain: {}\n  no: {}\n", 10, "the key False in 'variants' is not text"),
    ("  plain: {}", "  plain: 7", 9, "'variants.plain': input should be a valid dictionary, got 7."),
    ("  other:", "  other/one:", 12, "'variants.other/one' as a name"),
    ("  other:", "  ../other:", 12, "'variants.../other' as a name"),
    ("  other:", f"  {'o' * 81}:", 12, "as a name: string should have at most 80 characters"),
    ("name: small", "name: ../small", 1, "'name': string should match pattern"),
    ("name: small", "name: a/b", 1, "'name': string should match pattern"),
    ("name: small\n", "", 1, "'name' is missing."),
    ("question: Is it so?", "question: ''", 2, "'question': string should have at least 1 character"),
    ("seeds: [0, 1, 2]", "seeds: [true, 1]", 15, "'seeds.0': input should be a valid integer, got True."),
    ("seeds: [0, 1, 2]", "seeds: [1, 1.5]", 15, "'seeds.1': input should be a valid integer, got 1.5."),
    ("seeds: [0, 1, 2]", "seeds:\n  - 0\n  - a", 17, "'seeds.1': input should be a valid integer, got 'a'."),
    ("seeds: [0, 1, 2]", "seeds: 3", 15, "'seeds': input should be a valid list, got 3."),
    ("seeds: [0, 1, 2]", "seeds: []", 15, "'seeds': list should have at least 1 item"),
    ("seeds: [0, 1, 2]", "seeds: [0, 1, 0]", 15, "'seeds' has one seed twice"),
    ("seeds: [0, 1, 2]", "seeds: [0, -1]", 15, "must not be negative"),
    ("seeds: [0, 1, 2]", f"seeds: [0, {10**30}]", 15, "'seeds' must be below 2**31"),
    ("seeds: [0, 1, 2]", f"seeds: [0, {'9' * 5000}]", 15, "cannot be read as '!!int'"),
    ("seeds: [0, 1, 2]", "seeds: [0, 1]\ndata_seeds: [7]", 16, "'data_seeds' has 1 numbers for 2 seeds"),
    ("seeds: [0, 1, 2]", "seeds: [0, 1]\ndata_seeds: x", 16, "'data_seeds': input should be a valid list, got 'x'."),
    ("smallest_effect: 0.1", "smallest_effect: 0", 21, "should be greater than 0, got 0"),
    ("smallest_effect: 0.1", "smallest_effect: .inf", 21, "finite number"),
    ("smallest_effect: 0.1", "smallest_effect: 1e999", 21, "finite number"),
    ("smallest_effect: 0.1", "smallest_effect: much", 21, "valid number, got 'much'."),
    ("quantity: total_params", "quantity: params", 17, "'match.0.quantity'"),
    ("    variants: []", "    variants: [gone]", 17, "match 1 names 'gone', which is not a variant"),
    ("    variants: []", "    free: {ngram: model.nothing}", 19, "Match 1 frees model.nothing of 'ngram', which is None there"),
    ("    variants: []", "    tolerance: 2", 19, "'match.0.tolerance': input should be less than 1, got 2"),
    ("metric: validation_bpb", "metric: [a]", 20, "'metric': input should be a valid string"),
    ("metric: validation_bpb", "control: a_b", 20, "'control' knows no 'a_b', did you mean 'a_a'?"),
    ("metric: validation_bpb", "control: feature_off", 12, "knows no switch for what model.num_layers does in 'other'"),
    ("metric: validation_bpb", "control: 5", 20, "'control': input should be a valid list, got 5."),
    ("metric: validation_bpb", "control: true", 20, "'control': input should be a valid list, got True."),
    ("metric: validation_bpb", "control: feature_off\nswitch_off: {ngram: 5}", 21, "'switch_off.ngram': input should be a valid"),
    ("layers: 2}", "layers: 2, switch_off: 5}", 12, "'variants.other.switch_off': write the settings that switch it off"),
    (MATCH, "match: flops\nfree: training.steps\ncontrol: 5", 18, "'control': input should be a valid list, got 5."),
    ("metric: validation_bpb", "notebook: gone.ipynb", 20, "The notebook of 'small' is not there"),
    ("metric: validation_bpb", "notebook: ../out.ipynb", 20, "'notebook' names ../out.ipynb, which leads out of the question's folder"),
    ("metric: validation_bpb", "notebook: link.ipynb", 20, "which leads out"),
    ("metric: validation_bpb", "notebook: q.yaml", 20, "q.yaml is no notebook: name a file that Jupyter has written"),
    ("metric: validation_bpb", "notebook: list.ipynb", 20, "list.ipynb is no notebook"),
    ("metric: validation_bpb", "notebook: a", 20, "The notebook of 'small' is not there"),
    ("metric: validation_bpb", f"notebook: {'x' * 300}", 20, "The notebook of 'small' is not there"),
    ("metric: validation_bpb", 'notebook: "a\\0b.ipynb"', 20, "no path holds that character"),
    ("metric: validation_bpb", "plugins: [gone.py]", 20, "cannot be read"),
    ("metric: validation_bpb", "plugins:\n  - ../out.py", 21, "'plugins' names ../out.py, which leads out of the question's folder"),
    ("metric: validation_bpb", 'plugins: ["a\\0b.py"]', 20, "no path holds that character"),
    ("metric: validation_bpb", "plugins: [~nosuch/x.py]", 20, "cannot be read"),
    ("metric: validation_bpb", f"plugins: [{'x' * 300}.py]", 20, "'plugins' cannot be looked for: File name too long."),
    ("metric: validation_bpb", "compare_with: a", 20, "which is no sweep's folder: it has no ablation.yaml."),
    ("metric: validation_bpb", "compare_with: ..", 20, "which is no sweep's folder"),
    ("metric: validation_bpb", "compare_with: q.yaml", 20, "which is no sweep's folder"),
    ("metric: validation_bpb", 'compare_with: "a\\0b"', 20, "no path holds that character"),
    ("question: Is it so?", 'question: "\\ud800"', 2, "'question' holds half a character"),
    ("metric: validation_bpb", "free: training.steps", 20, "'free' goes with one word of 'match'"),
    ("metric: validation_bpb", "tune: {setting: a, values: [1, 2], seeds: [2]}", 20, "both have 2: what is chosen on a seed"),
    ("metric: validation_bpb", "tune: {setting: a, values: [1], seeds: [5]}", 20, "'tune.values': list should have at least 2 items"),
    ("metric: validation_bpb", f"tune: {{setting: {RATE[:-1]}, values: [1, 2], seeds: [9]}}", 20, "did you mean 'learning_rate'?"),
    ("metric: validation_bpb", f"tune:\n  values: [1, 2]\n  seeds: [9]\n  setting: {RATE[:-1]}", 23, "of 'plain' to 1: Unknown key"),
    ("metric: validation_bpb", f"tune:\n  setting: {RATE}\n  values:\n  - 1\n  - -2\n  seeds: [9]", 24, "greater than 0, got -2"),
    ("metric: validation_bpb", "tune: {setting: training.device, values: [1, 2], seeds: [9]}", 20, "'training.device': input should be"),
    ("metric: validation_bpb", "resources: {memory: much}", 20, "resources.memory"),
    ("metric: validation_bpb", f"resources: {{memory: {'9' * 90} GB}}", 20, "'resources.memory': should be at most 10,000 TB"),
    ("metric: validation_bpb", f"resources: {{memory: {'9' * 400} GB}}", 20, "such as '8 GB' or '512 MB', got 403 characters"),
    ("metric: validation_bpb", f"resources: {{time: {'9' * 90} h}}", 20, "'resources.time': should be at most 10,000 d"),
    ("metric: validation_bpb", "measured: {plain: {points: [[0, x]]}}", 20, "'measured.plain.mark' is missing."),
    ("metric: validation_bpb", "tuning: {setting: a}", 20, "'tuning.metric' is missing."),
    ("better: other", "better: othre", 24, "claim 2 ('better') names 'othre'"),
    ("  - better: other\n    than: plain\n", "  - {better: ngram, than: plain}\n", 24, "a claim is there twice"),
    ("{better: ngram, than: plain}", "{better: plain, than: plain}", 23, "claim 1 compares 'plain' with itself."),
    ("  plain: {}", "\tplain: {}", 9, "found character '\\t' that cannot start any token"),
    ("question: Is it so?", "question: [Is it so", 3, "not valid YAML"),
    ("question: Is it so?", "question: !!python/object/apply:os.system ['echo hi']", 2, "the tag '!!python/object/apply:os.system' is not"),
    ("question: Is it so?", "question: &a [*a]", 2, "an alias stands within its own anchor"),
    ("question: Is it so?", "question: *gone", 2, "found undefined alias"),
    ("question: Is it so?", "question: Is\x07 it so?", 2, "the character #x0007 is not allowed"),
    ("question: Is it so?", "? [a, b]\n: 1", 2, "a list or a mapping cannot be a key"),
    ("claims:", "---\nclaims:", 22, "but found another document"),
]  # fmt: skip


def bomb() -> str:
    """Ten lines that stand for 10^9 values."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    return "\n".join(lines)


FILES = [
    (b"", 1, "found nothing"),
    (b"# nothing but words\n", 1, "found nothing"),
    (b"- a\n- b\n", 1, "expected 'key: value' lines, found list."),
    (b"just words\n", 1, "found str"),
    (b"\x00\x01\x02\x03", 1, "the character #x0000 is not allowed"),
    (b"name: a\nquestion: \xff\xfe\n", 2, "this is not UTF-8 text (byte 0xff)"),
    ("name: größe".encode("utf-16"), 1, "this is not UTF-8 text"),
    (bomb().encode(), 5, "with its aliases it stands for more than 100,000 values"),
    (b"name: a\nset: " + b"[" * 5000, 2, "nested too deeply"),
    (b"{" * 3000 + b"\n", 1, "nested too deeply"),
]


def ask(monkeypatch, capsys, *arguments: str) -> tuple[int, str]:
    """Exit code and error of the command, in this process."""
    monkeypatch.setattr(sys, "argv", ["longcat-lab", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    found = capsys.readouterr()
    assert found.out == ""
    return end.value.code, found.err


def place(tmp_path: Path) -> Path:
    """The folder of the question, with what it must not name in it and around it."""
    home = tmp_path / "here"
    (home / "a").mkdir(parents=True)
    (home / "a" / "file").touch()
    (home / "list.ipynb").write_text("[]")
    for name, text in (("out.yaml", "{}"), ("out.ipynb", RUN.read_text(encoding="utf-8")), ("out.py", RULE.read_text(encoding="utf-8"))):
        (tmp_path / name).write_text(text, encoding="utf-8")
        (home / name.replace("out", "link")).symlink_to(tmp_path / name)
    return home


def all_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize(("content", "line", "sentence"), [
    *[(GOOD.replace(old, new, 1).encode(), line, sentence) for old, new, line, sentence in CASES],
    *FILES,
], ids=[*(f"{i}-{sentence[:40]}" for i, (_, _, _, sentence) in enumerate(CASES)), *(f"file-{i}" for i in range(len(FILES)))])  # fmt: skip
def test_one_sentence_with_the_line(tmp_path: Path, monkeypatch, capsys, content: bytes, line: int, sentence: str) -> None:
    assert content != GOOD.encode(), "the case changes nothing"
    monkeypatch.chdir(home := place(tmp_path))
    (home / "q.yaml").write_bytes(content)
    before = all_in(tmp_path)
    code, said = ask(monkeypatch, capsys, "run", "q.yaml")
    assert code == 2 and said.count("\n") == 1, said
    assert re.match(rf"longcat-lab: q.yaml, line {line}\b", said), said
    assert sentence in said, said
    assert all_in(tmp_path) == before


@pytest.mark.parametrize(
    "line",
    [
        "base: ../out.yaml",
        "notebook: ../out.ipynb",
        "plugins: [../out.py]",
        "compare_with: a",
        "tune: {setting: a, values: [1, 2], seeds: [9]}",
    ],
)
def test_a_plan_refuses_what_a_run_refuses(tmp_path: Path, monkeypatch, capsys, line: str) -> None:
    monkeypatch.chdir(home := place(tmp_path))
    key = line.partition(":")[0]
    (home / "q.yaml").write_text("".join(each for each in GOOD.splitlines(True) if not each.startswith(f"{key}:")) + line + "\n")
    code, said = ask(monkeypatch, capsys, "run", "q.yaml", "--plan", "--no-measure")
    assert code == 2 and re.match(rf"longcat-lab: q.yaml, line \d+: '{key}' ", said), said


def test_a_path_in_full_and_one_into_the_working_folder_hide_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = place(tmp_path)
    (tmp_path / "out.yaml").write_text("model: {num_layers: 1}\n")

    def asked(base: str, notebook: str, plugin: str) -> tuple[str, Path, list[str]]:
        more = f"notebook: {notebook}\nplugins: ['{plugin}']\n"
        (home / "q.yaml").write_text(GOOD.replace("base: tiny", f"base: {base}") + more)
        a = read(home / "q.yaml")
        assert places.check(a) == [] and not a.at("base").endswith("line 1: ")
        return a.base, find_notebook(a, home / "q.yaml"), a.plugins

    meant = (str(tmp_path / "out.yaml"), tmp_path / "out.ipynb", [str(tmp_path / "out.py")])
    monkeypatch.chdir(home)
    assert asked(*(str(tmp_path / f"out.{kind}") for kind in ("yaml", "ipynb", "py"))) == meant
    monkeypatch.chdir(tmp_path)
    assert asked("../out.yaml", "../out.ipynb", "../out.py") == meant
    (tmp_path / "deep").mkdir()
    monkeypatch.chdir(tmp_path / "deep")
    with pytest.raises(LabError, match=r"q.yaml, line 4: 'base' names ../out.yaml, which leads out"):
        asked("../out.yaml", "../out.ipynb", "../out.py")


def test_a_place_outside_is_not_taken_where_one_inside_is_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`../x.yaml` is x.yaml in the working folder to a question below it, and never the one beside the working folder."""
    work = tmp_path / "work"
    (work / "questions").mkdir(parents=True)
    for name in ("x.yaml", "x.ipynb", "x.py"):
        (tmp_path / name).write_text('{"nbformat": 4, "cells": []}')
    (work / "questions" / "q.yaml").write_text(GOOD.replace("base: tiny", "base: ../x.yaml\nnotebook: ../x.ipynb\nplugins: [../x.py]"))
    monkeypatch.chdir(work)
    a = read("questions/q.yaml")
    with pytest.raises(LabError, match=r"q.yaml, line 4: 'base' names ../x.yaml, which leads out"):
        places.check(a)
    with pytest.raises(LabError, match=r"q.yaml, line 5: 'notebook' names ../x.ipynb, which leads out"):
        find_notebook(a, "questions/q.yaml")
    for name in ("x.yaml", "x.ipynb", "x.py"):
        (work / name).write_text('{"nbformat": 4, "cells": []}')
    a = read("questions/q.yaml")
    assert places.check(a) == [] and find_notebook(a, "questions/q.yaml") == work / "x.ipynb"
    assert a.base == str(work / "x.yaml") and a.plugins == [str(work / "x.py")]


def test_what_is_read_back_is_never_refused_for_where_somebody_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = place(tmp_path)
    (home / "q.yaml").write_text(
        GOOD.replace("base: tiny", "base: ../out.yaml\nnotebook: ../out.ipynb\nplugins: [../out.py]\ncompare_with: a")
    )
    monkeypatch.chdir(home)
    a = read("q.yaml")
    assert (a.base, a.notebook, a.plugins) == (str(tmp_path / "out.yaml"), "../out.ipynb", [str(tmp_path / "out.py")])
    with pytest.raises(LabError, match=r"q.yaml, line 4: 'base' names"):
        places.check(a)


def test_a_sweep_to_compare_with_may_come_later_and_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "q.yaml").write_text(GOOD + "compare_with: runs/other\n")
    said = "compare_with: runs/other holds no sweep yet; the order of the arms is compared once it has results."
    assert places.check(read("q.yaml")) == [said]
    monkeypatch.setattr(sys, "argv", ["longcat-lab", "run", "q.yaml", "--plan", "--no-measure"])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code and said in capsys.readouterr().out.splitlines()
    (tmp_path / "runs" / "other" / "tuning").mkdir(parents=True)
    assert places.check(read("q.yaml"))[0].endswith("once it has results."), "it is tuning"
    (tmp_path / "runs" / "other" / "ablation.yaml").touch()
    assert places.check(read("q.yaml")) == []


ODD: list[Any] = [None, 5, True, -1.5, 10**400, "x", "", "a\0b", [], [1], [None], [[]], {}, {"a": None}, {"plain": 5}, {"ngram": [1]}]
WORDS: list[dict[str, Any]] = [
    {},
    {"control": ["a_a", "feature_off", "shuffled_tokens"], "switch_off": {"other": None}},
    {"match": "flops", "free": "training.steps"},
]


@pytest.mark.parametrize("words", WORDS, ids=["plain", "controls", "matched"])
def test_no_value_of_no_key_is_more_than_a_sentence(words: dict[str, Any]) -> None:
    good = {key: value for key, value in yaml.safe_load(GOOD).items() if key != "match"} | words
    refused = 0
    for key in (*Ablation.model_fields, *SHORT):
        inner = Ablation.model_fields.get(key)
        below = list(getattr(inner and inner.annotation, "model_fields", {}))  # resources
        for odd in [*ODD, *({each: value} for each in below for value in ODD)]:
            try:
                places.check(read({**good, key: odd}))
            except LabError as error:
                refused += 1
                assert "\n" not in str(error)
    assert refused > 400


@pytest.mark.parametrize("resources", ["[1]", "5", "x"])
def test_an_override_below_what_is_no_mapping(tmp_path: Path, monkeypatch, capsys, resources: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "q.yaml").write_text(GOOD + f"resources: {resources}\n")
    code, said = ask(monkeypatch, capsys, "run", "q.yaml", "ablation.resources.cards=8")
    assert code == 2 and "q.yaml, line 26: 'resources'" in said, said


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("ablation.seeds=[0, a]", "Override 'ablation.seeds=[0, a]': 'seeds.1': input should be a valid integer"),
        ("ablation.baseline=gone", "Override 'ablation.baseline=gone': 'baseline' names 'gone'"),
        ("model.num_layr=2", "Override 'model.num_layr=2': Variant 'plain': Unknown key 'model.num_layr', did you mean 'num_layers'?"),
        ("ablation.seed=[0]", "Unknown key 'ablation.seed', did you mean 'seeds'?"),
    ],
)
def test_what_an_override_has_said_is_told_of_it(tmp_path: Path, monkeypatch, capsys, override: str, sentence: str) -> None:
    """Not of a line of the file, which says something else."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "q.yaml").write_text(GOOD)
    code, said = ask(monkeypatch, capsys, "run", "q.yaml", override)
    assert code == 2 and said.startswith(f"longcat-lab: {sentence}"), said
    assert [path.name for path in tmp_path.iterdir()] == ["q.yaml"]


def test_a_line_behind_an_alias_is_that_of_its_text(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    text = GOOD.replace("  ngram:\n", "  ngram: &n\n").replace("  other: {", "  other: {<<: *n, ").replace("ngram.order", "ngram.ordre")
    (tmp_path / "q.yaml").write_text(text.replace("  ngram: &n\n", "  ngram: &n\n    model.num_layers: 2\n"))
    assert "q.yaml, line 12: Variant 'ngram'" in ask(monkeypatch, capsys, "run", "q.yaml")[1]


def test_the_good_question_is_good(tmp_path: Path) -> None:
    from longcat_lab.ablation import read, solve

    (tmp_path / "q.yaml").write_text(GOOD)
    assert set(solve(read(tmp_path / "q.yaml")).configs) == {"plain", "ngram", "other"}
