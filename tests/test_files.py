"""The one reader and writer of files: whole or not at all, nothing through links, bits checked."""

import errno
import json
import os
import resource
import shutil
import signal
import stat
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_models import net, shake

import minilora
from minilora.files.links import leads_out, open_plain
from minilora.files.tensors import (
    UnwritableError,
    beside,
    is_new,
    leftovers,
    name_beside,
    read_tensors,
    sweep,
    sync,
    tensor_content,
    tensor_file,
    whole_folder,
    write,
    write_json,
)
from minilora.peft.files import find_pair, settle_pair

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool,
          torch.float8_e4m3fn]  # fmt: skip


def tensors():
    return {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(5, dtype=torch.bfloat16),
            "c": torch.zeros((), dtype=torch.int64)}  # fmt: skip


def in_child(action, die=None):
    """Run an action in a fork; its status. With `die`, SIGKILL before that call of `os`."""
    pid = os.fork()
    if pid == 0:
        try:
            left = [die]
            for name in ("replace", "rename", "unlink", "rmdir", "fsync") if die else ():

                def dying(*args, _real=getattr(os, name), **options):  # noqa: B008
                    left[0] -= 1
                    if left[0] == 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return _real(*args, **options)

                setattr(os, name, dying)
            action()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def every_kill(action, prepare, check):
    """Kill an action before each of its calls in turn, and check what is left each time."""
    for call in range(1, 100):
        prepare()
        status = in_child(action, die=call)
        assert status in (0, -signal.SIGKILL)
        check()
        if status == 0:
            return call
    raise AssertionError("it never ended")


# --- tensors


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3), st.booleans()),
        max_size=4,
    ),
    st.dictionaries(st.text(max_size=5), st.text(max_size=9), max_size=3),
)
def test_safetensors_reads_what_is_written(tmp_path_factory, rows, metadata):
    """The library judges: names, shapes, dtypes, bytes and metadata, non-contiguous ones too."""
    file = tmp_path_factory.mktemp("t") / "x.safetensors"
    metadata.pop("minilora_sha256", None)
    made = {}
    for i, (dtype, shape, turn) in enumerate(rows):
        value = torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)
        made[f"ä.{i}"] = value.mT if turn and value.dim() > 1 else value
    write(file, tensor_content(made, metadata))
    found = load_file(file)
    assert found.keys() == made.keys()
    for name, value in made.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape
        assert torch.equal(found[name].double(), value.double())
    with safe_open(file, "pt") as opened:
        assert {k: v for k, v in opened.metadata().items() if k != "minilora_sha256"} == metadata
    before = file.read_bytes()
    write(file, tensor_content(dict(reversed(made.items())), metadata))
    assert file.read_bytes() == before
    assert read_tensors(file)[0].keys() == made.keys()


def test_every_flipped_bit_is_refused(tmp_path):
    """But in the name of the checksums: without them a file is one of an older version."""
    file = tmp_path / "x.safetensors"
    write(file, tensor_content(tensors(), {"format": "pt", "fact": "3"}))
    whole = file.read_bytes()
    name = whole.index(b"minilora_sha256")
    for at in {*range(len(whole))} - {*range(name, name + 15)}:
        flipped = bytearray(whole)
        flipped[at] ^= 1 << (at % 8)
        file.write_bytes(flipped)
        with pytest.raises(ValueError, match="must be a whole safetensors file, found it damaged"):
            read_tensors(file)


