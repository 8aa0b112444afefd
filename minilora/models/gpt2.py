"""GPT-2 in plain PyTorch, with the module names of Hugging Face's `GPT2LMHeadModel`.

    h = E[ids] + P[positions]
    per block:  h += proj(attention(norm(h)));  h += proj(act(fc(norm(h))))
    logits = head(norm(h))

B sequences, T new tokens, S tokens attended to (cached ones and the new), V vocabulary.
The architecture: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners",
section 2.3; Radford et al. 2018, "Improving Language Understanding", section 3.1. Positions are
learned, a layer norm stands before each part, and linear maps are stored as `[in, out]`.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.files import short
from minilora.models.blocks import Slot, attend, extend
from minilora.models.causal import CausalLM
from minilora.models.config import ModelConfig
from minilora.models.gguf_names import Entries, GGUFNames
from minilora.models.not_built import NotBuiltError

_STD = 0.02  # of a fresh model's weights
# Checkpoints hold the causal mask and its fill value as if they were weights.
_MASKS = re.compile(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)")
_BODY = ("wte.", "wpe.", "h.", "ln_f.")

_tanh_gelu = partial(F.gelu, approximate="tanh")
# `activation_function`: several names of one formula are transformers' (its activations.py).
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_new": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "gelu_python_tanh": _tanh_gelu,
    "gelu_fast": _tanh_gelu,
    "gelu_accurate": _tanh_gelu,
    "gelu": F.gelu,
    "gelu_python": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
}


@dataclass(frozen=True)
class GPT2Config(ModelConfig):
    """Hold the numbers that define a GPT-2 model; names and defaults are Hugging Face's.

    Transformers' common names (`hidden_size`, `num_hidden_layers`, …) can be read too.

    Args:
        vocab_size: rows of the embedding and of the output head.
        n_positions: longest sequence, in tokens: rows of the position embedding.
        n_embd: width of the residual stream.
        n_layer: blocks.
        n_head: attention heads; divides `n_embd`.
        n_inner: width inside the MLP; None is 4 · n_embd.
        activation_function: of the MLP, a key of `ACTIVATIONS`.
        layer_norm_epsilon: added to the variance in the layer norms.
        scale_attn_weights: whether attention scores are divided by sqrt(head_dim).
        scale_attn_by_inverse_layer_idx: whether those of block i (from 0) are divided by i + 1.
        tie_word_embeddings: whether the head is the embedding matrix.
        resid_pdrop, embd_pdrop, attn_pdrop: kept to be written back: `GPT2` applies no dropout.
        bos_token_id, pad_token_id: beginning of sequence, padding; or None.
        eos_token_id: end of sequence: one id, several, or None.
    """

    model_type = "gpt2"
    architecture = "GPT2LMHeadModel"
    neutral: ClassVar = {"reorder_and_upcast_attn": (None, False), "pruned_heads": (None, {})}
    aliases: ClassVar = {
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    tie_word_embeddings: bool = True
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    bos_token_id: int | None = 50256
    eos_token_id: int | list[int] | None = 50256
    pad_token_id: int | None = None

    hidden_size = property(lambda self: self.n_embd)
    max_position_embeddings = property(lambda self: self.n_positions)
    num_attention_heads = num_key_value_heads = property(lambda self: self.n_head)
    num_hidden_layers = property(lambda self: self.n_layer)

    def __post_init__(self) -> None:
        super().__post_init__()
        name = self.activation_function
        if not isinstance(name, str) or name not in ACTIVATIONS:
            raise NotBuiltError(
                f"activation_function={short(name)} is not built: it must be one of "
                f"{', '.join(ACTIVATIONS)}; use a model with one of them"
            )
        if self.n_embd % self.n_head:
            raise ValueError(
                f"n_head must divide n_embd, found {self.n_head} and {self.n_embd}; correct "
                f"config.json"
            )

    @property
    def intermediate_size(self) -> int:
        """Width inside the MLP."""
        return 4 * self.n_embd if self.n_inner is None else self.n_inner

    @property
    def head_dim(self) -> int:
        """Width of one head, `n_embd / n_head`."""
        return self.n_embd // self.n_head


class Conv1D(nn.Module):
    """Apply y = x W + b with W stored as `[in, out]`, as OpenAI's GPT-2 does.

    A fresh W is normal with standard deviation 0.02, b zero.

    Args:
        nf, nx: widths of output and input.
        dtype, device: of weight `[nx, nf]` and bias `[nf]`.
    """

    def __init__(self, nf: int, nx: int, *, dtype=None, device=None) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.empty(nx, nf, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.zeros(nf, dtype=dtype, device=device))
        if not self.weight.is_meta:  # there is nothing to draw there, and it takes its time
            nn.init.normal_(self.weight, std=_STD)

    def forward(self, x: Tensor) -> Tensor:
        """Return `[..., nf]` for x `[..., nx]`."""
        y = torch.addmm(self.bias, x.reshape(-1, self.nx), self.weight)
        return y.view(*x.shape[:-1], self.nf)

    def extra_repr(self) -> str:
        """Show the widths when printed."""
        return f"nf={self.nf}, nx={self.nx}"


class Attention(nn.Module):
    """Attend with as many key and value heads as query heads, all from one projection."""

    def __init__(self, config: GPT2Config, layer: int, *, dtype=None, device=None) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.scale = config.head_dim**-0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= layer + 1
        made = {"dtype": dtype, "device": device}
        self.c_attn = Conv1D(3 * config.n_embd, config.n_embd, **made)
        self.c_proj = Conv1D(config.n_embd, config.n_embd, **made)

    def forward(self, x: Tensor, mask: Tensor | None, slot: Slot | None) -> Tensor:
        """Return `[B, T, n_embd]`; without a mask position t sees positions 0 to t."""
        split = (*x.shape[:2], -1, self.head_dim)
        q, k, v = (part.view(split).transpose(1, 2) for part in self.c_attn(x).chunk(3, dim=-1))
        if slot is not None:
            k, v = extend(slot, k, v)
        out = attend(q, k, v, mask, self.scale)
        return self.c_proj(out.transpose(1, 2).reshape(*x.shape[:2], -1))


class MLP(nn.Module):
    """Apply a linear map, the activation and a linear map back."""

    def __init__(self, config: GPT2Config, *, dtype=None, device=None) -> None:
        super().__init__()
        size, inner = config.n_embd, config.intermediate_size
        self.c_fc = Conv1D(inner, size, dtype=dtype, device=device)
        self.c_proj = Conv1D(size, inner, dtype=dtype, device=device)
        self.act = ACTIVATIONS[config.activation_function]

    def forward(self, x: Tensor) -> Tensor:
        """Return `proj(act(fc(x)))`."""
        return self.c_proj(self.act(self.c_fc(x)))


class Block(nn.Module):
    """Add attention and then the MLP to the residual stream, each after a norm."""

    window = rope = None

    def __init__(self, config: GPT2Config, layer: int, *, dtype=None, device=None) -> None:
        super().__init__()
        made = {"dtype": dtype, "device": device}
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon, **made)
        self.attn = Attention(config, layer, **made)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon, **made)
        self.mlp = MLP(config, **made)

    def forward(self, x: Tensor, mask: Tensor | None, slot: Slot | None) -> Tensor:
        """Return `[B, T, n_embd]`."""
        x = x + self.attn(self.ln_1(x), mask, slot)
        return x + self.mlp(self.ln_2(x))


class Body(nn.Module):
    """What Hugging Face's checkpoints call `transformer`: everything but the head."""

    def __init__(self, config: GPT2Config, *, dtype=None, device=None) -> None:
        super().__init__()
        made = {"dtype": dtype, "device": device}
        self.wte = nn.Embedding(config.vocab_size, config.n_embd, **made)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd, **made)
        self.h = nn.ModuleList(Block(config, layer, **made) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon, **made)


