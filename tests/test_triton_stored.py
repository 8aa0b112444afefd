"""LoRA over quantized weights: every gradient, both ways to multiply, the layers that use it."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import read_by
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from triton_cases import DEVICE, DTYPES, assert_as_exact, needs_kernels, operand, seed_tensor

needs_kernels()

import minilora  # noqa: E402
from minilora.kernels import quantize_rows, triton_lora_linear  # noqa: E402
from minilora.kernels.dropout import hashed_mask  # noqa: E402
from minilora.kernels.triton import _product, dynamic_table_on, nf4_table_on  # noqa: E402
from minilora.quantization import Quantization  # noqa: E402
from minilora.quantization.linear import QuantizedLinear  # noqa: E402

NAMES = ["y", "grad_x", "grad_A", "grad_B"]
FORMATS = {
    "int8": Quantization("int8"),
    "nf4": Quantization("nf4", 64, True),
    "nf4 f32 scales": Quantization("nf4", 32, False),
    "int4": Quantization("int4", 32),
}


def stored(spec, n, k, dtype, compute, bias=True):
    weight = operand(n, k, scale=k**-0.5).to(dtype)
    spec = dataclasses.replace(spec, **read_by(spec.format, compute=compute, grad_compute=compute))
    return QuantizedLinear.from_weight(weight, spec, bias=operand(n, dtype=dtype) if bias else None)


def through_codes(x, matrix):
    """What `x @ matrix` is once rows of x are quantized, with exact sums."""
    codes, scales = quantize_rows(x.float())
    return scales.double() * (codes.double() @ matrix)


def exact_linear(x, W, bias, A, B, scaling, keep, G, way=lambda x, matrix: x.double() @ matrix):
    x64, A, B, G64 = (t.detach().double() for t in (x, A, B, G))
    y = way(x.detach(), W.t()) + scaling * (x64 * keep) @ A.t() @ B.t()
    y = y if bias is None else y + bias.double()
    grad_s = scaling * G64 @ B
    grad_x = way(G, W) + (grad_s @ A) * keep
    return y, grad_x, grad_s.t() @ (x64 * keep), scaling * G64.t() @ ((x64 * keep) @ A.t())


def plain_linear(x, W, bias, A, B, scaling, keep, G):
    """The same by ordinary torch ops and autograd, everything in x's dtype."""
    x, A, B = (t.detach().to(x.dtype).requires_grad_() for t in (x, A, B))
    y = torch.nn.functional.linear(x, W.to(x.dtype), bias)
    y = y + (x * keep.to(x.dtype)) @ A.t() @ B.t() * scaling
    y.backward(G)
    return y.detach(), x.grad, A.grad, B.grad


def compare(name, m, n, k, r, dtype, compute, p=0.0, bias=True):
    layer = stored(FORMATS[name], n, k, dtype, compute, bias)
    x = operand(m, k, dtype=dtype, layout="strided").requires_grad_()
    A = operand(r, k, scale=k**-0.5).to(dtype).requires_grad_()
    B = operand(n, r, scale=r**-0.5).to(dtype).requires_grad_()
    G = operand(m, n, dtype=dtype, layout="transposed")
    seed = seed_tensor(m=m) if p else None
    y = _product(x, layer.frozen(), A, B, 2.5, seed, p)
    y.backward(G)
    keep = torch.ones(m, k, dtype=torch.float64, device=DEVICE)
    if p:
        keep = hashed_mask(seed, m, k, p).double() / (1 - p)
    W = layer.dequantize(torch.float64 if name == "int8" else torch.float32).double()
    operands = (x, W, layer.bias, A, B, 2.5, keep, G)
    exact, plain = exact_linear(*operands), list(plain_linear(*operands))
    size = exact_linear(x.abs(), W.abs(), None, A.abs(), B.abs(), 2.5, keep, G.abs())
    if "int8" in (name, compute) and compute != "dequantize":  # torch's error: rounded rows
        c = layer.frozen().tensors[-2].view(torch.float32)
        codes = W / c.double()[:, None]

        def way(rows, matrix):
            if matrix.shape[0] == k:
                return through_codes(rows, matrix)
            return through_codes(rows.float() * c, codes)

        rounded = exact_linear(*operands, way=way)
        plain[:2] = [t.to(dtype) for t in rounded[:2]]
    for label, found, truth, other, s in zip(
        NAMES, (y.detach(), x.grad, A.grad, B.grad), exact, plain, size, strict=True
    ):
        assert_as_exact(found, truth, other, f"{name} {compute} {label}", s)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "compute"),
    [("int8", "auto"), ("int8", "dequantize"), ("nf4", "auto"), ("int4", "int8")],
)
@settings(max_examples=2)
@given(
    m=st.sampled_from([1, 9, 33]),
    n=st.sampled_from([1, 40]),
    blocks=st.sampled_from([1, 3]),
    r=st.sampled_from([1, 5, 17]),
    p=st.sampled_from([0.0, 0.25]),
    bias=st.booleans(),
)
@pytest.mark.usefixtures("nan_memory")
def test_lora_over_stored_weights_matches_float64(name, compute, dtype, m, n, blocks, r, p, bias):
    compare(name, m, n, 64 * blocks, r, dtype, compute, p, bias)


