"""What is measured here: that it is measured, and of the right thing; never how fast."""

import itertools
import statistics
import subprocess
import time
from pathlib import Path

import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from minilora.kernels import hand_back_freed_memory
from minilora.lora import sizes
from minilora.lora.layer import LoRALayer, lora_layers
from minilora.models import GPT2Config, LlamaConfig
from minilora.planning import machines, timing
from minilora.planning.machines import calibrate, forget_peak, free_memory, peak_bytes
from minilora.planning.shapes import Settings, Shape
from minilora.planning.timing import random_model, timed_step, timed_step_apart
from minilora.quantization.linear import QuantizedLinear
from minilora.running.loss import token_loss

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
    assert 100 * 2**20 < found.process < 2 * machines.PROCESS


def test_the_share_of_other_work_is_what_is_not_ours():
    assert machines._others((0.0, 0.0, 0.0), (10.0, 8.0, 2.0)) == pytest.approx(0.6)
    assert machines._others((5.0, 1.0, 1.0), (5.0, 1.0, 1.0)) == 0.0
    assert machines._others((0.0, 0.0, 0.0), (10.0, 2.0, 3.0)) == 0.0
    first = machines._processor_seconds()
    assert all(after >= before for before, after in
               zip(first, machines._processor_seconds(), strict=True))  # fmt: skip


def test_a_process_that_cannot_be_measured_is_taken_as_usual(monkeypatch):
    def fail(*_, **__):
        raise subprocess.SubprocessError

    monkeypatch.setattr(machines.subprocess, "run", fail)
    assert machines.process_bytes.__wrapped__() == machines.PROCESS
    assert timed_step_apart(LLAMA, Settings()) is None


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_is_forecast_from_few_blocks(checkpointing):
    before = torch.random.get_rng_state()
    settings = Settings(batch_size=2, length=16, r=4, checkpointing=checkpointing)
    found = timed_step(LLAMA, settings)
    assert 0 < found.low <= found.seconds <= found.high
    assert found.repeats >= 5
    assert timed_step(LLAMA, settings) == found, "timed once"
    twice = Settings(batch_size=2, length=16, r=4, checkpointing=checkpointing, accumulate=2)
    assert timed_step(LLAMA, twice).seconds == 2 * found.seconds
    assert torch.equal(before, torch.random.get_rng_state())


def test_depth_rows_and_vocabulary_are_scaled(monkeypatch):
    asked = []

    def steps(shape, settings, rows, clock):
        asked.append((rows, shape.config.vocab_size))
        return itertools.repeat((rows * 1.0, rows * 0.5))

    monkeypatch.setattr(timing, "_steps", steps)
    monkeypatch.setattr(timing, "_known", {})
    config = LlamaConfig(10**6, 2048, 8192, 10, 16, 16, 128, 64)
    found = timed_step(Shape("wide", config, ""), Settings(batch_size=6, length=16))
    vocabulary = 2**25 // 2048
    assert [size for _, size in asked] == [vocabulary]
    assert found.seconds == pytest.approx((1.0 * 10**6 / vocabulary + 0.5 * 10) * 6)
    assert found.low == found.high == found.seconds
    assert found.repeats == 5


@pytest.mark.parametrize(
    ("blocks", "repeats", "steady"),
    [
        ([1.0, 1.1, 1.0, 1.1, 1.0], 5, True),
        ([1.0, 9.0, 1.0, 1.0, 1.0], 5, True),  # one step that something else ran into
        ([1.0, 2.0] * 8, 15, False),
        ([2.0, 1.0, 2.0] + [1.0] * 13, 8, True),  # quiet in the end
    ],
)
def test_repeats_that_disagree_are_more_and_are_told(monkeypatch, blocks, repeats, steady):
    monkeypatch.setattr(timing, "_steps", lambda *_: iter([(0.0, one) for one in blocks]))
    monkeypatch.setattr(timing, "_known", {})
    found = timed_step(LLAMA, Settings(batch_size=1, length=16))
    assert (found.repeats, found.steady) == (repeats, steady)
    assert found.seconds == pytest.approx(3 * statistics.median(blocks[:repeats]))
    if not steady:
        assert "disagree by a factor of 2 (above 1.25) after 15 repeats" in found.doubt()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("shape", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_blocks_are_told_from_the_rest(shape, checkpointing):
    """By a clock that counts the calls of the blocks' linears, forward and again."""
    ticks = [0.0]
    settings = Settings(batch_size=2, length=16, r=4, checkpointing=checkpointing)
    steps = timing._steps(shape, settings, 2, lambda: ticks[0])

    def count(module, _):
        ticks[0] += isinstance(module, LoRALayer)

    handle = register_module_forward_pre_hook(count)
    try:
        rest, block = next(steps)
    finally:
        handle.remove()
    assert block == (7 if shape is LLAMA else 4) * (2 if checkpointing else 1)
    assert rest == 0, "head and embedding have no adapter"


def test_labels_that_are_not_learned_are_left_out_of_the_timed_loss():
    seen = []
    settings = Settings(batch_size=2, length=17, r=4, learned=0.25)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "token_loss", lambda model, batch: seen.append(batch) or
                      token_loss(model, batch))  # fmt: skip
        next(timing._steps(LLAMA, settings, 2, time.perf_counter))
    assert {batch.tokens for batch in seen} == {2 * 4}


def test_a_step_is_timed_apart_and_nothing_of_the_current_folder_runs(tmp_path, monkeypatch):
    """A second: a process that imports torch. Without `-I` a torch.py beside it would run."""
    for name in ("torch", "json", "numpy"):
        (tmp_path / f"{name}.py").write_text("open('it-ran', 'w').close()")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))  # as `python -m` does
    found = timed_step_apart(LLAMA, Settings(batch_size=2, length=16, r=4))
    assert found is not None
    assert 0 < found.low <= found.seconds <= found.high
    if forget_peak():
        assert 0 < abs(found.beyond) < 300e6, "of a plan that knows no libraries' own memory"
    assert not (tmp_path / "it-ran").exists()


@pytest.mark.parametrize("version", [1, 2])
def test_a_containers_limit_counts_and_what_it_caches_of_files_is_free(
    tmp_path, monkeypatch, version
):
    names = ("memory.max", "memory.current", "inactive_file")
    if version == 1:
        (tmp_path / "memory").mkdir()
        names = ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes",
                 "total_inactive_file")  # fmt: skip
    limit, used, cached = (n * 10**6 for n in (100, 90, 30))
    (tmp_path / names[0]).write_text(f"{limit}\n")
    (tmp_path / names[1]).write_text(f"{used}\n")
    stat = tmp_path / names[1].replace("current", "stat").replace("usage_in_bytes", "stat")
    stat.write_text(f"inactive_file_of_another 7\n{names[2]} {cached}\nactive_file 5\n")

    def path(*parts):
        return tmp_path if parts == ("/sys/fs/cgroup",) else Path(*parts)

    monkeypatch.setattr("minilora.planning.machines.Path", path)
    assert free_memory() == limit - used + cached
    (tmp_path / names[0]).write_text("max\n" if version == 2 else f"{2**63 - 4096}\n")
    assert free_memory() > 10**9


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
