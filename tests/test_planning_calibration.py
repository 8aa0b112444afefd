"""What is measured here: that it is measured, and of the right thing; never how fast."""

import subprocess

import pytest
import torch

from minilora.kernels import hand_back_freed_memory
from minilora.lora_layer import lora_layers
from minilora.models import GPT2Config, LlamaConfig
from minilora.planning import calibration, constants
from minilora.planning.calibration import (
    calibrate,
    forget_peak,
    free_memory,
    peak_bytes,
    random_model,
    timed_step,
    timed_step_apart,
)
from minilora.planning.memory import Settings
from minilora.planning.shapes import Shape
from minilora.quantization import QuantizedLinear
from minilora.sizes import sizes

LLAMA = Shape("small", LlamaConfig(97, 64, 128, 3, 4, 2, 16, 64), "here")
GPT2 = Shape("small", GPT2Config(vocab_size=97, n_positions=64, n_embd=64, n_layer=3, n_head=2), "")


@pytest.mark.parametrize("shape", [LLAMA, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("format", [None, "int8", "nf4", "int4"])
def test_a_random_model_is_one_that_trains(shape, format):
    settings = Settings(format, batch_size=2, length=16, r=4)
    model = random_model(shape, settings)
    assert not any(p.is_meta for p in model.parameters())
    quantized = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    assert bool(quantized) == (format is not None)
    quantizing = {} if format is None else {"format": format}
    planned = sizes(shape.empty(torch.bfloat16), **quantizing)
    assert sizes(model).base == planned.total
    ids = torch.randint(0, 97, (2, 16))
    loss = model.loss(ids, ids)
    loss.backward()
    assert loss.isfinite()
    for layer in lora_layers(model).values():
        assert layer.adapters["default"].lora_B.grad.isfinite().all()


def test_the_machine_is_measured_once():
    found = calibrate()
    assert found is calibrate()
    assert found.memory > 10**8
    assert found.bandwidth > 10**8
    assert all(rate > 0 for name, rate in found.rates.items() if name != "int8")
    assert 100 * constants.MIB < found.process < 2 * constants.PROCESS


def test_the_share_of_other_work_is_what_is_not_ours():
    assert calibration._others((0.0, 0.0, 0.0), (10.0, 8.0, 2.0)) == pytest.approx(0.6)
    assert calibration._others((5.0, 1.0, 1.0), (5.0, 1.0, 1.0)) == 0.0
    assert calibration._others((0.0, 0.0, 0.0), (10.0, 2.0, 3.0)) == 0.0
    first = calibration._processor_seconds()
    assert all(after >= before for before, after in
               zip(first, calibration._processor_seconds(), strict=True))  # fmt: skip


def test_a_process_that_cannot_be_measured_is_taken_as_usual(monkeypatch):
    def fail(*_, **__):
        raise subprocess.SubprocessError

    monkeypatch.setattr(calibration.subprocess, "run", fail)
    assert calibration.process_bytes.__wrapped__() == constants.PROCESS
    assert timed_step_apart(LLAMA, Settings()) is None


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_is_foretold_from_two_depths(checkpointing):
    before = torch.random.get_rng_state()
    settings = Settings(batch_size=2, length=16, r=4, checkpointing=checkpointing)
    found = timed_step(LLAMA, settings)
    assert found > 0
    assert timed_step(LLAMA, settings) == found, "timed once"
    twice = Settings(batch_size=2, length=16, r=4, checkpointing=checkpointing, accumulate=2)
    assert timed_step(LLAMA, twice) == 2 * found
    assert torch.equal(before, torch.random.get_rng_state())


def test_depth_rows_and_vocabulary_are_scaled(monkeypatch):
    asked = []

    def seconds(shape, settings, layers, rows, clock):
        asked.append((layers, rows, calibration._shallow(shape, layers).config.vocab_size))
        return rows * (1.0 + 0.5 * layers)

    monkeypatch.setattr(calibration, "_seconds", seconds)
    monkeypatch.setattr(calibration, "_known", {})
    config = LlamaConfig(10**6, 2048, 8192, 10, 16, 16, 128, 64)
    found = timed_step(Shape("wide", config, ""), Settings(batch_size=6, length=16))
    vocabulary = 2**25 // 2048
    rows = asked[0][1]
    assert asked == [(1, rows, vocabulary), (3, rows, vocabulary)]
    one = rows * (1.0 * 10**6 / vocabulary + 0.5 * 10)
    assert found == pytest.approx(one * 6 / rows)


def test_a_step_is_timed_apart_and_nothing_of_the_current_folder_runs(tmp_path, monkeypatch):
    """A second: a process that imports torch. Without `-I` a torch.py beside it would run."""
    for name in ("torch", "json", "numpy"):
        (tmp_path / f"{name}.py").write_text("open('it-ran', 'w').close()")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))  # as `python -m` does
    found = timed_step_apart(LLAMA, Settings(batch_size=2, length=16, r=4))
    assert found is not None
    assert found > 0
    assert not (tmp_path / "it-ran").exists()


def test_the_peak_is_the_kernels():
    if not peak_bytes():
        pytest.skip("needs /proc")
    forget_peak()
    before = peak_bytes()
    held = torch.ones(2**26)
    assert peak_bytes() - before > 0.8 * held.nbytes
    del held
    hand_back_freed_memory()  # a timed step or a run in this process lets glibc keep it
    if forget_peak():
        assert peak_bytes() < before + 2**27
    assert free_memory() > 0
