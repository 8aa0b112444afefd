"""The passes in C against float64, and who takes them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora.kernels import rms_norm, rotary, rowwise, swiglu
from minilora.kernels.cpu import library, passes

BF16 = torch.bfloat16
WIDTHS = [1, 2, 7, 15, 16, 17, 33, 64, 100]
GELU = (2 / torch.pi) ** 0.5

pytestmark = pytest.mark.skipif(
    not passes.takes(torch.ones(1, dtype=BF16)), reason="no C compiler, or no AVX2"
)


@pytest.fixture(params=["built", "plain"])
def native(request, tmp_path_factory, monkeypatch):
    """The library as it is here, and as it is where there is no AVX2."""
    if request.param == "plain":
        folder = tmp_path_factory.mktemp("plain")
        tried = (library.build(folder, c, ("-DPLAIN",)) for c in library.compilers())
        found = next(one for one in tried if one is not None)
        monkeypatch.setattr(passes, "native", lambda: found)


def assert_rounded(found, true, times=1, room=2e-5):
    """Each number is the nearest of bf16's, so many times, up to what f32 leaves open."""
    assert found.dtype == BF16
    half = true.abs() * 2.0**-8 * times * (1 + 2**-6) + true.abs().max() * room
    assert ((found.double() - true).abs() <= half).all()


def norm(x, weight, eps, offset):
    unit = x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    return (weight + (offset or 0)) * unit


def gated(gate, up, gelu):
    inner = 2 * GELU * (gate + 0.044715 * gate**3) if gelu else gate
    return gate / (1 + (-inner).exp()) * up


def turn(x, cos, sin):
    half = cos.shape[-1]
    pairs = torch.view_as_complex(
        torch.stack((x[..., :half], x[..., half : 2 * half]), -1).contiguous()
    ) * torch.complex(cos, sin)
    return torch.cat((pairs.real, pairs.imag, x[..., 2 * half :]), -1)


def in_torch(x, cos, sin):
    half = cos.shape[-1]
    a, b, rest = x.split([half, half, x.shape[-1] - 2 * half], -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1)


def gradients(function, inputs, grad_out, *rest):
    leaves = [t.double().requires_grad_() for t in inputs]
    return torch.autograd.grad(function(*leaves, *rest), leaves, grad_out.double())


@pytest.mark.parametrize("offset", [None, 0, 1])
@settings(max_examples=20, deadline=None)
@given(rows=st.integers(0, 6), width=st.sampled_from(WIDTHS), seed=st.integers(0, 99))
def test_the_norm(offset, rows, width, seed):
    torch.manual_seed(seed)
    x, grad_out = torch.randn(2, rows, width).to(BF16)
    weight = torch.randn(width).to(BF16)
    y = passes.norm_pass(x, weight, 1e-5, offset)
    true = norm(x.double(), weight.double(), 1e-5, offset)
    if offset is None:  # the unit row is rounded, too
        assert ((y.double() - true).abs() <= true.abs() * 2.0**-7 * 1.01).all()
    elif rows:
        assert_rounded(y, true)
    grad = passes.norm_back_pass(grad_out, x, weight, 1e-5, offset or 0)
    if rows:
        (wanted,) = gradients(lambda x: norm(x, weight.double(), 1e-5, offset), [x], grad_out)
        # What is left of two terms that nearly cancel in narrow rows.
        terms = (grad_out.double() * (weight.double() + (offset or 0))).abs().max()
        scale = terms / x.double().pow(2).mean(-1).add(1e-5).sqrt().min()
        assert ((grad.double() - wanted).abs() <= wanted.abs() * 2.0**-8 + scale * 1e-5).all()


@pytest.mark.parametrize("gelu", [False, True])
@settings(max_examples=20, deadline=None)
@given(count=st.sampled_from([0, 1, 15, 16, 4095, 4097, 9000]), seed=st.integers(0, 99))
def test_the_gates(gelu, count, seed):
    torch.manual_seed(seed)
    gate, up, grad_out = (torch.randn(3, count) * 4).to(BF16)
    y, grads = passes.gated_pass(gate, up, gelu), passes.gated_back_pass(grad_out, gate, up, gelu)
    if count:
        assert_rounded(y, gated(gate.double(), up.double(), gelu), times=2)
        for mine, true in zip(grads, gradients(gated, [gate, up], grad_out, gelu), strict=True):
            assert_rounded(mine, true)