def test_files_without_checksums_are_read_and_other_values_only_if_asked(tmp_path):
    save_file(tensors(), tmp_path / "old", {"format": "pt"})
    assert torch.equal(read_tensors(tmp_path / "old")[0]["a"], tensors()["a"])
    write(tmp_path / "new", tensor_content(tensors(), {}))
    content = bytearray((tmp_path / "new").read_bytes())
    content[-1] ^= 1
    (tmp_path / "new").write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged or cut short \(. does not have the SHA-256"):
        read_tensors(tmp_path / "new")
    assert read_tensors(tmp_path / "new", check=False)[0].keys() == tensors().keys()
    for sums in ("3", "[", '"x"'):
        save_file(tensors(), tmp_path / "odd", {"minilora_sha256": sums})
        with pytest.raises(ValueError, match="damaged or cut short"):
            read_tensors(tmp_path / "odd")


def test_missing_damaged_and_unreadable_are_three_errors(tmp_path):
    with pytest.raises(ValueError, match="must be a safetensors file, found none there"):
        read_tensors(tmp_path / "none")
    (tmp_path / "cut").write_bytes(b"no")
    with pytest.raises(ValueError, match="found it damaged or cut short"), \
            tensor_file(tmp_path / "cut"):  # fmt: skip
        pass
    (tmp_path / "folder").mkdir()
    with pytest.raises(RuntimeError, match="folder' must be readable, found: Is a directory; mend"):
        read_tensors(tmp_path / "folder")


def test_a_dtype_that_the_format_lacks_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"z can't be stored in safetensors, found torch.complex"):
        tensor_content({"z": torch.zeros(1, dtype=torch.complex64)}, {})


# --- one file


def test_write_replaces_a_link_and_never_follows_it(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "x").symlink_to(tmp_path / "precious")
    write_json(tmp_path / "x", {"ü": 1})
    assert (tmp_path / "precious").read_text() == "mine"
    assert not (tmp_path / "x").is_symlink() and json.loads((tmp_path / "x").read_text()) == {
        "ü": 1
    }
    plain = tmp_path / "plain"
    plain.touch()
    assert (tmp_path / "x").stat().st_mode == plain.stat().st_mode  # of any new file
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plain", "precious", "x"]


