"""What families are built of: cache, RMS norm, attention, gated MLP, a layer.

B sequences, T new tokens, S tokens attended to (cached ones and the new).
The architecture: Touvron et al. 2023, "LLaMA", section 2.2; rotary embeddings lie in `rotary.py`.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.kernels import capped_attention, causal_attention, on_cpu, rms_norm, swiglu
from minilora.models.config import DecoderConfig
from minilora.models.rotary import Rotation, rotate

Slot = tuple[Tensor, Tensor, int]  # keys and values [B, kv_heads, room, D], held


class KVCache:
    """Hold the keys and values of the tokens read so far, in memory taken once.

    Args:
        model: a `CausalLM`, whose shape, dtype and device the cache gets.
        batch: sequences side by side.
        max_length: tokens per sequence there is room for.

    Attributes:
        length: tokens held so far, the same for every sequence. Lower it to forget the newest.

    Raises:
        ValueError: `batch` or `max_length` below 1.
    """

    def __init__(self, model: Any, batch: int, max_length: int) -> None:
        if batch < 1 or max_length < 1:
            raise ValueError(
                f"a KVCache needs batch and max_length of 1 or more, found {batch} and {max_length}"
            )
        config = model.config
        # The norm's dtype: the head and the projections may be quantized.
        like = model.get_submodule(model.norm_name).weight
        shape = (batch, config.num_key_value_heads, max_length, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.keys = [torch.empty(shape, dtype=like.dtype, device=like.device) for _ in layers]
        self.values = [torch.empty_like(keys) for keys in self.keys]
        self.batch, self.max_length, self.length = batch, max_length, 0

    def check_room(self, batch: int, tokens: int) -> None:
        """Raise unless `tokens` more of `batch` sequences fit."""
        if batch != self.batch:
            raise ValueError(
                f"the cache was made for {self.batch} sequences, found a batch of {batch}; "
                f"make a cache of that batch"
            )
        if self.length + tokens > self.max_length:
            raise ValueError(
                f"the cache holds at most {self.max_length} tokens: {self.length} are in it and "
                f"{tokens} more do not fit; make a cache with a larger max_length"
            )

    def take(self, rows: Sequence[int]) -> None:
        """Hold these sequences from now on, by their numbers; one may come more than once."""
        index = torch.tensor(rows, device=self.keys[0].device)
        for held in (self.keys, self.values):
            for i, old in enumerate(held):
                held[i] = old.new_empty(len(rows), *old.shape[1:])
                held[i][:, :, : self.length] = old[:, :, : self.length].index_select(0, index)
        self.batch = len(rows)

    def slot(self, layer: int) -> Slot:
        """Return what one layer writes into: its keys, its values, and how many are held.

        `length` moves once per forward pass, by the model, when every layer has written.
        """
        return self.keys[layer], self.values[layer], self.length


def extend(slot: Slot, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Write `[B, kv_heads, T, head_dim]` after what a layer holds and return all of it."""
    keys, values, length = slot
    end = length + k.shape[2]
    keys[:, :, length:end] = k
    values[:, :, length:end] = v
    return keys[:, :, :end], values[:, :, :end]


class RMSNorm(nn.Module):
    """Scale each row to unit mean square, times a weight; f32 inside for narrower inputs.

    Attributes:
        offset: what a family adds to the stored weight, where it also weights in f32; see
            `kernels.rms_norm`.
    """

    # An int: torch 2.13 can't trace two norms that take one class's float.
    offset: ClassVar[int | None] = None

    def __init__(self, size: int, eps: float, *, dtype=None, device=None) -> None:
        super().__init__()
        self.eps = eps
        fresh = 1.0 - (self.offset or 0)
        self.weight = nn.Parameter(torch.full((size,), fresh, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """Return `(weight + offset) · x / sqrt(mean(x²) + eps)` in x's dtype."""
        return rms_norm(x, self.weight, self.eps, self.offset)

    def extra_repr(self) -> str:
        """Show size and eps when printed."""
        return f"{self.weight.shape[0]}, eps={self.eps}"


class SharedPrefix(NamedTuple):
    """Rows that begin alike, laid out as one: `[1, P + B·(T - P)]`, the P shared tokens come once.

    Attention alone looks at rows, so it alone needs them apart.
    """

    tokens: int  # P
    rows: int  # B
    mask: Tensor | None  # [T, T] or None, as `attend` takes it

    def rest(self, x: Tensor) -> Tensor:
        """Return what rows have of their own, `[B, heads, T - P, D]` of `[1, heads, …, D]`."""
        return x.transpose(1, 2)[0, self.tokens :].unflatten(0, (self.rows, -1)).transpose(1, 2)

    def whole(self, x: Tensor) -> Tensor:
        """Return the rows, `[B, heads, T, D]` of `[1, heads, …, D]`."""
        first = x[:, :, : self.tokens].expand(self.rows, -1, -1, -1)
        return torch.cat((first, self.rest(x)), 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *options: Any) -> Tensor:
        """Attend `[1, heads, …, D]`: the shared tokens to themselves, and what follows to both."""
        start, mask = self.tokens, self.mask
        above, below = (None, None) if mask is None else (mask[:start, :start], mask[start:])
        # Copied, so that autograd keeps no more of the keys than these.
        keys, values = (x[:, :, :start].contiguous() for x in (k, v))
        first = attend(q[:, :, :start], keys, values, above, *options)
        rest = attend(self.rest(q), self.whole(k), self.whole(v), below, *options)
        return torch.cat((first.transpose(1, 2), rest.transpose(1, 2).flatten(0, 1)[None]), 1)


Mask = Tensor | SharedPrefix | None  # None: the causal rule


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, cap: float | None = None
) -> Tensor:
    """Attend the last T of S tokens, `[B, heads, T, D]` to `[B, kv_heads, S, D]`.

    Without a mask each sees itself and those before it.
    """
    if isinstance(mask, SharedPrefix):
        return mask.attend(q, k, v, scale, cap).transpose(1, 2)
    if cap is not None:
        return capped_attention(q, k, v, mask, scale, cap)
    # One new token may see everything, so it needs no mask and is not "causal" in SDPA's sense,
    # which aligns the first query with the first key.
    if mask is None and q.shape[2] > 1:
        return causal_attention(q, k, v, scale)
    if mask is not None and not on_cpu(q) and q.shape[1] > k.shape[1]:
        # A GPU's kernels take a mask or grouped heads; given both torch would form all scores.
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)


