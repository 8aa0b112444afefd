"""Which device is used, and that everything lies there; without a GPU. With one: `test_cuda.py`."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from test_cli import run, tiny_folder
from torch.utils import backend_registration
from training_models import examples, fit, tiny

import minilora
from minilora.data import Batch, Batches, pad
from minilora.kernels import fastest_dtype, hardware, out_of_memory, resolve_device
from minilora.kernels.probe import Hardware
from minilora.planning import machines
from minilora.training import session
from minilora.training.feed import Feed

CUDA = torch.device("cuda", 1)


@pytest.fixture
def gpus(monkeypatch):
    """Let torch say that there are two GPUs."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (20 * 10**9, 24 * 10**9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device=None: 10**9)


# --- names --------------------------------------------------------------------------------------


def test_auto_is_the_gpu_that_is_there(gpus, monkeypatch):
    assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda", 0)
    assert resolve_device("cuda:1") == resolve_device(CUDA) == CUDA
    assert resolve_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "1")  # torchrun's
    assert resolve_device("auto") == CUDA and resolve_device("cuda:0").index == 0
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match=r"'cuda:2' must be one of the 2 GPUs .* start no more"):
        resolve_device("auto")


def test_apples_gpu_comes_after_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device("auto") == torch.device("mps")
    assert fastest_dtype(torch.device("mps")) == torch.float32


@pytest.mark.parametrize(("device", "kind", "match"), [
    ("gpu", ValueError, r"device must be 'auto', 'cpu', 'cuda', 'cuda:N' or 'mps', found 'gpu'"),
    ("cuda", RuntimeError, r"'cuda' needs a GPU that torch can use, found none; use 'cpu'"),
    ("mps", RuntimeError, r"'mps' needs Apple's GPU"),
])  # fmt: skip
def test_a_device_that_is_not_there(monkeypatch, tmp_path, capsys, device, kind, match):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(kind, match=match):
        minilora.load_model(tmp_path / "absent", device=device)  # said before the rest
    with pytest.raises(kind, match=match):
        hardware(device)
    assert run("eval", "model", "--data", "x.jsonl", "--device", device) == 2


@pytest.mark.parametrize(("capability", "dtype"), [
    ((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16),
])  # fmt: skip
def test_bfloat16_from_capability_8_on(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert fastest_dtype(CUDA) == dtype


@pytest.mark.parametrize("verb", ["train", "eval", "generate", "merge", "explain", "quantize"])
def test_the_verbs_take_a_device(verb, capsys):
    with pytest.raises(SystemExit):
        run(verb, "--help")
    assert "--device DEVICE" in capsys.readouterr().out


def test_the_device_reaches_the_model(tmp_path, monkeypatch, gpus):
    folder, found = tiny_folder(tmp_path / "model"), []

    def load(source, quantize, dtype, device, **options):
        found.append(device)
        return minilora.load_model(source, quantize, dtype, "cpu", **options)

    monkeypatch.setattr("minilora.cli.sources.load_model", load)
    for words in (["--device", "cuda:1"], []):
        assert run("generate", folder, "a", "--max-new-tokens", 4, *words) == 0
    assert found == [CUDA, torch.device("cuda", 0)]


# --- what is said -------------------------------------------------------------------------------


@pytest.mark.parametrize(("error", "device"), [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), "cuda"),
    (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"), "mps"),
    (RuntimeError("[enforce fail at x] . DefaultCPUAllocator: can't allocate memory"), "cpu"),
    (MemoryError(), "cpu"), (RuntimeError("shape"), None), (ValueError("x"), None),
])  # fmt: skip
def test_what_lacks_memory(error, device):
    assert out_of_memory(error) == device


def test_the_command_says_what_takes_less_memory(tmp_path, monkeypatch, capsys):
    folder = tiny_folder(tmp_path / "model")

    def fail(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has\n…")

    monkeypatch.setattr("minilora.cli.sources.load_model", fail)
    assert run("generate", folder, "a", "--device", "cpu") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    for part in ("Tried to allocate 2.00 GiB", "--quantize nf4", "--device cpu", "of the CUDA"):
        assert part in said


def test_a_row_that_does_not_fit_is_told_by_its_device(monkeypatch):
    def fail(model, batch):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(RuntimeError, match=r"must fit in memory, and on cpu it does not"):
        fit(tiny(), loss=fail, max_steps=1)


# --- training -----------------------------------------------------------------------------------


def test_a_gpu_adds_in_one_order_during_a_run_alone():
    for device, wanted in ((CUDA, True), (CUDA, False), (torch.device("cpu"), True)):
        ordered = wanted and device == CUDA
        with session._in_one_order(device, wanted):
            assert torch.are_deterministic_algorithms_enabled() is ordered
            assert torch.is_deterministic_algorithms_warn_only_enabled() is ordered
        assert not torch.are_deterministic_algorithms_enabled()
        assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    try:
        with session._in_one_order(CUDA):  # the user's own stays
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_feed_pins_for_its_own_gpu_and_copies_without_waiting(monkeypatch):
    told, waits = [], []

    def to(tensor, device, non_blocking=False):
        assert device == CUDA
        waits.append(not non_blocking)
        return tensor

    monkeypatch.setattr(torch.cuda, "set_device", lambda d: told.append((d, threading.get_ident())))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.clone())
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: True)
    monkeypatch.setattr(torch.Tensor, "to", to)
    batches = [b for b, _ in Feed(Batches(examples(9), batch_size=4), CUDA).epoch()]
    assert len(batches) == 3 and not any(waits)
    ((device, thread),) = told
    assert device == CUDA and thread != threading.get_ident()


