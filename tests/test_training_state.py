"""The state's file: two kept, damage noticed, a disk that is full or can't be written."""

import builtins
import contextlib
import errno
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import textwrap
import unittest.mock

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from training_models import factors, fit, same, tiny

import minilora
from minilora.training.adamw import AdamW
from minilora.training.state import (
    PREVIOUS_FILE,
    STATE_FILE,
    _read,
    check_out,
    has_state,
    load_state,
    save_state,
    settle_state,
)

FACTS = {"step": 7}


def value(step):
    return {"a": torch.full((3,), float(step)), "b": torch.zeros((), dtype=torch.float64)}


def write(folder, step):
    save_state(folder, value(step), {"step": step})


def test_save_state_keeps_the_last_two(tmp_path):
    for step in (1, 2, 3):
        write(tmp_path, step)
    assert sorted(f.name for f in tmp_path.iterdir()) == sorted([STATE_FILE, PREVIOUS_FILE])
    tensors, facts = load_state(tmp_path)
    assert facts["step"] == 3 and facts["fallback"] is None
    assert torch.equal(tensors["a"], value(3)["a"])
    (tmp_path / STATE_FILE).unlink()
    assert has_state(tmp_path)
    tensors, facts = load_state(tmp_path)
    assert facts["step"] == 2 and "is missing (a save was cut short)" in facts["fallback"]
    assert torch.equal(tensors["a"], value(2)["a"])


def test_load_state_notices_every_flipped_bit(tmp_path):
    """In the facts, too: a step or a place in the data that is another goes on with other bits."""
    write(tmp_path, 1)
    write(tmp_path, 2)
    whole = (tmp_path / STATE_FILE).read_bytes()
    before = (tmp_path / PREVIOUS_FILE).read_bytes()
    for where in range(len(whole)):
        content = bytearray(whole)
        content[where] ^= 1 << (where % 8)
        (tmp_path / STATE_FILE).write_bytes(content)
        _, facts = load_state(tmp_path)
        assert facts["step"] == 1 and "is damaged: going on from" in facts["fallback"]
    assert (tmp_path / STATE_FILE).read_bytes() == content  # nothing changes by reading
    assert (tmp_path / PREVIOUS_FILE).read_bytes() == before
    settle_state(tmp_path)
    write(tmp_path, 3)  # what pushed the damaged one out, not the good one
    (tmp_path / STATE_FILE).unlink()
    assert load_state(tmp_path)[1]["step"] == 1


def test_load_state_refuses_two_damaged_ones(tmp_path):
    for step in (1, 2):
        write(tmp_path, step)
    for name in (STATE_FILE, PREVIOUS_FILE):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{STATE_FILE} must be a state that minilora wrote"):
        load_state(tmp_path)


@pytest.mark.parametrize(("fused", "where"), [(True, "meta"), (False, "cpu")])
def test_restore_optimizer_puts_the_step_where_the_kernel_reads_it(fused, where):
    """A fused kernel on an accelerator reads it there; a meta tensor stands in for one."""
    parameter = torch.empty(3, device="meta")
    optimizer = AdamW({parameter: "p"}, minilora.TrainConfig(max_steps=1))
    optimizer.defaults["fused"] = fused
    kept = {"step": torch.tensor(2.0), "exp_avg": torch.ones(3), "exp_avg_sq": torch.ones(3)}
    tensors = {f"optimizer.{key}.p": value for key, value in kept.items()}
    optimizer.restore(tensors, lambda p, v: v.to(p.device))
    assert optimizer.state[parameter]["step"].device.type == where
    assert optimizer.state[parameter]["exp_avg"].device.type == "meta"


def test_check_out_takes_a_folder_in_which_a_run_was_killed_before_its_first_save(tmp_path):
    with pytest.raises(ValueError, match="resume needs"):
        check_out(tmp_path, resume=True)
    (tmp_path / "run.lock").write_text("{}")
    check_out(tmp_path, resume=True)
    with pytest.raises(ValueError, match="resume needs"):
        check_out(tmp_path, resume=True, begun=False)


# --- a disk that fails