class Attention(nn.Module):
    """Attend with grouped queries: several query heads share one key and value head.

    A family with other projections overrides `add_projections` and `heads`.
    """

    def __init__(self, config: DecoderConfig, *, dtype=None, device=None) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.scale, self.cap = config.attention_scale, config.attention_cap
        wide = config.num_attention_heads * config.head_dim
        narrow = config.num_key_value_heads * config.head_dim
        made = {"dtype": dtype, "device": device}
        self.add_projections(config.hidden_size, wide, narrow, bias=config.qkv_bias, **made)
        self.o_proj = nn.Linear(wide, config.hidden_size, bias=config.attention_bias, **made)

    def add_projections(self, size: int, wide: int, narrow: int, **options: Any) -> None:
        """Make what `heads` runs, from `size` to `wide` (queries) and `narrow` (keys, values)."""
        self.q_proj = nn.Linear(size, wide, **options)
        self.k_proj = nn.Linear(size, narrow, **options)
        self.v_proj = nn.Linear(size, narrow, **options)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return unrotated queries `[B, heads, T, head_dim]`, and keys and values of `kv_heads`."""
        split = (*x.shape[:2], -1, self.head_dim)
        return (
            self.q_proj(x).view(split).transpose(1, 2),
            self.k_proj(x).view(split).transpose(1, 2),
            self.v_proj(x).view(split).transpose(1, 2),
        )

    def forward(self, x: Tensor, rotation: Rotation, mask: Mask, slot: Slot | None) -> Tensor:
        """Return `[B, T, hidden]`; without a mask position t sees positions 0 to t."""
        q, k, v = self.heads(x)
        q, k = rotate(q, rotation), rotate(k, rotation)
        if slot is not None:
            k, v = extend(slot, k, v)
        out = attend(q, k, v, mask, self.scale, self.cap)
        return self.o_proj(out.transpose(1, 2).reshape(*x.shape[:2], -1))


class MLP(nn.Module):
    """Apply the SwiGLU block."""

    def __init__(self, config: DecoderConfig, *, dtype=None, device=None) -> None:
        super().__init__()
        size, inner = config.hidden_size, config.intermediate_size
        made = {"bias": config.mlp_bias, "dtype": dtype, "device": device}
        self.gate_proj = nn.Linear(size, inner, **made)
        self.up_proj = nn.Linear(size, inner, **made)
        self.down_proj = nn.Linear(inner, size, **made)

    def forward(self, x: Tensor) -> Tensor:
        """Return `down(silu(gate(x)) ⊙ up(x))`."""
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class DecoderLayer(nn.Module):
    """Add attention and then the SwiGLU block to the residual stream, each after a norm.

    A family with other parts names them in a subclass, its `CausalLM.layer_class`; one that norms
    elsewhere also has its own `forward`.

    Attributes:
        window: tokens that a token sees, itself among them; None: itself and all before it.
        rope: how queries and keys are rotated; None: not at all.
    """

    attention_class: ClassVar[type[nn.Module]] = Attention
    mlp_class: ClassVar[type[nn.Module]] = MLP
    norm_class: ClassVar[type[RMSNorm]] = RMSNorm
    norms: ClassVar[tuple[str, ...]] = ("input_layernorm", "post_attention_layernorm")
    input_layernorm: RMSNorm
    post_attention_layernorm: RMSNorm

    def __init__(self, config: DecoderConfig, layer: int, *, dtype=None, device=None) -> None:
        super().__init__()
        self.window, self.rope = config.windows[layer], config.ropes[layer]
        made = {"dtype": dtype, "device": device}
        self.self_attn = self.attention_class(config, **made)
        self.mlp = self.mlp_class(config, **made)
        for name in self.norms:
            norm = self.norm_class(config.hidden_size, config.norm_eps, **made)
            self.add_module(name, norm)

    def forward(self, x: Tensor, rotation: Rotation, mask: Mask, slot: Slot | None) -> Tensor:
        """Return `[B, T, hidden]`."""
        x = x + self.self_attn(self.input_layernorm(x), rotation, mask, slot)
        return x + self.mlp(self.post_attention_layernorm(x))
