"""Products of quantized layers on CUDA by backend="torch": decoded in one launch, then torch's own.

Where there is no GPU, `decodes` is told that kernels run on the CPU, as the interpreter's do.
"""

import dataclasses

import pytest
import torch
from small_models import read_by
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from triton_cases import DEVICE, DTYPES, assert_as_exact, needs_kernels, operand

needs_kernels()

import minilora  # noqa: E402
from minilora.kernels import decoding, scales_from_bits  # noqa: E402
from minilora.kernels.triton.launch import Launch  # noqa: E402
from minilora.quantization import Quantization  # noqa: E402
from minilora.quantization.linear import QuantizedLinear  # noqa: E402

FORMATS = {
    "int8": Quantization("int8"),
    "nf4": Quantization("nf4", 64, True),
    "nf4 f32 scales": Quantization("nf4", 32, False),
    "int4": Quantization("int4", 32),
}


@pytest.fixture(autouse=True)
def kernels_run_here(monkeypatch):
    monkeypatch.setattr(decoding, "runs_on", lambda device: True)


def as_in_torch(monkeypatch):
    monkeypatch.setattr(decoding, "runs_on", lambda device: False)


def stored(name, n, k, **how):
    how = how or {"compute": "dequantize", "grad_compute": "dequantize"}
    spec = dataclasses.replace(FORMATS[name], **read_by(FORMATS[name].format, **how))
    return QuantizedLinear.from_weight(operand(n, k, scale=k**-0.5), spec, bias=operand(n))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "n", "k"),
    [(name, *shape) for name in FORMATS for shape in ((1, 64), (70, 192))]
    + [("int8", 5, 7), ("nf4", 5, 7), ("nf4", 9, 50), ("nf4 f32 scales", 300, 70)],
)
@pytest.mark.usefixtures("nan_memory")
def test_both_products_are_of_the_decoded_weight(monkeypatch, dtype, name, n, k):
    layer = stored(name, n, k)
    tensors, forward, grad_x, how = layer.frozen()
    x, G = operand(33, k, dtype=dtype), operand(33, n, dtype=dtype)
    W = decoding.decoded(x, layer.parts, how.format, n, k, how.block)
    exact = layer.dequantize(torch.float32)  # by torch
    assert_as_exact(W, exact.double(), exact.to(dtype))
    y = torch.nn.functional.linear(x, W, layer.bias.to(dtype))
    torch.testing.assert_close(forward(x, *tensors), y, rtol=0, atol=0)
    torch.testing.assert_close(grad_x(G, *tensors), G @ W, rtol=0, atol=0)


class Calls(TorchDispatchMode):
    """Lists operators that are no views, and launches, which are not run."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.seen = []
        launched = lambda launch: self.seen.append(launch.kernel.fn.__name__)  # noqa: E731
        monkeypatch.setattr(Launch, "run", launched)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and func._schema.name != "aten::detach":
            self.seen.append(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("name", FORMATS)
def test_a_product_is_one_launch_and_one_call(monkeypatch, name, rows):
    """With 1 row as in generation; the tables of NF4 lie on the device by then."""
    layer = stored(name, 64, 128).requires_grad_(False).eval()
    x, G = operand(rows, 128), operand(rows, 64)
    kernel = f"decode_{name.split()[0]}"
    with torch.no_grad():
        layer(x)
        tensors, _, grad_x, _ = layer.frozen()
        with Calls(monkeypatch) as calls:
            layer(x)
            grad_x(G, *tensors)
    assert calls.seen == ["empty", kernel, "addmm", "empty", kernel, "mm"]


def test_few_rows_asked_to_be_integers_are_decoded_too(monkeypatch):
    layer = stored("int4", 64, 128, compute="int8")
    x = operand(5, 128)
    monkeypatch.setattr("minilora.kernels.int8._can_multiply", lambda *sizes: False)
    with torch.no_grad(), Calls(monkeypatch) as calls:
        layer.frozen().linear_forward(x, *layer.frozen().tensors)
    assert calls.seen == ["empty", "decode_int4", "addmm"]


def gradients(model, x):
    x = x.detach().clone().requires_grad_()
    y = model(x)
    trained = [p for p in model.parameters() if p.requires_grad]
    return [y.detach(), *torch.autograd.grad(y.float().square().mean(), [x, *trained])]


def adapted(shake, format):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8, bias=False)).to(DEVICE)
    how = read_by(format, compute="dequantize", grad_compute="dequantize")
    minilora.quantize(model, format, targets=["0", "2"], **how)
    minilora.inject(model, r=5, alpha=8, targets=["0", "2"], exclude=[])
    return shake(model)


@pytest.mark.parametrize("format", ["int8", "nf4", "int4"])
def test_adapted_layers_match_those_that_torch_decodes(monkeypatch, shake, format):
    model, x = adapted(shake, format), torch.randn(2, 7, 64, device=DEVICE)
    found = gradients(model, x)
    graphs = []

    def seen(graph, inputs):
        graphs.append(graph.print_readable(print_output=False))
        return graph

    compiled = gradients(torch.compile(model, fullgraph=True, backend=seen), x)
    assert [text.count("minilora.decoded_weight") for text in graphs] == [4]  # forward and backward
    assert {m.last_path for m in model.modules() if hasattr(m, "last_path")} == {"fused"}
    as_in_torch(monkeypatch)
    expected = gradients(model, x)
    for a, b, c in zip(found, compiled, expected, strict=True):
        torch.testing.assert_close(a, c, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(b, c, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", FORMATS)
def test_second_derivatives_are_those_of_the_decoded_weight(name):
    layer, x = stored(name, 16, 64), operand(3, 64).requires_grad_()
    W = layer.dequantize(torch.float32)

    def curvature(product):
        (grad,) = torch.autograd.grad(torch.tanh(product(x)).sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), x)[0]

    expected = curvature(lambda x: torch.nn.functional.linear(x, W, layer.bias))
    torch.testing.assert_close(curvature(layer), expected, rtol=1e-4, atol=1e-5)


def test_the_operator_passes_torchs_own_checks():
    for name in FORMATS:
        layer = stored(name, 30, 64)
        how = layer.frozen().stored
        torch.library.opcheck(
            torch.ops.minilora.decoded_weight.default,
            (list(layer.parts), how.format, 30, 64, how.block, operand(3, 64)),
            test_utils=["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"],
        )


def test_float64_is_decoded_by_torch(monkeypatch):
    layer, x = stored("int8", 16, 64), operand(3, 64).double()
    monkeypatch.setattr(Launch, "run", None)
    codes, bits = layer.parts
    W = codes.double() * scales_from_bits(bits).double()[:, None]
    expected = x @ W.t() + layer.bias
    torch.testing.assert_close(layer(x), expected)


def test_a_device_is_asked_once_whether_kernels_run(monkeypatch):
    monkeypatch.undo()
    asked = []
    monkeypatch.setattr(decoding, "_usable", {})
    monkeypatch.setattr("minilora.kernels.triton.problem", asked.append)
    gpu = torch.device("cuda", 0)
    assert [decoding.runs_on(gpu) for _ in range(3)] == [True] * 3
    assert asked == [gpu]
    assert not decoding.runs_on(torch.device("cpu"))  # kernels that are interpreted are slow
    assert not decoding.runs_on(torch.device("meta"))
    assert asked == [gpu]