@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(0, 5)),
    half=st.sampled_from([1, 4, 16, 20]),
    rest=st.sampled_from([0, 1, 6]),
    own=st.booleans(),
    seed=st.integers(0, 99),
)
def test_rotary_embeddings(shape, half, rest, own, seed):
    torch.manual_seed(seed)
    (B, H, T), D = shape, 2 * half + rest
    x = torch.randn(B, T, H, D).to(BF16).transpose(1, 2)  # as models have it
    angle = torch.randn(B if own else 1, 1, T, half)
    cos, sin = angle.cos().to(BF16), angle.sin().to(BF16)
    there = passes.rotary_pass(x, cos, sin, False)
    back = passes.rotary_pass(x, cos, sin, True)
    assert there.is_contiguous()
    assert back.stride() == x.stride()
    if x.numel():
        # To the bit what torch's operations make, since models are compared with other libraries'.
        assert torch.equal(there, in_torch(x, cos, sin))
        assert torch.equal(back, in_torch(x, cos, -sin))
        assert torch.equal(there[..., 2 * half :], x[..., 2 * half :])


def operands():
    torch.manual_seed(3)
    x, up, grad_out = torch.randn(3, 2, 5, 3, 40).to(BF16)
    cos = torch.randn(1, 1, 5, 16).to(BF16)
    return {
        "norm_pass": (x, x[0, 0, 0], 1e-5, 1),
        "norm_back_pass": (grad_out, x, x[0, 0, 0], 1e-5, 1),
        "gated_pass": (x, up, True),
        "gated_back_pass": (grad_out, x, up, False),
        "rotary_pass": (x.transpose(1, 2), cos, cos, True),
    }


def listed(found):
    return [found] if isinstance(found, torch.Tensor) else list(found)


@pytest.mark.parametrize("name", operands())
def test_all_are_right_without_avx2(name, native):
    inputs = operands()[name]
    found = listed(getattr(passes, name)(*inputs))
    wide = {
        "norm_pass": norm,
        "norm_back_pass": lambda g, x, w, eps, offset: gradients(
            lambda x: norm(x, w, eps, offset), [x], g
        ),
        "gated_pass": gated,
        "gated_back_pass": lambda g, a, b, gelu: gradients(gated, [a, b], g, gelu),
        "rotary_pass": lambda x, cos, sin, back: turn(x, cos, -sin if back else sin),
    }[name](*(t.double() if isinstance(t, torch.Tensor) else t for t in inputs))
    for mine, true in zip(found, listed(wide), strict=True):
        assert_rounded(mine, true, times=3 if name == "rotary_pass" else 2, room=1e-2)


