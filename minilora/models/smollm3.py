"""SmolLM3: the numbers of Hugging Face's `SmolLM3ForCausalLM`.

A Llama whose every fourth layer doesn't rotate queries and keys (Yang et al. 2025, "Rope to Nope
and Back Again", arXiv:2501.18795). With `use_sliding_window` those layers have a window.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from minilora.files import short
from minilora.models.causal import CausalLM
from minilora.models.config import FULL, SLIDING, DecoderConfig
from minilora.models.gguf_names import DECODER_NAMES, Entries
from minilora.models.llama import Llama
from minilora.models.rope import Rope


def _rotated(count: int, given: Sequence[int] | None, interval: int) -> list[int]:
    return [n % interval for n in range(1, count + 1)] if given is None else [*given][:count]


@dataclass(frozen=True)
class SmolLM3Config(DecoderConfig):
    """Hold the numbers that define a SmolLM3 model; names and defaults are Hugging Face's.

    Args:
        no_rope_layers: per layer 1 where queries and keys are rotated, else 0; None: 0 in every
            `no_rope_layer_interval`-th layer.
        no_rope_layer_interval: read only where there is no list. The other fields are
            `DecoderConfig`'s.
    """

    model_type = "smollm3"
    architecture = "SmolLM3ForCausalLM"
    left_out = ()
    defaults: ClassVar = {
        "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 4,
        "tie_word_embeddings": True,
    }  # fmt: skip
    window_switch = True

    max_position_embeddings: int = 32768
    rope_theta: float = 2000000.0
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 128000
    eos_token_id: int | list[int] | None = 128001
    pad_token_id: int | None = 128004
    no_rope_layers: tuple[int, ...] | None = None
    no_rope_layer_interval: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        layers = self.no_rope_layers
        few = layers is not None and len(layers) < self.num_hidden_layers
        if few or not {*(layers or ())} <= {0, 1}:
            raise ValueError(
                f"no_rope_layers must hold 0 or 1 for each of {self.num_hidden_layers} layers, "
                f"found {short(layers)}; correct config.json"
            )

    @property
    def ropes(self) -> tuple[Rope | None, ...]:
        """Per layer how queries and keys are rotated; None: not at all."""
        args = self.num_hidden_layers, self.no_rope_layers, self.no_rope_layer_interval
        return tuple(self.rope if rotated else None for rotated in _rotated(*args))

    @classmethod
    def _completed(cls, values: dict[str, Any], entries: dict[str, Any]) -> dict[str, Any]:
        layers = values.get("no_rope_layers")
        if layers is not None:
            if not isinstance(layers, list) or {*map(type, layers)} - {int}:
                raise ValueError(f"no_rope_layers must be a list or null, found {short(layers)}")
            values["no_rope_layers"] = tuple(layers)
        return super()._completed(values, entries)

    @classmethod
    def _older_types(cls, values: dict[str, Any], entries: dict[str, Any]) -> list[str]:
        interval = values.get("no_rope_layer_interval", 4)
        cls._check("no_rope_layer_interval", int, interval)
        layers = _rotated(values["num_hidden_layers"], values.get("no_rope_layers"), interval)
        return [FULL if rotated else SLIDING for rotated in layers]

    def _entries(self) -> dict[str, Any]:
        rotated = [int(rope is not None) for rope in self.ropes]
        return super()._entries() | {"no_rope_layers": rotated}


def _every_fourth(entries: Entries) -> Entries:
    """Leave every fourth layer unrotated, as llama.cpp does, and all without windows."""
    return entries | {"no_rope_layers": None, "no_rope_layer_interval": 4, "sliding_window": None}


class SmolLM3(CausalLM):
    """Compute next-token logits as Hugging Face's `SmolLM3ForCausalLM` does; see `CausalLM`."""

    config_class = SmolLM3Config
    gguf = Llama.gguf._replace(
        architecture="smollm3", completed=_every_fourth, ropes=DECODER_NAMES.ropes
    )
