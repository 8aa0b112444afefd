"""Every autograd Function of ours, traced by torch.compile, has its gradients untraced.

torch 2.11 gives zeros, without a word, for one whose output it also takes for an intermediate:
changed in place, or handed on by a `.to()` that changes nothing.
"""

import importlib
import pkgutil

import pytest
import torch

import minilora
from minilora.kernels import (
    FrozenLinear,
    conv1d_forward,
    conv1d_grad_x,
    dense_forward,
    dense_grad_x,
    drop,
    frozen_product,
    geglu,
    lora_linear,
    rms_norm,
    rotary,
    swiglu,
)
from minilora.kernels.attention import _CausalAttention
from minilora.kernels.cross_entropy import _LinearCrossEntropy
from minilora.kernels.dropout import _Drop
from minilora.kernels.frozen import _Frozen
from minilora.kernels.low_rank import _LoRALinear
from minilora.kernels.rowwise import _Gated, _RMSNorm, _Rotary
from minilora.kernels.triton import OLDEST, version
from minilora.quantization import Quantization
from minilora.quantization.linear import QuantizedLinear

M, K, N, R = 9, 128, 24, 3


def base(kind, dtype=torch.float32):
    W, b = torch.randn(N, K), torch.randn(N).to(dtype)
    if kind == "dense":
        return FrozenLinear((W.to(dtype), b), dense_forward, dense_grad_x)
    if kind == "conv1d":
        return FrozenLinear((W.t().contiguous().to(dtype), b), conv1d_forward, conv1d_grad_x)
    format, _, compute = kind.partition(" ")
    how = {"compute": compute or "auto", "grad_compute": compute or "auto"}
    return QuantizedLinear.from_weight(W, Quantization(format, **how), bias=b).frozen()


def frozen(kind, dtype=torch.float32):
    linear = base(kind, dtype)
    return lambda x: frozen_product(x, linear), [torch.randn(M, K, dtype=dtype)]


def lora(kind, dtype=torch.float32, p=0.0):
    linear = base(kind, dtype)
    mask = torch.rand(M, K) >= p if p else None
    leaves = [torch.randn(M, K, dtype=dtype), torch.randn(R, K), torch.randn(N, R)]
    return lambda x, A, B: lora_linear(x, linear, A, B, 1.7, mask, p), leaves


def dropped():
    seeds = torch.tensor([5, 2**40 + 1, -3])
    return lambda x: drop(x, seeds, 0.4), [torch.randn(M, K)]


def attention(dtype):
    q, k = torch.randn(2, 4, 7, 8).to(dtype), torch.randn(2, 2, 7, 8).to(dtype)
    return lambda q, k, v: _CausalAttention.apply(q, k, v, 0.3), [q, k, k + 1]


def rotary_embedding(dtype):
    x, cos, sin = (torch.randn(2, 3, 5, 8).to(dtype), *torch.randn(2, 1, 1, 5, 4).to(dtype))
    return lambda x: rotary(x, cos, sin), [x]


def loss():
    labels = torch.randint(19, (M,))
    leaves = [torch.randn(M, 8), torch.randn(19, 8)]
    apply = _LinearCrossEntropy.apply
    return lambda hidden, weight: apply(hidden, weight, labels, False, None, False), leaves


def loss_by_row():
    labels, weight = torch.randint(19, (M,)), torch.randn(19, 8)
    apply = _LinearCrossEntropy.apply
    return lambda hidden: apply(hidden, weight, labels, False, None, True), [torch.randn(M, 8)]


KINDS = ["dense", "conv1d", "int8", "int8 dequantize", "nf4", "int4", "int4 dequantize"]
CASES = {
    _Frozen: [lambda kind=kind: frozen(kind) for kind in KINDS]
    + [lambda: frozen("dense", torch.bfloat16), lambda: frozen("int8", torch.bfloat16)],
    _LoRALinear: [lambda kind=kind: lora(kind) for kind in KINDS]
    + [lambda: lora("dense", p=0.5), lambda: lora("dense", torch.bfloat16)],
    _Drop: [dropped],
    _RMSNorm: [lambda: (lambda x, w: rms_norm(x, w, 1e-5), [torch.randn(M, K), torch.randn(K)])],
    _Gated: [
        lambda: (swiglu, [torch.randn(M, K), torch.randn(M, K)]),
        lambda: (geglu, [torch.randn(M, K), torch.randn(M, K)]),
    ],
    _Rotary: [lambda: rotary_embedding(torch.bfloat16)],
    _CausalAttention: [lambda: attention(torch.float32), lambda: attention(torch.bfloat16)],
    _LinearCrossEntropy: [loss, loss_by_row],
}


def gradients(call, leaves):
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    y = call(*leaves)
    weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).reshape(y.shape)
    return y.detach(), *torch.autograd.grad(y, leaves, weights)


@pytest.mark.parametrize(
    ("function", "number"),
    [(function, i) for function, cases in CASES.items() for i in range(len(cases))],
)
def test_compiled_gradients_equal_eager_ones(function, number):
    call, leaves = CASES[function][number]()
    torch._dynamo.reset()
    traced = torch.compile(call, backend="aot_eager", fullgraph=True)
    eager = gradients(call, leaves)
    assert all(found.any() for found in eager)
    for found, wanted in zip(gradients(traced, leaves), eager, strict=True):
        tolerance = 2e-2 if wanted.dtype == torch.bfloat16 else 1e-5
        scale = float(wanted.abs().max())
        torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance * scale)


def subclasses(kind):
    return {kind}.union(*map(subclasses, kind.__subclasses__()))


def test_no_function_is_left_out():
    for module in pkgutil.walk_packages(minilora.__path__, "minilora."):
        none = module.name.startswith("minilora.kernels.triton.") and (version() or (0,)) < OLDEST
        if module.name != "minilora.__main__" and not none:  # which is never imported then
            importlib.import_module(module.name)
    ours = {f for f in subclasses(torch.autograd.Function) if f.__module__.startswith("minilora.")}
    traced = {f for f in ours if not f.__name__.endswith(("Backward", "_Eager"))}
    assert traced == set(CASES)
