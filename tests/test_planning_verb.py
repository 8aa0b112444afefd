"""The verb, its advice and its tables, on a machine with round figures."""

import dataclasses
import json
import shlex
import types

import pytest
import torch
from planning_machine import MACHINE
from torch.distributed.run import get_args_parser as torchrun

import minilora
from minilora.cli.command import build_parser
from minilora.data.batches import Example
from minilora.models import LlamaConfig
from minilora.planning import advice, memory
from minilora.planning import plans as verb
from minilora.planning.advice import Planner, best_dtype, command, variants
from minilora.planning.machines import DEVICES, this_machine
from minilora.planning.memory import count_memory
from minilora.planning.plans import rules_of_thumb
from minilora.planning.saved import SavedBytes
from minilora.planning.shapes import Settings, Shape, read_shape
from minilora.planning.timing import Timing

SMALL = LlamaConfig(97, 64, 128, 3, 4, 2, 16, 64)


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """Return a setter of the machine at hand; nothing is measured or timed."""
    current = [MACHINE]
    monkeypatch.setattr(verb, "calibrate", lambda: current[0])

    def become(**changed):
        current[0] = dataclasses.replace(MACHINE, **changed)

    return become


def plan(model=SMALL, data=1000, **options):
    return minilora.plan(model, data, **{"timed": False, "length": 32, "r": 4} | options)


def test_a_small_model_stays_on_the_cpu():
    found = plan()
    assert found.fits
    assert found.advice.cpu
    assert "The CPU here is the right choice" in found.advice.why
    assert found.settings.dtype == torch.bfloat16
    assert found.advice.option.device.name == "here"
    assert "; on this machine (" in str(found) and " on here" not in str(found)
    assert sum(found.memory.components().values()) == found.memory.peak