def test_labels_are_counted_on_the_cpu_and_again_when_they_change(monkeypatch):
    batch = pad(Batches(examples(5), batch_size=5).examples)
    wanted = int((batch.labels[:, 1:] != -100).sum())
    some = batch.to("meta")  # whose values nobody can read
    assert some.tokens == wanted
    assert (
        some.rows(1, 3).tokens
        == batch.rows(1, 3).tokens
        == Batch(batch.input_ids[1:3], batch.labels[1:3]).tokens
    )
    assert batch.tokens == wanted
    batch.labels[:, -1] = -100
    batch.labels[0] = -100
    assert batch.tokens == int((batch.labels[:, 1:] != -100).sum()) < wanted
    with torch.inference_mode():
        other = Batch(batch.input_ids.clone(), batch.labels.clone())
        before = other.tokens
        other.labels[:] = -100
        assert before > 0 and other.tokens == 0


# --- planning -----------------------------------------------------------------------------------


@pytest.fixture
def measured(gpus, monkeypatch, request):
    """Let the probe find a GPU of 120 TFLOP/s."""
    found = Hardware("cuda:0", "NVIDIA Test", 2, ("sm_80",), 1.5e4, 1.2e5, 2e5, torch.bfloat16,
                     1.2e5, 900.0, 24 * 10**9)  # fmt: skip
    cpu = machines.hardware
    monkeypatch.setattr(machines, "hardware", lambda d="cpu": found if d != "cpu" else cpu())
    monkeypatch.setattr(machines, "process_bytes", lambda: 10**8)
    request.addfinalizer(machines.calibrate.cache_clear)  # which would keep that
    return found


def test_a_plan_is_for_the_gpu_here(measured):
    found = minilora.plan("tinyllama-1.1b", 1000, length=512, timed=False)
    assert found.device.gpu and found.device.what == "NVIDIA Test" and found.fits
    assert found.device.memory == 21 * 10**9  # what is free, and what this process holds
    assert found.settings.dtype == torch.bfloat16
    assert found.speed.how == "rates measured here"
    assert found.advice.why.startswith("The GPU here is the right choice")
    assert "--device cuda " in found.advice.command + " " and not found.advice.cpu
    one = minilora.plan("tinyllama-1.1b", 1000, length=512, timed=False, device="cuda:1")
    assert "--device cuda:1" in one.advice.command
    cpu = minilora.plan("smollm2-135m", 10, length=16, timed=False, device="cpu")
    assert not cpu.device.gpu and "--device cpu" in cpu.advice.command


def test_a_plan_for_a_gpu_that_is_too_small(measured):
    found = minilora.plan("llama-2-70b", 1000, timed=False)
    assert not found.fits and "GPU here" not in found.advice.why


def test_the_probe_of_a_gpu_prints(measured):
    assert "NVIDIA Test (cuda:0, 24.0 GB; sm_80); f32 15000" in str(measured)


# --- the whole path -----------------------------------------------------------------------------


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="needs a torch that takes devices made in Python",
)
def test_everything_lies_on_the_device_and_computes_the_cpus_numbers(tmp_path):
    """In a process of its own, as torch has one such device: `pretend_run.py`. Takes 20 s."""
    script = Path(__file__).with_name("pretend_run.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(script.parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
