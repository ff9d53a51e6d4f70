"""Cut files, a full disk, a killed process, callers at the same time: nothing half-written, nothing finished lost."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from longcat_lab.data import prepare
from longcat_lab.errors import LabError

HERE = str(Path(__file__).parent)


def start(code, *arguments):
    """A real process with `prepare` and `tiny` at hand; its arguments are in `sys.argv`."""
    header = f"import sys; sys.path.insert(0, {HERE!r}); from conftest import tiny; from longcat_lab.data import prepare\n"
    environment = os.environ | {"PYTHONPATH": ":".join(path for path in sys.path if path)}
    command = [sys.executable, "-c", header + code, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def left(cache):
    return sorted(path.name for path in cache.iterdir() if not path.name.endswith(".lock"))


@pytest.mark.parametrize("name", ["train.tokens.bin", "validation.starts.bin", "tokenizer.json", "token_bytes.npy"])
def test_a_file_cut_short(corpus, config, tmp_path, name):
    copy = tmp_path / corpus.path.name
    shutil.copytree(corpus.path, copy)
    size = (copy / name).stat().st_size
    with (copy / name).open("r+b") as file:
        file.truncate(size - 7)
    with pytest.raises(LabError) as caught:
        prepare(config(), 512, tmp_path)
    assert str(caught.value) == (
        f"The prepared file {copy / name} holds {size - 7} of {size} bytes; delete the folder {copy}, and it is prepared again."
    )
    (copy / name).unlink()
    with pytest.raises(LabError, match=f"holds 0 of {size} bytes"):
        prepare(config(), 512, tmp_path)
    shutil.rmtree(copy)
    assert prepare(config(), 512, tmp_path).hash == corpus.hash


@pytest.mark.parametrize("content", [None, "", '{"hash": ', "[]", "{}"])
def test_a_manifest_that_cannot_be_read(corpus, config, tmp_path, content):
    copy = tmp_path / corpus.path.name
    shutil.copytree(corpus.path, copy)
    (copy / "manifest.json").unlink()
    if content is not None:
        (copy / "manifest.json").write_text(content)
    with pytest.raises(LabError, match=r"has no readable manifest\.json; delete that folder"):
        prepare(config(), 512, tmp_path)


def test_no_space_left(config, tmp_path):
    finished = prepare(config(train_bytes=30_000), 512, tmp_path)
    code = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))  # the kernel refuses to write more, as a full disk does
from longcat_lab.errors import LabError
try:
    prepare(tiny(), 512, sys.argv[1])
except LabError as error:
    print(error)
"""
    process = start(code, tmp_path)
    printed, trouble = process.communicate(timeout=60)
    assert process.returncode == 0, trouble
    assert printed.startswith(f"No space left for the corpus in {tmp_path} (File too large); free some, lower data.train_bytes")
    assert printed.count("\n") == 1
    assert left(tmp_path) == [finished.path.name]
    assert prepare(config(train_bytes=30_000), 512, tmp_path).hash == finished.hash


def test_a_cache_that_cannot_be_written(config, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(LabError, match=r"cannot be written to .*; set LONGCAT_LAB_CACHE to a folder that can be written"):
        prepare(config(), 512, tmp_path / "file")
    with pytest.raises(LabError, match=r"cannot be written to .*; set LONGCAT_LAB_CACHE"):
        prepare(config(), 512, tmp_path / "file" / "below")
    with pytest.raises(LabError, match=r"cannot be written to .* File name too long.*; set LONGCAT_LAB_CACHE"):
        prepare(config(), 512, tmp_path / ("x" * 300))


@pytest.mark.parametrize("refused", ["exists", "read_text"])
def test_a_cache_without_the_right_to_read(corpus, config, cache, monkeypatch, refused):
    real = getattr(Path, refused)

    def denied(path, *arguments, **named):
        if path.is_relative_to(cache):  # root, who may run this, is refused nothing by the rights of a folder
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *arguments, **named)

    monkeypatch.setattr(Path, refused, denied)
    with pytest.raises(LabError, match=r"^The (prepared )?corpus .*cannot be (read|written).*Permission denied.*; (make|set) .*\.$"):
        prepare(config(), 512, cache)


def test_a_killed_process_leaves_nothing_that_counts(corpus, config, tmp_path):
    code = """
import time
def stop_here(line):
    print(line, flush=True)
    if line.startswith("tokenizing"):
        time.sleep(60)
prepare(tiny(), 512, sys.argv[1], stop_here)
"""
    process = start(code, tmp_path)
    for line in process.stdout:
        if line.startswith("tokenizing"):
            break
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=10) == -signal.SIGKILL
    process.communicate()
    assert [name for name in left(tmp_path) if ".tmp-" in name]  # it was in the middle of writing
    assert not (tmp_path / corpus.path.name).exists()
    good = prepare(config(), 512, tmp_path)
    assert good.hash == corpus.hash
    assert left(tmp_path) == [good.path.name]


def test_an_interrupt_leaves_nothing(config, tmp_path):
    def interrupt(line):
        if line.startswith("tokenizing"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(config(), 512, tmp_path, interrupt)
    assert left(tmp_path) == []


def test_callers_at_the_same_time_share_one_preparation(corpus, tmp_path):
    code = """
lines = []
print(prepare(tiny(), 512, sys.argv[1], lines.append).hash, bool(lines))
"""
    processes = [start(code, tmp_path) for _ in range(3)]
    printed = [process.communicate(timeout=120)[0].split() for process in processes]
    assert {words[0] for words in printed} == {corpus.hash}
    assert [words[1] for words in printed].count("True") == 1
    assert left(tmp_path) == [corpus.path.name]


def test_the_second_call_is_fast(corpus, config, cache):
    started = time.perf_counter()
    prepare(config(), 512, cache)
    assert time.perf_counter() - started < 1


def test_the_cache_comes_from_the_environment(config, tmp_path, monkeypatch):
    monkeypatch.setenv("LONGCAT_LAB_CACHE", str(tmp_path / "deep" / "cache"))
    assert prepare(config(train_bytes=20_000), 512).path.parent == tmp_path / "deep" / "cache"
    monkeypatch.delenv("LONGCAT_LAB_CACHE")
    monkeypatch.chdir(tmp_path)
    assert prepare(config(train_bytes=20_000), 512).path.parent == Path(".cache/longcat_lab")