def test_a_compiled_run_is_planned_as_one(monkeypatch):
    """What its blocks keep is traced in test_planning_saved.py; here nothing is, to save time."""
    traced = []

    def untraced(model, autocast, *, compile, **options):
        traced.append(compile)
        return SavedBytes(model, autocast, **options)

    monkeypatch.setattr(memory, "SavedBytes", untraced)
    monkeypatch.setattr(memory, "_known", {})
    eager, found = (plan(device="h200", batch_size=64, compile=one) for one in (False, True))
    assert set(traced[: len(traced) // 2]) == {False} and set(traced[len(traced) // 2 :]) == {True}
    assert 1 < found.speed.tokens_per_second / eager.speed.tokens_per_second < 1.5
    assert found.advice.command.endswith(" --compile") and "--compile" not in eager.advice.command
    assert ", compiled; " in str(found) and "taking 60% of peak" in str(found)
    assert "taking 40% of peak" in str(eager)


def test_a_large_run_is_sent_to_the_smallest_gpu_that_fits():
    found = plan("llama-2-7b", 20_000, length=1024)
    assert not found.advice.cpu
    assert "The CPU here is the wrong choice" in found.advice.why
    assert found.advice.option.device.name == "rtx-4090"
    assert found.advice.option.fits
    assert found.advice.option.memory.peak <= 0.9 * DEVICES["rtx-4090"].memory
    assert "over 20,000 examples take" in found.advice.why
    words = shlex.split(found.advice.command)
    assert build_parser().parse_args(words[1:]).device == "cuda"


def test_what_fits_nowhere_is_said(machine):
    machine(memory=10**9)
    huge = LlamaConfig(128256, 32768, 131072, 40, 256, 256, 128, 8192)
    found = plan(huge, 10, length=8192)
    assert found.advice.option is None
    assert found.advice.command == ""
    assert "No machine in the table fits either" in found.advice.why
    assert not found.fits
    assert found.speed is None
    assert "not planned, since it does not fit" in str(found)


def test_seventy_billion_need_a_node_and_a_small_cpu_is_told(machine):
    machine(memory=8 * 10**9)
    found = plan("llama-2-70b", 1000, length=512)
    assert "do not fit into 8.0 GB here, not even in nf4" in found.advice.why
    assert found.advice.option.device.name == "a100-80gb"
    assert found.advice.option.settings.format == "int8", "72 of the 76 GB that may be used"


def test_what_is_given_up_first():
    settings = Settings(batch_size=4, length=32)
    order = [(s.format, s.checkpointing, s.batch_size, s.accumulate)
             for s in variants(settings, this_machine(MACHINE))]  # fmt: skip
    assert order[:6] == [
        (None, False, 4, 1), (None, False, 2, 2), (None, False, 1, 4),
        (None, True, 4, 1), (None, True, 2, 2), (None, True, 1, 4),
    ]  # fmt: skip
    assert [o[0] for o in order] == [None] * 6 + ["int8"] * 6 + ["nf4"] * 6
    assert all(batch * accumulate == 4 for _, _, batch, accumulate in order)
    nf4 = Settings("nf4", batch_size=3, checkpointing=True)
    assert {(s.format, s.checkpointing) for s in variants(nf4, this_machine(MACHINE))} == {
        ("nf4", True)
    }


def test_a_node_shares_rows_then_weights():
    settings = Settings(batch_size=8, length=32)
    found = list(variants(settings, DEVICES["8xa100-80gb"]))
    assert {(s.ranks, s.parallel) for s in found} == {(8, "ddp"), (8, "fsdp")}
    assert all(s.format is None for s in found if s.parallel == "fsdp")
    assert all(s.batch_size == 8 for s in found), "each rank keeps a row"
    few = variants(Settings(batch_size=3, length=32), DEVICES["8xa100-80gb"])
    assert {s.ranks for s in few} == {3}
    alone = variants(Settings(batch_size=1, length=32), DEVICES["8xa100-80gb"])
    assert {s.ranks for s in alone} == {1}


def test_the_batch_is_split_before_the_base_gets_fewer_bits():
    """Also where a quantized base would leave room for the whole batch at once."""
    size = plan("llama-2-7b", batch_size=8, length=512, dtype="bfloat16").memory.peak
    found = plan("llama-2-7b", batch_size=8, length=512, dtype="bfloat16", memory_gb=size / 1.2e9)
    whole = next(one for one in found.options if one.settings.format == "nf4")
    assert whole.fits and whole.settings.batch_size == 8
    advised = found.advice.option.settings
    assert (advised.format, advised.batch_size * advised.accumulate) == (None, 8)
    assert advised.batch_size < 8


def test_ranks_on_one_cpu_share_its_time(monkeypatch):
    asked = []

    def timed(shape, settings):
        asked.append(settings.ranks)
        return Timing(1.0, 1.0, 1.0, 5)

    monkeypatch.setattr("minilora.planning.advice.timed_step", timed)
    found = plan(batch_size=4, ranks=4, parallel="ddp", timed=True)
    assert set(asked) == {1}
    assert found.speed.step_seconds == 1.0


def test_the_best_that_fits_leaves_a_margin(machine):
    shape = Shape("small", SMALL, "here")
    data = advice.Data(10, 32, 32)
    whole = Planner(shape, data, MACHINE, {}, timed=False)
    settings = Settings(batch_size=64, length=32)
    local = this_machine(MACHINE)
    peak = whole.memory(settings, local).peak
    tight = dataclasses.replace(local, memory=int(peak / 0.9) + 2)
    assert whole.best(settings, tight).settings == settings
    tight = dataclasses.replace(local, memory=int(peak / 0.9) - 2)
    assert whole.best(settings, tight).settings.batch_size == 32
    none = whole.best(settings, dataclasses.replace(local, memory=10**6))
    assert not none.fits
    assert (none.settings.format, none.settings.batch_size) == ("nf4", 1), "what needs the least"
    two = dataclasses.replace(settings, ranks=2, parallel="ddp")
    assert not whole.fits(whole.memory(two, local), two, tight), "two processes share one memory"


def test_other_settings_are_scaled_from_the_timed_ones(monkeypatch):
    shape, data = Shape("small", SMALL, "here"), advice.Data(10, 32, 32)
    timing = Timing(3.0, 2.9, 3.1, 5)
    monkeypatch.setattr("minilora.planning.advice.timed_step", lambda *_: timing)
    planner = Planner(shape, data, MACHINE, {})
    settings, local = Settings(batch_size=4, length=32), this_machine(MACHINE)
    first = planner.option(settings, local).speed
    assert (first.step_seconds, first.how, first.timing) == (3.0, "timed here", timing)
    more = planner.option(dataclasses.replace(settings, batch_size=8), local).speed
    assert more.how == "scaled from the timed"
    assert 3.0 < more.step_seconds < 9.0
    assert planner.option(settings, local).speed == first
    other = planner.option(dataclasses.replace(settings, format="nf4"), local).speed
    assert other.how == "timed here", "each format is timed once"


def parsed(words):
    """The options of a command line by their plain names."""
    read = vars(build_parser().parse_args(words)).items()
    known = {"r": 8, "parallel": None} | {key.rpartition(".")[2]: value for key, value in read}
    return types.SimpleNamespace(**known)


def test_the_command_is_one_that_train_takes():
    shape = Shape("smollm2-135m", SMALL, "here", stored=True)
    settings = Settings(
        "nf4", torch.float32, 4, ["q_proj", "v_proj"], ["0"], 2, 4, 32, True, 0.1, 2, "ddp", 32
    )
    text = command(shape, settings, advice.Data(10, 32, 32, 2.5), DEVICES["epyc-7763"])
    words = shlex.split(text)
    started = torchrun().parse_args(words[1:])
    assert (started.nproc_per_node, started.training_script) == ("2", "minilora")
    options = parsed(started.training_script_args)
    assert (options.model, options.quantize, options.block_size) == ("smollm2-135m", "nf4", 32)
    assert (options.r, options.batch_size, options.accumulate) == (4, 2, 4)
    assert (options.max_length, options.epochs, options.dtype) == (32, 2.5, "float32")
    assert options.checkpointing
    assert options.targets == ["q_proj", "v_proj"]
    assert (options.exclude, options.dropout, options.parallel) == (["0"], 0.1, "ddp")
    preset = command(
        Shape("llama-2-7b", SMALL, ""), Settings(), advice.Data(1, 2, 2), DEVICES["rtx-4090"]
    )
    assert preset.startswith("minilora train path/to/llama-2-7b --data train.jsonl --out out/v1")


@pytest.mark.parametrize("device", ["here", *DEVICES])
@pytest.mark.parametrize("model", ["gpt2", "llama-2-7b", "llama-2-70b"])
def test_every_command_is_parsed_by_who_gets_it(model, device):
    found = plan(model, 30_000, length=1024, device=device)
    options = [found.advice.option, *found.options]
    for option in options:
        words = shlex.split(command(found.shape, option.settings, found.data, option.device))
        if words[0] == "torchrun":
            words = ["minilora", *torchrun().parse_args(words[1:]).training_script_args]
        read = parsed(words[1:])
        assert read.device == ("cuda" if option.device.gpu else "auto")
        assert (read.r, read.parallel) == (option.settings.r, option.settings.parallel)


def test_it_is_said_of_a_model_that_is_read_through_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPTNeoConfig(
        vocab_size=99, hidden_size=64, num_layers=2, num_heads=4, intermediate_size=64,
        attention_types=[[["global", "local"], 1]], architectures=["GPTNeoForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    found = plan(tmp_path, device="rtx-4090")
    assert found.advice.command.startswith("minilora train")
    assert "transformers' own model is trained: gpt_neo is not built" in str(found)
    assert "own model" not in str(plan("mistral-7b-v0.3", device="rtx-4090"))


def test_rows_of_other_machines_compute_in_what_is_fastest_there(machine):
    slow = {"float32": 90e9, "bfloat16": 23e9, "float16": 23e9, "int8": 0.0}
    machine(rates=slow, integer=None)
    found = plan("tinyllama-1.1b", device="rtx-4090")
    dtypes = {one.device.name: one.settings.dtype for one in found.options}
    assert dtypes["here"] == dtypes["epyc-7763"] == torch.float32
    assert dtypes["rtx-4090"] == torch.bfloat16
    local = next(one for one in found.options if one.device.name == "here")
    alone = next(one for one in plan("tinyllama-1.1b").options if one.settings == local.settings)
    assert local.speed == alone.speed, "whatever machine was asked for"
    asked = plan("tinyllama-1.1b", device="rtx-4090", dtype="bfloat16")
    assert {one.settings.dtype for one in asked.options} == {torch.bfloat16}


def test_cost_over_machines_has_a_bottom():
    prices = {"here": 0.1, "rtx-4090": 0.4, "a100-80gb": 1.6, "h100-80gb": 2.5, "8xa100-80gb": 13.0}
    found = plan("tinyllama-1.1b", 5000, length=512, prices=prices)
    assert "Over machines cost is U-shaped" in str(found)
    paid = {one.device.name: one.cost for one in found.options if one.cost is not None}
    least = min(paid, key=paid.get)
    assert f"the least is at {least}" in str(found)
    assert least not in ("here", "8xa100-80gb")
    assert "Over machines" not in str(plan("tinyllama-1.1b"))


def test_no_bottom_is_claimed_where_there_is_none():
    asked = dict.fromkeys(("rtx-4090", "a100-80gb", "h100-80gb"), 1.0)
    text = str(plan("tinyllama-1.1b", 5000, length=512, prices=asked))
    assert "cost is least at the fastest that is compared, h100-80gb" in text
    assert "U-shaped" not in text


def test_machines_that_are_too_small_have_a_row():
    found = plan("llama-2-70b", 1000, length=512)
    small = next(one for one in found.options if one.device.name == "rtx-4090")
    assert not small.fits
    assert (small.settings.format, small.settings.checkpointing) == ("nf4", True)
    assert small.settings.batch_size == 1
    assert small.memory.peak > small.device.memory
    line = next(line for line in str(found).splitlines() if "rtx-4090" in line)
    assert line.split()[-4:] == ["no", "–", "–", "–"]


def test_what_the_command_refuses_is_not_advised():
    shape = Shape("small", SMALL, "here")
    planner = Planner(shape, advice.Data(10, 32, 32), MACHINE, {}, timed=False)
    settings = Settings("nf4", batch_size=8, length=32, ranks=8, parallel="fsdp")
    sharded = planner.option(settings, DEVICES["8xa100-80gb"])
    assert sharded.fits
    assert advice.advise(planner, [sharded]).option is None
    plain = planner.option(dataclasses.replace(settings, format=None), DEVICES["8xa100-80gb"])
    assert advice.advise(planner, [sharded, plain]).option is plain


def test_other_work_on_the_machine_is_told(machine):
    assert "Other work" not in str(plan())
    machine(busy=0.63)
    assert "Other work took 63% of the processor while this was measured" in str(plan())
    assert plan().to_dict()["busy"] == 0.63
    assert "Other work" not in str(plan(device="rtx-4090"))


def test_a_run_costs_its_hours_at_the_price():
    found = plan(device="rtx-4090", prices=0.01)
    assert "Cost: under 0.01" in str(found)
    assert found.cost == pytest.approx(0.01 * found.speed.hours)
    assert json.loads(json.dumps(found.to_dict()))["cost"] == found.cost
    assert plan().cost is None
    here = plan(device="cpu", prices={"cpu": 0.5})
    assert here.cost == pytest.approx(0.5 * here.speed.hours) == plan(prices=0.5).cost
    for price in (-1, float("nan"), "3", True):
        with pytest.raises(ValueError, match="the price of an hour on rtx-4090 must be at least 0"):
            plan(device="rtx-4090", prices=price)


def test_examples_are_measured():
    rows = [Example([1] * n, [1] * n) for n in (3, 5, 40)]
    found = plan(data=rows, length=None)
    assert (found.data.examples, found.data.mean, found.data.longest) == (3, 40, 40), "padded"
    assert plan(data=rows, length=None, batch_size=1).data.mean == 16
    assert found.settings.length == 40
    assert plan(data=rows, length=4).data == advice.Data(3, 4, 4, 20.0, 8 / 9)
    assert plan(data=rows).data.longest == 32


def test_a_block_size_is_of_the_formats_that_have_one():
    """Of those that are compared with what was asked, too."""
    for asked in ("nf4", None):
        found = {one.settings.format: one.memory for one in plan(quantize=asked).options}
        wide = {
            one.settings.format: one.memory for one in plan(quantize=asked, block_size=128).options
        }
        assert found["int8"].scales == wide["int8"].scales > 0
        assert found["nf4"].scales > wide["nf4"].scales > 0


def test_what_is_learned_decides_the_heads_time():
    rows = [Example([1] * 20, [-100] * 15 + [1] * 5)] * 8
    some, all_of_it = plan(data=rows), plan(data=[Example([1] * 20, [1] * 20)] * 8)
    assert some.data.learned == pytest.approx(5 / 19)
    assert some.speed.step_seconds < all_of_it.speed.step_seconds
    with pytest.raises(ValueError, match="no example has anything to learn within length=15"):
        plan(data=rows, length=15)


def test_timings_that_disagree_are_told(monkeypatch):
    for high, told in ((3.2, False), (4.5, True)):
        monkeypatch.setattr(
            "minilora.planning.advice.timed_step", lambda *_, high=high: Timing(3.0, 2.9, high, 15)
        )
        text = str(plan(timed=True))
        assert f"Time: 3 s a step (2.9 to {high} in the middle half of 15 repeats), " in text
        assert ("timings disagree by a factor of 1.6 (above 1.25) after 15" in text) == told
        assert json.dumps(plan(timed=True).to_dict())


def test_passes_over_the_data_are_those_that_training_makes():
    found = plan(data=40)
    assert (found.data.epochs, found.speed.steps) == (20, 100)
    assert "--epochs 20" in found.advice.command
    assert plan(data=40, accumulate=5, batch_size=1).speed.steps == 104
    assert plan(data=5000).data.epochs == 1


def test_it_prints_and_is_json():
    found = plan(prices=0.5, epochs=2)
    text = str(found)
    for part in ("Memory of each process at the peak", "peak", "Time:", "Rules of thumb",
                 "1 GB per 1B", "70B in 14 GB", "7B in 3.5 GB", "Options", "Advice",
                 "minilora train", "Cost: "):  # fmt: skip
        assert part in text
    told = json.loads(json.dumps(found.to_dict()))
    assert told["memory"]["peak"] == found.memory.peak
    assert told["settings"]["dtype"] == "bfloat16"
    assert len(told["options"]) == len(found.options)
    named = plan("gpt2", device="rtx-4090", targets=["c_attn"])
    assert "taking 40% of peak" in str(named)
    assert json.dumps(named.to_dict())


def test_auto_is_what_is_fastest_there(machine):
    assert best_dtype(DEVICES["epyc-7763"]) == torch.float32
    assert best_dtype(DEVICES["rtx-4090"]) == torch.bfloat16
    machine(rates={"float32": 90e9, "bfloat16": 23e9, "float16": 23e9, "int8": 0.0}, integer=None)
    assert plan().settings.dtype == torch.float32
    assert plan(dtype="bfloat16").settings.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"model": "llama2-7b"}, "nearest: llama-2-7b"),
        ({"device": "rtx4090"}, "device must be .* or one of .*; nearest: rtx-4090"),
        ({"data": 0}, "data must be a whole number of .*, found 0"),
        ({"data": -5}, "data must be a whole number of .*, found -5"),
        ({"data": []}, "data must hold at least one example, found none"),
        ({"length": 0}, "length must be a whole number of .*, found 0"),
        ({"length": 1}, "length must be at least 2, as a row's first token is never learned"),
        ({"ranks": 9, "parallel": "ddp"}, "must be at least ranks, found batch_size=8 and ranks=9"),
        ({"epochs": -1}, "epochs must be a finite number above 0, found -1"),
        ({"batch_size": -8}, "batch_size must be a whole number of .*, found -8"),
        ({"r": 64}, "r=64 is above what .*k_proj can use"),
        ({"length": 65}, "length must fit the context"),
        ({"quantize": "int5"}, "format must be one of"),
        ({"quantize": "int8", "block_size": 32}, "block_size acts on format='nf4' or 'int4' alone"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), found 1.0"),
        ({"memory_gb": 0}, "memory_gb must be a number above 0, found 0"),
        ({"device": "rtx-4090", "ranks": 2, "parallel": "ddp"}, "rtx-4090 has 1 GPUs, found ran"),
        ({"prices": {"rtx-4091": 1}}, "device must be 'auto', .*found 'rtx-4091'"),
        ({"dtype": "int8"}, "dtype must be a floating-point torch dtype"),
    ],
)  # fmt: skip
def test_bad_input_is_named(options, match):
    with pytest.raises(ValueError, match=match):
        plan(**options)