def failing(monkeypatch, what, number, at=1):
    """Let the at-th call fail as the system would."""
    error = OSError(number, os.strerror(number))
    left = [at]

    def fails():
        left[0] -= 1
        if left[0] == 0:
            raise error

    if what == "write":
        real = builtins.open

        def opening(file, mode="r", *arguments, **options):
            opened = real(file, mode, *arguments, **options)
            if mode != "xb" or ".state." not in str(file):
                return opened
            whole = opened.write

            def half(content):
                whole(content[: len(content) // 2])  # as a disk that is full takes it
                fails()
                return whole(content[len(content) // 2 :])

            context = contextlib.closing(opened)
            return unittest.mock.MagicMock(
                wraps=opened, write=half, __enter__=lambda mock: mock, __exit__=lambda mock, *error:
                context.__exit__(*error),
            )  # fmt: skip

        monkeypatch.setattr(builtins, "open", opening)
        return
    real_call = getattr(os, what)

    def failing_call(*arguments, **options):
        fails()
        return real_call(*arguments, **options)

    monkeypatch.setattr(os, what, failing_call)


@pytest.mark.parametrize(
    ("what", "at"), [("write", 1), ("fsync", 1), ("replace", 1), ("replace", 2), ("fsync", 2)]
)
@pytest.mark.parametrize(
    ("number", "hint"),
    [
        (errno.ENOSPC, "No space left on device; free space there"),
        (errno.EROFS, "Read-only file system; name a folder on a file system that can be written"),
        (errno.EIO, "Input/output error; see what is wrong with the disk"),
    ],
)
def test_save_state_names_what_failed_and_leaves_the_states(
    tmp_path, monkeypatch, what, at, number, hint
):
    for step in (1, 2):
        write(tmp_path, step)
    with monkeypatch.context() as patch:
        failing(patch, what, number, at)
        with pytest.raises(RuntimeError, match=f"{STATE_FILE} must be written, .*: {hint}"):
            write(tmp_path, 3)
    renamed = (what, at) == ("fsync", 2)  # the folder's: the file is there, its entry not flushed
    assert load_state(tmp_path)[1] == load_state(tmp_path)[1] | {
        "step": 3 if renamed else 2, "fallback": None,
    }  # fmt: skip
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("point", [("fsync", 1), ("replace", 1), ("replace", 2)])
def test_save_state_cut_short_by_ctrl_c_leaves_the_states(tmp_path, monkeypatch, point):
    for step in (1, 2):
        write(tmp_path, step)
    real, left = getattr(os, point[0]), [point[1]]

    def interrupted(*arguments, **options):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, point[0], interrupted)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path, 3)
    found = load_state(tmp_path)[1]
    assert found["step"] == 2 and found["fallback"] is None
    assert not list(tmp_path.glob(".*"))


def test_fit_on_a_disk_that_fills_up_goes_on_bit_equal(tmp_path, monkeypatch, capsys):
    options = {"max_steps": 6, "save_every": 2, "batch_size": 3}
    whole, broken, again = (tiny(dropout=0.2) for _ in range(3))
    fit(whole, **options)
    real = os.fsync

    def full(opened):
        if (tmp_path / STATE_FILE).exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(opened)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(
            RuntimeError, match=r"No space left on device; free space there, and try"
        ):
            fit(broken, out=tmp_path, quiet=False, **options)
    assert "the state could not be saved" in capsys.readouterr().err
    assert load_state(tmp_path)[1]["step"] == 2
    assert not (tmp_path / "run.lock").exists()
    fit(again, out=tmp_path, resume=True, **options)
    assert same(factors(whole), factors(again))


def test_fit_names_the_metrics_file_that_takes_no_line(tmp_path, monkeypatch):
    real = builtins.open

    def opening(file, mode="r", *arguments, **options):
        if mode == "a" and (tmp_path / STATE_FILE).exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(file, mode, *arguments, **options)

    monkeypatch.setattr(builtins, "open", opening)
    with pytest.raises(RuntimeError, match=r"metrics.jsonl must take another line.*No space left"):
        fit(tiny(), max_steps=4, save_every=2, out=tmp_path)
    assert load_state(tmp_path)[1]["step"] == 3  # rescued: its step was complete


def test_fit_names_the_metrics_file_that_it_can_not_cut(tmp_path, monkeypatch):
    fit(tiny(), max_steps=2, out=tmp_path)
    logged = (tmp_path / "metrics.jsonl").read_bytes()

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(
            RuntimeError, match=r"metrics.jsonl must be written anew.*No space left"
        ):
            fit(tiny(), max_steps=3, out=tmp_path, resume=True)
    assert (tmp_path / "metrics.jsonl").read_bytes() == logged
    fit(tiny(), max_steps=3, out=tmp_path, resume=True)


def test_load_state_leaves_a_newest_state_of_another_version(tmp_path):
    """It is whole: going on from the one before would throw its steps away."""
    for step in (1, 2):
        write(tmp_path, step)
    newest = tmp_path / STATE_FILE
    with safe_open(newest, "pt") as opened:
        facts = json.loads(opened.metadata()["minilora_run"])
    save_file(load_file(newest), newest, {"minilora_run": json.dumps(facts | {"version": 6})})
    held = newest.read_bytes()
    with pytest.raises(ValueError, match="state version 6, this minilora reads 5"):
        load_state(tmp_path)
    assert newest.read_bytes() == held
    newest.replace(tmp_path / PREVIOUS_FILE)  # killed between two renames, then minilora upgraded
    with pytest.raises(ValueError, match="state version 6, this minilora reads 5"):
        load_state(tmp_path)


def test_load_state_takes_a_state_that_can_not_be_read_now_for_no_damaged_one(tmp_path):
    """Permissions or a disk that fails for a moment: the newest state must survive it."""
    for step in (1, 2):
        write(tmp_path, step)
    newest = tmp_path / STATE_FILE
    newest.rename(tmp_path / "kept")
    newest.mkdir()  # can't be read, by root neither
    with pytest.raises(RuntimeError, match=f"{STATE_FILE}' must be readable, found: .*try again"):
        load_state(tmp_path)
    newest.rmdir()
    (tmp_path / "kept").rename(newest)
    assert load_state(tmp_path)[1] == {"version": 5, "step": 2, "fallback": None}
    save_file({"a": torch.ones(1)}, newest, {"minilora_run": json.dumps({"version": 5})})
    with pytest.raises(ValueError, match="it has no checksums"):
        _read(newest)


def test_a_run_that_is_refused_leaves_the_states_as_they_are(tmp_path):
    """The state before a damaged one takes its place only when the run goes on."""
    fit(tiny(), max_steps=2, save_every=1, out=tmp_path)
    newest = tmp_path / STATE_FILE
    content = bytearray(newest.read_bytes())
    content[-9] ^= 1
    newest.write_bytes(content)
    before = {p.name: p.read_bytes() for p in tmp_path.glob("state*")}
    with pytest.raises(ValueError, match="must keep its settings"):
        fit(tiny(), max_steps=3, batch_size=3, out=tmp_path, resume=True)
    assert {p.name: p.read_bytes() for p in tmp_path.glob("state*")} == before
    assert fit(tiny(), max_steps=3, out=tmp_path, resume=True).steps == 3


@pytest.mark.parametrize("name", ["run.lock", "loss.png", "last", "metrics.jsonl", "state"])
@pytest.mark.parametrize("resume", [False, True])
def test_a_run_writes_through_no_link_of_its_folder(tmp_path, name, resume):
    """A run folder from a stranger must not lead to a user's own files."""
    out, precious = tmp_path / "run", tmp_path / "precious"
    fit(tiny(), max_steps=1, out=out)
    if not resume:
        shutil.rmtree(out)
        out.mkdir()
    link = out / (STATE_FILE if name == "state" else name)
    shutil.rmtree(link, ignore_errors=True)
    link.unlink(missing_ok=True)
    if name == "state" and resume:
        return
    if name == "last":
        precious.mkdir()
    else:
        precious.write_text("mine")
    link.symlink_to(precious)
    try:
        fit(tiny(), max_steps=2, out=out, resume=resume)
    except ValueError as error:
        assert re.search("must be a file of its own, found a link|must be a folder of its own|" \
                         "holds the state of an earlier run", str(error))  # fmt: skip
    else:
        assert name == "loss.png" and not link.is_symlink()
    assert list(precious.iterdir()) == [] if name == "last" else precious.read_text() == "mine"


CHILD = """
import os, resource, signal, sys
sys.path.insert(0, {tests!r})
from training_models import fit, tiny
if {limit}:
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN
    resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
elif os.getuid() == 0:
    os.setuid(65534)
try:
    fit(tiny(), max_steps=6, save_every=2, out={out!r}, resume={resume})
except RuntimeError as error:
    print(error)
"""


def child(tmp_path, out, limit=0, resume=True):
    tests = os.path.dirname(__file__)
    code = CHILD.format(tests=tests, limit=limit, out=str(out), resume=resume)
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_fit_says_that_a_file_may_not_grow_and_keeps_the_state(tmp_path):
    """A limit of the system on files, in a process of its own: a short write in earnest."""
    out = tmp_path / "run"
    fit(tiny(), max_steps=2, out=out)
    before = (out / STATE_FILE).read_bytes()
    said = child(tmp_path, out, limit=len(before) // 2)
    assert f"{out / STATE_FILE} must be written, but that failed: File too large" in said
    assert "raise the limit on the size of files (ulimit -f)" in said
    assert (out / STATE_FILE).read_bytes() == before
    assert json.dumps(load_state(out)[1]["step"]) == "2"


def test_fit_says_that_a_folder_is_read_only(tmp_path):
    made = [one for one in tmp_path.parents if one.name.startswith(("pytest-", "popen-"))]
    for folder in (tmp_path, *made):
        folder.chmod(0o755)
    out = tmp_path / "run"
    out.mkdir()
    out.chmod(0o555)
    said = child(tmp_path, out, resume=False)
    assert f"out must be a folder that can be written, but {out} can not: Permission denied" in said
    assert list(out.iterdir()) == []
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
