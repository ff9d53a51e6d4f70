"""A real corpus of Python source: nothing lost, nothing twice, the same every time."""

import hashlib
import itertools
import os
import subprocess
import sys

import numpy as np
import pytest

from longcat_lab.config.data import DataConfig, PythonPackages
from longcat_lab.data import TokenSplit, open_corpus, prepare
from longcat_lab.data.documents import Document, Tally, cut, select
from longcat_lab.data.python_packages import PackageSource, required_distributions
from longcat_lab.data.sources import open_source
from longcat_lab.errors import LabError
from longcat_lab.node import ConfigError, validate_node


def environment(**changes):
    return os.environ | {"PYTHONPATH": ":".join(path for path in sys.path if path)} | changes


def texts(corpus, name):
    split = corpus.split(name)
    bounds = [*split.document_starts, len(split)]
    for start, end in itertools.pairwise(bounds):
        assert split.tokens[end - 1] == corpus.eos_id
        yield corpus.tokenizer.decode(split.tokens[start : end - 1].tolist())


def test_every_document_is_source_text_again(corpus, config):
    tally = Tally()
    documents = {hashlib.sha256(d.text.encode()).digest() for d in open_source(config()).documents(tally)}
    assert tally.skipped["empty"] > 0  # the __init__.py files of the standard library
    assert tally.skipped["too long"] > 0
    whole = lost = 0
    for name in corpus.splits:
        for text in texts(corpus, name):
            if hashlib.sha256(text.encode()).digest() in documents:
                whole += 1
            else:
                lost += 1
    assert whole > 20
    assert lost <= len(corpus.splits)  # each split's last document is cut at its cap


def test_manifest_counts_what_is_there(corpus, config):
    assert corpus.splits == ["train", "validation", "out_of_distribution"]
    caps = {"train": 300_000, "validation": 40_000, "out_of_distribution": 40_000}
    for name, counted in corpus.manifest["splits"].items():
        split = corpus.split(name)
        assert (counted["documents"], counted["tokens"]) == (len(split.document_starts), len(split))
        assert caps[name] - 500 < counted["bytes"] <= caps[name]
        assert sum(counted["packages"].values()) == counted["bytes"]
    assert set(corpus.manifest["splits"]["train"]["packages"]) == {"stdlib"}
    assert corpus.manifest["identity"]["text"]["distributions"].keys() == {"jinja2", "mpmath"}


def test_token_bytes_sum_to_the_text(corpus):
    assert corpus.token_bytes.shape == (corpus.vocab_size,)
    assert corpus.token_bytes[corpus.eos_id] == 0
    for name in corpus.splits:
        assert corpus.token_bytes[corpus.split(name).tokens].sum() == corpus.manifest["splits"][name]["bytes"]


@pytest.mark.parametrize("text", ["", "a", "\r\n\t  x", "déjà vu 漢字 🐱", "if x:\n    return <|endoftext|>\n", "\x00\x7f"])
def test_any_text_round_trips(corpus, text):
    ids = corpus.tokenizer.encode(text).ids
    assert corpus.tokenizer.decode(ids) == text
    assert corpus.eos_id not in ids  # also where the text spells the token out
    assert corpus.token_bytes[ids].sum() == len(text.encode())


def test_two_preparations_give_the_same_bytes(corpus, config, tmp_path):
    again = prepare(config(), 512, tmp_path)
    assert again.path != corpus.path
    assert again.hash == corpus.hash
    for name in corpus.manifest["files"]:
        assert (again.path / name).read_bytes() == (corpus.path / name).read_bytes()


def test_the_tokenizer_does_not_depend_on_threads(corpus, cache, tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[2]); from conftest import tiny; from longcat_lab.data import prepare;"
        "print(prepare(tiny(), 512, sys.argv[1]).hash)"
    )
    command = [sys.executable, "-c", code, str(tmp_path), str(__file__.rsplit("/", 1)[0])]
    found = subprocess.run(command, env=environment(TOKENIZERS_PARALLELISM="false"), capture_output=True, text=True, check=True)
    assert found.stdout.strip() == corpus.hash


def test_the_second_call_reads_no_text(corpus, config, cache, monkeypatch):
    monkeypatch.setattr(PackageSource, "documents", lambda *_: pytest.fail("read the text again"))
    assert prepare(config(sequence_length=128, batch_size=4, seed=3), 512, cache).path == corpus.path


@pytest.mark.parametrize("changes", [{"train_bytes": 200_000}, {"tokenizer_bytes": 50_000}, {"out_of_distribution_bytes": 0}])
def test_what_changes_the_text_is_another_corpus(corpus, config, cache, changes):
    other = prepare(config(**changes), 512, cache)
    assert other.path != corpus.path
    assert other.hash != corpus.hash


def test_no_out_of_distribution_split(config, cache):
    other = prepare(config(out_of_distribution_bytes=0), 512, cache)
    assert other.splits == ["train", "validation"]
    with pytest.raises(LabError, match=r"no split 'out_of_distribution'; it has: train, validation\."):
        other.split("out_of_distribution")


