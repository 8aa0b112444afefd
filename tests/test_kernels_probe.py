"""The hardware probe: what it reports, how it decides, what it refuses. No test reads a clock."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minilora.kernels import hardware

module = importlib.import_module("minilora.kernels.probe")


def test_hardware_reports_this_machine_and_is_probed_once():
    found = hardware()
    assert found is hardware()
    assert isinstance(found, module.Hardware)
    assert (found.device, found.threads) == ("cpu", torch.get_num_threads())
    assert min(found.float32, found.bfloat16) > 0
    assert found.int8 >= 0
    assert found.dtype in (torch.float32, torch.bfloat16)
    assert set(found.flags) <= set(module._FLAGS)
    for part in (found.name, "GFLOP/s", f"dtype auto = {str(found.dtype)[6:]}"):
        assert part in str(found)


@pytest.mark.parametrize(
    ("float32", "bfloat16", "dtype"),
    [
        (93.0, 23.0, torch.float32),  # AVX2: bf16 is emulated
        (100.0, 120.0, torch.float32),  # not enough to give up half the mantissa
        (100.0, 126.0, torch.bfloat16),
        (100.0, 900.0, torch.bfloat16),  # AMX
    ],
)
def test_hardware_picks_the_dtype_that_was_measured_fastest(monkeypatch, float32, bfloat16, dtype):
    rates = {torch.float32: float32, torch.bfloat16: bfloat16, torch.int8: 7.0}
    monkeypatch.setattr(module, "_rate", lambda multiply, left, right: rates[right.dtype])
    found = hardware.__wrapped__()
    assert (found.float32, found.bfloat16, found.int8) == (float32, bfloat16, 7.0)
    assert found.dtype is dtype


@pytest.mark.parametrize("way", ["int8", "blocks", None])
def test_the_integer_rate_is_of_the_product_that_layers_use(monkeypatch, way):
    """That of bytes in blocks takes rows of floats, `_int_mm` takes int8 on both sides."""
    monkeypatch.setattr(module, "integer_way", lambda: way)
    rates = {torch.float32: 1.0, torch.bfloat16: 1.0, torch.int8: 7.0}
    monkeypatch.setattr(module, "_rate", lambda multiply, left, right: rates[left.dtype])
    assert hardware.__wrapped__().int8 == (1.0 if way == "blocks" else 7.0)


def test_hardware_reports_no_rate_where_int8_cannot_run(monkeypatch):
    def rate(multiply, left, right):
        if right.dtype == torch.int8:
            raise RuntimeError("not built for this platform")
        return 1.0

    monkeypatch.setattr(module, "_rate", rate)
    assert hardware.__wrapped__().int8 == 0.0


def test_rate_counts_the_operations_of_the_product(monkeypatch):
    clock = iter([0.0, 0.0, 0.0, 2.0, 1.0])  # stop, while, start, end, while: one run of 2 s
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))
    left, right = torch.ones(10, 100), torch.ones(100, 1000)
    assert module._rate(torch.mm, left, right) == pytest.approx(2 * 10 * 100 * 1000 / 2 / 1e9)


def test_hardware_reads_flags_by_whole_words(tmp_path, monkeypatch):
    text = "processor: 0\nmodel name\t: Some CPU: fast\nflags\t\t: fpu avx2 avx512fx amx_int8\n"
    file = tmp_path / "cpuinfo"
    file.write_text(text)
    monkeypatch.setattr(module, "Path", lambda _: file)
    assert module._cpu_name_and_flags() == ("Some CPU: fast", ("avx2", "amx_int8"))


def test_hardware_works_without_cpuinfo(monkeypatch):
    monkeypatch.setattr(module, "Path", lambda _: Path("no") / "such" / "file")
    name, flags = module._cpu_name_and_flags()
    assert name
    assert flags == ()


def test_hardware_refuses_unknown_and_missing_devices(monkeypatch):
    with pytest.raises(ValueError, match="device must be 'auto', .*, found 'tpu'"):
        hardware("tpu")
    with pytest.raises(ValueError, match=r"hardware\(\) knows 'auto', .*, found 'meta'"):
        hardware("meta")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="needs a GPU that torch can use, found none"):
        hardware.__wrapped__("cuda")


_COMPUTED = """
import hashlib, sys, torch
torch.set_default_dtype(getattr(torch, sys.argv[1]))
import minilora
from minilora.kernels import DYNAMIC_CODE
from minilora.lora import mixed
from torch import nn

found = hashlib.sha256()

def note(*tensors):
    for one in tensors:
        stored = one.detach().contiguous().view(torch.uint8).numpy().tobytes()
        found.update(f"{one.dtype}{list(one.shape)}".encode() + stored)

def net():
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(64, 64, dtype=torch.float32) for _ in range(3)))

x = torch.linspace(-2, 2, 3 * 64, dtype=torch.float32).reshape(3, 64)
note(DYNAMIC_CODE)
for format in ("nf4", "int4", "int8"):
    model = net()
    minilora.quantize(model, format)
    note(*model.state_dict().values(), model[0].dequantize(torch.bfloat16), model(x))
for options in ({"init": "orthogonal"}, {"init": "olora"}, {"dora": True}, {"lora_bias": True}):
    model = net()
    torch.manual_seed(1)
    minilora.inject(model, r=4, **options)
    minilora.inject(model, r=2, adapter="b")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    if "init" in options:
        pair = {"default": 0.5, "b": 1.0}
        minilora.combine(model, pair, "c", method="dare_linear_svd", r=4, density=0.5, seed=3)
    with mixed(model.eval(), ["default", "b", "base"]):
        note(*model.state_dict().values(), model(x))
print(found.hexdigest(), minilora.hardware().dtype)
"""


def test_the_default_dtype_decides_nothing():
    """Three processes, as tables are made at import: some ten seconds."""
    told = {
        name: subprocess.run(
            [sys.executable, "-c", _COMPUTED, name],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        for name in ("float32", "bfloat16", "float64")
    }
    said = {name: one.stdout or one.stderr[-800:] for name, one in told.items()}
    assert len(set(said.values())) == 1, said
