"""Blocks of one's own in files that a configuration names, and in a notebook's cells."""

import inspect
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

import longcat_lab as lab
from longcat_lab.config import ConfigError, apply, load, plugins, write_yaml
from longcat_lab.errors import LabError

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples" / "plugins"
LSA = ["model.attention.kind=lsa", "model.attention.index_topk=16", "model.attention.index_local_tokens=8"]
RULE = '''
from typing import ClassVar, Literal
import longcat_lab as lab

STEPS = [STEP]

@lab.register("selection")
class Mine(lab.Selection):
    """Every so many keys."""

    kind: Literal["mine"] = "mine"
    uses_indexer: ClassVar[bool] = False

    def rank(self, at):
        return (at.distance % STEPS[0] == 0).float().expand_as(at.visible)
'''


def rule(step=4, kind="mine"):
    return RULE.replace("STEP]", f"{step}]").replace('"mine"', f'"{kind}"')


pytestmark = pytest.mark.usefixtures("fresh_registry")


def write(text, name="rules.py", folder=None):
    path = (folder or Path.cwd()) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def mine(*overrides, base="tiny", file="rules.py"):
    return load(base, f"plugins=[{file}]", *LSA, "model.attention.selection.kind=mine", *overrides)


def python(code, *arguments, folder=None):
    """A process of its own."""
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, cwd=folder)


def command(*arguments):
    return subprocess.run([sys.executable, "-m", "longcat_lab", *map(str, arguments)], capture_output=True, text=True)


# ---- naming and importing


def test_a_file_is_imported_before_its_kinds_are_needed():
    path, config = write(rule()), mine()
    kind = type(config.model.attention.selection)
    assert config.plugins == [str(path)] and lab.kinds("selection")["mine"] is kind and kind.__module__ in sys.modules
    assert (
        lab.budget(config).loc["total", "params"]
        == lab.budget(load("tiny", *LSA, "model.attention.selection.kind=window")).loc["total", "params"]
    )
    for again in (load(config.to_dict()), apply(config, {"seed": 1}), lab.RunConfig(**config.to_dict())):
        assert type(again.model.attention.selection) is kind and again.plugins == [str(path)]


def test_source_and_pickles_are_those_of_any_class():
    write(rule())
    config = mine()
    assert "Every so many keys" in inspect.getsource(type(config.model.attention.selection))
    assert pickle.loads(pickle.dumps(config)) == config


def test_names_are_relative_to_the_file_that_names_them_then_to_the_working_folder():
    beside, here = write(rule(), folder=Path("there").resolve()), write(rule(5))
    only = write(rule(6, "only"), "only.py")
    selection = {"kind": "lsa", "selection": {"kind": "mine"}}
    Path("there/run.yaml").write_text(write_yaml({"plugins": ["rules.py", "only.py"], "model": {"attention": selection}}))
    assert load("there/run.yaml").plugins == [str(beside), str(only)]
    with pytest.raises(ConfigError, match=rf"kind 'mine' is taken by {beside}"):
        load("there/run.yaml", "plugins=[rules.py]")  # an override lies beside nothing
    beside.unlink()
    assert load("there/run.yaml").plugins == [str(here), str(only)]
    with pytest.raises(ConfigError, match=r"'plugins' names .*/there/gone\.py, which cannot be read: No such file"):
        Path("there/run.yaml").write_text("plugins: [gone.py]")
        load("there/run.yaml")


