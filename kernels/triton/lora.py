"""The LoRA linear on Triton: two `torch.library` operators, and autograd between them.

    minilora::lora_linear           X, W, b, A, B, s, seed, p → Y, S
    minilora::lora_linear_backward  G, X, W, A, B, S, s, seed, p, wanted → grad_X, grad_A, grad_B

The operators are for code that is traced. Eager code runs their bodies in an autograd Function, as
an operator costs the host more than all its launches.

W comes as `[K, N]` (a transposed view of nn.Linear's). Kept for backward: X, S and the factors;
the dropout mask is made again from the seed. Launches are listed by plain functions, so that the
same list can be run, compiled ahead of time and counted.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..workspace import is_plain
from .launch import Launch, architecture, cdiv, precision, run_all
from .lora_backward import launch_expand, launch_sum, launch_tall
from .lora_forward import launch_gemm, launch_shrink
from .tiles import expand_tile, gemm_tile, shrink_tile, splits_for, tall_tile


def plan_gemm(
    x: Tensor, w: Tensor, bias: Tensor | None, s: Tensor, b: Tensor, scale: float,
    seed: Tensor | None, p: float, y: Tensor, arch: int,
) -> Launch:  # fmt: skip
    """Return the launch that fills `y [M, N]`: the forward's, or the input gradient's."""
    tile = gemm_tile(x.shape[0], w.shape[1], b.shape[0], x.dtype, arch, precision(x))
    return launch_gemm(x, w, bias, s, b, scale, seed, p, y, tile)


def plan_shrink(
    x: Tensor, A: Tensor, seed: Tensor | None, p: float, s: Tensor, scale: float, arch: int
) -> Launch:
    """Return the launch that fills `s [M, R]`."""
    tile = shrink_tile(x.shape[0], A.shape[0], x.dtype, arch, precision(x))
    return launch_shrink(x, A, seed, p, s, scale, tile)


def _partials(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def plan_tall(
    u: Tensor, x: Tensor, seed: Tensor | None, p: float, out: Tensor, scale: float, arch: int
) -> list[Launch]:
    """Return the launches that fill `out [R, K]` with `scale / (1 − p) · uᵀ (x ∘ D)`."""
    (M, R), K = u.shape, x.shape[1]
    tile = tall_tile(R, x.dtype, arch)
    slices = splits_for(cdiv(K, tile.k) * cdiv(R, tile.r), cdiv(M, tile.m), 64)
    sums = _partials(x, slices, R, K)
    scale = scale / (1 - p) if seed is not None else scale
    return [launch_tall(u, x, seed, p, sums, tile), launch_sum(sums, out, scale)]


def plan_factors(
    grad_out: Tensor, x: Tensor, A: Tensor, B: Tensor, s: Tensor, scaling: float,
    seed: Tensor | None, p: float, grad_s: Tensor, grad_A: Tensor | None, grad_B: Tensor | None,
    arch: int,
) -> list[Launch]:  # fmt: skip
    """Return the launches that fill grad_s `[M, R]` and what is given of grad_A, grad_B."""
    (M, N), R = grad_out.shape, A.shape[0]
    launches: list[Launch] = []
    tile = expand_tile(R, grad_out.dtype, arch)

    if tile is None or grad_B is None:
        launches.append(plan_shrink(grad_out, B.t(), None, 0.0, grad_s, scaling, arch))
        if grad_B is not None:
            launches += plan_tall(s, grad_out, None, 0.0, grad_B.t(), scaling, arch)
    else:
        blocks = cdiv(M, tile.m)
        splits = splits_for(blocks, cdiv(N, tile.n))
        sums = _partials(x, blocks, R, N)
        if splits == 1:
            launches.append(launch_expand(grad_out, B, s, grad_s[None], sums, scaling, tile))
        else:
            pieces = _partials(x, splits, M, R)
            launches.append(launch_expand(grad_out, B, s, pieces, sums, 1.0, tile))
            launches.append(launch_sum(pieces, grad_s, scaling))
        launches.append(launch_sum(sums, grad_B.t(), scaling))
    if grad_A is not None:
        launches += plan_tall(grad_s, x, seed, p, grad_A, 1.0, arch)
    return launches


def new_gradients(tensors: Sequence[Tensor], wanted: list[bool]) -> list[Tensor]:
    """Return an uninitialised tensor like each, of no element where none is wanted."""
    pairs = zip(tensors, wanted, strict=True)
    return [t.new_empty(t.shape if want else (0,)) for t, want in pairs]


def _forward(
    x: Tensor, w: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float,
    seed: Tensor | None, p: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    y = x.new_empty(x.shape[0], w.shape[1])
    s = x.new_empty(x.shape[0], A.shape[0])
    w, A, B = (t.to(x.dtype) for t in (w, A, B))
    arch = architecture(x.device)
    shrink = plan_shrink(x, A, seed, p, s, 1.0, arch)
    gemm = plan_gemm(x, w, bias, s, B.t(), scaling, None, 0.0, y, arch)
    run_all([shrink, gemm], not is_plain(x))
    return y, s


def _backward(
    grad_out: Tensor, x: Tensor, w: Tensor, A: Tensor, B: Tensor, s: Tensor, scaling: float,
    seed: Tensor | None, p: float, wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grad_x, grad_A, grad_B = new_gradients((x, A, B), wanted)
    grad_s = s.new_empty(s.shape)
    w, narrow_A, narrow_B = (t.to(x.dtype) for t in (w, A, B))
    arch = architecture(x.device)
    launches = plan_factors(
        grad_out, x, narrow_A, narrow_B, s, scaling, seed, p, grad_s,
        grad_A if wanted[1] else None, grad_B if wanted[2] else None, arch,
    )  # fmt: skip
    if wanted[0]:
        launches.append(
            plan_gemm(grad_out, w.t(), None, grad_s, narrow_A, 1.0, seed, p, grad_x, arch)
        )
    run_all(launches, not is_plain(grad_out))
    return grad_x, grad_A, grad_B


_forward_op = torch.library.triton_op("minilora::lora_linear", mutates_args={})(_forward)
_backward_op = torch.library.triton_op("minilora::lora_linear_backward", mutates_args={})(_backward)


@_forward_op.register_fake
def _forward_shape(x, w, bias, A, B, scaling, seed, p):
    return x.new_empty((x.shape[0], w.shape[1])), x.new_empty((x.shape[0], A.shape[0]))


@_backward_op.register_fake
def _backward_shape(grad_out, x, w, A, B, s, scaling, seed, p, wanted):
    return tuple(new_gradients((x, A, B), wanted))


def _keep(ctx, inputs, output):
    x, w, _, A, B, scaling, seed, p = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, w, A, B, output[1], seed)
    ctx.scaling, ctx.p = scaling, p


def _differentiate(ctx, grad_out, _):
    if grad_out is None:
        return (None,) * 8
    x, w, A, B, s, seed = ctx.saved_tensors
    wanted = [ctx.needs_input_grad[i] for i in (0, 3, 4)]
    traced = torch.is_grad_enabled() or not is_plain(grad_out)
    backward = torch.ops.minilora.lora_linear_backward if traced else _backward
    grads = backward(grad_out.to(x.dtype), x, w, A, B, s, ctx.scaling, seed, ctx.p, wanted)
    grad_x, grad_A, grad_B = (g if want else None for g, want in zip(grads, wanted, strict=True))
    return grad_x, None, None, grad_A, grad_B, None, None, None


_forward_op.register_autograd(_differentiate, setup_context=_keep)


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        output = _forward(*inputs)
        _keep(ctx, inputs, output)
        return output

    backward = staticmethod(_differentiate)


def lora_dense(
    x: Tensor, w: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float,
    seed: Tensor | None = None, p: float = 0.0,
) -> Tensor:  # fmt: skip
    """Compute `x w + bias + scaling · D(x) Aᵀ Bᵀ` by two kernels, backward by five.

    Args:
        x: `[M, K]` f32, f16 or bf16, any strides; kept for backward.
        w: `[K, N]`, frozen, any strides; cast to x's dtype.
        bias: `[N]` or None.
        A: `[R, K]`, any floating dtype, cast to x's for the products; its gradient is rounded once,
            from f32 sums.
        B: `[N, R]`, as A.
        scaling: alpha / r, or alpha / sqrt(r) under rsLoRA.
        seed: int64 `[S]`, one for each M / S rows, that the dropout mask is a hash of; or None.
        p: the probability to drop.

    Returns:
        `[M, N]` in x's dtype.
    """
    if is_plain(x):
        return _Eager.apply(x, w, bias, A, B, float(scaling), seed, float(p))[0]
    return torch.ops.minilora.lora_linear(x, w, bias, A, B, scaling, seed, p)[0]
