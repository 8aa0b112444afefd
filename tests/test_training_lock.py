"""One process per folder; the file that a killed run leaves is no lock."""

import errno
import fcntl
import json
import os
import resource

import pytest
from training_models import fit, tiny

from minilora.training.lock import LOCK_FILE, FolderLock, check_free


def test_lock_refuses_a_second_holder_by_pid_and_start(tmp_path):
    lock = FolderLock(tmp_path)
    told = json.loads((tmp_path / LOCK_FILE).read_text())
    assert told["pid"] == os.getpid()
    message = rf"one process at a time, but process {told['pid']} \(started {told['started'][:4]}"
    for second in (FolderLock, check_free):
        with pytest.raises(RuntimeError, match=message):
            second(tmp_path)
    with pytest.raises(RuntimeError, match="is at work in"):
        fit(tiny(), max_steps=1, out=tmp_path)
    (tmp_path / LOCK_FILE).write_text("?")
    with pytest.raises(RuntimeError, match="but another process is at work"):
        check_free(tmp_path)
    lock.release()
    check_free(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_lock_takes_over_what_a_crash_left(tmp_path):
    lock = FolderLock(tmp_path)
    os.close(lock.opened)  # as when its process dies
    check_free(tmp_path)
    again = FolderLock(tmp_path)
    assert again.left
    again.withdraw()
    assert (tmp_path / LOCK_FILE).exists()  # still the mark of a run that was killed
    FolderLock(tmp_path).release()
    assert not (tmp_path / LOCK_FILE).exists()


def test_lock_takes_a_file_without_content_for_the_mark_of_a_killed_run(tmp_path):
    """The moment between making the file and writing into it is a moment to be killed in."""
    (tmp_path / LOCK_FILE).touch()
    lock = FolderLock(tmp_path)
    assert lock.left
    lock.release()
    lock = FolderLock(tmp_path)
    assert not lock.left
    lock.release()


def test_a_killed_runs_folder_is_free_where_locks_need_a_writable_file(tmp_path, monkeypatch):
    """As on NFS 4, which is not at hand: its rule is put around `flock`."""
    real = fcntl.flock

    def flock(opened, operation):
        if operation & fcntl.LOCK_EX and fcntl.fcntl(opened, fcntl.F_GETFL) & 3 == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        real(opened, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    (tmp_path / "run.lock").write_text("{}")
    check_free(tmp_path)
    lock = FolderLock(tmp_path)
    with pytest.raises(RuntimeError, match="one process at a time"):
        check_free(tmp_path)
    lock.release()


def test_lock_withdraws_the_folders_it_made(tmp_path):
    lock = FolderLock(tmp_path / "a" / "b")
    lock.withdraw()
    assert list(tmp_path.iterdir()) == []


def test_lock_is_of_the_file_that_is_there(tmp_path, monkeypatch):
    """A holder that ends between opening and locking takes its file with it: lock the new one."""
    import minilora.training.lock as module

    real, first = module._take, []

    def racing(opened, file):
        real(opened, file)
        if not first:
            first.append(opened)
            file.unlink()

    monkeypatch.setattr(module, "_take", racing)
    lock = FolderLock(tmp_path)
    assert lock._is(lock.opened)
    lock.release()


def test_fit_releases_the_folder_however_it_ends(tmp_path):
    fit(tiny(), max_steps=1, out=tmp_path / "good")
    assert not (tmp_path / "good" / LOCK_FILE).exists()

    def loss(model, batch):
        raise MemoryError

    with pytest.raises(MemoryError):
        fit(tiny(), max_steps=1, out=tmp_path / "bad", loss=loss)
    assert not (tmp_path / "bad" / LOCK_FILE).exists()
    with pytest.raises(TypeError):
        fit(tiny(), 3, max_steps=1, out=tmp_path / "new" / "none")
    assert not (tmp_path / "new").exists()


def test_lock_does_not_follow_a_link_to_nowhere(tmp_path):
    (tmp_path / LOCK_FILE).symlink_to(tmp_path / "gone" / "file")
    for look in (FolderLock, check_free):
        with pytest.raises(ValueError, match="run.lock' must be a file of its own, found a link"):
            look(tmp_path)
    assert not (tmp_path / "gone").exists()
    (tmp_path / LOCK_FILE).unlink()
    os.mkfifo(tmp_path / LOCK_FILE)
    for look in (FolderLock, check_free):
        with pytest.raises(ValueError, match="run.lock' must be a file, found something else"):
            look(tmp_path)


def test_lock_does_not_write_into_another_files_second_name(tmp_path):
    (tmp_path / "precious").write_text("mine")
    os.link(tmp_path / "precious", tmp_path / LOCK_FILE)
    lock = FolderLock(tmp_path)
    assert lock.left and (tmp_path / "precious").read_text() == "mine"
    with pytest.raises(RuntimeError, match="one process at a time"):
        FolderLock(tmp_path)
    lock.release()
    assert [p.name for p in tmp_path.iterdir()] == ["precious"]


@pytest.mark.parametrize("left", [False, True])
def test_lock_that_can_not_be_written_is_let_go_of(tmp_path, left):
    """On a full disk: the next try in the same process must not find it at work."""
    if left:
        (tmp_path / LOCK_FILE).touch()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        with pytest.raises(RuntimeError, match="can not: File too large; name another one"):
            FolderLock(tmp_path / "new" if not left else tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [p.name for p in tmp_path.iterdir()] == ([LOCK_FILE] if left else [])
    FolderLock(tmp_path).release()
