"""The whole path on a CUDA device: load, quantize, train, resume, generate, merge, explain.

Skipped where torch sees none; `test_devices.py` holds what can be held without one.
"""

import dataclasses
import json
import warnings

import pytest
import torch
from small_models import read_by
from test_cli import ROWS, tiny_folder
from training_models import CONFIG, examples, factors, fit

import minilora
from minilora.cli.command import main
from minilora.kernels import fastest_dtype, hardware, resolve_device
from minilora.lora import lora_layers
from minilora.models import Llama
from minilora.training.state import load_state

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

FORMATS = [None, "int8", "nf4", "int4"]


@pytest.fixture
def folder(tmp_path):
    return tiny_folder(tmp_path / "model")


def on_gpu(model):
    places = {tensor.device.type for tensor in (*model.parameters(), *model.buffers())}
    assert places == {"cuda"}


def made(format=None, **options):
    """A small model with an adapter on the GPU; what it draws is the CPU's."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "head_dim": 8}
    model = Llama(dataclasses.replace(CONFIG, **shape))
    model.lm_head.weight.data.mul_(20)  # as drawn, no adapter could move the loss much
    if format is not None:
        minilora.quantize(model, format, **read_by(format, block_size=32))
    return minilora.inject(model, r=4, alpha=6, **options).to("cuda")


def test_the_device_is_found():
    assert resolve_device("auto").type == "cuda"
    found = hardware("cuda")
    assert found.memory > 10**9 and found.bandwidth > 10
    assert min(found.float32, getattr(found, str(found.dtype).removeprefix("torch."))) > 100
    assert found.dtype == fastest_dtype(torch.device("cuda", 0))
    with pytest.raises(ValueError, match=r"'cuda:99' must be one of the \d+ GPUs here"):
        resolve_device("cuda:99")


@pytest.mark.parametrize("format", ["int8", "nf4"])
def test_loading_puts_weights_there_and_quantizes_them_there(folder, format):
    model, _ = minilora.load_model(folder, format)
    on_gpu(model)
    cpu, _ = minilora.load_model(folder, format, dtype=torch.float32, device="cpu")
    gpu, _ = minilora.load_model(folder, format, dtype=torch.float32)
    for name, value in cpu.state_dict().items():
        assert torch.equal(value, gpu.state_dict()[name].cpu()), name


@pytest.mark.parametrize("format", FORMATS)
def test_decoded_weights_are_the_cpus(format):
    for name, layer in lora_layers(made(format)).items():
        here = layer.base.weight
        there = lora_layers(made(format).cpu())[name].base.weight
        torch.testing.assert_close(here.cpu(), there, rtol=0, atol=0)


@pytest.mark.parametrize("format", FORMATS)
def test_a_run_equals_the_cpus_and_repeats(format):
    valid = examples(5, seed=1)
    runs = [fit(made(format), valid=valid, max_steps=4, accumulate=2).losses for _ in range(2)]
    assert runs[0] == runs[1]
    cpu = made(format).cpu()
    if format is None:
        losses = fit(cpu, valid=valid, max_steps=4, accumulate=2).losses
        assert runs[0] == pytest.approx(losses, rel=1e-4)


@pytest.mark.parametrize("options", [{}, {"dropout": 0.3}], ids=str)
def test_a_resumed_run_has_the_same_bits(tmp_path, options):
    whole = made(**options)
    fit(whole, max_steps=6, out=tmp_path / "whole")
    part = made(**options)
    fit(part, max_steps=3, schedule="constant", out=tmp_path / "part")
    again = made(**options)
    fit(again, max_steps=6, schedule="constant", out=tmp_path / "part", resume=True)
    on_gpu(again)
    straight = made(**options)
    fit(straight, max_steps=6, schedule="constant")
    for name, value in factors(straight).items():
        assert torch.equal(value, factors(again)[name]), name
    assert {t.device.type for t in load_state(tmp_path / "part")[0].values()} == {"cpu"}


def test_random_streams_are_left_as_they_were():
    model = made(dropout=0.5)
    torch.cuda.manual_seed(5)
    before = torch.cuda.get_rng_state()
    fit(model, max_steps=2)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_bases_train(dtype):
    model = made().to(dtype)
    for layer in lora_layers(model).values():
        layer.adapters.float()
    result = fit(model, max_steps=20, lr=1e-2, dtype="auto")
    assert result.losses[-1] < result.losses[0] and not result.skipped


def test_a_step_that_does_not_fit_is_split():
    limit = torch.cuda.get_device_properties(0).total_memory
    model = made()
    try:
        base = torch.cuda.memory_reserved()
        torch.cuda.set_per_process_memory_fraction((base + 2**20) / limit)
        with pytest.raises(RuntimeError, match=r"one row of .* must fit in memory, and on cuda"):
            fit(model, [{"input_ids": [1] * 2000, "labels": [1] * 2000}], max_steps=1)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_text_is_the_cpus(folder):
    cpu, tokenizer = minilora.load_model(folder, dtype=torch.float32, device="cpu")
    gpu, _ = minilora.load_model(folder, dtype=torch.float32)
    prompts = ["a b c", "d"]
    for settings in ({}, {"temperature": 0.7, "seed": 3}):
        texts = [
            minilora.generate(model, prompts, tokenizer=tokenizer, max_new_tokens=8, **settings)
            for model in (cpu, gpu)
        ]
        assert texts[0] == texts[1]


def test_merging_is_undone_to_the_bit():
    model = made()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    minilora.merge(model)
    on_gpu(model)
    minilora.unmerge(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_command(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def run(*words):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            assert main([str(word) for word in words]) == 0
        return capsys.readouterr().out

    data = ("--data", "sums.jsonl", "--max-length", 32)
    train = (
        "train",
        folder,
        *data,
        "--out",
        "run",
        "--quantize",
        "nf4",
        "--block-size",
        32,
        "--dtype",
        "float32",
    )  # in bfloat16 some gradients of so small a model are 0
    run(*train, "--max-steps", 2, "--all-tokens", "--plan")
    run(*train, "--max-steps", 4, "--all-tokens", "--resume")
    for device in ("auto", "cuda:0", "cpu"):
        run("eval", folder, "--adapter", "run", *data, "--all-tokens", "--device", device)
    run("generate", folder, "a b", "--adapter", "run", "--max-new-tokens", 4)
    run("merge", folder, "--adapter", "run", "--out", "merged")
    run("quantize", folder, "--format", "int8", "--out", "small")
    run("explain", "run", "--data", "sums.jsonl", "--all-tokens", "--max-length", 32)
    assert "GPU here is the right choice" in run("plan", folder, "--untimed", "--max-length", 32)