def _of_gguf(entries: Entries) -> Entries:
    """An MLP of the usual width is not stated."""
    width = entries["intermediate_size"]
    return entries | {"n_inner": None if width == 4 * entries["n_embd"] else width}


_GGUF = GGUFNames(
    architecture="gpt2",
    required={
        "context_length": "n_positions",
        "embedding_length": "n_embd",
        "feed_forward_length": "intermediate_size",
        "block_count": "n_layer",
        "attention.head_count": "n_head",
        "attention.layer_norm_epsilon": "layer_norm_epsilon",
    },
    optional={"vocab_size": "vocab_size"},
    equal={"attention.head_count_kv": "num_key_value_heads"},
    neutral={"attention.causal": (True,)},
    biases={},
    whole={
        "token_embd": "transformer.wte",
        "position_embd": "transformer.wpe",
        "output_norm": "transformer.ln_f",
        "output": "lm_head",
    },
    parts={
        "attn_norm": "ln_1",
        "attn_qkv": "attn.c_attn",
        "attn_output": "attn.c_proj",
        "ffn_norm": "ln_2",
        "ffn_up": "mlp.c_fc",
        "ffn_down": "mlp.c_proj",
    },
    completed=_of_gguf,
    turned=("attn_qkv", "attn_output", "ffn_up", "ffn_down"),
)


class GPT2(CausalLM):
    """Compute next-token logits as Hugging Face's `GPT2LMHeadModel` does in evaluation mode.

    Dropout of the model is never applied, in training mode either (`resid_pdrop`, `embd_pdrop` and
    `attn_pdrop` are only kept for the configuration): what LoRA trains is regularised by the
    adapters' own dropout. Fresh matrices are normal with standard deviation 0.02, the maps back to
    the residual stream (`c_proj`) with 0.02 / sqrt(2 · n_layer) (Radford et al. 2019, section 2.3).
    """

    config_class = GPT2Config
    embedding_name, blocks_name, norm_name = "transformer.wte", "transformer.h", "transformer.ln_f"
    end_of_text = "<|endoftext|>"  # OpenAI's own folder names no special token
    gguf = _GGUF
    transformer: Body

    def body(self, **made: Any) -> nn.Module:
        """Make the embeddings, the blocks and the last norm."""
        return Body(self.config, **made)

    def _deviation(self, name: str) -> float:
        return _STD / (2 * self.config.n_layer) ** 0.5 if name.endswith(".c_proj.weight") else _STD

    @staticmethod
    def stored_fqn(name: str) -> str | None:
        """Put `transformer.` before the names of OpenAI's own weights, pass over causal masks."""
        if _MASKS.fullmatch(name):
            return None
        return f"transformer.{name}" if name.startswith(_BODY) else name

    def begin(self, ids: Tensor, positions: Tensor) -> tuple[Tensor, dict[Any, tuple]]:
        """Add the embeddings of ids and positions; blocks take nothing beside."""
        return self.transformer.wte(ids) + self.transformer.wpe(positions.long()), {None: ()}
