"""The shape of a Llama model, read from and written to Hugging Face's `config.json`."""

import sys
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from minilora.files import one_line, short

MOST_BLOCKS, LARGEST = 1024, 2**30  # of a configuration: every number has a limit
# Options that change the maths and are not built: a key, and the values that change nothing.
# `Llama` would compute something else than the model's authors did, so other values are refused.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "model_type": ("llama",),
    "architectures": (None, ["LlamaForCausalLM"]),
    "hidden_act": (None, "silu", "swish"),  # two names of one function
    "pretraining_tp": (None, 1),
    "quantization_config": (None,),
    "sliding_window": (None,),
    "use_sliding_window": (None, False),
    "partial_rotary_factor": (None, 1, 1.0),
    "rope_interleaved": (None, False),
    "attention_dropout": (None, 0, 0.0),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
}
_NEUTRAL_ROPE = {"rope_type": ("default",), "type": ("default",), "partial_rotary_factor": (1, 1.0)}


@dataclass(frozen=True)
class LlamaConfig:
    """Hold the numbers that define a Llama model; every name is Hugging Face's.

    Args:
        vocab_size: rows of the embedding and of the output head.
        hidden_size: width of the residual stream.
        intermediate_size: width inside the SwiGLU block.
        num_hidden_layers: decoder layers.
        num_attention_heads: query heads.
        num_key_value_heads: key and value heads; divides `num_attention_heads`.
        head_dim: width of one head, even.
        max_position_embeddings: longest sequence, in tokens.
        rms_norm_eps: added to the mean square in RMSNorm.
        rope_theta: base of the rotary frequencies.
        tie_word_embeddings: whether the head is the embedding matrix.
        attention_bias: whether q, k, v and o have biases.
        mlp_bias: whether gate, up and down have biases.
        bos_token_id: beginning of sequence, or None.
        eos_token_id: end of sequence: one id, several, or None.
        pad_token_id: padding, or None.

    Raises:
        ValueError: a number of the wrong type or out of range, or numbers that contradict.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            self._check(field.name, field.type, getattr(self, field.name))
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads must divide num_attention_heads, found "
                f"{self.num_key_value_heads} and {self.num_attention_heads}; correct config.json"
            )
        if self.num_attention_heads * self.head_dim > LARGEST:
            raise ValueError(
                f"num_attention_heads · head_dim must be at most {LARGEST:,}, found "
                f"{self.num_attention_heads} · {self.head_dim}; correct config.json"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim must be even (rotary embeddings turn pairs), found {self.head_dim}"
            )

    @staticmethod
    def _check(name: str, kind: Any, value: Any) -> None:
        is_int = isinstance(value, int) and not isinstance(value, bool)
        if name.endswith("_token_id"):
            ids = value if isinstance(value, list) and name == "eos_token_id" else [value]
            good = all(i is None or (type(i) is int and 0 <= i <= LARGEST) for i in ids)
            wanted = "a token id ≥ 0 or null"
        elif kind is bool:
            good, wanted = isinstance(value, bool), "true or false"
        elif kind is int:
            most = MOST_BLOCKS if name in ("num_hidden_layers", "n_layer") else LARGEST
            good = is_int and 0 < value <= most
            wanted = f"at most {most:,}" if is_int and value > most else "an integer above 0"
        else:
            good = (is_int or isinstance(value, float)) and 0 < value <= sys.float_info.max
            wanted = "a number above 0"
        if not good:
            raise ValueError(f"{name} must be {wanted}, found {short(value)}; correct config.json")

    @classmethod
    def from_dict(cls, entries: dict[str, Any]) -> "LlamaConfig":
        """Read the entries of a `config.json` of transformers 4 or 5.

        Keys that don't touch the maths are passed over; defaults are those of transformers'
        `LlamaConfig`.

        Args:
            entries: the parsed JSON object; not changed.

        Returns:
            The validated configuration.

        Raises:
            ValueError: not a Llama, an option that changes the maths and is not built (by name),
                or a value that is missing, mistyped or out of range.
        """
        if not isinstance(entries, dict):
            raise ValueError(f"a model configuration must be an object, found {short(entries)}")
        if "model_type" not in entries:
            raise ValueError("config.json must name its model_type ('llama'), found none")
        _refuse_other_maths(entries)
        known = {field.name for field in fields(cls)}
        values = {key: value for key, value in entries.items() if key in known}
        for key in ("vocab_size", "hidden_size", "intermediate_size"):
            if key not in values:
                raise ValueError(f"{key} must stand in config.json, found no such entry")
        values.setdefault("num_hidden_layers", 32)
        heads = values.setdefault("num_attention_heads", 32)
        if values.get("num_key_value_heads") is None:
            values["num_key_value_heads"] = heads
        values["rope_theta"] = _rope_theta(entries)
        if values.get("head_dim") is None:
            cls._check("hidden_size", int, values["hidden_size"])
            cls._check("num_attention_heads", int, heads)
            if values["hidden_size"] % heads:
                raise ValueError(
                    f"num_attention_heads must divide hidden_size where head_dim is not given, "
                    f"found {heads} and {values['hidden_size']}; correct config.json"
                )
            values["head_dim"] = values["hidden_size"] // heads
        for key in ("attention_bias", "mlp_bias", "tie_word_embeddings"):
            if values.get(key) is None:
                values[key] = False
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
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            **asdict(self),
            "rope_parameters": {"rope_theta": self.rope_theta, "rope_type": "default"},
        }
        if dtype is not None:
            entries["dtype"] = entries["torch_dtype"] = str(dtype).removeprefix("torch.")
        return entries


def _refuse_other_maths(entries: dict[str, Any]) -> None:
    for key, neutral in _NEUTRAL.items():
        if key in entries and entries[key] not in neutral:
            raise ValueError(
                f"{key}={short(entries[key])} is not built: minilora's Llama has only {key} = "
                f"{' or '.join(repr(value) for value in neutral)}; use a model without it"
            )
    layer_types = entries.get("layer_types") or []
    other = layer_types
    if isinstance(layer_types, list):
        other = [kind for kind in layer_types if kind != "full_attention"]
    if other:
        raise ValueError(
            f"layer_types={short(other)} is not built: every layer must be 'full_attention'"
        )


def _rope_theta(entries: dict[str, Any]) -> Any:
    """The rotary base, from transformers 5's `rope_parameters` or transformers 4's two keys."""
    for key in ("rope_parameters", "rope_scaling"):
        rope = entries.get(key)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            raise ValueError(f"{key} must be an object or null, found {short(rope)}")
        for name, value in rope.items():
            if name != "rope_theta" and value not in _NEUTRAL_ROPE.get(name, (None,)):
                raise ValueError(
                    f"{key}: {one_line(name, 80)}={short(value)} is not built: only the default "
                    f"rotary embedding without scaling is; use a model without it"
                )
        if rope.get("rope_theta") is not None:
            return rope["rope_theta"]
    theta = entries.get("rope_theta")
    return 10000.0 if theta is None else theta