def test_an_edited_file_is_imported_anew_and_one_that_is_not_is_not(capsys):
    path = write(rule() + "print('imported')\n")
    first = mine()
    stat = path.stat()
    assert type(mine("seed=1").model.attention.selection) is type(first.model.attention.selection)
    path.write_text(path.read_text().replace("STEPS = [4]", "STEPS = [5]"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # same second, same size: byte code would not notice
    second = mine()
    assert type(second.model.attention.selection) is lab.kinds("selection")["mine"] is not type(first.model.attention.selection)
    assert capsys.readouterr().out.split() == ["imported"] * 2
    path.write_text(path.read_text().replace("STEPS = [5]", "STEPS = [4]"))
    assert type(mine().model.attention.selection) is type(first.model.attention.selection), "known already"
    path.write_text(rule(kind="other"))
    with pytest.raises(ConfigError, match="there is no selection kind 'mine'"):
        mine()
    assert "other" in lab.kinds("selection")


def test_two_names_in_one_file_and_two_files_of_one_content():
    write(rule() + rule(5, "second").replace("class Mine", "class Second"))
    write(rule() + rule(5, "second").replace("class Mine", "class Second"), "copy.py")
    config = mine(file="rules.py, copy.py")
    assert len({type(config.model.attention.selection), lab.kinds("selection")["mine"]}) == 1 and len(config.plugins) == 2


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("import os\n\ndef f(:\n", r"rules\.py, line 3: SyntaxError: invalid syntax\."),
        ("x = 1\n1 / 0\n", r"rules\.py, line 2: ZeroDivisionError: division by zero\."),
        ("import sys\nsys.exit(3)\n", r"rules\.py, line 2: SystemExit: 3\."),
        ("def f():\n    raise OSError('first\\nsecond')\n\nf()\n", r"rules\.py, line 2: OSError: first\."),
        ("import no_such_module\n", r"rules\.py, line 1: ModuleNotFoundError: No module named 'no_such_module'\."),
        ("import beside_it\n", r"line 1: ModuleNotFoundError: .* \(a plugin is one file: take in what it needs of beside_it\.py\)\."),
        ("x = 1\n", r"rules\.py registers no block: put @lab\.register\(ROLE\) above a class in it\."),
        (rule().replace('"selection"', '"selektion"'), r"line \d+: There is no role 'selektion', did you mean 'selection'\?"),
        (
            rule(kind="window"),
            r"line \d+: The selection kind 'window' is taken by longcat_lab's own WindowSelection: give the `kind` of Mine",
        ),
        (rule().replace('kind: Literal["mine"] = "mine"', ""), r"The class Mine has no name: write `kind: Literal\["),
        (rule().replace('("selection")', '("selection", default=True)'), r"Mine cannot be a default"),
        (
            rule() + '\n@lab.register("selection")\nclass Also(Mine):\n    kind: Literal["mine"] = "mine"\n',
            r"line 17: The selection kind 'mine' is taken by the class Mine of the same file",
        ),
        ("\0", r"rules\.py: \w+Error: source code string cannot contain null bytes\."),
    ],
)
def test_what_is_wrong_with_a_file_is_one_sentence_and_leaves_nothing(text, sentence):
    write(text), write("", "beside_it.py")
    before = {role: set(found) for role, found in lab.kinds().items()}
    modules = set(sys.modules)
    for _ in range(2):  # the second time is no better
        with pytest.raises(ConfigError, match=sentence) as error:
            load("tiny", "plugins=[rules.py]")
        assert "\n" not in str(error.value)
    assert {role: set(found) for role, found in lab.kinds().items()} == before
    assert not [name for name in set(sys.modules) - modules if name.startswith("plugin_")]


@pytest.mark.parametrize("value", ["rules.py", "[rules]", "[3]", "{a: b}"])
def test_plugins_that_are_no_list_of_files_are_named(value):
    with pytest.raises(ConfigError, match=r"'plugins': write a list of Python files, as in plugins: \[rules\.py\], got"):
        load("tiny", f"plugins={value}")


def test_a_name_that_another_file_has_taken_is_an_error_until_that_file_is_gone():
    first = write(rule())
    mine()
    write(rule(5), "second.py")
    with pytest.raises(ConfigError, match=rf"second\.py, line \d+: The selection kind 'mine' is taken by {first}: give .* another name"):
        mine(file="second.py")
    first.rename("moved.py")
    assert mine(file="second.py").plugins == [str(Path("second.py").resolve())]


def test_a_kind_whose_file_is_not_named_is_told_where_to_name_it():
    for wrong in ("mine", "windw"):
        with pytest.raises(ConfigError, match="One of your own must be in a Python file that 'plugins' names"):
            load("tiny", *LSA, f"model.attention.selection.kind={wrong}")


# ---- what a run is


def test_identity_follows_the_code_and_not_the_place(tmp_path):
    path = write(rule())
    first = lab.identity(mine())
    path.write_text("# a remark\n" + rule())
    assert lab.identity(mine()) == first
    path.rename("moved.py")
    assert lab.identity(mine(file="moved.py")) == first
    Path("moved.py").write_text(rule(5))
    assert lab.identity(mine(file="moved.py")) != first, "a list that the class uses"
    Path("moved.py").write_text(rule() + rule(5, "another").replace("class Mine", "class Another").replace("STEPS", "OTHERS"))
    assert lab.identity(mine(file="moved.py")) == first, "a block beside it"
    plain = lab.identity(load("tiny"))
    assert lab.identity(load("tiny", "plugins=[moved.py]")) == plain


def test_commands_take_plugins_and_a_record_never_makes_code_run(tmp_path):
    trained = command("train", EXAMPLES / "ffn.yaml", "training.steps=3", "--out", tmp_path / "run")
    assert trained.returncode == 0, trained.stderr
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    (told,) = record["provenance"]["plugins"]
    assert record["status"] == "finished" and told["path"] == str(EXAMPLES / "ffn.py") and len(told["sha256"]) == 64
    assert record["config"]["plugins"] == [told["path"]] and record["config"]["model"]["ffn"]["kind"] == "squared_relu"

    folder = tmp_path / "run"
    read = "import sys, longcat_lab as lab\nprint(lab.Run(sys.argv[1]).config.model.ffn.kind)"
    alone = python(read, folder)
    assert alone.returncode == 1 and "a run's record may not import it: if you trust that file, say lab.load({'plugins'" in alone.stderr
    said = re.search(r"lab\.load\(\{.*?\}\)", alone.stderr)[0]
    trusted = python(read.replace("print", f"{said}\nprint", 1), folder)
    assert trusted.stdout.split() == ["squared_relu"], trusted.stderr
    without = python(
        "import sys, json, longcat_lab as lab\nlab.load({**json.load(open(sys.argv[1])), 'plugins': []})", write("{}", "c.json")
    )
    assert without.returncode == 0, without.stderr

    moved = write((EXAMPLES / "ffn.py").read_text() + "# moved\n", "elsewhere.py")
    again = lab.fit(load(EXAMPLES / "ffn.yaml", "training.steps=3", f"plugins=[{moved}]"), folder)
    assert again.record == record and again.summary["status"] == "finished"


