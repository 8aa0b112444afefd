"""Memory used again: the buffers of decoded weights, and what the C library keeps when freed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minilora.kernels import hand_back_freed_memory, keep_freed_memory
from minilora.kernels.workspace import _of_libc, workspace

CPU = torch.device("cpu")


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@torch.no_grad()
def test_a_workspace_is_lent_again():
    first = workspace(torch.Size((3, 5)), torch.float64, CPU)
    second = workspace(torch.Size((2, 4)), torch.float64, CPU)
    assert second.shape == (2, 4)
    assert second.data_ptr() == first.data_ptr()
    assert workspace(torch.Size((2, 4)), torch.float32, CPU).data_ptr() != first.data_ptr()
    with torch.enable_grad():  # a recorded gradient may keep it
        assert workspace(torch.Size((2, 4)), torch.float64, CPU).data_ptr() != first.data_ptr()


def test_a_buffer_first_lent_in_inference_mode_can_be_written_in_training():
    with torch.inference_mode():
        workspace(torch.Size((64, 4099)), torch.float16, CPU)
    with torch.no_grad():
        assert workspace(torch.Size((2, 3)), torch.float16, CPU).copy_(torch.ones(2, 3)).sum() == 6


@pytest.mark.skipif(_of_libc("mallopt") is None, reason="needs glibc")
def test_freed_memory_is_kept_until_it_is_handed_back():
    keep_freed_memory()
    hand_back_freed_memory()
    held = torch.ones(2**26)
    size, before = held.nbytes, resident()
    del held
    kept = resident()
    assert before - kept < size // 4, "the next step finds it there"
    hand_back_freed_memory()
    assert kept - resident() > size // 2


def test_elsewhere_nothing_is_done(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert _of_libc("malloc_trim") is None
    keep_freed_memory.__wrapped__()
    hand_back_freed_memory()


@pytest.mark.parametrize(("set_to", "wanted"), [(None, "256"), ("1000", "1000")])
def test_fewer_compiled_products_are_kept_unless_the_user_says_how_many(set_to, wanted):
    name = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
    environment = {key: value for key, value in os.environ.items() if key != name}
    code = f"import os, minilora; print(os.environ[{name!r}])"
    given = environment | ({} if set_to is None else {name: set_to})
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=given, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == wanted, done.stderr


@pytest.mark.parametrize(("taken", "wanted"), [
    (2**30, [(-3, 2**30), (-1, 2**31 - 1)]),
    (2**25, [(-3, 2**30), (-3, 2**25), (-1, 2**31 - 1)]),  # as glibc does before 2.35
    (0, [(-3, 2**30), (-3, 2**25)]),
])  # fmt: skip
def test_what_glibc_refuses_is_asked_for_in_less(monkeypatch, taken, wanted):
    """A stand-in for older ones: a trim threshold alone would freeze the other where it is."""
    asked = []

    def mallopt(name, value):
        asked.append((name, value))
        return int(name != -3 or value <= taken)

    monkeypatch.setattr("minilora.kernels.workspace._of_libc", lambda name: mallopt)
    keep_freed_memory.__wrapped__()
    assert asked == wanted
