"""Seconds and money against sums done by hand."""

import pytest
import torch
from planning_machine import MACHINE

from minilora.models import LlamaConfig
from minilora.planning.machines import DEVICES, device
from minilora.planning.memory import count_memory
from minilora.planning.shapes import Settings, Shape, read_shape
from minilora.planning.speed import (
    count_steps,
    count_work,
    duration,
    from_rates,
    on_device,
    run_speed,
)
from minilora.training.config import TrainConfig
from minilora.training.progress import planned_steps

SMALL = Shape("small", LlamaConfig(97, 64, 128, 3, 4, 2, 16, 64), "here")


def work(shape=SMALL, **options):
    settings = Settings(**{"batch_size": 2, "length": 16, "r": 4} | options)
    memory = count_memory(shape, settings)
    return count_work(shape, settings, memory), settings, memory


def test_flops_are_those_of_the_formula():
    found, _, memory = work()
    tokens = 32
    weights = 3 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128)
    factors = 3 * 4 * (2 * 128 + 2 * 96 + 3 * 192)
    assert found.base == 4 * tokens * weights
    assert found.adapters == 6 * tokens * factors
    assert found.attention == 7 * tokens * 16 * 64 * 3
    assert found.head == 4 * tokens * 64 * 97
    assert found.flops == found.base + found.adapters + found.attention + found.head
    assert found.bytes == 2 * memory.weights + 4 * memory.activations
    assert found.decoded == 0


def test_checkpointing_runs_blocks_again_and_accumulation_repeats():
    once, *_ = work()
    again, *_ = work(checkpointing=True)
    assert again.base == once.base * 3 // 2
    assert again.adapters == once.adapters * 4 // 3
    assert again.head == once.head
    twice, *_ = work(accumulate=2)
    assert twice.flops == 2 * once.flops
    assert twice.bytes == 2 * once.bytes
    nf4, *_ = work(format="nf4")
    assert nf4.decoded == once.base // (4 * 32) * 2


def test_seconds_from_a_datasheet():
    found, settings, memory = work()
    one = device("A100-80GB")
    seconds = on_device(found, memory, settings, one)
    wanted = found.flops / (312e12 * 0.4) + found.bytes / (2039e9 * 0.7)
    assert seconds == pytest.approx(wanted)
    found, settings, memory = work(batch_size=8, ranks=8, parallel="fsdp")
    node = device("8xa100-80gb")
    seconds = on_device(found, memory, settings, node)
    wanted = found.flops / (8 * 312e12 * 0.4) + found.bytes / (8 * 2039e9 * 0.7)
    assert seconds == pytest.approx(wanted + 2 * memory.weights * 7 / 300e9)


def test_seconds_from_rates_use_integers_where_they_are_exact():
    found, settings, _ = work(format="int8")
    other = found.flops - found.base
    wanted = found.base / (800e9 * 0.35) + other / (400e9 * 0.35) + found.bytes / 10e9
    assert from_rates(found, settings, MACHINE) == pytest.approx(wanted)
    found, settings, _ = work(format="nf4", dtype=torch.float32)
    wanted = found.flops / (100e9 * 0.35) + found.bytes / 10e9 + found.decoded * 0.6e-9
    assert from_rates(found, settings, MACHINE) == pytest.approx(wanted)


def test_a_step_takes_as_long_as_its_slowest_rank():
    """Nine rows on eight ranks leave two of them to one."""
    nine, *_ = work(batch_size=9, ranks=8, parallel="ddp")
    sixteen, *_ = work(batch_size=16, ranks=8, parallel="ddp")
    assert (nine.flops, nine.bytes) == (sixteen.flops, sixteen.bytes)


@pytest.mark.parametrize("examples", [1, 7, 8, 9, 100])
@pytest.mark.parametrize("epochs", [0.5, 1, 3])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_steps_are_those_that_fit_makes(examples, epochs, accumulate):
    config = TrainConfig(batch_size=4, accumulate=accumulate, epochs=epochs)
    assert count_steps(examples, epochs, 4, accumulate) == planned_steps(config, examples)


def test_hours_follow_the_rows():
    settings = Settings(batch_size=2, length=16, r=4)
    found = run_speed(0.5, "datasheet", settings, 100, 2.0)
    assert (found.how, found.steps, found.tokens_per_second) == ("datasheet", 100, 64.0)
    assert found.hours == pytest.approx(0.5 * 100 / 3600)
    assert run_speed(0.5, "", settings, 3, 1).hours == pytest.approx(0.5 * 1.5 / 3600)


@pytest.mark.parametrize(
    ("hours", "text"),
    [(0.001, "3.6 s"), (0.2, "12 min"), (3.21, "3.2 h"), (240, "10.0 days"), (1 / 120, "30 s")],
)
def test_a_duration_is_in_a_unit_that_suits_it(hours, text):
    assert duration(hours) == text


def test_devices_state_their_source():
    assert {"rtx-4090", "a100-80gb", "8xa100-80gb", "h100-80gb", "h200", "epyc-7763"} == {*DEVICES}
    for one in DEVICES.values():
        assert one.source
        assert 0 < one.efficiency < 1
        assert 0 < one.moving < 1
        assert one.memory > 20e9
        assert one.rate(torch.bfloat16) > 0
    with pytest.raises(ValueError, match="found 'a100'; nearest: a100-80gb"):
        device("a100")


def test_a_larger_machine_is_faster_on_a_large_model():
    shape = read_shape("llama-2-7b")
    settings = Settings("nf4", batch_size=4, length=1024, checkpointing=True)
    memory = count_memory(shape, settings, gpu=True)
    found = count_work(shape, settings, memory)
    seconds = [on_device(found, memory, settings, device(name))
               for name in ("rtx-4090", "a100-80gb", "h100-80gb")]  # fmt: skip
    assert seconds == sorted(seconds, reverse=True)