def test_the_budget_command_takes_them_as_an_override():
    write(rule())
    shown = command("budget", "tiny", "plugins=[rules.py]", *LSA, "model.attention.selection.kind=mine")
    assert shown.returncode == 0 and "total" in shown.stdout, shown.stderr


def test_other_processes_are_asked_for_what_they_can_find():
    path = write(rule())
    config = mine()
    plugins.check_portable(config)
    unnamed = load("tiny", *LSA, "model.attention.selection.kind=mine")  # known here, because the file has been imported
    with pytest.raises(
        ConfigError, match=rf"'model\.attention\.selection' is of the kind 'mine', whose class Mine is from {path}: name that"
    ):
        plugins.check_portable(unnamed)
    path.write_text(rule(5))
    mine()
    with pytest.raises(ConfigError, match=r"has been edited in .* since this configuration was loaded: load it again"):
        plugins.check_portable(config)


# ---- a notebook's cell

CELLS = [
    "import longcat_lab as lab\nfrom typing import ClassVar, Literal\n",
    rule().split("lab\n", 1)[1],
    """
assert "mine" in lab.kinds("selection")
settings = [*LSA, "model.attention.selection.kind=mine", "training.steps=3", "training.evaluation_sequences=4"]
config = lab.load("tiny", *settings)
print("total", int(lab.budget(config).loc["total", "params"]))
run = lab.fit(config, "cell", progress=False)
print(run.summary["status"], run.config.model.attention.selection.kind)
first = lab.identity(config)
""".replace("*LSA", ", ".join(map(repr, LSA))),
    rule(9).split("lab\n", 1)[1].replace("STEPS[0]", "9"),
    """
assert lab.identity(lab.load("tiny", *settings)) != first
from pathlib import Path
from longcat_lab.ablation import run as sweep
from longcat_lab.config import write_yaml
Path("base.yaml").write_text(write_yaml(config.to_dict()))
Path("question.yaml").write_text(write_yaml({
    "name": "cell", "question": "q", "hypothesis": "h", "base": "base.yaml", "baseline": "a", "variants": {"a": {}},
    "seeds": [0], "smallest_effect": 0.1,
}))
try:
    sweep("question.yaml", "out")
except lab.LabError as error:
    print("SWEEP:", error)
print("nothing written:", not Path("out").exists())
""",
    "Path('rules.py').write_text(FILE)\nlab.load(config, 'plugins=[rules.py]')\nprint('file:', lab.kinds('selection')['mine'].__module__)",
    rule(9).split("lab\n", 1)[1],
]


def test_a_class_in_a_cell_trains_here_and_is_told_what_other_processes_need(tmp_path):
    from papermill import PapermillExecutionError

    from longcat_lab.ablation.kernel import execute

    source, done = tmp_path / "cells.ipynb", tmp_path / "done.ipynb"
    cells = [text.replace("FILE", repr(rule(9))) for text in CELLS]
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in cells]), source)
    with pytest.raises(PapermillExecutionError, match=r"The selection kind 'mine' is taken by .*rules\.py"):
        execute(source, done, {})  # its last cell takes a name that a file has by then
    outputs = [output for cell in nbformat.read(done, 4).cells for output in cell.get("outputs", [])]
    text = "".join(output.get("text", "") for output in outputs)
    assert re.search(r"total \d+\nfinished mine\n", text)
    assert "SWEEP: Variant 'a': 'model.attention.selection' is of the kind 'mine', whose class Mine is only known in this session" in text
    assert "put it into a Python file and name that under 'plugins'" in text and "nothing written: True" in text
    assert "file: plugin_rules_" in text
    # The same in a process that has never seen the cell.
    other = command("run", tmp_path / "question.yaml")
    assert other.returncode == 2 and "there is no selection kind 'mine'" in other.stderr and "'plugins' names" in other.stderr
    with pytest.raises(LabError, match=r"there is no selection kind 'mine'.*'plugins' names"):
        lab.Run(tmp_path / "cell").config  # noqa: B018 (reading it is the test)


def test_a_record_is_not_read_with_a_plugin_that_was_edited_since():
    """Old weights under a new rule would be a silent lie; and a record must not make content run that was never imported."""
    write(rule(step=4))
    config = mine()
    record = {"config": config.to_dict(), "provenance": {"plugins": plugins.stated(config.plugins)}}
    assert load(plugins.known_here(record)) == config
    write(rule(step=8))
    with pytest.raises(ConfigError, match="as it was before it was edited"):
        plugins.known_here(record)
    mine()  # imported anew: still not what the run used
    with pytest.raises(ConfigError, match="as it was before it was edited"):
        plugins.known_here(record)