def test_write_refuses_what_is_no_file(tmp_path):
    """Renamed over, `--json /dev/stdout` would be the end of it for a process of root."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for name in ("pipe", "link"):
        with pytest.raises(ValueError, match="must be a file or not exist, found something else"):
            write(tmp_path / name, "x")
    assert stat.S_ISFIFO((tmp_path / "link").stat().st_mode)
    with pytest.raises(UnwritableError, match="none/x must be written, but that failed: No such"):
        write(tmp_path / "none" / "x", "y")


@needs_fork
def test_a_full_disk_is_one_error_and_leaves_what_was_there(tmp_path):
    """A limit on the size of files, in earnest: every writer says so and keeps the old file."""
    model = shake(minilora.inject(net(), r=4, alpha=6))
    minilora.save(model, tmp_path)
    write(tmp_path / "page.html", "old")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
        shake(model)
        for action in (
            lambda: minilora.save(model, tmp_path),
            lambda: write(tmp_path / "page.html", "x" * 1000),
        ):
            with pytest.raises(
                RuntimeError, match=r"must be written.*File too large; raise the limit"
            ):
                action()

    assert in_child(full) == 0
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_leftovers_are_swept_unless_somebody_is_writing_them(tmp_path):
    dead, other = name_beside(tmp_path / "x"), tmp_path / ".x.backup.tmp"
    dead.write_text("half")
    other.write_text("a user's")
    with beside(tmp_path / "x", b"new") as alive:
        assert sorted(leftovers(tmp_path, "x")) == sorted([dead, alive])
        sweep(tmp_path, "x")
        assert alive.exists() and not dead.exists()
        os.replace(alive, tmp_path / "x")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".x.backup.tmp", "x"]
    dead.write_text("half")
    write(tmp_path / "x", "newer")
    assert not dead.exists() and other.exists()


def test_open_plain_follows_no_link_and_waits_for_no_pipe(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="link' must be a file of its own, found a link; remove"):
        open_plain(tmp_path / "link", os.O_RDONLY)
    with pytest.raises(ValueError, match="pipe' must be a file, found something else"):
        open_plain(tmp_path / "pipe", os.O_RDONLY)
    os.close(open_plain(tmp_path / "file", os.O_RDONLY))


def test_open_plain_leaves_the_mode_to_the_umask(tmp_path):
    before = os.umask(0o002)
    try:
        os.close(open_plain(tmp_path / "new", os.O_WRONLY | os.O_CREAT))
    finally:
        os.umask(before)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o664


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="no folder here that can't be flushed")
def test_a_folder_that_its_file_system_does_not_flush_is_no_error():
    opened = os.open("/proc", os.O_RDONLY)
    with pytest.raises(OSError, match=os.strerror(errno.EINVAL)):
        os.fsync(opened)
    os.close(opened)
    sync(Path("/proc"))
    with pytest.raises(OSError, match=os.strerror(errno.ENOENT)):
        sync(Path("/proc/no such folder"))


def test_leads_out_knows_the_hubs_cache(tmp_path):
    (tmp_path / "m" / "snapshots" / "1").mkdir(parents=True)
    (tmp_path / "m" / "blobs").mkdir()
    (tmp_path / "m" / "blobs" / "b").touch()
    (tmp_path / "secret").touch()
    folder = tmp_path / "m" / "snapshots" / "1"
    (folder / "a").symlink_to("../../blobs/b")
    (folder / "s").symlink_to(tmp_path / "secret")
    (folder / "own").touch()
    (folder / "inside").symlink_to("own")
    (tmp_path / "m" / "blobs").rename(tmp_path / "elsewhere")  # on another disk
    (tmp_path / "m" / "blobs").symlink_to(tmp_path / "elsewhere")
    (folder / "part").mkdir()
    (folder / "part" / "a").symlink_to("../../../blobs/b")
    assert not leads_out(folder / "part", folder / "part" / "a")
    assert [leads_out(folder, folder / name) for name in ("a", "s", "own", "inside")] == [
        False, True, False, False]  # fmt: skip


# --- folders


def make(folder, number=1, last="config.json"):
    with whole_folder(folder, last=last) as made:
        for name in ("a", "config.json", "z"):
            (made / name).write_text(f"{name}{number}")


def content(folder):
    return {p.name: p.read_text() for p in folder.iterdir() if p.is_file()}


def whole(number):
    return {name: f"{name}{number}" for name in ("a", "config.json", "z")}


@needs_fork
@pytest.mark.parametrize("there", [False, True])
def test_a_new_folder_is_whole_or_absent_whenever_it_is_killed(tmp_path, there):
    folder = tmp_path / "out"

    def prepare():
        if folder.exists() and content(folder):  # killed after its last rename
            shutil.rmtree(folder)
        assert is_new(folder)  # sweeps what the kill before left
        assert [p.name for p in tmp_path.iterdir() if p != folder] == []
        if there:
            folder.mkdir(exist_ok=True)

    def check():
        if folder.exists() and content(folder):
            assert content(folder) == whole(1)

    assert every_kill(lambda: make(folder), prepare, check) > 3
    assert content(folder) == whole(1) and [p.name for p in tmp_path.iterdir()] == ["out"]


@needs_fork
def test_a_folder_that_holds_files_is_never_read_half_old_and_half_new(tmp_path):
    folder = tmp_path / "out"

    def prepare():
        make(folder, 1)
        (folder / "notes.txt").write_text("a user's")

    def check():
        found = content(folder)
        assert found.pop("notes.txt") == "a user's"
        if "config.json" in found:
            assert found in (whole(1), whole(2))

    assert every_kill(lambda: make(folder, 2), prepare, check) > 5
    assert content(folder) == whole(2) | {"notes.txt": "a user's"}
    assert len(list(folder.iterdir())) == 4 and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_current_folder_stays_where_it_is(tmp_path, monkeypatch):
    """Another one in its place would leave this process, and a shell, in one that is gone."""
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    before = os.stat(".").st_ino
    make(".")
    assert content(tmp_path / "out") == whole(1)
    assert os.stat(tmp_path / "out").st_ino == before == os.stat(".").st_ino
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    make(tmp_path / "link")  # named by the user, so followed
    assert content(tmp_path / "elsewhere") == whole(1) and (tmp_path / "link").is_symlink()


def test_a_folder_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), whole_folder(tmp_path / "out") as made:
        (made / "a").touch()
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with (
        pytest.raises(UnwritableError, match="out must be written.*No space left.*free space"),
        whole_folder(tmp_path / "out"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    (tmp_path / "file").touch()
    assert not is_new(tmp_path / "file")
    with pytest.raises(UnwritableError, match="must be written"), \
            whole_folder(tmp_path / "file" / "out"):  # fmt: skip
        pass


# --- an adapter's pair


@needs_fork
@pytest.mark.parametrize("foreign", [False, True])
def test_an_adapter_saved_over_another_is_the_old_or_the_new_one_whenever_it_is_killed(
    tmp_path, foreign
):
    """Killed before each rename; an old one that PEFT wrote has no hash that pairs its files."""
    old, new = (shake(minilora.inject(net(), r=r, alpha=a), scale=a) for r, a in ((4, 6), (2, 9)))
    x = torch.randn(3, 12)
    wanted = [model(x) for model in (old, new)]
    seen = set()

    def prepare():
        minilora.save(old, tmp_path)
        assert len(list(tmp_path.iterdir())) == 2  # what was left is swept
        if foreign:
            save_file(load_file(tmp_path / "adapter_model.safetensors"),
                      tmp_path / "adapter_model.safetensors", {"format": "pt"})  # fmt: skip

    def check():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = minilora.load(net(), tmp_path)(x)
        (which,) = [i for i, want in enumerate(wanted) if torch.equal(found, want)]
        seen.add(which)
        assert minilora.check(tmp_path)[0].takes
        config = tmp_path / "adapter_config.json"
        if config.exists():  # what every other program reads is one of the two, too
            r = json.loads(config.read_text())["r"]
            A = load_file(tmp_path / "adapter_model.safetensors")
            assert all(v.shape[0] == r for k, v in A.items() if "lora_A" in k)
        settle_pair(tmp_path)
        assert len(list(tmp_path.iterdir())) == 2
        assert find_pair(tmp_path) == (config, tmp_path / "adapter_model.safetensors")
        settled = minilora.load(net(), tmp_path, verify=False)(x)
        assert torch.equal(settled, wanted[which])

    assert every_kill(lambda: minilora.save(new, tmp_path), prepare, check) > 5
    assert seen == {0, 1}


def test_an_adapters_flipped_bits_are_refused_and_its_old_files_are_not(tmp_path):
    minilora.save(shake(minilora.inject(net(), r=2, alpha=3)), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    kept = file.read_bytes()
    generator = torch.Generator().manual_seed(0)
    name = kept.index(b"minilora_sha256")
    places = torch.randint(len(kept), (60,), generator=generator).tolist()
    for at in {*places} - {*range(name, name + 15)}:
        flipped = bytearray(kept)
        flipped[at] ^= 4
        file.write_bytes(flipped)
        with pytest.raises(ValueError, match="must|SHA-256"):
            minilora.load(net(), tmp_path)
    values = load_file(file) if file.write_bytes(kept) else {}
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    metadata.pop("minilora_sha256")
    save_file(values, file, metadata)
    minilora.load(net(), tmp_path)


def test_peft_reads_an_adapter_with_checksums_without_a_word(tmp_path):
    peft = pytest.importorskip("peft")
    model = shake(minilora.inject(net(), r=2, alpha=3))
    minilora.save(model, tmp_path)
    x = torch.randn(3, 12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        base = net()
        base.prepare_inputs_for_generation = None  # its head is called lm_head
        theirs = peft.PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(theirs.base_model(x), model(x))
