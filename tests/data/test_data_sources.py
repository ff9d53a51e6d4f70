"""Local files and datasets behind the same interface, and one sentence for each bad input."""

import contextlib
import itertools
import json
import os
import tempfile
from pathlib import Path

import pytest

from longcat_lab.config.data import DataConfig, Files, HuggingFace
from longcat_lab.data import prepare
from longcat_lab.data.files import PIECE, FileSource, find_files, pieces
from longcat_lab.errors import LabError

TEXTS = [f"Document {i}: " + " ".join(str(i * j % 97) for j in range(50)) + " ünï\n" for i in range(60)]


def take(path, cache, **fields):
    return prepare(DataConfig(source=Files(path=str(path), **fields)), 300, cache)


def contents(corpus, name):
    split = corpus.split(name)
    bounds = [*split.document_starts, len(split)]
    return [corpus.tokenizer.decode(split.tokens[a : b - 1].tolist()) for a, b in itertools.pairwise(bounds)]


def everything(corpus):
    return [text for name in corpus.splits for text in contents(corpus, name)]


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_json_lines(tmp_path):
    corpus = take(write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in [*TEXTS, TEXTS[0]]] + [{"text": None}]), tmp_path / "c")
    assert sorted(everything(corpus)) == sorted(TEXTS)
    assert corpus.manifest["duplicates"] == 1
    assert corpus.manifest["skipped"] == {"no text": 1}
    counts = corpus.manifest["splits"]
    assert 0 < counts["validation"]["bytes"] < 0.15 * counts["train"]["bytes"]


def test_parquet(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table({"id": range(60), "body": TEXTS}), tmp_path / "a.parquet")
    assert sorted(everything(take(tmp_path / "a.parquet", tmp_path / "c", text_field="body"))) == sorted(TEXTS)
    with pytest.raises(LabError, match=r"a\.parquet has no field 'text' \(it has: id, body\): set data\.source\.text_field"):
        take(tmp_path, tmp_path / "c")
    with pytest.raises(LabError, match="'id' holds int, not text"):
        take(tmp_path, tmp_path / "c", text_field="id")
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    with pytest.raises(LabError, match=r"a\.parquet cannot be read as Parquet"):
        take(tmp_path, tmp_path / "c", text_field="body")


def test_a_folder_of_text_files(tmp_path):
    folder = tmp_path / "text"
    for i, text in enumerate(TEXTS):
        file = folder / f"part{i % 3}" / f"{i}{('.txt', '.md', '.py')[i % 3]}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    (folder / "empty.txt").write_text(" \n")
    (folder / "ignored.bin").write_bytes(b"\x00")
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "a.txt").write_text("hidden")
    corpus = take(folder, tmp_path / "c")
    assert sorted(everything(corpus)) == sorted(TEXTS)
    assert corpus.manifest["skipped"] == {"empty": 1, "not UTF-8": 1}
    assert set(corpus.manifest["splits"]["train"]["packages"]) == {"part0", "part1", "part2"}
    moved = tmp_path / "elsewhere"
    folder.rename(moved)
    assert take(moved, tmp_path / "c").hash == corpus.hash  # what identifies the data is its content


def test_a_changed_file_is_another_corpus(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in TEXTS])
    before = take(path, tmp_path / "c")
    write_jsonl(path, [{"text": t} for t in TEXTS[1:]])
    assert take(path, tmp_path / "c").hash != before.hash


def test_held_out_paths(tmp_path):
    train = write_jsonl(tmp_path / "train.jsonl", [{"text": t} for t in TEXTS[:40]])
    held = write_jsonl(tmp_path / "held.jsonl", [{"text": t} for t in TEXTS[35:50]])
    other = write_jsonl(tmp_path / "other.jsonl", [{"text": t} for t in TEXTS[50:]])
    corpus = take(train, tmp_path / "c", validation_path=str(held), out_of_distribution_path=str(other))
    assert sorted(contents(corpus, "train")) == sorted(TEXTS[:35])
    assert sorted(contents(corpus, "validation")) == sorted(TEXTS[35:50])
    assert sorted(contents(corpus, "out_of_distribution")) == sorted(TEXTS[50:])


def test_a_book_in_one_file_gives_both_splits(tmp_path):
    book = "\n\n".join(f"Chapter {i}. " + "word " * (i % 300 + 5) for i in range(1500))
    (tmp_path / "book.txt").write_text(book)
    assert "".join(pieces(book)) == book
    assert all(PIECE <= len(piece) <= 2 * PIECE for piece in list(pieces(book))[:-1])
    assert "".join(pieces("x" * 100_000)) == "x" * 100_000
    corpus = take(tmp_path / "book.txt", tmp_path / "c")
    assert corpus.splits == ["train", "validation"]


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({}, r"the folder '.*' holds no text; put \.txt, \.md, \.py, \.jsonl, \.parquet files there"),
        ({"a.csv": "x"}, "holds no text"),
        ({"a.txt": ""}, "has no text to train on"),
        ({"a.txt": "one document"}, "has no text to train on: point it to text, or to more than one document"),
        ({"a.jsonl": '{"text": "x"}\n{"text": "y'}, r"a\.jsonl, line 2 is not JSON: correct or remove that line"),
        ({"a.jsonl": '{"content": "x"}\n'}, r"a\.jsonl, line 1 has no field 'text' \(it has: content\): set data\.source\.text_field"),
        ({"a.jsonl": '{"text": 3}\n'}, r"line 1: 'text' holds int, not text"),
        (
            {"a.jsonl": '{"text": "x"}\n' + "[" * 100_000},
            r"a\.jsonl, line 2 is nested too deeply to be read: correct or remove that line\.",
        ),
        ({"a.jsonl": "[1]\n"}, r"line 1 has no field 'text' \(it has no fields\)"),
    ],
)
def test_bad_folders(tmp_path, files, sentence):
    folder = tmp_path / "text"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_text(content)
    with pytest.raises(LabError, match=sentence) as caught:
        take(folder, tmp_path / "c")
    assert "\n" not in str(caught.value)
    left = [path.name for path in (tmp_path / "c").iterdir() if not path.name.endswith(".lock")] if (tmp_path / "c").exists() else []
    assert left == []


