"""The formats and `QuantizedLinear` against definitions written apart, and bitsandbytes."""

import copy
import dataclasses
import functools
import io
import pickle

import bitsandbytes.functional as bnb
import pytest
import torch
from blocks_oracle import half_steps
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from small_models import read_by
from torch import nn

import minilora
from minilora.kernels import DYNAMIC_CODE, cpu, int8_is_exact, quantize_rows
from minilora.quantization import FORMATS, Quantization
from minilora.quantization.linear import QuantizedLinear

needs_blocks = pytest.mark.skipif(
    not cpu.has_blocks(), reason="no AVX2, or no C compiler that will do"
)
SPECS = [
    Quantization("int8"),
    Quantization("nf4"),
    Quantization("nf4", 128, False),
    Quantization("int4"),
    Quantization("int4", 32),
]


def name_of(spec):
    return f"{spec.format} {spec.block_size}{'' if spec.double_quant else ' f32 scales'}"


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(N, K, spec, dtype=torch.float32, bias=False, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(N, K, generator=generator) * torch.rand(N, 1, generator=generator)
    b = torch.randn(N, generator=generator).to(dtype) if bias else None
    weight, spec = weight.to(dtype), dataclasses.replace(spec, **options)
    return weight, QuantizedLinear.from_weight(weight, spec, bias=b)


@functools.cache
def dynamic_map():
    return bnb.create_dynamic_map()


def decoded(module):
    """Ŵ in float64 straight from the definition of each format."""
    p = {name: t.detach() for name, t in module.named_parameters()}
    N, K, spec = module.out_features, module.in_features, module.spec
    if spec.format == "int8":
        return p["codes"].double() * p["scale_bits"].view(torch.float32).double()[:, None]
    if spec.format == "int4":
        W = torch.empty(N, K, dtype=torch.float64)
        for n in range(N):
            for k in range(K):
                byte = int(p["codes"][n, k % (K // 2)])
                q = (byte >> 4 if k >= K // 2 else byte & 15) - 8
                s = int(p["steps"][n, k // spec.block_size])
                assert -7 <= q <= 7
                W[n, k] = q * s * float(p["scale_bits"][n : n + 1].view(torch.float32))
        return W
    if spec.double_quant:
        code = dynamic_map().double()
        second = p["absmax2_bits"].view(torch.float32).double()
        each = (
            code[p["absmax"].reshape(-1).long()]
            * second.repeat_interleave(256)[: p["absmax"].numel()]
        )
        absmax = each + p["offset_bits"].view(torch.float32).double()
    else:
        absmax = p["absmax_bits"].view(torch.float32).double().reshape(-1)
    table = bnb.get_4bit_type("nf4", device="cpu").double()
    byte = p["codes"].reshape(-1).long()
    values = table[torch.stack([byte >> 4, byte & 15], 1).reshape(-1)[: N * K]]
    return (values * absmax.repeat_interleave(spec.block_size)[: N * K]).view(N, K)


def relative(found, want):
    return float((found.double() - want).norm() / want.norm().clamp(min=1e-30))


# What plain torch loses in this dtype, times two.
ROUNDING = {torch.float64: 1e-7, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@pytest.mark.parametrize("spec", SPECS, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_is_the_formats_definition(spec, dtype):
    module = make(6, 128, spec, dtype)[1]
    want = decoded(module)
    assert relative(module.dequantize(torch.float64), want) < 1e-6
    # In the stored dtype: the f32 value rounded once.
    assert torch.equal(module.dequantize(), module.dequantize(torch.float32).to(dtype))
    assert module.dequantize().dtype == dtype


@settings(max_examples=60)
@given(
    spec=st.sampled_from(SPECS),
    N=st.sampled_from([1, 2, 7, 31, 64]),
    groups=st.integers(1, 5),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_quantize_errs_by_half_a_step_at_most(spec, N, groups, dtype, seed):
    weight, module = make(N, groups * spec.block_size, spec, dtype, seed=seed)
    W, found = weight.double(), decoded(module)
    blocks = W.reshape(-1, spec.block_size)
    errors = (found - W).abs().reshape(-1, spec.block_size)
    largest = blocks.abs().amax(1, keepdim=True)
    if spec.format == "int8":
        bound = W.abs().amax(1, keepdim=True) / 127 / 2
        assert ((found - W).abs() <= bound * 1.00001 + 1e-12).all()
    elif spec.format == "nf4":
        gap = 1.0 - 0.6961928009986877  # the table's widest
        slack = 0.0
        if spec.double_quant:  # a scale is off by half a gap of its code (1/128 at most)
            spread = (largest - largest.mean()).abs().max()
            slack = spread / 128 + spread / 32768
        assert (errors <= gap / 2 * largest + slack + 1e-7).all()
    else:  # the step that reaches the largest weight is among those tried
        channel = module.scale_bits.view(torch.float32).double()
        channel = channel.repeat_interleave(groups)[:, None]
        step = (largest / 7 / channel * (1 - 1e-6)).ceil() * channel
        assert (
            errors.square().sum(1, keepdim=True) <= spec.block_size * (step / 2) ** 2 + 1e-9
        ).all()
    assert module.nbytes == sum(spec.nbytes(*weight.shape).values())


@settings(max_examples=80)
@given(
    spec=st.sampled_from(SPECS),
    M=st.sampled_from([0, 1, 2, 5, 17, 33]),
    N=st.sampled_from([1, 3, 16, 37]),
    groups=st.integers(1, 3),
    bias=st.booleans(),
    strided=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 4),
)
def test_dequantized_products_match_the_dense_oracle(
    spec, M, N, groups, bias, strided, dtype, seed
):
    options = read_by(spec.format, compute="dequantize", grad_compute="dequantize")
    K = groups * spec.block_size
    _, module = make(N, K, spec, dtype, bias, seed, **options)
    W = decoded(module)
    torch.manual_seed(seed)  # an example is the same numbers wherever it is drawn
    x = torch.randn(2, M, 2 * K if strided else K).to(dtype)
    x = (x[..., ::2] if strided else x).detach().requires_grad_()
    y = module(x)
    g = torch.randn_like(y)
    y.backward(g)
    want = x.detach().double() @ W.T + (0 if module.bias is None else module.bias.double())
    assert y.shape == (2, M, N)
    assert y.dtype == x.grad.dtype == dtype
    assert relative(y.detach(), want) < ROUNDING[dtype]
    assert relative(x.grad, g.double() @ W) < ROUNDING[dtype]


@pytest.mark.skipif(not int8_is_exact(), reason="torch's int8 product saturates here (no VNNI)")
@settings(max_examples=60)
@given(
    spec=st.sampled_from([SPECS[0], SPECS[3], SPECS[4]]),
    M=st.sampled_from([0, 1, 5, 33]),
    N=st.sampled_from([1, 3, 37]),
    groups=st.integers(1, 3),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 4),
)
def test_int8_products_match_the_quantized_oracle(spec, M, N, groups, bias, dtype, seed):
    """Against float64 products of what the rows were rounded to: only sums' rounding is left."""
    K = groups * spec.block_size
    _, module = make(N, K, spec, dtype, bias, seed, compute="int8", grad_compute="int8")
    module._integer = "int8"
    W = decoded(module)
    torch.manual_seed(seed)
    x = torch.randn(M, K).to(dtype).requires_grad_()
    y = module(x)
    g = torch.randn_like(y)
    y.backward(g)

    def rounded(rows):  # in f32, as the format says: a code on an edge is then the same
        scale = rows.float().abs().amax(1, keepdim=True) / 127
        return (rows.float() / scale.clamp(min=1e-30)).round().double() * scale.double()

    channel = module.scale_bits.view(torch.float32)
    want = rounded(x.detach()) @ W.T
    want = want + (0 if module.bias is None else module.bias.double())
    assert relative(y.detach(), want) < max(1e-4, ROUNDING[dtype])
    grad = rounded(g.float() * channel) @ (W / channel.double()[:, None])
    assert relative(x.grad, grad) < max(1e-4, ROUNDING[dtype])
    # And so near the unquantized product: each code is off by at most half a step.
    if M:
        exact = x.detach().double() @ W.T
        bound = 0.5 / 127 * x.detach().double().abs().amax(1, keepdim=True) * W.abs().sum(1)
        bias_ = 0 if module.bias is None else module.bias.double()
        slack = ROUNDING[dtype] * (y.detach().double().abs() + 1)
        assert ((y.detach().double() - bias_ - exact).abs() <= bound * 1.01 + slack).all()


@settings(max_examples=60)
@given(
    spec=st.sampled_from([SPECS[0], SPECS[3], SPECS[4]]),
    M=st.sampled_from([0, 1, 5, 33]),
    N=st.sampled_from([1, 3, 37]),
    groups=st.integers(1, 3),
    bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
@needs_blocks
def test_products_in_blocks_are_near_the_oracle(spec, M, N, groups, bias, dtype, seed):
    """Each of 64 places is off by at most half of the block's step; more in test_kernels_cpu."""
    K = groups * spec.block_size
    _, module = make(N, K, spec, dtype, bias, seed, compute="int8", grad_compute="int8")
    module._integer = "blocks"
    W, channel = decoded(module), module.scale_bits.view(torch.float32).double()
    x = torch.randn(M, K).to(dtype).requires_grad_()
    y = module(x)
    g = torch.randn_like(y)
    y.backward(g)
    assert y.dtype == x.grad.dtype == dtype
    bias_ = torch.zeros(N) if module.bias is None else module.bias.double()
    codes = W / channel[:, None]
    for found, rows, along, weight, added in (
        (y.detach().double(), x.detach().double(), codes, W.T, bias_),
        (x.grad.double(), g.double() * channel, codes.T, codes, 0),
    ):
        wanted = rows @ weight + added
        bound = half_steps(rows, along) @ weight.abs() * 1.01
        slack = ROUNDING[dtype] * (wanted.abs() + bound) + 1e-6
        assert ((found - wanted).abs() <= bound + slack).all()
    exact = x.detach().double().requires_grad_()  # in float64 nothing is rounded
    y = module(exact)
    y.backward(g.double())
    torch.testing.assert_close(y, exact @ W.T + bias_)
    torch.testing.assert_close(exact.grad, g.double() @ W)


@pytest.mark.parametrize("way", [
    pytest.param("int8", marks=pytest.mark.skipif(
        not int8_is_exact(), reason="torch's int8 product saturates here (no VNNI)")),
    pytest.param("blocks", marks=needs_blocks),
])  # fmt: skip
@given(
    spec=st.sampled_from([SPECS[0], SPECS[3]]),
    count=st.sampled_from([1, 3, 16, 500]),
    M=st.sampled_from([0, 1, 9]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_outlier_channels_are_exact_and_leave_the_scales(way, spec, count, M, dtype):
    K = 192

    def layer(outliers):
        options = {"compute": "int8", "grad_compute": "int8", "outliers": outliers}
        module = make(7, K, spec, dtype, **options)[1]
        module._integer = way
        return module

    module = layer(count)
    W = decoded(module)
    torch.manual_seed(0)
    x = torch.randn(M, K).to(dtype)
    loud = torch.tensor([5, 77, 130])
    x[:, loud] = 100 * x[:, loud].sign()
    y = module(x).double()
    kept = min(count, K // 16)
    columns = x.double().abs().amax(0).topk(kept).indices if M else torch.tensor([], dtype=int)
    rest = x.double().index_fill(1, columns, 0)
    if way == "int8":
        scale = (rest.abs().amax(1, keepdim=True).float() / 127).double().clamp(min=1e-300)
        want = ((rest / scale).round() * scale + x.double() - rest) @ W.T
        assert relative(y, want) < max(1e-4, ROUNDING[dtype])
    else:
        channel = module.scale_bits.view(torch.float32).double()
        bound = half_steps(rest, W / channel[:, None]) @ W.abs().T
        slack = ROUNDING[dtype] * ((x.double() @ W.T).abs() + 1)
        assert ((y - x.double() @ W.T).abs() <= bound * 1.01 + slack).all()
    if M and kept >= 3:  # with the loud channels apart the others are rounded finely
        exact = x.double() @ W.T
        if dtype == torch.float32:
            plain = layer(0)(x).double()
            assert (y - exact).norm() < 0.2 * (plain - exact).norm()


def test_outliers_must_be_a_count():
    for wrong in (-1, True, 1.5):
        with pytest.raises(ValueError, match="outliers must be a whole number of at least 0"):
            make(4, 64, Quantization("int8"), outliers=wrong)


def test_rounding_to_int8_does_not_wrap():
    """127.4 rounds to 128 in bf16, and 128 wraps to −128: codes must be formed in f32."""
    x = torch.linspace(-1, 1, 4097).to(torch.bfloat16)[None] * 3.3
    codes, scales = quantize_rows(x)
    assert codes.min() == -127
    assert codes.max() == 127
    assert ((codes * scales).sign() == x.sign())[x.abs() > scales].all()
    assert relative(codes * scales, x.double()) < 0.01


@given(st.sampled_from(["zero", "subnormal", "nan", "inf", "one"]))
def test_quantize_rows_edges(kind):
    value = {"zero": 0.0, "subnormal": 1e-42, "nan": float("nan"), "inf": float("inf"), "one": 1.0}
    x = torch.zeros(3, 5)
    x[1, 2] = value[kind]
    codes, scales = quantize_rows(x)
    assert scales[0] == 1
    assert not codes[0].any()
    if kind in ("nan", "inf"):
        assert not (codes[1] * scales[1]).isfinite().all()
    else:
        assert relative(codes[1] * scales[1], x[1].double()) <= (1 if kind == "subnormal" else 1e-6)
    empty = quantize_rows(torch.zeros(4, 0))
    assert empty[0].shape == (4, 0)
    assert empty[1].shape == (4, 1)


@pytest.mark.parametrize("block", [32, 64, 128, 256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize("shape", [(16, 64), (7, 33), (33, 512), (1, 1), (3, 1000), (9, 4096)])
@pytest.mark.parametrize("double", [True, False])
def test_nf4_is_bit_identical_to_bitsandbytes(block, shape, double):
    for dtype in DTYPES:
        weight, module = make(*shape, Quantization("nf4", block, double), dtype)
        codes, state = bnb.quantize_4bit(
            weight, blocksize=block, quant_type="nf4", compress_statistics=double
        )
        assert torch.equal(module.codes.reshape(-1), codes.reshape(-1))
        if double:
            assert torch.equal(module.absmax.reshape(-1), state.absmax.reshape(-1))
            assert torch.equal(module.absmax2_bits.view(torch.float32), state.state2.absmax)
            assert torch.equal(module.offset_bits.view(torch.float32)[0], state.offset)
        else:
            assert torch.equal(module.absmax_bits.view(torch.float32).reshape(-1), state.absmax)
        if shape[1] % block == 0 or judge_decodes_across_rows():
            assert torch.equal(module.dequantize(), bnb.dequantize_4bit(codes, state))
        assert relative(module.dequantize(torch.float64), decoded(module)) < 1e-6


@functools.cache
def judge_decodes_across_rows():
    """Whether bitsandbytes decodes blocks that cross a row: 0.50's AVX-512 code does not."""
    weight = torch.tensor([[1.0] * 64, [0.5] * 64, [1.0] * 64, [2.0] * 64], dtype=torch.bfloat16)
    codes, state = bnb.quantize_4bit(weight, blocksize=128, quant_type="nf4")
    return relative(bnb.dequantize_4bit(codes, state), weight.double()) < 0.2


@pytest.mark.parametrize(
    ("spec", "error"),
    [  # of N(0, 1), relative RMS; NF4's by integration, see benchmarks/formats.py
        (Quantization("nf4", 32, False), 0.0873),
        (Quantization("nf4", 64, False), 0.0920),
        (Quantization("nf4", 128, False), 0.0956),
    ],
)
def test_nf4_errs_on_normal_weights_as_the_closed_form_says(spec, error):
    weight = torch.randn(256, 4096, generator=torch.Generator().manual_seed(0))
    module = QuantizedLinear.from_weight(weight, spec)
    assert relative(module.dequantize(), weight.double()) == pytest.approx(error, rel=0.005)


def test_int4_beats_a_plain_grid_of_the_same_groups():
    weight = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0))
    for group in (32, 64, 128):
        blocks = weight.view(-1, group)
        step = blocks.abs().amax(1, keepdim=True) / 7
        plain = ((blocks / step).round() * step).view_as(weight)
        found = QuantizedLinear.from_weight(weight, Quantization("int4", group)).dequantize()
        assert relative(found, weight.double()) < relative(plain, weight.double())


def test_every_code_of_nf4_is_used_and_decodes():
    table = bnb.get_4bit_type("nf4", device="cpu")
    weight = table.repeat(4).view(1, 64)
    module = QuantizedLinear.from_weight(weight, Quantization("nf4", 64, False))
    assert torch.equal(module.dequantize(), weight)
    byte = module.codes.reshape(-1)
    assert set((byte >> 4).tolist() + (byte & 15).tolist()) == set(range(16))
    assert torch.equal(DYNAMIC_CODE, bnb.create_dynamic_map().float())


def test_bytes_follow_the_formulas():
    N, K = 37, 640
    n = N * K
    blocks = -(-n // 64)

    def stored(format):
        return sum(Quantization(format).nbytes(N, K).values())

    assert stored("nf4") == -(-n // 2) + blocks + 4 * -(-blocks // 256) + 4
    assert stored("int8") == n + 4 * N
    assert stored("int4") == n // 2 + n // 64 + 4 * N
    for spec in SPECS:
        shapes = spec.layout(N, K).values()
        assert all(len(shape) for shape, _ in shapes)  # FSDP2 can't shard what is 0-dim
        assert not any(dtype.is_floating_point for _, dtype in shapes)  # no cast reaches scales
    assert Quantization("nf4").layout(N, K)["codes"][0][0] == N


@pytest.mark.parametrize("spec", SPECS, ids=name_of)
def test_codes_survive_what_users_do_to_modules(spec, tmp_path):
    weight, module = make(8, 128, spec, torch.float32, bias=True)
    before = {n: p.detach().clone() for n, p in module.named_parameters()}

    def same(other, bias=True):
        for name, value in before.items():
            if bias or name != "bias":
                assert torch.equal(getattr(other, name), value), name
        assert not any(p.requires_grad for p in other.parameters())
        return True

    for cast, dtype in (
        (lambda m: m.half(), torch.float16),
        (lambda m: m.to(torch.bfloat16), torch.bfloat16),
        (lambda m: m.double(), torch.float64),
        (lambda m: m.to("cpu"), torch.float32),
    ):
        other = cast(copy.deepcopy(module))
        assert same(other, bias=dtype == torch.float32)
        assert other.dtype == other.bias.dtype == other.dequantize().dtype == dtype
    assert same(pickle.loads(pickle.dumps(module)))
    assert same(copy.deepcopy(module))
    assert same(module.share_memory())
    other = make(8, 128, spec, bias=True, seed=5)[1]
    other.load_state_dict(module.state_dict())
    assert same(other)
    save_file(module.state_dict(), tmp_path / "q.safetensors")
    other = make(8, 128, spec, bias=True, seed=5)[1]
    other.load_state_dict(load_file(tmp_path / "q.safetensors"), assign=True)
    assert same(other)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    assert same(torch.load(io.BytesIO(buffer.getvalue()), weights_only=False))
    x = torch.randn(3, 128)
    assert torch.equal(other(x), module(x))
    assert module.weight.shape == weight.shape


@pytest.mark.parametrize("spec", SPECS, ids=name_of)
def test_only_codes_are_kept_for_backward(spec):
    _, module = make(16, 128, spec)
    x = torch.randn(40, 128, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        module(x).sum()
    mine = {p.data_ptr() for p in module.parameters()}
    shared = {DYNAMIC_CODE.data_ptr()}
    assert all(t.data_ptr() in mine | shared for t in kept)


@pytest.mark.parametrize("spec", [SPECS[0], SPECS[1], SPECS[3]], ids=name_of)
def test_compiled_equals_eager(spec):
    _, module = make(24, 128, spec, bias=True)
    before = {n: p.clone() for n, p in module.named_parameters()}
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    for M in (5, 9):
        x = torch.randn(M, 128)
        a, b = (x.clone().requires_grad_() for _ in range(2))
        y, want = compiled(a), module(b)
        assert relative(y.detach(), want.detach().double()) < 1e-5
        g = torch.randn_like(y)
        y.backward(g)
        want.backward(g)
        assert relative(a.grad, b.grad.double()) < 1e-5
    assert all(torch.equal(p, before[n]) for n, p in module.named_parameters())


@pytest.mark.parametrize("spec", [SPECS[0], SPECS[3]], ids=name_of)
def test_few_rows_compiled_equal_uncompiled_ones(spec):
    _, module = make(24, 128, spec)
    module.eval()._integer = None
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for M in (1, 3, 40):
            x = torch.randn(M, 128)
            assert relative(compiled(x), module(x).double()) < 1e-5


@settings(max_examples=40)
@given(
    spec=st.sampled_from([SPECS[0], SPECS[3]]),
    M=st.sampled_from([0, 1, 2, 7, 16, 17]),
    N=st.sampled_from([1, 3, 37]),
    groups=st.integers(1, 3),
    bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_few_rows_are_multiplied_from_the_codes(spec, M, N, groups, bias, dtype, seed):
    """Against the dense oracle; row by row the same bits."""
    _, module = make(N, groups * spec.block_size, spec, dtype, bias, seed)
    module.eval()._integer = None
    torch.manual_seed(seed)
    W, x = decoded(module), torch.randn(M, groups * spec.block_size).to(dtype)
    b = 0 if module.bias is None else module.bias.double()
    with torch.no_grad():
        y = module(x)
        assert y.dtype == dtype
        assert relative(y, x.double() @ W.T + b) < ROUNDING[dtype]
        if M <= 16:
            assert all(torch.equal(module(x[i : i + 1]), y[i : i + 1]) for i in range(M))


@pytest.mark.parametrize("spec", [SPECS[0], SPECS[1], SPECS[3]], ids=name_of)
def test_second_derivatives_are_right(spec):
    """Decoded weights are then kept by autograd, so they must not lie in the reused buffer."""
    ways = read_by(spec.format, compute="dequantize", grad_compute="dequantize")
    _, module = make(5, 64, spec, torch.float64, **ways)
    x = torch.randn(3, 64, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: torch.tanh(module(x)), x)
    if spec.format != "nf4":  # rounding has no derivative: it is the dequantized product's
        module.spec = dataclasses.replace(module.spec, grad_compute="int8")
        (g,) = torch.autograd.grad(torch.tanh(module(x)).sum(), x, create_graph=True)
        again = g.square().sum()
        module.spec = dataclasses.replace(module.spec, grad_compute="dequantize")
        (want,) = torch.autograd.grad(torch.tanh(module(x)).sum(), x, create_graph=True)
        assert torch.equal(g, want)
        # The last pass records nothing, so its own products are rounded again.
        found, plain = (torch.autograd.grad(v, x)[0] for v in (again, want.square().sum()))
        assert relative(found, plain) < 0.02


@pytest.mark.parametrize("spec", SPECS, ids=name_of)
def test_integers_are_no_input(spec):
    with pytest.raises(TypeError, match="floating-point inputs, found torch.int64; cast it"):
        make(4, 64, spec)[1](torch.ones(2, 64, dtype=torch.int64))


@pytest.mark.parametrize("spec", SPECS, ids=name_of)
def test_shapes_alone_quantize_and_take_codes_later(spec):
    weight, module = make(4, 128, spec)
    empty = QuantizedLinear.from_weight(weight.to("meta"), spec)
    assert empty(torch.ones(3, 128, device="meta")).shape == (3, 4)
    assert empty.nbytes == module.nbytes
    empty.load_state_dict(module.state_dict(), assign=True)
    assert torch.equal(empty.dequantize(), module.dequantize())
    empty = QuantizedLinear.from_weight(weight.to("meta"), spec).to_empty(device="cpu")
    empty.load_state_dict(module.state_dict())
    assert torch.equal(empty.dequantize(), module.dequantize())


def test_workspace_is_not_shared_with_results():
    """Decoding goes through a reused buffer: a result must not change when it is used again."""
    _, first = make(16, 128, Quantization("nf4"), seed=1)
    _, second = make(16, 128, Quantization("nf4"), seed=2)
    W = first.dequantize()
    kept = W.clone()
    y = first(torch.eye(128))
    out = y.clone()
    second(torch.eye(128))
    second.dequantize()
    assert torch.equal(W, kept)
    assert torch.equal(y, out)
    for form in ("int8", "int4"):
        module = make(16, 128, Quantization(form), compute="dequantize", grad_compute="dequantize")[
            1
        ]
        W, y = module.dequantize(), module(torch.eye(128))
        kept, out = W.clone(), y.clone()
        make(16, 128, Quantization(form), seed=3)[1].dequantize()
        module(torch.ones(1, 128))
        assert torch.equal(W, kept)
        assert torch.equal(y, out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("int3", 64, True), "format must be one of int8, nf4, int4, found 'int3'"),
        (("nf4", 48, True), "block_size of nf4 must be one of 32, .*, found 48"),
        (("int4", 256, True), "block_size of int4 must be one of 32, 64, 128, found 256"),
        (("nf4", True, True), "block_size must be a whole number of at least 1"),
    ],
)
def test_unknown_formats_and_blocks(arguments, message):
    with pytest.raises(ValueError, match=message):
        Quantization(*arguments)


@pytest.mark.parametrize(
    ("format", "options", "message"),
    [
        ("int8", {"block_size": 32}, "block_size acts on format='nf4' or 'int4' alone, found bl"),
        ("int8", {"double_quant": False}, "double_quant acts on format='nf4' alone, found double"),
        ("int4", {"double_quant": False}, "double_quant=False with format='int4'; leave it out"),
        ("nf4", {"compute": "dequantize"}, "compute acts on format='int8' or 'int4' alone, found"),
        ("nf4", {"grad_compute": "dequantize"}, "grad_compute acts on format='int8' or 'int4' al"),
        (
            "nf4",
            {"outliers": 4},
            "outliers acts on format='int8' or 'int4' alone, found outliers=4",
        ),
        ("int8", {"outliers": 4, "compute": "dequantize"}, "compute='dequantize' has none of, fou"),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(format, options, message):
    with pytest.raises(ValueError, match=message):
        Quantization(format, **options)
    with pytest.raises(ValueError, match=message):
        minilora.quantize(nn.Sequential(nn.Linear(64, 4)), format, targets=["0"], **options)


@pytest.mark.parametrize("format", FORMATS)
def test_each_option_that_a_format_reads_changes_it(format):
    """And the repr shows it."""
    others = {"block_size": 128, "double_quant": False, "compute": "dequantize",
              "grad_compute": "dequantize", "outliers": 4}  # fmt: skip
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))
    x = torch.randn(3, 128, requires_grad=True)

    def made(**options):
        module = QuantizedLinear.from_weight(weight, Quantization(format, **options))
        module._integer = "int8"
        y = module(x)
        (grad,) = torch.autograd.grad(y.square().sum(), x)
        return module, y, grad

    _, y, grad = made()
    for name in FORMATS[format].reads:
        module, other, other_grad = made(**{name: others[name]})
        assert not (torch.equal(y, other) and torch.equal(grad, other_grad)), name
        assert f"{name}={others[name]}" in repr(module)
    assert FORMATS[format].reads


def test_double_quant_must_be_a_flag():
    with pytest.raises(ValueError, match="double_quant must be True or False, found 1"):
        Quantization("nf4", 64, 1)


@pytest.mark.parametrize(
    ("weight", "spec", "message"),
    [
        (
            torch.full((4, 64), float("nan")),
            Quantization("int8"),
            "must be finite, found NaN or Inf",
        ),
        (
            torch.full((4, 64), float("-inf")),
            Quantization("nf4"),
            "must be finite, found NaN or Inf",
        ),
        (
            torch.ones(4, 96),
            Quantization("int4"),
            "96 inputs, .* groups of 64 .*; pass block_size=32",
        ),
        (torch.ones(4, 33), Quantization("int4"), "33 inputs, .*; use 'nf4' or 'int8' for it"),
        (torch.ones(4, 0), Quantization("nf4"), r"has no weights: its shape is \[4, 0\]"),
        (
            torch.ones(4),
            Quantization("nf4"),
            r"floating-point matrix, found torch.float32 of shape \[4\]",
        ),
        (torch.ones(4, 4, dtype=torch.int8), Quantization("nf4"), "matrix, found torch.int8"),
        (
            torch.full((4, 64), 1e300, dtype=torch.float64),
            Quantization("int8"),
            r"NaN or Inf \(in float32\)",
        ),
    ],
)
def test_weights_that_cannot_be_stored(weight, spec, message):
    with pytest.raises(ValueError, match=message):
        QuantizedLinear.from_weight(weight, spec)


def test_unknown_ways_to_compute():
    with pytest.raises(
        ValueError, match="compute must be one of auto, int8, dequantize, found 'x'"
    ):
        make(4, 64, Quantization("int8"), compute="x")


def test_how_integers_are_multiplied_follows_from_the_processor(monkeypatch):
    from minilora.kernels import probe
    from minilora.quantization import linear, options

    ways = {(True, "avx512_vnni", True): "int8", (True, "avx2", True): "blocks",
            (False, "avx512_vnni", True): "blocks", (True, "avx2", False): None,
            (False, "avx2", False): None}  # fmt: skip
    for (exact, flag, blocks), way in ways.items():
        monkeypatch.setattr(probe, "int8_is_exact", lambda exact=exact: exact)
        monkeypatch.setattr(probe, "has_blocks", lambda blocks=blocks: blocks)
        monkeypatch.setattr(probe, "_cpu_name_and_flags", lambda flag=flag: ("a name", (flag,)))
        assert probe.integer_way.__wrapped__() == way
        monkeypatch.setattr(linear, "integer_way", lambda way=way: way)
        monkeypatch.setattr(options, "integer_way", lambda way=way: way)
        monkeypatch.setattr(options, "int8_is_exact", lambda exact=exact: exact)
        module = make(4, 64, Quantization("int8"))[1]
        assert module.ways == (way or "dequantize",) * 2
        module.spec = Quantization("int8", compute="dequantize")
        assert module.ways == ("dequantize", way or "dequantize")
        if way or exact:
            module.spec = Quantization("int8", compute="int8")
            assert module.ways[0] == (way or "int8")
    with pytest.raises(RuntimeError, match=r"not exact .* AVX2 and a C compiler; .* 'dequantize'"):
        make(4, 64, Quantization("int8"), compute="int8")


@pytest.mark.parametrize(
    ("spec", "name", "change", "message"),
    [
        (
            SPECS[0],
            "codes",
            lambda t: t[:3],
            r"codes of torch.int8 \[4, 64\].*torch.int8 \[3",
        ),
        (
            SPECS[0],
            "codes",
            lambda t: t.float(),
            "must have codes of torch.int8 .*, found torch.float32",
        ),
        (
            SPECS[1],
            "codes",
            lambda t: torch.cat([t, t]),
            r"codes of torch.uint8 \[4, 32\]",
        ),
        (
            SPECS[0],
            "scale_bits",
            lambda t: t * 0,
            "must have scales above 0, found 0 in scale_bits",
        ),
        (SPECS[3], "scale_bits", lambda t: t * 0 - 1, "must have finite scales, found NaN or Inf"),
        (SPECS[1], "absmax2_bits", lambda t: t | -(2**31), "scales of at least 0, found -"),
        (SPECS[3], "steps", lambda t: t * 0, "must have steps of 1 to 18, found 0 to 0"),
        (SPECS[0], "codes", lambda t: t * 0 - 128, "must have codes of -127 to 127, found -128"),
    ],
)
def test_damaged_state_dicts(spec, name, change, message):
    _, module = make(4, 64, spec)
    state = {n: t.clone() for n, t in module.state_dict().items()}
    if name == "absmax2_bits":
        state[name] = torch.full_like(state[name], 1065353216)  # 1.0: the mean left nothing here
    state[name] = change(state[name])
    before = {n: t.clone() for n, t in module.state_dict().items()}
    with pytest.raises(RuntimeError, match=message):
        module.load_state_dict(state)
    assert all(torch.equal(t, before[n]) for n, t in module.state_dict().items())


def test_half_a_state_dict_is_refused():
    _, module = make(4, 64, Quantization("nf4"))
    state = module.state_dict()
    del state["absmax2_bits"]
    with pytest.raises(RuntimeError, match="absmax2_bits"):
        module.load_state_dict(state)
    with pytest.raises(RuntimeError, match="codes"):  # a plain layer's
        module.load_state_dict(nn.Linear(64, 4, bias=False).state_dict())


@pytest.mark.parametrize("spec", SPECS, ids=name_of)
def test_zero_rows_and_zero_weights(spec):
    weight = torch.randn(4, 128)
    weight[1] = 0
    module = QuantizedLinear.from_weight(weight, spec)
    assert module.dequantize().isfinite().all()
    exact = spec.format != "nf4" or not spec.double_quant
    assert not module.dequantize()[1].any() or not exact
    zero = QuantizedLinear.from_weight(torch.zeros(4, 128), spec)
    assert not zero.dequantize().any()
    assert not zero(torch.ones(2, 128)).any()


def test_it_shows_itself():
    _, module = make(4, 64, Quantization("nf4"))
    assert "format=nf4, block_size=64, double_quant=True" in repr(module)
    _, module = make(4, 64, Quantization("int8"))
    assert "format=int8, compute=auto, grad_compute=auto" in repr(module)
    assert set(FORMATS) == {"int8", "nf4", "int4"}


def test_autocast_decides_the_dtype():
    _, module = make(4, 64, Quantization("nf4"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(torch.randn(2, 64)).dtype == torch.bfloat16
    assert module(torch.randn(2, 64, dtype=torch.float64)).dtype == torch.float64
