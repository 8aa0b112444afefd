"""The checked base of the families' configurations, read from and written to `config.json`."""

import dataclasses
import sys
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar, get_args

import torch

from minilora.files import short
from minilora.models.not_built import NotBuiltError
from minilora.models.rope import SCALINGS, Dynamic, Rope, Scaling, read_rope

MOST_BLOCKS, LARGEST = 1024, 2**30  # every number of a configuration has a limit
FULL, SLIDING = "full_attention", "sliding_attention"  # the `layer_types`
Neutral = dict[str, tuple[Any, ...]]
_NEUTRAL: Neutral = {
    "quantization_config": (None,),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
}
Config = TypeVar("Config", bound="ModelConfig")


@dataclass(frozen=True)
class ModelConfig:
    """The base of a family's frozen dataclass, whose fields are checked by name and type.

    An int must be above 0 (and has a limit), a float too; names ending in `_token_id` hold ids,
    names ending in `_pdrop` probabilities. Every family has `vocab_size`, `hidden_size`,
    `intermediate_size`, `num_hidden_layers`, `num_attention_heads`, `num_key_value_heads`,
    `head_dim`, `max_position_embeddings`, `tie_word_embeddings` and the three token ids.

    Attributes:
        model_type: what `config.json` calls the family.
        architecture: what it calls the family's causal language model.
        neutral: keys that change the maths when they have other values than these, by which
            the family would compute something else than the model's authors did.
        aliases: fields under another name in this family: transformers' common name to its own.
        left_out: fields that this family's `config.json` does not have.
        logit_cap: what no logit exceeds; None: nothing is capped.

    Raises:
        ValueError: a value of the wrong type or out of range, or values that contradict.
    """

    model_type: ClassVar[str]
    architecture: ClassVar[str]
    neutral: ClassVar[Neutral] = {}
    aliases: ClassVar[dict[str, str]] = {}
    left_out: ClassVar[tuple[str, ...]] = ()
    logit_cap: ClassVar[Any] = None

    def __post_init__(self) -> None:
        for each in fields(self):
            self._check(each.name, each.type, getattr(self, each.name))

    @classmethod
    def _check(cls, name: str, kind: Any, value: Any) -> None:
        is_number = type(value) in (int, float)
        wanted = None
        if name.endswith("_token_id"):
            ids = value if isinstance(value, list) and name == "eos_token_id" else [value]
            if not all(i is None or (type(i) is int and 0 <= i <= LARGEST) for i in ids):
                wanted = "a token id ≥ 0 or null"
        elif name.endswith("_pdrop"):
            if not (is_number and 0 <= value < 1):
                wanted = "a probability in [0, 1)"
        elif kind is bool:
            wanted = None if isinstance(value, bool) else "true or false"
        elif kind is float or (float in get_args(kind) and value is not None):
            if not (is_number and 0 < value <= sys.float_info.max):
                wanted = "a number above 0"
        elif kind is int or (int in get_args(kind) and value is not None):
            blocks = cls.aliases.get("num_hidden_layers", "num_hidden_layers")
            most = MOST_BLOCKS if name == blocks else LARGEST
            if type(value) is not int or not 0 < value <= most:
                large = type(value) is int and value > most
                wanted = f"at most {most:,}" if large else "an integer above 0"
        if wanted is not None:
            raise ValueError(f"{name} must be {wanted}, found {short(value)}; correct config.json")

    @property
    def context_length(self) -> int:
        """The longest sequence, in tokens."""
        return self.max_position_embeddings  # type: ignore[attr-defined]

    def replace(self: Config, **changes: Any) -> Config:
        """Return a copy with other values, given by transformers' common names."""
        own = {self.aliases.get(name, name): value for name, value in changes.items()}
        return dataclasses.replace(self, **own)

    @classmethod
    def from_dict(cls: type[Config], entries: dict[str, Any]) -> Config:
        """Read the entries of a `config.json` of transformers 4 or 5.

        Keys that don't touch the maths are passed over; defaults are those of transformers.

        Args:
            entries: the parsed JSON object; not changed.

        Returns:
            The validated configuration.

        Raises:
            ValueError: another family, an option that changes the maths and is not built (by
                name), or a value that is missing, mistyped, out of range or given twice and
                differing.
        """
        if not isinstance(entries, dict):
            raise ValueError(f"a model configuration must be an object, found {short(entries)}")
        if "model_type" not in entries:
            raise ValueError(
                f"config.json must name its model_type ({cls.model_type!r}), found none"
            )
        own: Neutral = {
            "model_type": (cls.model_type,),
            "architectures": (None, [cls.architecture]),
        }
        for key, neutral in (own | _NEUTRAL | cls.neutral).items():
            if key in entries and entries[key] not in neutral:
                raise NotBuiltError(
                    f"{key}={short(entries[key])} is not built: minilora's "
                    f"{cls.__name__.removesuffix('Config')} has only {key} = "
                    f"{' or '.join(repr(value) for value in neutral)}; use a model without it"
                )
        known = {each.name for each in fields(cls)} - set(cls.left_out)
        values = {key: value for key, value in entries.items() if key in known}
        for common, name in cls.aliases.items():
            if common in entries and values.setdefault(name, entries[common]) != entries[common]:
                raise ValueError(
                    f"{name} and {common} are one number and must agree, found "
                    f"{short(values[name])} and {short(entries[common])}; remove one of them"
                )
        return cls(**cls._completed(values, entries))

    @classmethod
    def _completed(cls, values: dict[str, Any], entries: dict[str, Any]) -> dict[str, Any]:
        """Return the fields' values with what follows from other entries of `config.json`."""
        return values

    def to_dict(self, dtype: torch.dtype | None = None) -> dict[str, Any]:
        """Return the entries of a `config.json` that transformers 4 and 5 load.

        Args:
            dtype: the dtype of the stored weights, written as `dtype` and `torch_dtype`; left out
                when None.

        Returns:
            A fresh dict of JSON values.
        """
        entries = {"architectures": [self.architecture], "model_type": self.model_type}
        entries |= self._entries()
        if dtype is not None:
            entries["dtype"] = entries["torch_dtype"] = str(dtype).removeprefix("torch.")
        return entries

    def _entries(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if name not in self.left_out}