def test_bad_paths(tmp_path):
    with pytest.raises(LabError, match=r"data\.source\.path: there is no file or folder"):
        take(tmp_path / "nothing", tmp_path / "c")
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(LabError, match="is not a kind of text that can be read"):
        take(tmp_path / "a.csv", tmp_path / "c")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(LabError, match=r"data\.source\.validation_path: there is no"):
        take(tmp_path / "a.txt", tmp_path / "c", validation_path=str(tmp_path / "none"))


@contextlib.contextmanager
def locked(folder):
    """The folder as a person meets it who may not read it. Rights do not hold root back, so root becomes another user meanwhile."""
    root = os.geteuid() == 0
    folder.chmod(0)
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)


@pytest.fixture
def public():
    """A folder that every user may enter; those of `tmp_path` are private."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="rights of another kind")
def test_folders_without_the_right_to_read(public):
    inner = public / "text" / "inner"
    inner.mkdir(parents=True)
    (inner / "x.txt").write_text("text")
    (public / "text" / "y.txt").write_text("text")
    assert len(find_files(public / "text", "key")) == 2
    cannot = r"cannot be read \(Permission denied\); make it readable, or name another file or folder\."
    with locked(public / "text"):
        with pytest.raises(LabError, match=rf"^data\.source\.path: '{public}/text' {cannot}$"):
            find_files(public / "text", "data.source.path")
        with pytest.raises(LabError, match=rf"^data\.source\.path: '{public}/text/y\.txt' {cannot}$"):
            find_files(public / "text" / "y.txt", "data.source.path")
    with locked(inner), pytest.raises(LabError, match=rf"^key: '{inner}' {cannot}$"):
        find_files(public / "text", "key")
    inner.rename(public / "text" / ".inner")
    with locked(public / "text" / ".inner"):  # hidden, so that nobody asked for it
        assert find_files(public / "text", "key") == [public / "text" / "y.txt"]


def test_paths_that_the_system_refuses(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(LabError, match=r"data\.source\.path: there is no file or folder '.*/file/x\.txt'"):
        take(tmp_path / "file" / "x.txt", tmp_path / "c")
    with pytest.raises(LabError, match=r"data\.source\.path: .* cannot be read \(File name too long\); make it readable"):
        take(tmp_path / ("x" * 300), tmp_path / "c")
    with pytest.raises(LabError, match=r"data\.source\.path: '~no-such-person/x' is below a home folder that is not known"):
        take("~no-such-person/x", tmp_path / "c")


def test_a_file_that_vanishes_before_it_is_asked_about(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    source = FileSource(Files(path=str(tmp_path)))
    (tmp_path / "a.txt").unlink()
    with pytest.raises(LabError, match=r"data\.source: '.*a\.txt' cannot be read \(No such file or directory\)"):
        source.identity()


def test_half_a_surrogate_pair_is_skipped(tmp_path):
    path = tmp_path / "a.jsonl"
    write_jsonl(path, [{"text": t} for t in TEXTS] + [{"text": "\ud800"}])
    assert take(path, tmp_path / "c").manifest["skipped"] == {"no text": 1}


def dataset(name, **fields):
    return DataConfig(source=HuggingFace(name=str(name), **fields), train_bytes=4000, validation_bytes=400)


def test_hugging_face_without_the_package(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)  # what an import finds where it is not installed
    with pytest.raises(LabError, match=r"needs the package 'datasets': install it \(pip install datasets\)"):
        prepare(dataset("some/thing"), 300, tmp_path)


def test_hugging_face_streaming(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    write_jsonl(tmp_path / "set" / "train.jsonl", [{"text": t} for t in TEXTS])
    corpus = prepare(dataset(tmp_path / "set"), 300, tmp_path / "c")
    assert corpus.splits == ["train", "validation"]
    assert set(contents(corpus, "train")[:-1]) < set(TEXTS)
    assert corpus.manifest["splits"]["train"]["bytes"] <= 4000
    with pytest.raises(LabError, match=r"has no field 'body' \(it has: text\)"):
        prepare(dataset(tmp_path / "set", text_field="body"), 300, tmp_path / "c")
    with pytest.raises(LabError, match=r"The dataset .* cannot be read \(.*\): check its name and the network"):
        prepare(dataset(tmp_path / "none"), 300, tmp_path / "c")
