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
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from minilora.models.blocks import Slot, attend, extend
from minilora.models.causal import CausalLM, Transform
from minilora.models.gpt2_config import ACTIVATIONS, GPT2Config

_STD = 0.02  # of a fresh model's weights
# Checkpoints hold the causal mask and its fill value as if they were weights.
_MASKS = re.compile(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)")
_BODY = ("wte.", "wpe.", "h.", "ln_f.")


class Conv1D(nn.Module):
    """Apply a linear map whose weight is stored as `[in, out]`, as OpenAI's GPT-2 does.

    y = x W + b

    A fresh weight is normal with standard deviation 0.02, the bias zero.

    Args:
        nf: width of the output.
        nx: width of the input.
        dtype: of weight and bias; torch's default when None.
        device: where they lie.

    Attributes:
        nf, nx: as given.
        weight: `[nx, nf]`.
        bias: `[nf]`.
    """

    def __init__(self, nf: int, nx: int, *, dtype=None, device=None) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.empty(nx, nf, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.zeros(nf, dtype=dtype, device=device))
        if not self.weight.is_meta:  # there is nothing to draw there, and it takes its time
            nn.init.normal_(self.weight, std=_STD)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
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

    def forward(
        self, x: torch.Tensor, mask: torch.Tensor | None, slot: Slot | None
    ) -> torch.Tensor:
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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `proj(act(fc(x)))`."""
        return self.c_proj(self.act(self.c_fc(x)))


class Block(nn.Module):
    """Add attention and then the MLP to the residual stream, each after a norm."""

    def __init__(self, config: GPT2Config, layer: int, *, dtype=None, device=None) -> None:
        super().__init__()
        made = {"dtype": dtype, "device": device}
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon, **made)
        self.attn = Attention(config, layer, **made)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon, **made)
        self.mlp = MLP(config, **made)

    def forward(
        self, x: torch.Tensor, mask: torch.Tensor | None, slot: Slot | None
    ) -> torch.Tensor:
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


class GPT2(CausalLM):
    """Compute next-token logits as Hugging Face's `GPT2LMHeadModel` does in evaluation mode.

    Dropout of the model is never applied, in training mode either (`resid_pdrop`, `embd_pdrop` and
    `attn_pdrop` are only kept for the configuration): what LoRA trains is regularised by the
    adapters' own dropout. A fresh model is random: normal with standard deviation 0.02, the maps
    back to the residual stream (`c_proj`) with 0.02 / sqrt(2 · n_layer) (Radford et al. 2019,
    section 2.3), biases zero. `from_pretrained` reads one.

    Args:
        config: the model's shape, kept.
        dtype: of every parameter; torch's default when None.
        device: where they lie; `"meta"` takes no memory.

    Attributes:
        config: the `GPT2Config`; the others as in `CausalLM`.
    """

    context_name = "n_positions"

    def __init__(
        self,
        config: GPT2Config,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.transformer = Body(config, dtype=dtype, device=device)
        self.lm_head = nn.Linear(
            config.n_embd, config.vocab_size, bias=False, dtype=dtype, device=device
        )
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2 and not parameter.is_meta:
                residual = name.endswith(".c_proj.weight")
                std = _STD / (2 * config.n_layer) ** 0.5 if residual else _STD
                nn.init.normal_(parameter, std=std)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make the head's weight the embedding's own parameter where the config says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.transformer.wte.weight

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str = "cpu",
        transform: Transform | None = None,
    ) -> "GPT2":
        """Read a Hugging Face folder: `config.json` and safetensors, whole or sharded.

        Tensors may be named with or without `transformer.` in front. The causal masks that
        checkpoints hold (`h.0.attn.bias`, `h.0.attn.masked_bias`) are passed over.

        Args:
            folder: path of the folder.
            dtype: None as stored, `"auto"` the fastest here (`minilora.hardware().dtype`), or a
                floating-point torch dtype.
            device: where the weights go.
            transform: called per tensor as `transform(fqn, tensor)`, with the name in this model
                and the tensor already in dtype and on device; what it returns, of the same shape,
                is put in.

        Returns:
            The model in evaluation mode.

        Raises:
            ValueError: a configuration that is not built; files that are missing, damaged or
                point outside the folder; tensors missing, unexpected or of another shape, by name.
        """
        from minilora.loading import read_folder

        return read_folder(folder, dtype=dtype, device=device, transform=transform, kind="gpt2")

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding module."""
        return self.transformer.wte

    def _begin(self, ids: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, tuple]:
        return self.transformer.wte(ids) + self.transformer.wpe(positions.long()), ()

    def _blocks(self) -> Iterable[nn.Module]:
        return self.transformer.h

    def _end(self, x: torch.Tensor) -> torch.Tensor:
        return self.transformer.ln_f(x)


def stored_fqn(name: str) -> str | None:
    """Return the dotted name in a `GPT2` of a tensor in a checkpoint, None for a causal mask.

    OpenAI's own weights lack the leading `transformer.`; a name that is none of the architecture's
    stays as it is.
    """
    if _MASKS.fullmatch(name):
        return None
    return f"transformer.{name}" if name.startswith(_BODY) else name