@dataclass(frozen=True)
class DecoderConfig(ModelConfig):
    """The numbers of a decoder with rotary embeddings, RMS norms and a gated MLP.

    Every name is Hugging Face's; a family is a subclass. One that has windows says so in its own
    `left_out`, without `sliding_window`, and without `layer_types` where layers differ.

    Args:
        vocab_size: rows of the embedding and of the output head.
        hidden_size: width of the residual stream.
        intermediate_size: width inside the MLP.
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
        bos_token_id, pad_token_id: beginning of sequence, padding; or None.
        eos_token_id: end of sequence: one id, several, or None.
        sliding_window: tokens that a token sees in a sliding layer, itself among them; None: no
            layer is sliding.
        layer_types: per layer `"full_attention"` or `"sliding_attention"`; None: all sliding where
            `sliding_window` is set.
        rope_scaling: how rotary frequencies differ from the plain ones; None: not at all.

    Attributes:
        rope_types: classes of `rope_scaling` that the family has, by config.json's names.
        window_switch: whether windows are off unless `use_sliding_window` is true.
        defaults: what missing keys of `config.json` mean, where not what the fields' defaults say.
        attention_scale: what a query times a key is multiplied by.
        attention_cap: what no attention score exceeds; None: nothing is capped.
        qkv_bias: whether q, k and v have biases.
        rotary_dim: how many numbers of a head are rotated.
    """

    window_switch: ClassVar[bool] = False
    rope_types: ClassVar[dict[str, type[Scaling]]] = SCALINGS
    defaults: ClassVar[dict[str, Any]] = {}
    attention_cap: ClassVar[Any] = None
    left_out: ClassVar[tuple[str, ...]] = ("sliding_window", "layer_types")
    neutral: ClassVar = {
        "hidden_act": (None, "silu", "swish"),  # two names of one function
        "rope_interleaved": (None, False),
        "attention_dropout": (None, 0, 0.0),
    }

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
    sliding_window: int | None = None
    layer_types: tuple[str, ...] | None = None
    rope_scaling: Scaling | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_types()
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
        if self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim:
            raise ValueError(
                f"head_dim must be even (rotary embeddings turn pairs), or the part of it that is "
                f"rotated, found {self.rotary_dim} of {self.head_dim}; correct config.json"
            )
        if not isinstance(self.rope_scaling, Scaling | None):
            raise ValueError(
                f"rope_scaling must be a Scaling of minilora.models or None, found "
                f"{short(self.rope_scaling)}; from_dict reads config.json's objects"
            )
        if self.rope_scaling is not None:
            self.rope_scaling.check(self.rope)

    def _check_types(self) -> None:
        types = self.layer_types
        if types is None:
            return
        if len(types) != self.num_hidden_layers or not {*types} <= {FULL, SLIDING}:
            raise ValueError(
                f"layer_types must name {FULL!r} or {SLIDING!r} for each of "
                f"{self.num_hidden_layers} layers, found {short(list(types))}; correct config.json"
            )
        if SLIDING in types and self.sliding_window is None:
            raise ValueError(
                f"sliding_window must be set where layer_types has {SLIDING!r}, found none; "
                f"correct config.json"
            )

    norm_eps = property(lambda self: self.rms_norm_eps)
    attention_scale = property(lambda self: self.head_dim**-0.5)
    qkv_bias = property(lambda self: self.attention_bias)
    rotary_dim = property(lambda self: self.head_dim)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Per layer how many tokens a token sees, itself among them; None: all before it."""
        types = self.layer_types or (SLIDING,) * self.num_hidden_layers
        return tuple(self.sliding_window if each == SLIDING else None for each in types)

    @property
    def rope(self) -> Rope:
        """How queries and keys are rotated, in most layers."""
        context = self.max_position_embeddings
        return Rope(self.rotary_dim, self.rope_theta, self.rope_scaling, context)

    @property
    def ropes(self) -> tuple[Rope | None, ...]:
        """Per layer how queries and keys are rotated; None: not at all."""
        return (self.rope,) * self.num_hidden_layers

    @property
    def context_length(self) -> int:
        """The longest sequence, in tokens: with the dynamic rope, `factor` times the usual one."""
        scaling = self.rope_scaling
        factor = scaling.factor if isinstance(scaling, Dynamic) else 1
        return int(self.max_position_embeddings * factor)

    @classmethod
    def _completed(cls, values: dict[str, Any], entries: dict[str, Any]) -> dict[str, Any]:
        values = {**cls.defaults, **values}
        for key in ("vocab_size", "hidden_size", "intermediate_size"):
            if key not in values:
                raise ValueError(f"{key} must stand in config.json, found no such entry")
        values.setdefault("num_hidden_layers", 32)
        values = cls._with_windows(values, entries)
        heads = values.setdefault("num_attention_heads", 32)
        if values.get("num_key_value_heads") is None:
            values["num_key_value_heads"] = heads
        context = values.setdefault("max_position_embeddings", cls.max_position_embeddings)
        rope = read_rope(entries, context, cls.rope_types)
        known = {each.name for each in fields(cls)}
        if rope.get("partial_rotary_factor", 1) != 1 and "partial_rotary_factor" not in known:
            found = short(rope["partial_rotary_factor"])
            raise NotBuiltError(
                f"partial_rotary_factor={found} is not built: heads are rotated whole"
            )
        values |= {key: value for key, value in rope.items() if key in known}
        if values.get("head_dim") is None:
            cls._check("hidden_size", int, values["hidden_size"])
            cls._check("num_attention_heads", int, heads)
            if values["hidden_size"] % heads:
                raise ValueError(
                    f"num_attention_heads must divide hidden_size where head_dim is not given, "
                    f"found {heads} and {values['hidden_size']}; correct config.json"
                )
            values["head_dim"] = values["hidden_size"] // heads
        switches = ("attention_bias", "mlp_bias", "tie_word_embeddings")
        return values | {key: False for key in switches if values.get(key) is None}

    @classmethod
    def _with_windows(cls, values: dict[str, Any], entries: dict[str, Any]) -> dict[str, Any]:
        """Read `layer_types`, or make them from what the family's older keys say."""
        switch = entries.get("use_sliding_window")
        if switch is not None and not isinstance(switch, bool):
            raise ValueError(f"use_sliding_window must be true or false, found {short(switch)}")
        if switch and not cls.window_switch:
            raise NotBuiltError(
                "use_sliding_window=True is not built: the family has no such switch"
            )
        if cls.window_switch and not switch:
            values["sliding_window"] = None
        types, window = entries.get("layer_types"), values.get("sliding_window")
        cls._check("sliding_window", int | None, window)
        if entries.get("sliding_window") is not None and "sliding_window" in cls.left_out:
            found = short(entries["sliding_window"])
            raise NotBuiltError(f"sliding_window={found} is not built: the family has no windows")
        if not (types is None or (isinstance(types, list) and {*map(type, types)} <= {str})):
            raise ValueError(f"layer_types must be a list of names or null, found {short(types)}")
        if "layer_types" in cls.left_out:
            only = FULL if window is None else SLIDING
            if {*(types or ())} - {only}:
                raise NotBuiltError(
                    f"layer_types={short(types)} is not built: every layer must be {only!r}"
                )
            return values
        if types is None and window is not None:
            cls._check("num_hidden_layers", int, values["num_hidden_layers"])
            types = cls._older_types(values, entries)
        if types is None or SLIDING not in types:
            return values | {"layer_types": None, "sliding_window": None}
        return values | {"layer_types": tuple(types)}

    @classmethod
    def _older_types(cls, values: dict[str, Any], entries: dict[str, Any]) -> list[str]:
        """Return the `layer_types` where there are none, by default Qwen's rule."""
        first = entries.get("max_window_layers", 28)
        if type(first) is not int or first < 0:
            raise ValueError(f"max_window_layers must be an integer ≥ 0, found {short(first)}")
        return [SLIDING if i >= first else FULL for i in range(values["num_hidden_layers"])]

    def _entries(self) -> dict[str, Any]:
        rope: dict[str, Any] = {"rope_theta": self.rope_theta, "rope_type": "default"}
        entries = {"hidden_act": "silu", **super()._entries(), "rope_parameters": rope}
        del entries["rope_scaling"]
        if self.rope_scaling is not None:
            entries["rope_scaling"] = self.rope_scaling.entries()
            rope |= entries["rope_scaling"]
        if "layer_types" in entries:
            entries["layer_types"] = [FULL if w is None else SLIDING for w in self.windows]
        if self.window_switch:
            entries["use_sliding_window"] = self.sliding_window is not None
        return entries