def test_memory_can_be_given():
    found = plan(memory_gb=0.1)
    assert not any(one.fits for one in found.options if one.device.name == "here")
    assert "do not fit into 0.1 GB here" in found.advice.why
    found = plan(memory_gb=0.1, device="rtx-4090")
    memory = [one.device.memory for one in found.options if one.device.name == "rtx-4090"]
    assert memory == [10**8] * len(memory)


def rules(name, **options):
    shape, settings = read_shape(name), Settings(**options)
    return rules_of_thumb(shape, settings, count_memory(shape, settings, gpu=True))


def test_what_the_rules_say_and_what_is():
    memory, lora, nf4 = rules("llama-2-70b", r=16, batch_size=1)
    assert lora.says == pytest.approx(14e9, rel=0.02)
    assert lora.computed > 138e9
    assert "frozen weights: these stay" in str(lora)
    assert memory.says == pytest.approx(1.2 * 69e9, rel=0.01)
    assert memory.computed > memory.says
    seven = rules("llama-2-7b")[2]
    assert seven.says == pytest.approx(3.4e9, rel=0.02)
    assert 3.8e9 < seven.computed < 4.1e9
    assert nf4.computed > nf4.says


def test_a_small_model_is_mostly_not_weights():
    first = rules("smollm2-135m", length=256)[0]
    assert first.computed > 5 * first.says