@pytest.mark.parametrize(
    ("name", "m", "compute"),
    [
        ("int4", 140, "auto"),
        ("int4", 20, "dequantize"),
        ("nf4 f32 scales", 20, "auto"),
        ("int8", 260, "auto"),  # so many rows that the codes are turned over
    ],
)
@pytest.mark.usefixtures("nan_memory")
def test_more_rows_match_float64(name, m, compute):
    compare(name, m, 70, 192, 4, torch.float16, compute, 0.1)


@pytest.mark.parametrize(("n", "k"), [(5, 7), (9, 50)])
def test_nf4_lines_that_end_within_a_byte_or_a_block_are_decoded_whole(n, k):
    compare("nf4", 3, n, k, 2, torch.float32, "auto")


def test_no_rows_give_zero_gradients():
    for spec in FORMATS.values():
        layer = stored(spec, 8, 64, torch.float16, "auto")
        x = operand(0, 64, dtype=torch.float16).requires_grad_()
        A, B = operand(2, 64).requires_grad_(), operand(8, 2).requires_grad_()
        y = _product(x, layer.frozen(), A, B, 1.0, None, 0.0)
        y.backward(torch.zeros_like(y))
        assert y.shape == (0, 8)
        assert A.grad.count_nonzero() == B.grad.count_nonzero() == 0


@pytest.mark.parametrize("compute", ["auto", "dequantize"])
def test_operators_pass_torchs_own_checks(compute):
    layer = stored(FORMATS["int8"], 30, 32, torch.float32, compute)
    x, A, B = (operand(*s).requires_grad_() for s in ((20, 32), (4, 32), (30, 4)))
    *parts, bias = layer.frozen().tensors
    way = "int8" if compute == "auto" else compute
    torch.library.opcheck(
        torch.ops.minilora.lora_stored.default,
        (x, parts, bias, A, B, 1.5, seed_tensor(), 0.2, "int8", 0, way, way),
        test_utils=["test_schema", "test_autograd_registration", "test_faketensor"],
    )


def test_only_x_s_the_factors_and_the_base_are_kept():
    layer, kept = stored(FORMATS["nf4"], 64, 128, torch.float16, "auto"), {}
    x = operand(96, 128, dtype=torch.float16).requires_grad_()
    A, B = operand(4, 128).requires_grad_(), operand(64, 4).requires_grad_()

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        _product(x, layer.frozen(), A, B, 1.5, None, 0.0)
    for t in (x, A, B, *layer.parameters()):
        kept.pop(t.untyped_storage().data_ptr(), None)
    assert sorted(kept.values()) == [16 * 4, 96 * 4 * 2, 256 * 4]  # S, and the two tables


def quantized_pair(shake, format, **options):
    models = []
    for backend in ("torch", "triton"):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8, bias=False))
        minilora.quantize(model.to(DEVICE), format, targets=["0", "2"], **options)
        minilora.inject(model, r=5, alpha=8, targets=["0", "2"], exclude=[], backend=backend)
        models.append(shake(model))
    return models


def gradients(model, x):
    x = x.detach().clone().requires_grad_()
    y = model(x)
    y.float().square().mean().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("format", ["int8", "nf4", "int4"])
