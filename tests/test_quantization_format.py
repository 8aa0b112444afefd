"""What it takes to add a storage format: one class, and one line in `options.FORMATS`."""

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from torch import nn

import minilora
from minilora.kernels import scales_from_bits
from minilora.kernels.triton import uncovered
from minilora.loading.model import load_model
from minilora.loading.saving import save_pretrained
from minilora.models import Llama, LlamaConfig
from minilora.planning.memory import Settings, count_memory
from minilora.planning.shapes import read_shape
from minilora.quantization import FORMATS, quantized_layers
from minilora.quantization.format import Format, bits_of

WIDTHS = LlamaConfig(260, 32, 48, 2, 4, 2, 8, 64)
IDS = torch.arange(20).view(2, 10)


class FP8(Format):
    """A scale for each row; stored as bytes, so that no cast of a module reaches them."""

    def layout(self, spec, N, K):
        return {"codes": ((N, K), torch.uint8), "scale_bits": ((N,), torch.int32)}

    def encode(self, weight, spec):
        wide = weight.float()
        scales = wide.abs().amax(1).div(448).clamp(min=1e-37)
        codes = (wide / scales[:, None]).to(torch.float8_e4m3fn)
        return {"codes": codes.view(torch.uint8), "scale_bits": bits_of(scales)}

    def decode(self, parts, spec, shape, dtype):
        codes, bits = parts
        values = codes.view(torch.float8_e4m3fn).float() * scales_from_bits(bits)[:, None]
        return values.to(dtype)


@pytest.fixture(autouse=True)
def fp8(monkeypatch):
    monkeypatch.setitem(FORMATS, "fp8", FP8())


def model():
    torch.manual_seed(0)
    return Llama(WIDTHS).eval()


def test_a_new_format_is_multiplied_trained_and_merged():
    plain, small = model(), minilora.quantize(model(), "fp8")
    assert "format=fp8" in repr(small)
    error = (small(IDS) - plain(IDS)).norm() / plain(IDS).norm()
    assert 0 < error < 0.1
    minilora.inject(small, r=2, alpha=3)
    optimizer = torch.optim.SGD([p for p in small.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(3):
        loss = nn.functional.cross_entropy(small(IDS[:, :-1]).flatten(0, 1), IDS[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    before = small(IDS)
    minilora.merge(small, mode="dequantize")
    torch.testing.assert_close(small(IDS), before, rtol=1e-4, atol=1e-4)


def test_a_new_format_is_written_and_read(tmp_path):
    small = minilora.quantize(model(), "fp8")
    save_pretrained(small, tmp_path / "small", byte_tokenizer())
    read, _ = load_model(tmp_path / "small", dtype=torch.float32)
    assert torch.equal(read(IDS), small(IDS))
    save_pretrained(model(), tmp_path / "plain", byte_tokenizer())
    read, _ = load_model(tmp_path / "plain", "fp8", dtype=torch.float32)
    assert torch.equal(read(IDS), small(IDS))


def test_a_new_format_is_planned():
    sizes = {format: minilora.lora.sizes(model(), format).base for format in ("fp8", "int8", "nf4")}
    assert sizes["fp8"] == sizes["int8"] > sizes["nf4"]
    shape = read_shape("smollm2-135m")
    memory = {format: count_memory(shape, Settings(format=format)) for format in ("fp8", "int8")}
    assert memory["fp8"].codes == memory["int8"].codes > 0
    assert memory["fp8"].backward < memory["int8"].backward  # no integers are multiplied


def test_quantize_takes_the_options_as_one_value():
    one = minilora.quantize(model(), minilora.Quantization("nf4", 32, double_quant=False))
    other = minilora.quantize(model(), "nf4", block_size=32, double_quant=False)
    assert [m.spec for m in quantized_layers(one).values()] == [
        m.spec for m in quantized_layers(other).values()
    ]
    assert torch.equal(one(IDS), other(IDS))
    with pytest.raises(ValueError, match="one by one or in a Quantization, found .* beside it"):
        minilora.quantize(model(), minilora.Quantization("nf4"), block_size=32)
    with pytest.raises(ValueError, match="compute acts on format='int8' or 'int4' alone"):
        minilora.quantize(model(), minilora.Quantization("nf4"), compute="dequantize")


def test_a_new_format_has_no_kernels_on_triton():
    (layer,) = minilora.quantize(nn.Sequential(nn.Linear(64, 32)), "fp8")
    assert uncovered(layer.frozen()) == "there are no kernels for a base stored like this"