@pytest.mark.parametrize("name", operands())
def test_the_operations_are_well_formed(name):
    inputs = operands()[name]
    torch.library.opcheck(getattr(torch.ops.minilora, name), inputs)
    turned = [
        t.mT.contiguous().mT if isinstance(t, torch.Tensor) and t.dim() > 2 else t for t in inputs
    ]
    torch.library.opcheck(getattr(torch.ops.minilora, name), turned)  # in another order in memory
    threads = torch.get_num_threads()
    try:
        alone = []
        for count in (1, 2):
            torch.set_num_threads(count)
            alone.append(listed(getattr(passes, name)(*inputs)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*alone, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_so(bad):
    x, other = torch.ones(3, 20, dtype=BF16), torch.ones(20, dtype=BF16)
    x[1, 4] = bad
    for found in (
        passes.norm_pass(x, other, 1e-5, None),
        passes.norm_back_pass(x, x, other, 1e-5, 0),
        passes.gated_pass(x, torch.ones_like(x), False),
        passes.gated_pass(x, torch.ones_like(x), True),
        *passes.gated_back_pass(x, x, torch.ones_like(x), False),
    ):
        assert not found[1].isfinite().all()
        assert found[[0, 2]].isfinite().all()


@pytest.mark.parametrize("gelu", [False, True])
def test_far_out_a_gate_is_a_line_and_zero(gelu):
    gate = torch.tensor([200.0, 1e4, 3e38]).to(BF16)
    assert torch.equal(passes.gated_pass(gate, torch.ones_like(gate), gelu), gate)
    left = passes.gated_pass(-gate[:2], torch.ones(2, dtype=BF16), gelu)
    assert left.abs().max() < 1e-30
    gate = gate[: 2 if gelu else 3]  # the square of 3e38 is infinite, in torch's derivative, too
    for mine in passes.gated_back_pass(torch.ones_like(gate), gate, gate, gelu):
        assert torch.equal(mine, gate)


def test_who_takes_them(monkeypatch):
    x = torch.ones(4, 8, dtype=BF16)
    assert passes.takes(x, torch.nn.Parameter(x))
    assert not passes.takes(x, x.float())
    assert not passes.takes(x.to("meta"))
    assert not passes.takes(x.as_subclass(type("Own", (torch.Tensor,), {})))
    seen = []
    torch.func.vmap(lambda row: (seen.append(passes.takes(row)), row)[1])(x)
    torch.func.jvp(lambda row: (seen.append(passes.takes(row)), row)[1], (x,), (x,))
    torch.compile(lambda row: (seen.append(passes.takes(row)), row)[1], backend="eager")(x)
    assert seen == [False] * 3
    monkeypatch.setattr(passes, "native", lambda: None)
    assert not passes.takes(x)


def test_models_take_them_and_get_what_torch_makes(monkeypatch):
    """With gradients, without, and where nothing can be compiled."""
    torch.manual_seed(0)
    x, up, grad_out = torch.randn(3, 2, 3, 5, 8).to(BF16)
    cos = torch.randn(1, 1, 5, 4).to(BF16)
    weight = torch.randn(8).to(BF16)
    calls = {
        "norm": lambda x: rms_norm(x, weight, 1e-5),
        "gated": lambda x: swiglu(x, up),
        "rotary": lambda x: rotary(x, cos, cos),
    }
    ran = []
    own = passes._run
    monkeypatch.setattr(passes, "_run", lambda name, *rest: ran.append(name) or own(name, *rest))

    def both(call):
        leaf = x.clone().requires_grad_()
        y = call(leaf)
        return y.detach(), *torch.autograd.grad(y, leaf, grad_out)

    mine = {name: both(call) for name, call in calls.items()}
    assert ran == ["norm", "norm_back", "gated", "gated_back", "rotary", "rotary"]
    with torch.no_grad():
        assert all(torch.equal(call(x), mine[name][0]) for name, call in calls.items())
    monkeypatch.setattr(rowwise, "takes", lambda *_: False)
    for name, call in calls.items():
        for a, b in zip(mine[name], both(call), strict=True):
            torch.testing.assert_close(a, b, rtol=0.03, atol=0.03)
    assert len(ran) == 9


def test_second_derivatives_are_torchs():
    x = torch.randn(4, 8).to(BF16).requires_grad_()
    weight = torch.ones(8, dtype=BF16)
    (grad,) = torch.autograd.grad(
        (rms_norm(x, weight, 1e-5) * x.detach()).sum(), x, create_graph=True
    )
    assert torch.autograd.grad(grad.pow(2).sum(), x)[0].isfinite().all()


@pytest.mark.parametrize("name", operands())
def test_operands_of_another_size_or_dtype_are_refused(name):
    inputs = list(operands()[name])
    at = 2 if name == "norm_back_pass" else 1
    inputs[at] = inputs[at][..., 1:]
    with pytest.raises(ValueError, match=f"{name} takes .* pass operands of one layer"):
        getattr(passes, name)(*inputs)
    inputs[at] = operands()[name][at].float()
    with pytest.raises(
        TypeError, match=f"{name} takes .* in torch.bfloat16 .*, found torch.float32"
    ):
        getattr(passes, name)(*inputs)
    wide = [t.float() if isinstance(t, torch.Tensor) else t for t in operands()[name]]
    with pytest.raises(TypeError, match=f"{name} takes .* in torch.bfloat16"):  # all of them alike
        getattr(passes, name)(*wide)


def test_a_weight_of_another_size_is_broadcast_or_refused_as_by_torch():
    x = torch.randn(3, 4).to(BF16)
    assert torch.equal(
        rms_norm(x, torch.ones(1, dtype=BF16), 1e-5), rms_norm(x, torch.ones(4, dtype=BF16), 1e-5)
    )
    with pytest.raises(RuntimeError, match="size of tensor"):
        rms_norm(x, torch.ones(3, dtype=BF16), 1e-5)