def test_quantized_layers_match_the_torch_path(shake, format):
    how = read_by(format, compute="dequantize", grad_compute="dequantize")
    plain, ours = quantized_pair(shake, format, **how)
    x = torch.randn(2, 7, 64, device=DEVICE)
    for found, expected in zip(gradients(ours, x), gradients(plain, x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert {m.last_path for m in ours.modules() if hasattr(m, "last_path")} == {"triton"}


def test_int8_layers_multiply_integers_by_default(shake):
    plain, ours = quantized_pair(shake, "int8", grad_compute="dequantize")
    x = torch.randn(9, 64, device=DEVICE)
    for module in plain.modules():
        if isinstance(module, QuantizedLinear):
            module.spec = dataclasses.replace(module.spec, compute="dequantize")
    found, expected = ours(x), plain(x)
    difference = (found - expected).norm() / expected.norm()
    assert 1e-4 < difference < 2e-2  # rows are rounded to 8 bits


@pytest.mark.parametrize("format", ["int8", "nf4"])
def test_autocast_checkpointing_and_compile(shake, format):
    _, ours = quantized_pair(shake, format)
    x = torch.randn(6, 64, device=DEVICE)
    expected = gradients(ours, x)
    ours.zero_grad()
    leaf = x.clone().requires_grad_()
    y = checkpoint(ours, leaf, use_reentrant=False)
    y.square().mean().backward()
    found = [y.detach(), leaf.grad, *(p.grad for p in ours.parameters() if p.grad is not None)]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    ours.zero_grad()
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    for a, b in zip(gradients(compiled, x), expected, strict=True):
        torch.testing.assert_close(a, b)
    with torch.autocast(DEVICE, torch.float16):
        assert ours(x).dtype == torch.float16


def test_nf4_tables_lie_on_the_device_once(shake, monkeypatch):
    """A copy from the host in every forward would wait for the GPU, and break CUDA graphs."""
    monkeypatch.setattr("minilora.kernels.triton._placed", {})
    _, ours = quantized_pair(shake, "nf4")
    x = torch.randn(6, 64, device=DEVICE)
    with FakeTensorMode(allow_non_fake_inputs=True):
        nf4_table_on(x.device)
    with torch.inference_mode():
        ours(x)
    kept = [nf4_table_on(x.device), dynamic_table_on(x.device)]
    assert [type(table) for table in kept] == [torch.Tensor] * 2  # none that was only traced
    gradients(ours, x)  # an inference tensor could not be saved for backward
    assert kept[0] is nf4_table_on(x.device) and kept[1] is dynamic_table_on(x.device)
    graphs = []

    def seen(graph, inputs):
        graphs.append(graph)
        return graph

    torch.compile(ours, fullgraph=True, backend=seen)(x)
    named = dict(graphs[0].named_buffers()) | vars(graphs[0])
    constants = [n for n in graphs[0].graph.nodes if n.op == "get_attr"]
    assert {named[n.target].data_ptr() for n in constants} == {t.data_ptr() for t in kept}
    assert not [n for n in graphs[0].graph.nodes if n.target is torch.tensor]
    # Constants are named by the function that gave them, and AOTAutograd takes no name twice.
    names = list(getattr(graphs[0], "_param_name_to_source", {}).values())
    assert len(set(names)) == len(names)


def test_outliers_raise_with_the_reason():
    layer = stored(FORMATS["int8"], 8, 64, torch.float32, "auto")
    layer.spec = dataclasses.replace(layer.spec, outliers=2)
    with pytest.raises(
        RuntimeError,
        match="backend='triton' cannot run: its kernels multiply every input channel alike, and "
        "this base keeps 2 outliers in floating point",
    ):
        triton_lora_linear(operand(3, 64), layer.frozen(), operand(2, 64), operand(8, 2), 1.0)


@pytest.mark.parametrize("format", [None, "int8", "nf4", "int4"])
def test_the_gpu_benchmark_sees_a_wrong_result(monkeypatch, format):
    import gpu_layers

    monkeypatch.setattr(gpu_layers, "DEVICE", DEVICE)
    errors, same = gpu_layers.check(format, 20, 64, 48, times=2)
    assert same and gpu_layers.holds(format, errors)
    made = gpu_layers.ours
    monkeypatch.setattr(gpu_layers, "ours", lambda *a, **o: _scaled(made(*a, **o)))
    errors, _ = gpu_layers.check(format, 20, 64, 48)
    assert not gpu_layers.holds(format, errors)


def _scaled(model):
    model[0].adapters["default"].alpha *= 2
    return model
