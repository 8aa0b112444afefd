"""The shape of a GPT-2 model, read from and written to Hugging Face's `config.json`."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from minilora.files import short
from minilora.models.llama_config import LlamaConfig

_tanh_gelu = partial(F.gelu, approximate="tanh")

# `activation_function`: several names of one formula are transformers' (its activations.py).
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
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
# The names that every model has in transformers, which a config.json may use as well.
_ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
# Options that change the maths and are not built: a key, and the values that change nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "model_type": ("gpt2",),
    "architectures": (None, ["GPT2LMHeadModel"]),
    "reorder_and_upcast_attn": (None, False),
    "add_cross_attention": (None, False),
    "is_encoder_decoder": (None, False),
    "quantization_config": (None,),
    "pruned_heads": (None, {}),
}


@dataclass(frozen=True)
class GPT2Config:
    """Hold the numbers that define a GPT-2 model; names and defaults are Hugging Face's.

    The names that `LlamaConfig` has for the same numbers (`hidden_size`, `num_hidden_layers`, …)
    can be read too.

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
        resid_pdrop: kept to be written back: `GPT2` applies no dropout.
        embd_pdrop: as `resid_pdrop`.
        attn_pdrop: as `resid_pdrop`.
        bos_token_id: beginning of sequence, or None.
        eos_token_id: end of sequence: one id, several, or None.
        pad_token_id: padding, or None.

    Raises:
        ValueError: a value of the wrong type or out of range, or values that contradict.
    """

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

    def __post_init__(self) -> None:
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            if name == "activation_function":
                if not isinstance(value, str) or value not in ACTIVATIONS:
                    raise ValueError(
                        f"{name}={short(value)} is not built: it must be one of "
                        f"{', '.join(ACTIVATIONS)}; use a model with one of them"
                    )
            elif name.endswith("_pdrop"):
                if type(value) not in (int, float) or not 0 <= value < 1:
                    raise ValueError(
                        f"{name} must be a probability in [0, 1), found {short(value)}; correct "
                        f"config.json"
                    )
            elif name == "n_inner":
                if value is not None:
                    LlamaConfig._check(name, int, value)
            else:
                LlamaConfig._check(name, field.type, value)
        if self.n_embd % self.n_head:
            raise ValueError(
                f"n_head must divide n_embd, found {self.n_head} and {self.n_embd}; correct "
                f"config.json"
            )

    @property
    def hidden_size(self) -> int:
        """`n_embd`."""
        return self.n_embd

    @property
    def intermediate_size(self) -> int:
        """Width inside the MLP."""
        return 4 * self.n_embd if self.n_inner is None else self.n_inner

    @property
    def num_hidden_layers(self) -> int:
        """`n_layer`."""
        return self.n_layer

    @property
    def num_attention_heads(self) -> int:
        """`n_head`."""
        return self.n_head

    @property
    def num_key_value_heads(self) -> int:
        """`n_head`: every head has keys and values of its own."""
        return self.n_head

    @property
    def head_dim(self) -> int:
        """Width of one head, `n_embd / n_head`."""
        return self.n_embd // self.n_head

    @property
    def max_position_embeddings(self) -> int:
        """`n_positions`."""
        return self.n_positions

    @classmethod
    def from_dict(cls, entries: dict[str, Any]) -> "GPT2Config":
        """Read the entries of a `config.json` of transformers 4 or 5.

        Keys that don't touch the maths are passed over; defaults are those of transformers'
        `GPT2Config`.

        Args:
            entries: the parsed JSON object; not changed.

        Returns:
            The validated configuration.

        Raises:
            ValueError: not a GPT-2, an option that changes the maths and is not built (by name),
                or a value that is mistyped, out of range or given twice and differing.
        """
        if not isinstance(entries, dict):
            raise ValueError(f"a model configuration must be an object, found {short(entries)}")
        if "model_type" not in entries:
            raise ValueError("config.json must name its model_type ('gpt2'), found none")
        for key, neutral in _NEUTRAL.items():
            if key in entries and entries[key] not in neutral:
                raise ValueError(
                    f"{key}={short(entries[key])} is not built: minilora's GPT2 has only {key} = "
                    f"{' or '.join(repr(value) for value in neutral)}; use a model without it"
                )
        known = {field.name for field in fields(cls)}
        values = {key: value for key, value in entries.items() if key in known}
        for alias, name in _ALIASES.items():
            if alias in entries and values.setdefault(name, entries[alias]) != entries[alias]:
                raise ValueError(
                    f"{name} and {alias} are one number and must agree, found "
                    f"{short(values[name])} and {short(entries[alias])}; remove one of them"
                )
        return cls(**values)

    def to_dict(self, dtype: torch.dtype | None = None) -> dict[str, Any]:
        """Return the entries of a `config.json` that transformers 4 and 5 load.

        Args:
            dtype: the dtype of the stored weights, written as `dtype` and `torch_dtype`; left out
                when None.

        Returns:
            A fresh dict of JSON values.
        """
        entries: dict[str, Any] = {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            **asdict(self),
        }
        if dtype is not None:
            entries["dtype"] = entries["torch_dtype"] = str(dtype).removeprefix("torch.")
        return entries