def test_large_vocabularies_take_four_bytes_a_token(config, tmp_path):
    other = prepare(config(train_bytes=20_000, tokenizer_bytes=20_000), 70_000, tmp_path)
    assert other.split("train").tokens.dtype == np.uint32
    assert other.vocab_size == len(other.token_bytes) == 70_000
    assert other.manifest["learned_tokens"] < 70_000


def test_a_text_is_used_once_and_held_out_text_never_trained_on():
    both, caps = "held out\n", {"train": 100, "validation": 12, "out_of_distribution": 100}
    given = [
        Document("o", "other\n", "out_of_distribution"),
        Document("v", "other\n", "validation"),
        Document("v", "first text\n", "validation"),  # 11 of 12 bytes
        Document("v", both, "validation"),  # no room left for it, and still kept out of training
        Document("t", "other\n", "train"),
        Document("t", both, "train"),
        Document("t", "own\n", "train"),
        Document("u", "own\n", "train"),
    ]
    tally = Tally()
    used = [(d.package, d.text, d.split) for d in select(given, caps, tally)]
    assert used == [
        ("o", "other\n", "out_of_distribution"),
        ("v", "first text\n", "validation"),
        ("v", "h", "validation"),
        ("t", "own\n", "train"),
    ]
    assert tally.duplicates == 4


def test_real_splits_share_no_text(corpus):
    found = {name: set(texts(corpus, name)) for name in corpus.splits}
    for name, own in found.items():
        assert len(own) == corpus.manifest["splits"][name]["documents"]  # no text twice within a split
        for other in found.keys() - {name}:
            assert not own & found[other]


def test_cut_keeps_lines_and_characters_whole():
    assert cut(b"one\ntwo\nthree", 10) == b"one\ntwo\n"
    assert cut("ééé".encode(), 3) == "é".encode()
    assert cut(b"x", 0) == b""


def test_no_package_swamps_training():
    caps = DataConfig(train_bytes=2_000_000, out_of_distribution_bytes=1, validation_bytes=1)
    used = {}
    for document in select(open_source(caps).documents(Tally()), {"train": 2_000_000, "validation": 1, "out_of_distribution": 1}, Tally()):
        used[document.package] = used.get(document.package, 0) + len(document.text.encode())
    assert len(used) > 8
    assert max(used.values()) < (0.15 * 2_000_000) + 200_000  # the share, and the file that passes it
    assert not used.keys() & {"longcat-lab", "longcat_lab"}


def test_default_packages_are_what_is_required():
    found = required_distributions()
    assert {"torch", "tokenizers", "numpy", "networkx", "sympy", "mpmath", "jinja2", "fsspec"} <= found.keys()
    assert "longcat-lab" not in found
    assert "pip" not in found  # installed, but required by nothing


def test_test_suites_and_vendored_copies_are_left_out():
    source = PackageSource(DataConfig(source=PythonPackages(packages=["stdlib", "setuptools"])))
    for name in ("stdlib", "setuptools", "networkx"):
        parts = {part for path, _ in source._files(name) for part in path.split("/")[:-1]}
        assert not parts & {"test", "tests", "_vendor", "site-packages", "pydoc_data"}
    assert "dataclasses.py" in dict(source._files("stdlib"))


def test_package_mistakes_are_sentences(tmp_path):
    missing = DataConfig(source=PythonPackages(validation=["no-such-package"]))
    with pytest.raises(LabError, match=r"data\.source\.validation: the package 'no-such-package' is not installed; install it"):
        prepare(missing, 512, tmp_path)
    for key in ("packages", "validation", "out_of_distribution"):
        with pytest.raises(
            LabError, match=rf"^data\.source\.{key}: the list has an empty name; remove it, or write the name of an installed"
        ):
            prepare(DataConfig(source=PythonPackages(**{key: [""]})), 512, tmp_path)
    everything = DataConfig(source=PythonPackages(packages=["networkx"]))
    with pytest.raises(LabError, match="every package named there is held out"):
        prepare(everything, 512, tmp_path)
    with pytest.raises(ConfigError, match="networkx cannot be both"):
        validate_node(DataConfig, {"source": {"kind": "python_packages", "out_of_distribution": ["networkx"]}}, "data")
    with pytest.raises(LabError, match=r"model\.vocab_size is 256, but a byte-level tokenizer needs at least 257"):
        prepare(DataConfig(), 256, tmp_path)
    assert not list(tmp_path.iterdir())


def test_configuration_is_plain_data_with_help():
    config = DataConfig()
    assert validate_node(DataConfig, config.to_dict()) == config
    for node in (DataConfig, *(type(config.source),)):
        assert all(field.description for field in node.model_fields.values())
    files = validate_node(DataConfig, {"source": {"kind": "files", "path": "x"}})
    assert files.source.text_field == "text"


def test_import_needs_only_torch_and_numpy():
    late = "dict.fromkeys(['tokenizers', 'pyarrow', 'datasets', 'filelock'])"  # None in sys.modules: an import of it fails
    code = f"import sys; sys.modules.update({late}); import longcat_lab.data"
    subprocess.run([sys.executable, "-c", code], env=environment(), check=True)


def test_opening_needs_no_configuration(corpus):
    assert open_corpus(corpus.path).hash == corpus.hash
    assert isinstance(corpus.split("train"), TokenSplit)
    assert corpus.split("train").tokens.flags.writeable is False
